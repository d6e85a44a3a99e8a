"""Blocks of a file that draft the token after the next: what they compute, and that no answer is another with them."""

from __future__ import annotations

import random
import threading
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from answers_together import begun_together
from speculation_trials import free_drafts
from tiny_models import HYBRIDS, write_tiny_model

import edgellm
from edgellm.engine.cache import KVCache, pool_blocks
from edgellm.engine.nextn_drafts import NextnDrafter, NextnDrafts
from edgellm.engine.speculation import Ask, Draft, TapSource
from edgellm.formats.gguf import GGUFFile
from edgellm.kernels import executors
from edgellm.kernels.ops import SelectOutputs
from edgellm.kernels.program import Batch, HiddenExecutor
from edgellm.kernels.reference import ReferenceExecutor
from edgellm.models import build_nextn_program, build_program

ARCHITECTURES = ("qwen35", "qwen35moe", "qwen3next", "glm4moe")
N_EMBD = 64
SIZES: dict[str, Any] = {"n_embd": N_EMBD, "n_ff": 64, "n_head": 4, "n_head_kv": 2, "head_dim": 16}
PROMPT = [11, 12, 13, 14, 15] * 6 + [20, 21]


def nextn_tensors(blk: int) -> dict[str, np.ndarray]:
    """What such a block has beside a layer."""
    rng = np.random.default_rng(7)
    norms = {name: 1 + 0.1 * rng.standard_normal(N_EMBD) for name in ("enorm", "hnorm", "shared_head_norm")}
    found = norms | {"eh_proj": rng.standard_normal((N_EMBD, 2 * N_EMBD)) / N_EMBD**0.5}
    return {f"blk.{blk}.nextn.{name}.weight": array.astype(np.float32) for name, array in found.items()}


def write(path: Path, architecture: str, quant: str = "F32") -> Path:
    """Four layers, the last of which drafts; the second is of its kind."""
    keys = {"nextn_predict_layers": 1} | ({"full_attention_interval": 2} if architecture in HYBRIDS else {})
    metadata = {f"{architecture}.{key}": value for key, value in keys.items()}
    tensors = nextn_tensors(3)
    return write_tiny_model(path, architecture, quant, n_layer=4, metadata=metadata, extra_tensors=tensors, **SIZES)


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {name: write(folder / f"{name}.gguf", name) for name in ARCHITECTURES}


def normed(x: np.ndarray, weight: np.ndarray, eps: float = 1e-5) -> np.ndarray:
    return x / np.sqrt((x.astype(np.float64) ** 2).mean(-1, keepdims=True) + eps) * weight


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_block_is_a_layer_behind_the_two_normed_inputs(paths: dict[str, Path], architecture: str) -> None:
    """The judge is the model itself, its last layer and norm in the block's place, given the inputs from outside."""
    rng = np.random.default_rng(1)
    tokens, states = rng.integers(0, 200, 12), rng.standard_normal((12, N_EMBD)).astype(np.float32)
    with GGUFFile.open(paths[architecture]) as gguf:
        block, model = build_nextn_program(gguf), build_program(gguf)
        of = {name.removeprefix("blk.3.nextn."): t.dequantize().reshape(t.shape) for name, t in gguf.tensors.items()}
        both = normed(of["token_embd.weight"][tokens], of["enorm.weight"]), normed(states, of["hnorm.weight"])
        x = (np.concatenate(both, axis=1) @ of["eh_proj.weight"].T).astype(np.float32)
        for name in [name for name in model.tensors if name.startswith("blk.1.")]:
            other = gguf.tensors[name.replace("blk.1.", "blk.3.")]
            model.tensors[name] = replace(other, shape=model.tensors[name].shape)
        model.tensors["output_norm.weight"] = gguf.tensors["blk.3.nextn.shared_head_norm.weight"]
        first, end = (next(i for i, op in enumerate(model.ops) if f"blk.{blk}." in str(op)) for blk in (1, 2))
        head = next(i for i, op in enumerate(model.ops) if isinstance(op, SelectOutputs))
        layer = replace(model, ops=(model.ops[0], *model.ops[first:end], *model.ops[head:]))
        batch = Batch.single(layer, tokens)
        expected = ReferenceExecutor(layer, 4).run(replace(batch, embeddings=(np.arange(12), x)))
        batch = replace(Batch.single(block, tokens), embeddings=(np.arange(12), states))
        executor = ReferenceExecutor(block, 4)
        np.testing.assert_allclose(executor.run(batch), expected, atol=2e-5)
        assert executor.last_hidden().shape == (12, N_EMBD)


def test_a_file_or_an_architecture_without_such_a_block_is_refused_by_name(tmp_path: Path) -> None:
    for architecture in ("llama", "qwen35"):
        path = write_tiny_model(tmp_path / f"{architecture}.gguf", architecture, **SIZES)
        with pytest.raises(edgellm.UnsupportedError, match="draft") as caught:
            edgellm.load(path, speculate="mtp")
        assert caught.value.code == "NO_NEXTN"


def test_a_draft_goes_on_from_hidden_states_read_in_pieces(paths: dict[str, Path]) -> None:
    with GGUFFile.open(paths["qwen35"]) as gguf:
        model, block = build_program(gguf), build_nextn_program(gguf)
        text = [int(token) for token in np.random.default_rng(2).integers(0, 200, 24)]
        runner = ReferenceExecutor(model, 4)
        runner.run(Batch.single(model, text))
        states = runner.last_hidden()
        executor = ReferenceExecutor(block, pool_blocks(block.cache_layers, 64, 64))
        drafts = NextnDrafts(executor, KVCache(executor.pool, 64))
        assert isinstance(drafts, TapSource)
        drafts.goes_on = lambda chance, worth: True  # type: ignore[method-assign]
        drafter = drafts()
        assert isinstance(drafter, NextnDrafter)
        for end, seen in ((10, 9), (13, 12), (14, 13), (24, 23)):
            start = max(drafter.hidden, default=0)
            drafts.see(drafter, start, states[start:seen])
            (draft,) = drafts.draft_all([Ask(drafter, text[:end], 3)], 1.0)
            assert list(draft.tokens) == expected_draft(block, text[:end], states, 3), end
        assert drafter.sequence is not None and drafter.sequence.length == 23
        drafts.release(drafter)
        drafts.cache.check([])


def test_texts_whose_rows_do_not_fit_into_one_batch_draft_as_each_alone(paths: dict[str, Path]) -> None:
    with GGUFFile.open(paths["glm4moe"]) as gguf:
        block = build_nextn_program(gguf)
        rng = np.random.default_rng(3)
        texts = [[int(token) for token in rng.integers(0, 200, n)] for n in (20, 9, 30, 32, 5)]
        states = rng.standard_normal((32, N_EMBD)).astype(np.float32)
        executor = executors.open_executor("cpu", block, pool_blocks(block.cache_layers, 256, 64), max_tokens=32)
        assert isinstance(executor, HiddenExecutor)
        drafts = NextnDrafts(executor, KVCache(executor.pool, 64))
        drafts.goes_on = lambda chance, worth: True  # type: ignore[method-assign]
        found = []
        for together in ([texts], [[text] for text in texts]):
            found.append([])
            for some in together:
                asked = [Ask(drafts(), text, 3) for text in some]
                for ask in asked:
                    drafts.see(ask.drafter, 0, states[: len(ask.tokens) - 1])
                found[-1] += [list(draft.tokens) for draft in drafts.draft_all(asked, 1.0)]
                for ask in asked:
                    drafts.release(ask.drafter)
        assert found[0] == found[1]
        assert [len(draft) for draft in found[0]] == [3] * len(texts)
        drafts.close()


def expected_draft(block: Any, text: Sequence[int], states: np.ndarray, n: int) -> list[int]:
    """All rows anew for each token, the first of them that of position 1."""
    ids, given = list(text[1:]), list(states[: len(text) - 1])
    for _ in range(n):
        executor = ReferenceExecutor(block, 4)
        batch = Batch.single(block, ids)
        logits = executor.run(replace(batch, embeddings=(np.arange(len(ids)), np.array(given))))
        ids.append(int(logits[-1].argmax()))
        given.append(executor.last_hidden()[-1])
    return ids[-n:]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_an_answer_is_that_of_plain_decoding(
    paths: dict[str, Path], architecture: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    free_drafts(monkeypatch)
    real, rng, right = NextnDrafts._finished, random.Random(1), list[int]()

    def helped(self: NextnDrafts, one: Any, ask: Ask) -> Draft:
        """A block of random weights is hardly ever right."""
        draft = real(self, one, ask)
        known = right[len(ask.tokens) :][: len(draft.tokens)]
        return draft._replace(tokens=[t if rng.random() < 0.7 else (t + 1) % 200 for t in known], chances=[1.0] * 99)

    monkeypatch.setattr(NextnDrafts, "_finished", helped)
    path = paths[architecture]
    for options in ({"temperature": 0}, {"temperature": 0.9, "seed": 5}):
        more = {"max_tokens": 40, "ignore_eos": True, "logprobs": 2, **options}
        load = partial(edgellm.load, path, n_ctx=256, n_threads=1)
        with load() as plain, load(speculate="mtp") as drafting:
            assert drafting.memory_estimate.draft > 0
            expected = plain.generate(PROMPT, **more)
            right[:] = [*PROMPT, *expected.tokens]
            for _ in range(2):
                answer = drafting.generate(PROMPT, **more)
                assert (answer.tokens, answer.logprobs) == (expected.tokens, expected.logprobs)
                assert answer.timings.drafted_n > answer.timings.accepted_n > 8


@pytest.mark.parametrize(("n_together", "options"), [(40, {"logprobs": 2}), (3, {"repeat_penalty": 1.1})], ids=str)
def test_steps_of_many_rows_draft_and_end_nobody(
    paths: dict[str, Path], n_together: int, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three texts with drafts of fifteen tokens are 48 rows, of which an executor computes 32 at once."""
    free_drafts(monkeypatch)
    real, n_rows, see = NextnDrafts._finished, list[int](), NextnDrafts.see

    def long_ones(self: NextnDrafts, one: Any, ask: Ask) -> Draft:
        return real(self, one, ask)._replace(chances=[1.0] * 99)

    def seen(self: NextnDrafts, drafter: Any, start: int, rows: np.ndarray) -> None:
        n_rows.append(len(rows))
        see(self, drafter, start, rows)

    monkeypatch.setattr(NextnDrafts, "_finished", long_ones)
    monkeypatch.setattr(NextnDrafts, "see", seen)
    prompts = [[11 + i, 12, 13, 14, 15] * 3 for i in range(n_together)]
    more = {"max_tokens": 24, "ignore_eos": True, "temperature": 0, **options}
    found = []
    for speculate in (None, "mtp"):
        load = {"n_ctx": 256, "n_threads": 1, "n_parallel": n_together, "speculate": speculate}
        with edgellm.load(paths["glm4moe"], **load) as llm:
            found.append(begun_together(llm, prompts, more))
    assert [one.tokens for one in found[1]] == [one.tokens for one in found[0]]
    assert sum(one.timings.drafted_n for one in found[1]) > 0 and max(n_rows) > 1


def test_hidden_states_of_a_long_step_are_those_of_its_rows_one_by_one(paths: dict[str, Path]) -> None:
    with GGUFFile.open(paths["glm4moe"]) as gguf:
        program = build_program(gguf)
        executor = executors.open_executor("cpu", program, 8, max_tokens=64)
        assert isinstance(executor, HiddenExecutor)
        batch = replace(Batch.single(program, list(range(5, 50))), outputs=np.ones(45, bool))
        executor.run(batch)
        with pytest.raises(edgellm.ParameterError, match="32 rows"):
            executor.last_hidden()
        executor.keeps_hidden = True
        executor.run(batch)
        rows = executor.last_hidden()
        assert rows.shape == (45, N_EMBD)
        for i in (0, 31, 32, 44):
            executor.run(replace(batch, outputs=np.arange(45) == i))
            np.testing.assert_array_equal(executor.last_hidden()[0], rows[i])
        executor.close()


def test_answers_that_run_together_draft_and_runs_come_back_while_drafts_rest(
    paths: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What draws without Python draws nothing while hidden states are wanted, and all that it can when not."""
    prompts = [[11 + i, 12, 13, 14, 15] * 3 for i in range(3)]
    more = {"max_tokens": 60, "ignore_eos": True, "temperature": 0}
    n_runs, resting = list[int](), threading.Event()

    def wants(self: NextnDrafter, tokens: Sequence[int]) -> bool:
        return not resting.is_set()

    monkeypatch.setattr(NextnDrafter, "wants", wants)
    free_drafts(monkeypatch)
    with edgellm.load(paths["glm4moe"], n_ctx=256, n_threads=1, n_parallel=3, speculate="mtp") as llm:
        decode = llm.executor._team.decode  # type: ignore[attr-defined]

        def counted(*args: Any) -> Any:
            n_runs.append(args[3])
            return decode(*args)

        monkeypatch.setattr(llm.executor._team, "decode", counted)  # type: ignore[attr-defined]
        drafted = begun_together(llm, prompts, more)
        assert all(one.timings.drafted_n > 0 for one in drafted) and not n_runs
        resting.set()
        plain = begun_together(llm, prompts, more)
        n_runs.clear()
        alone = llm.generate(prompts[0], **more)
        assert max(n_runs) > 1 and alone.timings.drafted_n == 0
        assert [one.tokens for one in plain] == [one.tokens for one in drafted] and alone.tokens == plain[0].tokens
