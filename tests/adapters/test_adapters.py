"""Adapters in a program and in answers: the numbers of a merged model, and nobody else's numbers changed."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from adapter_files import AROUND, ATTENTION, EXPERTS, FEED_FORWARD, lora_pairs, merge, write_control_vector, write_lora
from cpu_programs import cpu_executor, sequences, single_sequence
from llama_cpp_judge import llama_cpp_answer
from speculation_trials import free_drafts, guess
from tiny_models import write_tiny_model

import edgellm
from edgellm.adapters.loading import AdapterChoice as Choice
from edgellm.adapters.loading import open_adapters
from edgellm.adapters.rewrite import adapted, layer_ends
from edgellm.engine.requests import GenerationRequest
from edgellm.formats.errors import EdgeLLMError, NumericError, ParameterError
from edgellm.formats.gguf import GGUFFile
from edgellm.kernels.cpu.compile.trials import nmse
from edgellm.kernels.program import Batch, Op, Program
from edgellm.kernels.reference import ReferenceExecutor
from edgellm.models import build_program
from edgellm.tokenizer import Tokenizer

ALPHA, RANK = 8.0, 4
N_TOKENS = 40
CASES: dict[str, tuple[str, ...]] = {
    "llama": (*ATTENTION, *FEED_FORWARD, *AROUND),
    "gemma3": (*ATTENTION, *FEED_FORWARD, "token_embd.weight"),
    "qwen3": (*ATTENTION, "ffn_down.weight"),
    "qwen2moe": (*EXPERTS, "attn_q.weight", "ffn_up_shexp.weight"),
    "qwen35": ("attn_qkv.weight", "attn_q.weight", "ssm_out.weight", *FEED_FORWARD),
    "granite": ("attn_q.weight", "output.weight"),
}
"""Architecture -> what the adapter changes."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of two layers, two adapters for it, a third that changes the vocabulary's ends, and a control vector."""
    folder = tmp_path_factory.mktemp("adapters")
    model = write_tiny_model(folder / "model.gguf", "llama", "Q4_K", quants={"output.weight": "Q6_K"}, tied=False)
    for name, endings, quant in (
        ("one", ATTENTION, "F32"), ("two", (*FEED_FORWARD, "attn_q.weight"), "F16"), ("three", AROUND, "F32"),
    ):  # fmt: skip
        write_lora(folder / f"{name}.gguf", lora_pairs(model, endings, seed=len(name), rank=5, size=0.2), quant=quant)
    directions = {"direction.1": np.linspace(-1, 1, 256, dtype=np.float32)}
    write_control_vector(folder / "happy.gguf", directions)
    return folder


@pytest.fixture(scope="module")
def program(folder: Path) -> Iterator[Program]:
    """That model with all four."""
    loaded = open_adapters(
        [Choice(folder / f"{name}.gguf") for name in ("one", "two", "three")], [Choice(folder / "happy.gguf")]
    )
    with GGUFFile.open(folder / "model.gguf") as gguf:
        plain = build_program(gguf)
        yield replace(plain, adapted=adapted(plain, loaded.adapters))
    loaded.close()


def scaled(batch: Batch, *rows: tuple[int, tuple[float, ...]]) -> Batch:
    """A batch whose next n tokens have these scales, and so on."""
    return replace(batch, adapters=np.concatenate([np.tile(np.float32(scales), (n, 1)) for n, scales in rows]))


@pytest.mark.parametrize("architecture", CASES)
def test_an_adapter_gives_the_numbers_of_the_merged_model(architecture: str, tmp_path: Path) -> None:
    tied = architecture in ("gemma3", "granite")
    model = write_tiny_model(tmp_path / "model.gguf", architecture, "F32", tied=tied, n_embd=64, n_ff=64, head_dim=32)
    endings = [one for one in CASES[architecture] if one != "output.weight" or not tied]
    pairs = lora_pairs(model, endings, RANK)
    if tied:  # what multiplies by the embedding has a branch of its own, what looks tokens up has none
        pairs.pop("token_embd.weight", None)
    lora = write_lora(tmp_path / "lora.gguf", pairs, architecture, ALPHA)
    merged = merge(model, tmp_path / "merged.gguf", pairs, 0.5 * ALPHA / RANK)
    loaded = open_adapters([Choice(lora)], [])
    with GGUFFile.open(model) as one, GGUFFile.open(merged) as other:
        plain, judge = build_program(one), build_program(other)
        batch = single_sequence(plain, N_TOKENS, seed=1)
        changed = replace(plain, adapted=adapted(plain, loaded.adapters))
        with_adapter = scaled(batch, (N_TOKENS, (0.5,)))
        expected = ReferenceExecutor(judge).run(batch)
        base = ReferenceExecutor(plain).run(batch)
        assert nmse(ReferenceExecutor(changed).run(with_adapter), expected) < 1e-9
        assert nmse(base, expected) > 1e-4, "the adapter changes nothing"
        executor = cpu_executor(changed, 8)
        try:
            rows = zip(executor.run(with_adapter), expected, strict=True)
            assert np.median([nmse(*row) for row in rows]) < 1e-5, "one may be sent to another expert"
            assert np.array_equal(executor.run(batch), _alone(plain, batch)), "without it nothing changes"
        finally:
            executor.close()
    loaded.close()


@pytest.mark.parametrize("architecture", ["llama", "qwen2moe"])
def test_llama_cpp_makes_the_same_of_the_same_file(architecture: str, tmp_path: Path) -> None:
    model = write_tiny_model(tmp_path / "model.gguf", architecture, "F32", tied=False, n_embd=64, n_ff=64, head_dim=16)
    file = write_lora(tmp_path / "lora.gguf", lora_pairs(model, CASES[architecture], RANK), architecture, ALPHA)
    loaded = open_adapters([Choice(file)], [])
    with GGUFFile.open(model) as gguf:
        plain = build_program(gguf)
        program = replace(plain, adapted=adapted(plain, loaded.adapters))
        letter = Tokenizer.from_gguf(gguf.metadata).encode("a")[-1]
        batch = scaled(single_sequence(program, 9, seed=1), (9, (0.5,)))
        prompts = [batch.tokens[:n].tolist() for n in (1, 4, 9)]
        judge = llama_cpp_answer(model, prompts, program.n_vocab, letter, [(file, 0.5)])
        logits = ReferenceExecutor(program).run(batch).astype(np.float64)
    loaded.close()
    likely = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    assert nmse(likely[[0, 3, 8]], judge.logprobs) < 1e-6


def test_a_control_vector_is_what_a_hook_adds_behind_its_layers(folder: Path, program: Program) -> None:
    batch, direction = single_sequence(program, 20, seed=1), np.linspace(-1, 1, 256, dtype=np.float32)
    end = layer_ends(program)[1]

    def add(index: int, op: Op, read: Callable[[str], np.ndarray]) -> None:
        if index == end:
            read("x")[:] += np.float32(1.5) * direction

    reference = ReferenceExecutor(program)
    expected = reference.run(batch, add)
    assert nmse(reference.run(scaled(batch, (20, (0, 0, 0, 1.5)))), expected) < 1e-12
    assert nmse(reference.run(batch), expected) > 1e-3


def _alone(program: Program, batch: Batch) -> np.ndarray:
    executor = cpu_executor(program, 8)
    try:
        return executor.run(batch).copy()
    finally:
        executor.close()


def test_rows_of_several_adapters_and_of_none_have_the_bits_that_they_have_alone(program: Program) -> None:
    scales = [(1.0, 0, 0, 0), (0, 0, 0, 0), (0, -0.7, 0, 0.5), (0.3, 2.0, 0, 0), (0, 0, 1.0, 0), (0, 0, 0, 1.5)]
    lengths, n_blocks = [9, 33, 1, 17, 40, 5], 24
    batch = sequences(program, lengths, [0] * len(lengths), n_blocks)
    together = scaled(batch, *zip(lengths, scales, strict=True))
    reference, executor = ReferenceExecutor(program, n_blocks, 128, "float16"), cpu_executor(program, n_blocks, 2, 128)
    try:
        found = executor.run(together).copy()
        assert nmse(found, reference.run(together)) < 1e-5
        ends = np.cumsum(lengths)
        for i, (end, length, scale) in enumerate(zip(ends, lengths, scales, strict=True)):
            rows = slice(end - length, end)
            own = {name: getattr(batch, name)[rows] for name in ("tokens", "positions", "sequences", "outputs")}
            alone = scaled(replace(batch, **own), (length, scale)) if any(scale) else replace(batch, **own)
            assert np.array_equal(executor.run(alone)[0], found[i]), f"sequence {i}"
            half = length // 2  # in two pieces
            for part in (slice(0, half), slice(half, length)) if half else ():
                cut = {name: values[part] for name, values in own.items()}
                last = executor.run(scaled(replace(batch, **cut), (len(cut["tokens"]), scale))).copy()
            assert not half or np.array_equal(last[0], found[i]), f"sequence {i} in pieces"
    finally:
        executor.close()


def test_a_hook_sees_the_ops_of_adapters_and_the_same_numbers(program: Program) -> None:
    batch = scaled(single_sequence(program, 20, seed=1), (20, (1.0, 0.5, 0.25, 1.0)))
    executor, seen = cpu_executor(program, 8), []
    try:
        plain = executor.run(batch).copy()
        hooked = executor.run(batch, lambda index, op, read: seen.append(op.name))
        assert np.array_equal(plain, hooked)
        assert {"adapter_down", "adapter_up", "add_direction"} <= set(seen)
    finally:
        executor.close()


def test_products_of_one_input_share_an_op_and_branches_stand_behind_the_last_of_them(program: Program) -> None:
    assert program.adapted is not None
    names = [op.name for op in program.adapted.ops]
    first = names.index("adapter_down")
    assert names[first : first + 7] == ["adapter_down", *["matmul"] * 3, *["adapter_up"] * 3]
    assert "adapter_down" not in [op.name for op in program.ops]


STREAMS = {"gemma3n": "streams"}
ENDS = ("llama", "gemma3", "qwen35", "granitehybrid", "gpt-oss", "olmo2", "gemma4", "gemma3n")


@pytest.mark.parametrize("architecture", ENDS)
def test_layers_end_where_their_last_op_writes_the_stream(architecture: str, tmp_path: Path) -> None:
    with GGUFFile.open(write_tiny_model(tmp_path / "model.gguf", architecture)) as gguf:
        program = build_program(gguf)
        assert list(layer_ends(program)) == [0, 1]
        stream = STREAMS.get(architecture, "x")
        assert all(stream in program.ops[i].written_buffers() for i in layer_ends(program).values())


# -- in answers --------------------------------------------------------------------------------------------------------

PROMPT = list(range(20, 90))


def loaded(folder: Path, **options: Any) -> edgellm.LLM:
    choices: dict[str, Any] = {
        "lora": {name: folder / f"{name}.gguf" for name in ("one", "two")},
        "control_vectors": [(folder / "happy.gguf", 0.0)],
        "n_ctx": 256,
        "n_threads": 2,
    }
    return edgellm.load(folder / "model.gguf", **(choices | options))


def answer(llm: edgellm.LLM, lora: Any = None, **options: Any) -> tuple[list[int], int]:
    """The tokens of an answer, and how many of the prompt's were known."""
    found = llm.generate(PROMPT, max_tokens=12, temperature=0, lora=lora, stop=None, **options)
    return found.tokens, found.timings.reused_n


def test_what_one_adapter_has_read_another_does_not_find(folder: Path) -> None:
    with loaded(folder, n_parallel=4) as llm:
        choices: list[Any] = [{}, "one", {"one": 0.5}, "two", {"one": 1.0, "two": 1.0}]
        first = [answer(llm, choice) for choice in choices]
        assert [reused for _, reused in first] == [0] * len(choices)
        assert len({tuple(tokens) for tokens, _ in first}) > 2, "the adapters change nothing"
        again = [answer(llm, choice) for choice in choices]
        assert [tokens for tokens, _ in again] == [tokens for tokens, _ in first]
        assert all(reused > 32 for _, reused in again)
        assert answer(llm, None) == answer(llm, {"one": 1.0, "two": 1.0}), "the model's own choice is both of them"
        assert answer(llm, {}, control_vectors={"happy": 2.0})[1] == 0


def test_answers_of_several_adapters_at_once_are_those_that_they_are_alone(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from concurrent.futures import ThreadPoolExecutor

    choices: list[Any] = [{}, "one", "two", {"one": -1.0, "two": 0.5}, {}, "two"]
    with loaded(folder, n_parallel=6) as llm, ThreadPoolExecutor(len(choices)) as pool:
        together = list(pool.map(lambda choice: answer(llm, choice)[0], choices))
    free_drafts(monkeypatch)
    with loaded(folder) as llm:
        oracle = guess(llm, [[*PROMPT, *tokens] for tokens in together])
        assert [answer(llm, choice)[0] for choice in choices] == together
        assert oracle.n_drafted > 0


def test_a_changed_default_holds_for_answers_that_choose_nothing(folder: Path) -> None:
    with loaded(folder) as llm:
        expected = answer(llm, {"two": 0.5})[0]
        llm.set_adapters({"two": 0.5}, {})
        assert answer(llm)[0] == expected
        assert list(llm.adapters.scales) == [0.0, 0.5, 0.0]
        assert llm.engine.adapters() == llm.adapter_scales(), "the engine reads what the model has"
        scores = llm.score(PROMPT).logprobs
        llm.set_adapters({}, {})
        assert not np.array_equal(llm.score(PROMPT).logprobs, scores)


def test_a_name_alone_means_the_scale_that_its_adapter_was_loaded_with(folder: Path) -> None:
    file = folder / "one.gguf"
    with loaded(
        folder, lora={"half": (file, 0.5), "rest": (file, 0.0), "idle": Choice(file, "idle", 0.25, True)}
    ) as llm:
        assert list(llm.adapters.scales) == [0.5, 0.0, 0.0, 0.0]
        for name, values in {"half": (0.5, 0, 0, 0), "rest": (0, 1, 0, 0), "idle": (0, 0, 0.25, 0)}.items():
            assert llm.adapter_scales(name).values == values
        assert llm.adapter_scales({}, "happy").values == (0, 0, 0, 1)


def test_a_saved_state_is_of_use_for_its_adapters_alone(folder: Path, tmp_path: Path) -> None:
    with loaded(folder) as llm:
        expected = answer(llm, "one")[0]
        assert llm.save_state(tmp_path / "state", PROMPT, lora="one") >= 64
        with pytest.raises(EdgeLLMError, match="None of these"):
            llm.save_state(tmp_path / "other", PROMPT, lora="two")
    with loaded(folder) as llm:
        with pytest.raises(EdgeLLMError, match="another model"):
            llm.load_state(tmp_path / "state", lora="two")
        llm.load_state(tmp_path / "state", lora="one")
        tokens, reused = answer(llm, "one")
        assert tokens == expected
        assert reused >= 64
        assert answer(llm, {})[1] == 0


def test_the_disk_keeps_the_prefixes_of_adapters_apart(folder: Path, tmp_path: Path) -> None:
    with loaded(folder, cache_dir=tmp_path) as llm:
        expected = [answer(llm, choice)[0] for choice in ("one", "two")]
    with loaded(folder, cache_dir=tmp_path) as llm:
        assert answer(llm, {})[1] == 0
        found = [answer(llm, choice) for choice in ("one", "two")]
        assert [tokens for tokens, _ in found] == expected
        assert all(reused >= 32 for _, reused in found)


def test_what_a_control_vector_made_in_some_layers_is_of_no_use_where_it_counts_in_others(tmp_path: Path) -> None:
    model = write_tiny_model(tmp_path / "model.gguf", n_layer=3, n_embd=64, n_ff=64, head_dim=32)
    directions = {f"direction.{layer}": np.linspace(-layer, 1, 64, dtype=np.float32) for layer in (1, 2)}
    vector = write_control_vector(tmp_path / "v.gguf", directions)

    def steered(layers: tuple[int, int] | None) -> edgellm.LLM:
        options: dict[str, Any] = {"n_ctx": 256, "n_threads": 1, "cache_dir": tmp_path / "cache"}
        return edgellm.load(model, control_vectors=vector, control_vector_layers=layers, **options)

    with steered((1, 1)) as llm:
        expected = answer(llm)[0]
        llm.save_state(tmp_path / "state", PROMPT)
    for layers in ((2, 2), None):
        with steered(layers) as llm:
            with pytest.raises(EdgeLLMError, match="another model"):
                llm.load_state(tmp_path / "state")
            assert answer(llm)[1] == 0, layers
    with steered((1, 1)) as llm:
        tokens, reused = answer(llm)
        assert tokens == expected
        assert reused >= 32
    with steered((1, 9)) as llm:
        assert answer(llm)[1] >= 32, "it counts in the same layers as without bounds"


def test_an_answer_of_a_form_keeps_it_with_an_adapter(folder: Path) -> None:
    with loaded(folder) as llm:
        assert llm.generate(PROMPT, regex="[ab]{3}", max_tokens=8, lora="one") in {
            x + y + z for x in "ab" for y in "ab" for z in "ab"
        }


WRONG_CHOICES: dict[str, tuple[Any, str]] = {
    "unknown": ("three", "no .?three.? was loaded.*one, two"),
    "no number": ({"one": float("nan")}, "must be a number"),
    "far out": ({"one": 1e9}, "must be a number"),
    "beyond floats": ({"one": 10**400}, "must be a number"),
    "complex": ({"one": np.complex64(1)}, "must be a number"),
    "no mapping": (3, "must be a mapping"),
}


def test_a_wrong_choice_is_refused_by_name(folder: Path) -> None:
    with loaded(folder) as llm:
        for choice, message in WRONG_CHOICES.values():
            with pytest.raises(EdgeLLMError, match=message):
                llm.generate(PROMPT, lora=choice)
    for options, message in (
        ({"lora": [folder / "one.gguf", folder / "one.gguf"]}, "both called"),
        ({"lora": 3}, "must be a path"),
        ({"control_vector_layers": (2, 1)}, "control_vector_layers"),
        ({"lora": folder / "none.gguf"}, "none.gguf"),
    ):
        with pytest.raises(EdgeLLMError, match=message):
            loaded(folder, **options)


def test_numbers_that_scales_make_too_large_are_told_as_theirs(folder: Path) -> None:
    with loaded(folder, n_parallel=2) as llm:
        expected = answer(llm, {})
        for lora in ({"one": 1e4, "two": 1e4}, {"one": -1e4, "two": 1e4}):
            with pytest.raises(NumericError, match=r"lora: with adapters of the scales -?10000, 10000, 0") as caught:
                answer(llm, lora)
            assert isinstance(caught.value, ParameterError)
        banned = {token: -float("inf") for token in range(llm.program.n_vocab)}
        with pytest.raises(EdgeLLMError, match="banned") as caught:  # which no scale is the cause of
            answer(llm, "one", logit_bias=banned)
        assert not isinstance(caught.value, ParameterError)
        assert answer(llm, {})[0] == expected[0]


def test_requests_of_other_kinds_have_the_scales_of_the_model_or_their_own(folder: Path) -> None:
    assert GenerationRequest.adapters is None
    with loaded(folder) as llm:
        usual = llm.embed("Name three rivers.")
        assert np.isfinite(usual).all()
        assert np.array_equal(llm.embed("Name three rivers.", lora={"one": 1.0, "two": 1.0}), usual)
        for other in ({"lora": {}}, {"lora": "one"}, {"control_vectors": "happy"}):
            assert not np.array_equal(llm.embed("Name three rivers.", **other), usual), other
        with pytest.raises(EdgeLLMError, match=r"three.*was loaded"):
            llm.embed("Name three rivers.", lora="three")


def test_an_answer_without_adapters_imports_nothing_that_reads_them(tmp_path: Path) -> None:
    path = write_tiny_model(tmp_path / "model.gguf", "llama", n_layer=1)
    code = (
        "import sys, edgellm\n"
        f"with edgellm.load({str(path)!r}, n_ctx=64, n_threads=1) as llm:\n"
        "    llm.generate([5, 6], max_tokens=2)\n"
        "print([m for m in sys.modules if m.startswith('edgellm.adapters.')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "['edgellm.adapters.scales']"
