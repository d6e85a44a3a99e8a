"""The log of rows: a state that is taken back has the bits of one that was never ahead, and no token comes twice."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from adapter_files import lora_pairs, write_lora
from answers_together import answers_together
from speculation_trials import guess
from tiny_models import write_tiny_model

import edgellm
from edgellm.engine.scheduler import Scheduler
from edgellm.formats.gguf import GGUFFile
from edgellm.kernels import executors
from edgellm.kernels.kv import StateLayer
from edgellm.kernels.program import Batch, LoggingExecutor, Program
from edgellm.kernels.row_log import LOG_ROWS, with_log
from edgellm.models import build_program

RECURRENT = (
    "lfm2", "lfm2moe", "qwen35", "qwen35moe", "qwen3next", "mamba2", "granitehybrid", "falcon-h1", "nemotron_h",
    "nemotron_h_moe",
)  # fmt: skip
EXECUTORS = ("cpu", "reference")
TEXTS = [np.random.default_rng(i).integers(3, 250, 60).astype(np.int32) for i in range(3)]
PROMPTS, TRIED, RIGHT = (33, 1, 20), (5, 4, 7), (2, 4, 6)  # tokens: before, of the step, and of those the right ones
N_SPARE = 6  # the first slot that no sequence has


@pytest.fixture(params=RECURRENT)
def path(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return write_tiny_model(tmp_path / "model.gguf", request.param, n_layer=4)


def step(
    program: Program, rows: Sequence[int], starts: Sequence[int], counts: Sequence[int], slots: Any, **more: Any
) -> Batch:
    """So many tokens of some texts, of which each has its blocks; ``slots`` are what each reads and writes."""
    n = sum(counts)
    blocks = 3 * np.arange(len(TEXTS))[list(rows), None] + np.arange(3)
    tables = [np.array(slots, np.int32) if g.kind == "state" else blocks.astype(np.int32) for g in program.groups]
    return Batch(
        tokens=np.concatenate([TEXTS[row][a : a + k] for row, a, k in zip(rows, starts, counts, strict=True)]),
        positions=np.concatenate([np.arange(a, a + k, dtype=np.int32) for a, k in zip(starts, counts, strict=True)]),
        sequences=np.repeat(np.arange(len(rows), dtype=np.int32), counts),
        outputs=np.ones(n, bool),
        tables=tuple(tables),
        **more,
    )


def states(executor: Any, slot: int) -> list[np.ndarray]:
    """What every layer has in a slot."""
    layers = zip(executor.program.cache_layers, executor.pool.arrays, strict=True)
    return [arrays[0][slot].copy() for layer, arrays in layers if isinstance(layer, StateLayer)]


def is_same(executor: Any, found: Sequence[np.ndarray], expected: Sequence[np.ndarray]) -> bool:
    """To the bit, but for the reference, whose products sum in another order in another batch."""
    alike = np.array_equal if executor.backend == "CPU" else partial(np.allclose, atol=1e-4)
    return all(map(alike, found, expected))


@pytest.fixture(params=EXECUTORS)
def executor(path: Path, request: pytest.FixtureRequest) -> Iterator[Any]:
    with GGUFFile.open(path) as gguf:
        opened = executors.open_executor(request.param, with_log(build_program(gguf)), 12, n_threads=2, max_tokens=64)
        yield opened
        opened.close()


def test_states_that_are_taken_back_are_those_of_the_tokens_that_stand(executor: Any) -> None:
    assert isinstance(executor, LoggingExecutor) and executor.program.log_rows == LOG_ROWS
    program, rows = executor.program, range(3)
    executor.run(step(program, rows, [0] * 3, PROMPTS, [[-1, row] for row in rows]))
    tried = step(program, rows, PROMPTS, TRIED, [[row, 3 + row] for row in rows], logged=True)
    logits = executor.run(tried).copy()
    ahead = states(executor, 4)
    executor.replay(tried, [RIGHT[0], 0, RIGHT[2]])  # of the second all are right
    for row in rows:
        read, written = row, N_SPARE
        for i in range(RIGHT[row]):
            plain = executor.run(step(program, [row], [PROMPTS[row] + i], [1], [[read, written]]))
            assert is_same(executor, [plain[0]], [logits[sum(TRIED[:row]) + i]])
            read, written = written, N_SPARE + (written == N_SPARE)
        assert is_same(executor, states(executor, 3 + row), states(executor, read))
    assert all(map(np.array_equal, states(executor, 4), ahead))


def test_a_text_can_be_taken_back_to_its_first_token_and_a_step_that_is_not_logged_leaves_the_same(
    executor: Any,
) -> None:
    program, first = executor.program, [[-1, 0]]
    executor.run(tried := step(program, [0], [0], [9], first, logged=True))
    whole = states(executor, 0)
    executor.replay(tried, [9])
    assert all(map(np.array_equal, states(executor, 0), whole))
    executor.replay(tried, [1])
    one = states(executor, 0)
    executor.run(step(program, [0], [0], [1], first))
    assert is_same(executor, states(executor, 0), one)
    executor.run(step(program, [0], [0], [9], first))
    assert all(map(np.array_equal, states(executor, 0), whole))


def test_a_program_without_states_and_one_that_is_not_to_log_have_no_log(path: Path, tmp_path: Path) -> None:
    from edgellm.kernels.cpu.run.executor import CPUExecutor

    with GGUFFile.open(write_tiny_model(tmp_path / "llama.gguf")) as gguf:
        plain = build_program(gguf)
        assert with_log(plain) is plain
    with GGUFFile.open(path) as gguf:
        program = build_program(gguf)
        more = CPUExecutor.work_nbytes(with_log(program), 64, 1) - CPUExecutor.work_nbytes(program, 64, 1)
        assert not program.log_rows and more > 0  # what it takes is in the plan
    for speculate in (None, "ngram"):
        with edgellm.load(path, n_ctx=64, speculate=speculate) as llm:
            assert (llm.engine._logging is not None) == (speculate is not None)


WAYS = {"greedy": {"temperature": 0}, "sampled": {"temperature": 0.9, "seed": 5}}


@pytest.mark.parametrize(("name", "way"), [("cpu", "greedy"), ("cpu", "sampled"), ("reference", "greedy")])
def test_no_token_is_computed_again_behind_a_draft_that_was_wrong(
    path: Path, name: str, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    known, schedule = list[int](), Scheduler.schedule

    def seen(self: Scheduler, *given: Any) -> Any:
        parts = schedule(self, *given)
        known.extend(len(part.tokens) - part.n_drafted for part in parts if part.request.generated)
        return parts

    prompts, ask = [TEXTS[i][: 20 + i].tolist() for i in range(2)], WAYS[way] | {"max_tokens": 20, "ignore_eos": True}
    load = partial(edgellm.load, path, executor=name, n_threads=1, n_ctx=128, n_parallel=2)
    forced = ask | {"regex": "[a-z ]{12,20}"}
    with load() as llm:
        expected = answers_together(llm, prompts, ask)
        under_grammar = llm.generate(prompts[0], **forced).tokens
    with load(speculate="ngram") as llm:
        texts = [[*p, *answer] for p, answer in zip([*prompts, prompts[0]], [*expected, under_grammar], strict=True)]
        oracle = guess(llm, texts)
        monkeypatch.setattr(Scheduler, "schedule", seen)
        assert answers_together(llm, prompts, ask) == expected
        assert oracle.n_drafted > 10 and set(known) == {1}
        stream = llm.stream(prompts[1], **ask)  # a caller that leaves
        next(stream)
        stream.close()
        assert llm.generate(prompts[0], **forced).tokens == under_grammar
        llm.engine.call(lambda cache, executor: cache.check([]))


def test_answers_with_an_adapter_are_taken_back_with_it(tmp_path: Path) -> None:
    path = write_tiny_model(tmp_path / "model.gguf", "qwen35", n_layer=4)
    pairs = lora_pairs(path, ("attn_qkv.weight", "ffn_down.weight"), size=0.4)
    lora = write_lora(tmp_path / "one.gguf", pairs, "qwen35")
    prompt, ask = TEXTS[0][:20].tolist(), {"max_tokens": 24, "ignore_eos": True, "temperature": 0}
    with edgellm.load(path, n_ctx=128, lora=lora, n_threads=1) as llm:
        plain = llm.generate(prompt, **ask)
    with edgellm.load(path, n_ctx=128, lora=lora, n_threads=1, speculate="ngram") as llm:
        guess(llm, [[*prompt, *plain.tokens]])
        answer = llm.generate(prompt, **ask)
    assert answer.tokens == plain.tokens and 0 < answer.timings.accepted_n < answer.timings.drafted_n
