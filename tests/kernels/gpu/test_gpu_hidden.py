"""Hidden states from a GPU: the reference's for every kind of encoder and for decoders, whole and in parts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import draft_files
import numpy as np
import pytest
import test_draft_files as draft_tests
import test_encoder_families as families
import test_nextn as nextn
import test_published_encoders as published
from answers_together import begun_together
from denoising_models import save_row
from gpu_device import device
from speculation_trials import free_drafts
from test_encoders import batch_of
from tiny_models import write_tiny_model

import edgellm
from edgellm.engine.nextn_drafts import NextnDrafts
from edgellm.formats.errors import ParameterError
from edgellm.formats.gguf import GGUFFile
from edgellm.kernels import executors
from edgellm.kernels.cpu.compile.trials import nmse
from edgellm.kernels.gpu.executor import GPUExecutor
from edgellm.kernels.ops import Scale
from edgellm.kernels.program import Batch, Buffer, HiddenExecutor, Op, Program
from edgellm.kernels.reference import ReferenceExecutor
from edgellm.kernels.split import SplitExecutor
from edgellm.models import build_program
from edgellm.quantize.convert import convert
from edgellm.quantize.inputs import open_input

N_BLOCKS, LENGTHS = 24, (1, 3, 17, 90)
LIMIT = 1e-6  # of NMSE: activations of 15 bits on the CPU's side of a cut give about 1e-7
FAMILIES = (
    "bert", "xlm-roberta that ranks", "nomic-bert", "jina-bert-v3", "modern-bert that ranks", "eurobert",
    "gemma-embedding",
)  # fmt: skip
PUBLISHED = ("nomic-bert-moe", "jina-bert-v2", "jina-bert-v2 for code")
DECODERS = {"llama": "Q4_K", "granite": "Q8_0", "gemma3": "Q8_0", "qwen35": "Q8_0", "gemma3n": "Q8_0"}


@pytest.fixture(scope="module")
def name() -> str:
    return device("gpu")


def saved(folder: Path, model: str) -> Path:
    """The file of an encoder, or of one that writes by denoising."""
    folder.mkdir(exist_ok=True)
    if model in FAMILIES:
        families.save(folder / "hf", model)
    elif model in PUBLISHED:
        published.save(folder / "hf", model)
    else:
        save_row(folder / "hf", model)
    with open_input(folder / "hf") as source:
        (path,) = convert(source, folder / "out.gguf", "f32")
    return path


@pytest.fixture(scope="module", params=[*FAMILIES, *PUBLISHED])
def encoder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Program]:
    with GGUFFile.open(saved(tmp_path_factory.mktemp("encoder"), request.param)) as gguf:
        yield build_program(gguf)


def opened(program: Program, name: str, layers: Any) -> Any:
    return executors.open_executor(name, program, N_BLOCKS, n_threads=2, max_tokens=128, gpu_layers=layers)


def test_texts_of_an_encoder_have_the_references_states_and_their_own_bits(encoder: Program, name: str) -> None:
    rng = np.random.default_rng(5)
    texts = [rng.integers(8, min(250, encoder.n_vocab), n).astype(np.int32) for n in LENGTHS]
    whole = ReferenceExecutor(encoder, 0, max_tokens=sum(LENGTHS)).run(batch_of(texts)).copy()
    for layers, kind in ((999, GPUExecutor), (1, SplitExecutor)):
        executor = opened(encoder, name, layers)
        assert type(executor) is kind
        found = executor.run(batch_of(texts)).copy()
        assert nmse(found, whole) < LIMIT
        end = 0
        for text in texts:
            start, end = end, end + len(text)
            batch = batch_of([text])
            assert np.array_equal(executor.run(batch), found[start:end])
            for wanted in ([0], [len(text) - 1], range(1, len(text))):  # few rows, and more than are computed at once
                batch.outputs[:] = False
                batch.outputs[list(wanted)] = True
                assert np.array_equal(executor.run(batch), found[start:end][list(wanted)])
        executor.close()


@pytest.mark.parametrize("model", DECODERS)
def test_a_decoder_gives_the_rows_behind_its_output_norm(model: str, name: str, tmp_path: Path) -> None:
    with GGUFFile.open(write_tiny_model(tmp_path / "model.gguf", model, DECODERS[model])) as gguf:
        program = build_program(gguf)
        tokens = np.random.default_rng(1).integers(3, program.n_vocab, 50)
        judge = ReferenceExecutor(program, N_BLOCKS, 128, "float16")
        whole = judge.run(replace(Batch.single(program, tokens, outputs="all"), hidden=True)).copy()
        for layers in (999, 1):
            executor = opened(program, name, layers)
            found = executor.run(replace(Batch.single(program, tokens, outputs="all"), hidden=True)).copy()
            assert found.shape == (50, program.n_embd) and nmse(found, whole) < LIMIT
            logits = executor.run(Batch.single(program, tokens[:30]))  # between two others
            assert logits.shape[1] == program.n_vocab
            last = executor.run(replace(Batch.single(program, tokens[30:], 30, "last"), hidden=True))
            assert np.array_equal(last[0], found[-1])
            executor.close()


def test_a_hook_sees_the_ops_that_make_them_and_what_it_changes_counts(encoder: Program, name: str) -> None:
    batch, seen = batch_of([np.arange(8, 48, dtype=np.int32)]), list[int]()

    def doubled(i: int, op: Op, read: Any) -> None:
        seen.append(i)
        if i == len(encoder.ops) - 1:
            read(encoder.hidden)[:] *= 2

    executor = opened(encoder, name, 999)
    plain = executor.run(batch).copy()
    assert nmse(executor.run(batch, doubled), 2 * plain) < LIMIT
    assert sorted(set(seen)) == list(range(len(encoder.ops)))
    executor.close()


def test_a_step_tells_what_its_logits_were_made_of_and_what_is_tapped(name: str, tmp_path: Path) -> None:
    path = write_tiny_model(tmp_path / "model.gguf", "llama", "Q8_0", n_layer=3)
    with GGUFFile.open(path) as gguf:
        plain = build_program(gguf)
        half = len(plain.ops) // 2
        ops = (*plain.ops[:half], Scale("x", "kept", 1.0), *plain.ops[half:])
        buffers = plain.buffers | {"kept": Buffer("kept", plain.n_embd)}
        program = replace(plain, ops=ops, buffers=buffers, tapped="kept")
    tokens = np.random.default_rng(1).integers(3, program.n_vocab, 50)
    executor, judge = opened(program, name, 999), ReferenceExecutor(program, N_BLOCKS, 128, "float16")
    assert isinstance(executor, HiddenExecutor)
    executor.keeps_hidden = True
    for outputs in ("last", "all"):  # of few rows, and of more than are computed at once
        batch = Batch.single(program, tokens, outputs=outputs)
        executor.run(batch)
        hidden = executor.last_hidden()
        assert np.array_equal(executor.run(replace(batch, hidden=True)), hidden)
        judge.run(batch)
        executor.run(batch)
        assert nmse(executor.last_tapped(), judge.last_tapped()) < LIMIT
    executor.keeps_hidden = False
    executor.run(batch)
    with pytest.raises(ParameterError, match="last_hidden"):
        executor.last_hidden()
    executor.close()


def test_drafts_that_read_hidden_states_change_no_token(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, right = nextn.write(tmp_path / "model.gguf", "qwen35", "Q8_0"), list[int]()
    real, more = NextnDrafts._finished, {"max_tokens": 24, "temperature": 0, "ignore_eos": True}
    free_drafts(monkeypatch)

    def helped(self: NextnDrafts, one: Any, ask: Any) -> Any:
        """A block of random weights is hardly ever right."""
        draft = real(self, one, ask)
        known = right[len(ask.tokens) :][: len(draft.tokens)]
        return draft._replace(
            tokens=[t if i % 3 else (t + 1) % 200 for i, t in enumerate(known, 1)], chances=[1.0] * 99
        )

    monkeypatch.setattr(NextnDrafts, "_finished", helped)
    load = partial(edgellm.load, path, n_ctx=128, n_threads=1, executor=name)
    with load() as plain, load(speculate="mtp") as drafting:
        assert type(drafting.executor) is GPUExecutor
        expected = plain.generate(nextn.PROMPT, **more)
        right[:] = [*nextn.PROMPT, *expected.tokens]
        answer = drafting.generate(nextn.PROMPT, **more)
        assert answer.tokens == expected.tokens
        assert answer.timings.drafted_n > answer.timings.accepted_n > 4
    with pytest.raises(edgellm.UnsupportedError, match="all layers on the GPU"):
        load(speculate="mtp", gpu_layers=1)


@pytest.mark.parametrize("architecture", ["llama", "qwen35"])
@pytest.mark.parametrize("kind", draft_tests.KINDS)
def test_drafts_of_files_of_their_own_change_no_token(
    kind: str, architecture: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model on the GPU, its draft on the CPU: greedy, sampled, under a grammar, left early, and several at once."""
    free_drafts(monkeypatch)
    right, _ = draft_tests.helped(monkeypatch)
    keys = {"qwen35.full_attention_interval": 2} if architecture == "qwen35" else {}
    path = write_tiny_model(
        tmp_path / "model.gguf", architecture, "F32", tied=False, metadata=keys, **draft_files.SIZES
    )
    draft = draft_files.write_draft(tmp_path / "draft.gguf", kind, draft_tests.tensors_of(kind))
    load = partial(edgellm.load, path, n_ctx=256, n_threads=1, executor=name, max_tokens_per_step=32)
    prompt, ask = draft_tests.PROMPT, {"max_tokens": 24, "ignore_eos": True, "seed": 7}
    with load() as plain, load(draft=draft) as drafting:
        source: Any = drafting.engine.scheduler.source
        assert type(drafting.executor) is GPUExecutor and drafting.memory_estimate.draft > 0
        for more in (
            {"temperature": 0},
            {"temperature": 0.9},
            {"temperature": 0, "repeat_penalty": 1.2, "logprobs": 2},
            {"temperature": 0, "regex": "[a-z ]{20,30}"},
        ):
            expected = plain.generate(prompt, **(ask | more))
            right[:] = [*prompt, *expected.tokens]
            answer = drafting.generate(prompt, **(ask | more))
            assert (answer.tokens, answer.logprobs) == (expected.tokens, expected.logprobs)
            assert answer.timings.drafted_n > answer.timings.accepted_n > 0, more
        stream = drafting.stream(prompt, **ask, temperature=0)
        next(stream)
        stream.close()
        drafting.engine.call(lambda cache, executor: None)  # behind the end of that answer
        assert not source.drafters and not any(source.cache.n_used())
        assert not drafting.take_notices()
    prompts = [[11 + i, *range(20, 20 + 9 * i), 14, 15] for i in range(3)]
    found = []
    for one in (None, draft):
        with load(draft=one, n_parallel=3, n_ctx=128) as llm:
            found.append(begun_together(llm, prompts, ask | {"temperature": 0}))
            assert not llm.take_notices()
    assert [one.tokens for one in found[1]] == [one.tokens for one in found[0]]
    assert all(one.timings.drafted_n > 0 for one in found[1])
    with pytest.raises(edgellm.UnsupportedError, match="all layers on the GPU"):
        load(draft=draft, gpu_layers=1)


def test_embed_and_rerank_give_what_the_cpu_gives(name: str, tmp_path: Path) -> None:
    texts = ["the license of any work and the end", "the", ""]
    for i, model in enumerate(("nomic-bert", "xlm-roberta that ranks")):
        path = saved(tmp_path / str(i), model)
        with edgellm.load(path) as judge, edgellm.load(path, executor=name) as llm:
            assert type(llm.executor) is GPUExecutor and llm.kind == judge.kind
            if llm.kind == "rerank":
                found, expected = llm.rerank("the end", texts), judge.rerank("the end", texts)
                assert [one.index for one in found] == [one.index for one in expected]
                assert np.allclose([one.score for one in found], [one.score for one in expected], atol=1e-4)
            else:
                vectors = llm.embed(texts)
                assert nmse(vectors, judge.embed(texts)) < LIMIT
                assert np.array_equal(llm.embed(texts[:1])[0], vectors[0])


@pytest.mark.parametrize("model", ["llada", "llada-moe", "dream"])
def test_a_model_that_writes_by_denoising_writes_what_it_writes_on_the_cpu(
    model: str, name: str, tmp_path: Path
) -> None:
    path, prompt = saved(tmp_path / "model", model), np.random.default_rng(0).integers(0, 270, 9).tolist()
    with edgellm.load(path, n_ctx=64) as judge, edgellm.load(path, n_ctx=64, executor=name) as llm:
        assert type(llm.executor) is GPUExecutor
        answers = [one.generate(prompt, max_tokens=24, temperature=0) for one in (judge, llm)]
    assert answers[0].text == answers[1].text and answers[0].text
