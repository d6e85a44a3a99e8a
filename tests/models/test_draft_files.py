"""Drafts in files of their own: what they compute, that llama.cpp drafts the same, and that no answer is another."""

from __future__ import annotations

import importlib.util
import json
import random
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import draft_files as files
import numpy as np
import pytest
from adapter_files import ATTENTION, lora_pairs, write_lora
from answers_together import begun_together
from draft_files import BLOCK, EAGLE_LAYERS, FLASH_LAYERS, MASK, N_EMBD, N_VOCAB, SIZES
from speculation_trials import free_drafts
from test_models import MODELS, nmse, transformers_model
from tiny_models import write_tiny_model, write_transformers_model

import edgellm
from edgellm.engine.block_drafts import BlockDrafts
from edgellm.engine.cache import KVCache, pool_blocks
from edgellm.engine.nextn_drafts import NextnDrafts
from edgellm.engine.speculation import Ask, Draft
from edgellm.formats.gguf import GGUFFile, QuantizedTensor
from edgellm.formats.quant_types import QUANT_TYPES
from edgellm.kernels import executors
from edgellm.kernels.program import Batch, HiddenExecutor
from edgellm.kernels.reference import ReferenceExecutor
from edgellm.loading import LoadOptions, prove_drafts
from edgellm.models import build_program
from edgellm.models.drafts import DraftProgram, Target, build_draft
from edgellm.models.drafts.features import Features, n_layers, with_features
from edgellm.quantize.inputs import open_gguf
from edgellm.quantize.mixes import Recipe
from edgellm.quantize.pipeline import plan_quantization, quantize

PROMPT = [11, 12, 13, 14, 15] * 6 + [20, 21]
IDS = [5, 11, 12, 40, 41, 100, 200, 270]
KINDS = ("eagle3", "dflash")


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("model") / "model.gguf", "llama", "F32", tied=False, **SIZES)


def tensors_of(kind: str, ids: Sequence[int] | None = IDS, **more: Any) -> dict[str, np.ndarray]:
    return files.eagle_tensors(ids, **more) if kind == "eagle3" else files.flash_tensors()


@pytest.fixture(scope="module")
def drafts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("drafts")
    return {kind: files.write_draft(folder / f"{kind}.gguf", kind, tensors_of(kind)) for kind in KINDS}


class Opened:
    """A model and a draft for it, and what the layers of the model read."""

    def __init__(self, model: Path, draft: Path) -> None:
        self.gguf, self.of_draft = GGUFFile.open(model), GGUFFile.open(draft)
        self.plain = build_program(self.gguf)
        self.made: DraftProgram = build_draft(self.of_draft, Target.of(self.plain))
        self.program = with_features(self.plain, self.made.features)

    def inputs(self, tokens: Sequence[int]) -> list[np.ndarray]:
        """What each layer, and the norm at the end, reads of all tokens."""
        found, executor = dict[int, np.ndarray](), ReferenceExecutor(self.plain, 8)

        def hook(index: int, op: Any, read: Callable[[str], np.ndarray]) -> None:
            names = [*op.weight_names(), *(["blk.5."] if op.name == "select_outputs" else [])]
            for name in names:
                if name.startswith("blk."):
                    found.setdefault(int(name.split(".")[1]), before["x"])
            before["x"] = read("x").copy()

        before: dict[str, np.ndarray] = {}
        executor.run(Batch.single(self.plain, tokens), hook)
        return [found[i] for i in range(6)]

    def features(self, tokens: Sequence[int]) -> np.ndarray:
        executor = ReferenceExecutor(self.program, 8)
        executor.run(Batch.single(self.program, tokens, 0, "last"))
        return executor.last_tapped().copy()

    def weight(self, name: str) -> np.ndarray:
        tensor = self.gguf.tensors[name]
        return tensor.dequantize().reshape(tensor.shape)

    def close(self) -> None:
        self.gguf.close()
        self.of_draft.close()


@pytest.fixture
def opened(model_path: Path, drafts: dict[str, Path], request: pytest.FixtureRequest) -> Any:
    both = Opened(model_path, drafts[request.param])
    yield both
    both.close()


TEXT = [int(token) for token in np.random.default_rng(2).integers(3, 270, 40)]
both_kinds = pytest.mark.parametrize("opened", KINDS, indirect=True)


@both_kinds
def test_features_are_what_layers_read_brought_together(opened: Opened) -> None:
    kind = opened.of_draft.architecture
    t, inputs = tensors_of(kind), opened.inputs(TEXT)
    wanted = files.fused(t, [inputs[i] for i in (EAGLE_LAYERS if kind == "eagle3" else FLASH_LAYERS)])
    wanted = wanted if kind == "eagle3" else files.normed(wanted, t["hidden_norm.weight"])
    np.testing.assert_allclose(opened.features(TEXT), wanted, atol=2e-5)


@both_kinds
def test_features_of_the_cpu_are_of_all_tokens_however_they_are_cut_and_leave_the_logits_alone(opened: Opened) -> None:
    kinds = [executors.open_executor("cpu", program, 8, max_tokens=64) for program in (opened.program, opened.plain)]
    tapped, plain = kinds
    assert isinstance(tapped, HiddenExecutor)
    batch = Batch.single(opened.program, TEXT, 0, "last")
    np.testing.assert_array_equal(tapped.run(batch), plain.run(batch))
    whole = tapped.last_tapped().copy()
    assert whole.shape == (len(TEXT), N_EMBD)
    assert nmse(whole, opened.features(TEXT)) < 1e-5  # its cache has 16 bits
    pieces = []
    for start, end, outputs in ((0, 7, False), (7, 8, True), (8, 40, True)):
        batch = Batch.single(opened.program, TEXT[start:end], start)
        tapped.run(replace(batch, outputs=np.full(end - start, outputs)))
        pieces.append(tapped.last_tapped().copy())
    np.testing.assert_array_equal(np.concatenate(pieces), whole)
    for executor in kinds:
        executor.close()


TAPPED = ("llama", "qwen3", "gemma3", "gemma4", "qwen35", "lfm2", "granitehybrid", "gpt-oss")


@pytest.mark.parametrize("name", TAPPED)
def test_what_a_layer_reads_is_that_of_transformers(name: str, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch", reason="the judge of states is transformers on torch")
    model = transformers_model(*MODELS[name])
    tokens = np.random.default_rng(0).integers(0, 64, 12).tolist()
    with torch.no_grad():
        states = model(torch.tensor([tokens]), output_hidden_states=True).hidden_states
    path = write_transformers_model(tmp_path / "model.gguf", model)
    with GGUFFile.open(path) as gguf:
        program = build_program(gguf)
        n = program.n_embd
        for layer in range(n_layers(program)):
            eye = QuantizedTensor("eye", (n, n), QUANT_TYPES["F32"], np.eye(n, dtype=np.float32).view(np.uint8))
            tapped = with_features(program, Features((layer,), eye))
            executor = ReferenceExecutor(tapped, 4)
            executor.run(Batch.single(tapped, tokens, 0, "last"))
            assert nmse(executor.last_tapped(), states[layer][0].float().numpy()) < 1e-9, layer


@pytest.mark.parametrize(
    ("tensors", "metadata"),
    [
        ({}, {}),
        ({"ids": None}, {}),
        ({"norm_before_fc": True}, {"eagle3.norm_before_fc": True}),
        ({}, {"eagle3.norm_before_residual": True}),
    ],
    ids=["few ids", "all ids", "norm before", "normed residual"],
)
def test_an_eagle_layer_computes_what_its_equations_say(
    tensors: dict[str, Any], metadata: dict[str, Any], model_path: Path, tmp_path: Path
) -> None:
    t = tensors_of("eagle3", **({"ids": IDS} | tensors))
    both = Opened(model_path, files.write_draft(tmp_path / "draft.gguf", "eagle3", t, metadata))
    inputs = both.inputs(TEXT)
    states = files.fused(t, [inputs[i] for i in EAGLE_LAYERS]).astype(np.float32)
    np.testing.assert_allclose(both.features(TEXT), states, atol=2e-5)
    executor = ReferenceExecutor(both.made.program, 4)
    batch = Batch.single(both.made.program, TEXT[1:], 0, "last")
    logits = executor.run(replace(batch, embeddings=(np.arange(39), states[:-1])))
    table = both.weight("token_embd.weight")
    residual = bool(metadata.get("eagle3.norm_before_residual"))
    wanted, state = files.eagle_logits(t, table[TEXT[1:]], states[:-1], norm_before_residual=residual)
    np.testing.assert_allclose(logits[0], wanted, atol=5e-5)
    np.testing.assert_allclose(executor.last_hidden()[0], state, atol=5e-5)
    assert (both.made.ids is None) == (tensors.get("ids", IDS) is None)
    if both.made.ids is not None:
        assert both.made.ids.tolist() == IDS
    both.close()


@pytest.mark.parametrize("opened", ["dflash"], indirect=True)
def test_a_block_computes_what_its_equations_say(opened: Opened) -> None:
    t, inputs = tensors_of("dflash"), opened.inputs(TEXT[:-1])
    block = [TEXT[-1], *[MASK] * (BLOCK - 1)]
    executor = ReferenceExecutor(opened.made.program, 4)
    keeper = ReferenceExecutor(opened.made.keep, 4, pool=executor.pool)  # type: ignore[arg-type]
    batch = Batch.single(opened.made.keep, TEXT[:-1])  # type: ignore[arg-type]
    features = opened.features(TEXT[:-1])
    keeper.run(replace(batch, outputs=np.zeros(39, bool), embeddings=(np.arange(39), features)))
    batch = Batch.single(opened.made.program, block, 39)
    logits = executor.run(replace(batch, sees=np.full(BLOCK, 39 + BLOCK - 1, np.int32)))
    rows = np.concatenate([inputs[i] for i in FLASH_LAYERS], axis=1)
    table = opened.weight("token_embd.weight")
    np.testing.assert_allclose(
        logits, files.flash_logits(t, rows, table[block], opened.weight("output.weight")), atol=5e-5
    )


# ---- drafts ----------------------------------------------------------------------------------------------------------


def source_of(opened: Opened, executor: str = "cpu", n_ctx: int = 128, max_tokens: int = 64) -> NextnDrafts:
    made, kinds = opened.made, []
    blocks = pool_blocks(made.program.cache_layers, n_ctx, max_tokens, 3)
    for program in (made.program, made.keep):
        if program is not None:
            pool = kinds[0].pool if kinds else None
            kinds.append(executors.open_executor(executor, program, blocks, max_tokens=max_tokens, pool=pool))
    kv = KVCache(kinds[0].pool, n_ctx)
    if made.block is None:
        found = NextnDrafts(kinds[0], kv, made.ids, of_tokens=True)  # type: ignore[arg-type]
    else:
        found = BlockDrafts(kinds[0], kinds[1], kv, made.block, made.ids)  # type: ignore[arg-type]
    found.goes_on = lambda chance, worth: True  # type: ignore[method-assign]
    return found


def expected_draft(opened: Opened, text: Sequence[int], features: np.ndarray, n: int) -> list[int]:
    """All anew from the whole text, by numpy."""
    kind, table = opened.of_draft.architecture, opened.weight("token_embd.weight")
    t = tensors_of(kind)
    if kind == "dflash":
        block = [text[-1], *[MASK] * (BLOCK - 1)]
        inputs = opened.inputs(text[:-1])
        rows = np.concatenate([inputs[i] for i in FLASH_LAYERS], axis=1)
        return [int(i) for i in files.flash_logits(t, rows, table[block], opened.weight("output.weight")).argmax(1)][
            1 : n + 1
        ]
    ids, states = list(text[1:]), list(features[: len(text) - 1])
    for _ in range(n):
        logits, state = files.eagle_logits(t, table[ids], np.array(states))
        ids.append(IDS[int(logits.argmax())])
        states.append(state)
    return ids[-n:]


@both_kinds
def test_a_draft_goes_on_from_rows_that_come_in_pieces(opened: Opened) -> None:
    features = opened.features(TEXT)
    source = source_of(opened, "reference")
    drafter = source()
    seen = 0
    for end in (20, 22, 23, 40):
        source.see(drafter, seen, features[seen : end - 1])
        seen = end - 1
        (draft,) = source.draft_all([Ask(drafter, TEXT[:end], 3)], 1.0)
        assert list(draft.tokens) == expected_draft(opened, TEXT[:end], features, 3), end
    source.release(drafter)
    source.cache.check([])
    source.close()
    source.close()


@both_kinds
def test_texts_that_do_not_fit_into_one_batch_draft_as_each_alone(opened: Opened) -> None:
    rng = np.random.default_rng(3)
    texts = [[int(token) for token in rng.integers(3, 270, n)] for n in (20, 9, 30, 32, 5)]
    rows = {i: opened.features(text) for i, text in enumerate(texts)}
    source = source_of(opened, max_tokens=32)
    found: list[list[list[int]]] = []
    for together in ([range(5)], [[i] for i in range(5)]):
        found.append([])
        for some in together:
            asked = [Ask(source(), texts[i], 3) for i in some]
            for i, ask in zip(some, asked, strict=True):
                source.see(ask.drafter, 0, rows[i][:-1])
            found[-1] += [list(draft.tokens) for draft in source.draft_all(asked, 1.0)]
            for ask in asked:
                source.release(ask.drafter)
    assert found[0] == found[1]
    assert [len(draft) for draft in found[0]] == [3] * 5
    source.close()


@both_kinds
def test_of_a_long_prompt_the_last_rows_are_kept_and_what_is_missing_is_passed_over(opened: Opened) -> None:
    features = opened.features(TEXT)
    source = source_of(opened, "reference", max_tokens=8)
    drafter: Any = source()
    for start in range(0, 32, 4):
        source.see(drafter, start, features[start : start + 4])
    assert len(drafter.hidden) <= 16
    (draft,) = source.draft_all([Ask(drafter, TEXT[:33], 2)], 1.0)
    assert len(draft.tokens) == 2 and drafter.sequence.length == 8
    source.see(drafter, 36, features[36:39])  # four tokens came while drafts rested
    (draft,) = source.draft_all([Ask(drafter, TEXT[:40], 2)], 1.0)
    assert len(draft.tokens) == 2 and drafter.sequence.length == 11
    source.release(drafter)
    source.cache.check([])
    source.close()


@both_kinds
def test_nan_ends_the_drafts_of_its_text_and_a_failure_those_of_all(opened: Opened) -> None:
    features, told = opened.features(TEXT), list[str]()
    source = source_of(opened, "reference")
    source.tell = told.append

    def drafted(rows: np.ndarray, drafter: Any) -> int:
        source.see(drafter, 0, rows[:-1])
        return len(source.draft_all([Ask(drafter, TEXT, 2)], 1.0)[0].tokens)

    lost, other = source(), source()
    assert drafted(features * np.nan, lost) == 0 and not source.wants(lost, TEXT)
    assert drafted(features, other) == 2 and not told
    source.executor.run = lambda *_: 1 / 0  # type: ignore[method-assign,assignment]
    with pytest.raises(ZeroDivisionError):  # our own mistake is none of these
        drafted(features, source())
    source.executor.run = partial(_fail, edgellm.ClosedError("it is closed"))  # type: ignore[method-assign]
    for one in (other, source()):
        assert drafted(features, one) == 0
    assert told == ["There are no more drafts: it is closed"]
    source.cache.check([])


def _fail(error: Exception, *_: Any) -> Any:
    raise error


def helped(monkeypatch: pytest.MonkeyPatch) -> tuple[list[int], list[int]]:
    """Drafts of random weights are hardly ever right: they are those of a text, with errors.

    This text, and how far those were read that are drafted for.
    """
    real, rng, right, n_read = NextnDrafts._finished, random.Random(1), list[int](), list[int]()

    def finished(self: NextnDrafts, one: Any, ask: Ask) -> Draft:
        draft = real(self, one, ask)
        n_read.append(one.drafter.first + one.drafter.sequence.length)
        known = right[len(ask.tokens) :][: len(draft.tokens)]
        return draft._replace(tokens=[t if rng.random() < 0.7 else (t + 1) % 200 for t in known], chances=[1.0] * 99)

    monkeypatch.setattr(NextnDrafts, "_finished", finished)
    return right, n_read


@pytest.mark.parametrize("kind", KINDS)
def test_an_answer_is_that_of_plain_decoding(
    kind: str, model_path: Path, drafts: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    free_drafts(monkeypatch)
    right, n_read = helped(monkeypatch)
    for options in ({"temperature": 0}, {"temperature": 0.9, "seed": 5}, {"temperature": 0, "repeat_penalty": 1.2}):
        more = {"max_tokens": 40, "ignore_eos": True, "logprobs": 2, **options}
        load = partial(edgellm.load, model_path, n_ctx=256, n_threads=1, max_tokens_per_step=16)
        with load() as plain, load(draft=drafts[kind]) as drafting:
            assert drafting.memory_estimate.draft > 0
            expected = plain.generate(PROMPT, **more)
            right[:] = [*PROMPT, *expected.tokens]
            for _ in range(2):
                n_read.clear()
                answer = drafting.generate(PROMPT, **more)
                assert (answer.tokens, answer.logprobs) == (expected.tokens, expected.logprobs)
                assert answer.timings.drafted_n > answer.timings.accepted_n > 8
                assert n_read == sorted(n_read) and n_read[0] >= len(PROMPT)
            assert not drafting.take_notices()


@pytest.mark.parametrize("kind", KINDS)
def test_answers_that_begin_together_draft_and_are_those_they_give_alone(
    kind: str, model_path: Path, drafts: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    free_drafts(monkeypatch)
    prompts = [[11 + i, *range(20, 20 + 9 * i), 14, 15] for i in range(5)]
    more = {"max_tokens": 24, "ignore_eos": True, "temperature": 0}
    found = []
    for draft in (None, drafts[kind]):
        load = {"n_ctx": 128, "n_threads": 1, "n_parallel": 3, "draft": draft, "max_tokens_per_step": 32}
        with edgellm.load(model_path, **load) as llm:
            found.append(begun_together(llm, prompts, more))
            assert not llm.take_notices()
    assert [one.tokens for one in found[1]] == [one.tokens for one in found[0]]
    assert all(one.timings.drafted_n > 0 for one in found[1])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("architecture", ["llama", "qwen35"])
def test_grammars_stop_strings_and_callers_that_leave_end_drafted_answers_where_they_end_others(
    kind: str, architecture: str, drafts: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also of a model whose every other layer has a state, which goes back behind a draft that was wrong."""
    free_drafts(monkeypatch)
    right, _ = helped(monkeypatch)
    keys = {"full_attention_interval": 2} if architecture == "qwen35" else {}
    metadata = {f"{architecture}.{key}": value for key, value in keys.items()}
    path = write_tiny_model(tmp_path / "model.gguf", architecture, "F32", tied=False, metadata=metadata, **SIZES)
    ask = {"max_tokens": 40, "ignore_eos": True, "seed": 7}
    with (
        edgellm.load(path, n_ctx=256, n_threads=1) as plain,
        edgellm.load(path, n_ctx=256, n_threads=1, draft=drafts[kind]) as drafting,
    ):
        text = plain.generate(PROMPT, **ask, temperature=0).text
        for more in (
            {"temperature": 0, "regex": "[a-z ]{20,30}"},
            {"temperature": 1.0, "regex": "(the|and) [a-z]{25}"},
            {"temperature": 0, "stop": [text[20:23]]},
            {"temperature": 0.8, "top_k": 40},
        ):
            expected = plain.generate(PROMPT, **(ask | more))
            right[:] = [*PROMPT, *expected.tokens]
            answer = drafting.generate(PROMPT, **(ask | more))
            assert (answer.tokens, answer.finish_reason) == (expected.tokens, expected.finish_reason)
            assert answer.timings.drafted_n > answer.timings.accepted_n > 0, more
        stream = drafting.stream(PROMPT, **ask, temperature=0)
        got = "".join(next(stream).text for _ in range(9))
        stream.close()
        assert text.startswith(got)
        drafting.engine.call(lambda cache, executor: None)  # behind the end of that answer
        source: Any = drafting.engine.scheduler.source
        assert not source.drafters
        source.cache.check([])
        assert not any(source.cache.n_used())
        assert not drafting.take_notices()


def test_an_answer_with_an_adapter_is_drafted_from_what_its_layers_read(
    model_path: Path, drafts: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free_drafts(monkeypatch)
    lora = write_lora(tmp_path / "one.gguf", lora_pairs(model_path, ATTENTION, size=0.4))
    more = {"max_tokens": 24, "ignore_eos": True, "temperature": 0}
    seen = list[np.ndarray]()
    see = NextnDrafts.see
    monkeypatch.setattr(
        NextnDrafts, "see", lambda self, of, at, rows: (seen.append(rows.copy()), see(self, of, at, rows))
    )
    for draft in (None, drafts["eagle3"]):
        with edgellm.load(model_path, n_ctx=256, n_threads=1, lora=lora, draft=draft) as llm:
            found = [llm.generate(PROMPT, **more, lora=scales) for scales in ("one", {})]
            if draft is None:
                expected = found
    assert [one.tokens for one in found] == [one.tokens for one in expected] and found[0].tokens != found[1].tokens
    assert all(one.timings.drafted_n > 0 for one in found)
    whole = [rows for rows in seen if len(rows) == len(PROMPT)]
    assert len(whole) == 2 and np.abs(whole[0] - whole[1]).max() > 0.01


# ---- beside llama.cpp ------------------------------------------------------------------------------------------------

_PROGRAM = """
import json, sys, xllamacpp
model, draft, kind, prompt, n, n_max = *sys.argv[1:4], *map(json.loads, sys.argv[4:])
params = xllamacpp.CommonParams()
params.model.path, params.n_ctx, params.n_parallel, params.warmup = model, 256, 1, False
params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
params.speculative.types = [getattr(xllamacpp.common_speculative_type, f"COMMON_SPECULATIVE_TYPE_DRAFT_{kind}")]
of = params.speculative.draft
of.mparams.path, of.n_max, of.n_min, of.p_min, of.n_gpu_layers = draft, n_max, 0, 0.0, 0
of.cache_type_k = of.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
server = xllamacpp.Server(params)
asked = {"prompt": prompt, "n_predict": n, "temperature": 0, "ignore_eos": True}
found = server.handle_completions({**asked, "cache_prompt": False, "stream": False})
times = found["timings"]
print("ANSWER", json.dumps([found["choices"][0]["text"], times.get("draft_n", 0), times.get("draft_n_accepted", 0)]))
"""


SEEDS = {"eagle3": 3, "dflash": 4}  # of drafts that are right now and then


@pytest.mark.parametrize("kind", KINDS)
def test_llama_cpp_drafts_as_many_right_tokens(kind: str, model_path: Path, tmp_path: Path) -> None:
    """Its server tells no drafts, but how many were right: as many as here, where each step drafts so many."""
    if importlib.util.find_spec("xllamacpp") is None:
        pytest.skip("llama.cpp is the judge: pip install xllamacpp")
    with edgellm.load(model_path, n_ctx=256, n_threads=1, executor="reference") as llm:
        found = llm.generate(PROMPT, max_tokens=48, ignore_eos=True, temperature=0)
    answer = list(found.tokens)
    n_max = 3 if kind == "eagle3" else BLOCK - 1
    ids = sorted([token for token, _ in Counter(answer).most_common(4)])  # few, so that some are right
    t = files.eagle_tensors(ids, seed=SEEDS[kind]) if kind == "eagle3" else files.flash_tensors(seed=SEEDS[kind])
    t["d2t"] = np.array(ids) - np.arange(len(ids))
    t["lm_head.weight"] = np.random.default_rng(9).standard_normal((len(ids), N_EMBD)).astype(np.float32)
    layers = {f"{kind}.target_layers": [1, 2, 4] if kind == "eagle3" else [2, 4]}  # DFlash's norm at the end it lacks
    path = files.write_draft(tmp_path / "draft.gguf", kind, t, layers)
    both = Opened(model_path, path)
    source, text, n_drafted, n_right = source_of(both, "reference", 256), [*PROMPT, *answer], 0, 0
    rows, at = both.features(text), len(PROMPT) + 1
    while at < len(text):
        drafter = source()
        source.see(drafter, 0, rows[: at - 1])
        (draft,) = source.draft_all([Ask(drafter, text[:at], n_max)], 1.0)
        source.release(drafter)
        tokens = list(draft.tokens)[: len(text) - at - 1]
        n = next((i for i, token in enumerate(tokens) if token != text[at + i]), len(tokens))
        n_drafted, n_right, at = n_drafted + len(tokens), n_right + n, at + n + 1
    arguments = [str(model_path), str(path), {"eagle3": "EAGLE3", "dflash": "DFLASH"}[kind]]
    command = [sys.executable, "-c", _PROGRAM, *arguments, *map(json.dumps, (PROMPT, 48, n_max))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    lines = [line for line in done.stdout.splitlines() if line.startswith("ANSWER ")]
    assert lines, done.stderr[-2000:]
    theirs = json.loads(lines[0].removeprefix("ANSWER "))
    assert n_right > 3
    assert theirs == [found.text, n_drafted, n_right]
    both.close()


# ---- refused by name -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_draft_is_no_model_of_its_own(kind: str, drafts: dict[str, Path]) -> None:
    with pytest.raises(edgellm.UnsupportedError, match="answers nothing by itself") as caught:
        edgellm.load(drafts[kind])
    assert caught.value.code == "DRAFT_MODEL"


@pytest.mark.parametrize(
    ("kind", "metadata", "code"),
    [
        ("eagle3", {"eagle3.target_hidden_size": 128}, "DRAFT_MODEL"),
        ("eagle3", {"eagle3.target_layers": [1, 2, 9]}, "DRAFT_MODEL"),
        ("eagle3", {"eagle3.target_layers": [1, 2]}, "MODEL_HPARAMS"),
        ("eagle3", {"eagle3.target_layers": None}, "MODEL_HPARAMS"),
        ("eagle3", {"tokenizer.ggml.tokens": ["a", "b"], "tokenizer.ggml.token_type": [1, 1]}, "DRAFT_MODEL"),
        ("eagle3", {"eagle3.norm_before_fc": True}, "MODEL_TENSOR_MISSING"),
        ("eagle3", {"eagle3.attention.sliding_window": 16}, "MODEL_KEY_UNKNOWN"),
        ("dflash", {"dflash.attention.causal": True}, "MODEL_KEY_UNKNOWN"),
        ("dflash", {"dflash.sample_from_anchor": True}, "MODEL_KEY_UNKNOWN"),
        ("dflash", {"dflash.selector_rank": 4}, "MODEL_KEY_UNKNOWN"),
        ("dflash", {"dflash.attention.sliding_window": 16}, "MODEL_KEY_UNKNOWN"),
        ("dflash", {"tokenizer.ggml.mask_token_id": None}, "MODEL_HPARAMS"),
        ("dflash", {"tokenizer.ggml.mask_token_id": N_VOCAB}, "MODEL_HPARAMS"),
    ],
    ids=lambda value: str(value)[:60],
)
def test_a_draft_for_another_model_or_of_another_kind_is_refused_by_name(
    kind: str, metadata: dict[str, Any], code: str, model_path: Path, tmp_path: Path
) -> None:
    path = files.write_draft(tmp_path / "draft.gguf", kind, tensors_of(kind), metadata)
    with pytest.raises(edgellm.EdgeLLMError, match=r"draft\.gguf") as caught:
        edgellm.load(model_path, n_ctx=64, draft=path)
    assert caught.value.code == code


def test_what_knows_more_than_these_is_refused_by_name(model_path: Path, tmp_path: Path) -> None:
    for more in ({"markov_w1.weight": np.ones((N_VOCAB, 4), np.float32)}, {"d2t": np.full(8, N_VOCAB)}):
        t = files.eagle_tensors(IDS) | more
        path = files.write_draft(tmp_path / "draft.gguf", "eagle3", t)
        with pytest.raises(edgellm.EdgeLLMError, match=r"draft\.gguf"):
            edgellm.load(model_path, n_ctx=64, draft=path)


def test_a_model_with_other_texts_under_the_same_ids_is_another(model_path: Path, tmp_path: Path) -> None:
    tokens = [f"t{i}" for i in range(N_VOCAB)]
    path = files.write_draft(tmp_path / "draft.gguf", "eagle3", tensors_of("eagle3"), {"tokenizer.ggml.tokens": tokens})
    with pytest.raises(edgellm.EdgeLLMError):
        edgellm.load(model_path, n_ctx=64, draft=path)


@pytest.mark.parametrize("kind", KINDS)
def test_a_server_is_told_at_its_start_which_model_a_draft_is_not_for(
    kind: str, model_path: Path, drafts: dict[str, Path], tmp_path: Path
) -> None:
    options = LoadOptions(draft=drafts[kind])
    prove_drafts([model_path], options)
    other = write_tiny_model(tmp_path / "other.gguf", "llama", "F32", **(SIZES | {"n_layer": 2}))
    with pytest.raises(edgellm.UnsupportedError, match="layers") as caught:
        prove_drafts([model_path, other], options)
    assert caught.value.code == "DRAFT_MODEL"


def test_a_draft_in_fewer_bits_drafts_too(
    model_path: Path, drafts: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free_drafts(monkeypatch)
    small = tmp_path / "small.gguf"
    with open_gguf(drafts["eagle3"]) as source:
        quantize(plan_quantization(source, Recipe("Q8_0")), small)
    with GGUFFile.open(small) as gguf:
        assert gguf.tensors["fc.weight"].quant.name == "Q8_0" and gguf.tensors["d2t"].quant.name == "I64"
    more = {"max_tokens": 30, "ignore_eos": True, "temperature": 0}
    with edgellm.load(model_path, n_ctx=128, n_threads=1, draft=small) as llm:
        assert llm.generate(PROMPT, **more).timings.drafted_n > 0
