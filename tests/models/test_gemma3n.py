"""Gemma 3n's own: streams, shared keys, rows that are dropped behind them, hostile keys, and llama.cpp's one shape."""

from __future__ import annotations

import math
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoint_folders import save_byte_level, save_model
from cpu_programs import FORMS, cpu_executor, single_sequence
from llama_cpp_judge import llama_cpp_answer, take_gelu_of_a_table
from speculation_trials import guess
from test_checkpoint_convert import centred
from test_models import nmse, transformers_logits, transformers_model
from tiny_models import write_tiny_model

import edgellm
from edgellm.formats.errors import EdgeLLMError
from edgellm.formats.gguf import GGUFFile
from edgellm.kernels.ops import GaussianTopK
from edgellm.kernels.program import Batch, Program
from edgellm.kernels.reference import ReferenceExecutor
from edgellm.models import build_program
from edgellm.quantize.convert import convert
from edgellm.quantize.inputs import open_input
from edgellm.tokenizer import Tokenizer

PROMPT = [11, 12, 13, 14, 15] * 14 + [20, 21]
GREEDY: dict[str, Any] = {"max_tokens": 8, "temperature": 0, "ignore_eos": True}
N_TOKENS = 90
SIZES: dict[str, Any] = {"n_embd": 64, "n_ff": 64, "n_head": 4, "n_head_kv": 2, "head_dim": 16}


def program_of(path: Path) -> Program:
    with GGUFFile.open(path) as gguf:
        return build_program(gguf)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("models") / "model.gguf", "gemma3n", n_layer=5, **SIZES)


def test_layers_that_share_keys_have_none_and_those_without_a_factor_cut_nothing_off(path: Path) -> None:
    program = program_of(path)
    assert len(program.cache_layers) == 2
    assert [layer for op in program.ops for layer in op.read_layers()] == [0, 1, 0, 1, 0]
    assert [op.factor for op in program.ops if isinstance(op, GaussianTopK)] == [1.0] * 3


@pytest.mark.parametrize("kept", [[89], [3, 70, 89], [], [*range(0, N_TOKENS, 2)]], ids=len)
def test_rows_that_are_dropped_behind_the_last_keys_change_no_bit(kept: list[int], path: Path) -> None:
    program = program_of(path)
    batch = single_sequence(program, N_TOKENS, seed=1)
    executor = cpu_executor(program, 16, 2, N_TOKENS, FORMS[0])
    whole = executor.run(batch).copy()
    outputs = np.zeros(N_TOKENS, bool)
    outputs[kept] = True
    few = executor.run(replace(batch, outputs=outputs)).copy()
    executor.close()
    assert np.array_equal(few, whole[kept])


def test_steps_of_any_size_and_what_is_known_give_the_same_answer(path: Path, drafts: bool) -> None:
    with edgellm.load(path, n_ctx=256, n_threads=2) as llm:
        cold = list(llm.generate(PROMPT, **GREEDY).tokens)
        warm = llm.generate(PROMPT, **GREEDY)
        assert list(warm.tokens) == cold and warm.timings.reused_n > 0
    for n in (1, 7):
        with edgellm.load(path, max_tokens_per_step=n, n_ctx=256, n_threads=2) as llm:
            if drafts:
                guess(llm, [[*PROMPT, *cold]])
            found = llm.generate(PROMPT, **GREEDY)
            assert list(found.tokens) == cold, n
            assert (found.timings.drafted_n > 0) == (drafts and n > 1)


@pytest.mark.parametrize("n_embd", [48, 60])
def test_streams_of_any_width_are_right_or_named(n_embd: int, tmp_path: Path) -> None:
    """The kernels take columns of a row 16 at a time; the reference any."""
    path = write_tiny_model(tmp_path / "model.gguf", "gemma3n", "F32", **SIZES | {"n_embd": n_embd})
    program = program_of(path)
    batch = single_sequence(program, 9)
    expected = ReferenceExecutor(program).run(batch)
    if n_embd % 16:
        with pytest.raises(EdgeLLMError, match=r"buffer (streams|predicted|others)") as caught:
            cpu_executor(program, 16, 2, N_TOKENS, FORMS[0])
        assert caught.value.code == "BUFFER_COLUMNS"
        return
    with closing(cpu_executor(program, 16, 2, N_TOKENS, FORMS[0])) as executor:
        assert nmse(executor.run(batch), expected) <= 1e-6


INFINITE, NAN = float("inf"), float("nan")
BAD: dict[str, list[Any]] = {
    "altup.num_inputs": [0, 1, 2, 4, 65, "3"],
    "altup.active_idx": [3, 64],
    "activation_sparsity_scale": [[1.0], [1.0, NAN, 1.0, 1.0], [INFINITE] * 4, [11.0] * 4, [1, 1, 1, 1], 1.0],
    "attention.value_length": [8],
    "attention.sliding_window": [0],
    "attention.sliding_window_pattern": [0, [True]],
    "attention.shared_kv_layers": [3, 4, 513],
    "feed_forward_length": [[64], [64, 64, 0, 64], 32],
    "embedding_length_per_layer_input": [0, 5, 64],
    "final_logit_softcapping": [-1.0, NAN, INFINITE],
}


@pytest.mark.parametrize("key", BAD)
def test_a_key_that_cannot_be_is_a_named_error(key: str, tmp_path: Path) -> None:
    for value in BAD[key]:
        bad = write_tiny_model(
            tmp_path / "bad.gguf", "gemma3n", "F32", n_layer=4, metadata={f"gemma3n.{key}": value}, **SIZES
        )
        with pytest.raises(EdgeLLMError) as caught:
            program_of(bad)
        assert caught.value.code not in ("", "ERROR") and "bad.gguf" in str(caught.value), value


@pytest.mark.parametrize("name", ["altup_proj", "altup_unembd_proj", "blk.0.laurel_l", "blk.1.altup_correct_scale"])
def test_a_tensor_that_is_missing_is_named(name: str, tmp_path: Path) -> None:
    bad = write_tiny_model(tmp_path / "bad.gguf", "gemma3n", "F32", leave_out=(f"{name}.weight",), **SIZES)
    with pytest.raises(EdgeLLMError, match=name) as caught:
        program_of(bad)
    assert caught.value.code == "MODEL_TENSOR_MISSING"


# -- llama.cpp, which knows 4 streams, rank 64, 256 columns for a layer, 10 sparse layers, 20 that keep keys -----------

KNOWN: dict[str, Any] = {
    "vocab_size": 280, "vocab_size_per_layer_input": 280, "hidden_size": 32, "intermediate_size": 32, "head_dim": 16,
    "num_attention_heads": 2, "num_key_value_heads": 1, "num_hidden_layers": 22, "num_kv_shared_layers": 2,
    "sliding_window": 33, "tie_word_embeddings": True,
}  # fmt: skip
TOKENS = np.random.default_rng(0).integers(0, 270, 60).tolist()
PROMPTS_BEHIND = [1, 2, 7, 33, 34, 60]


def with_unused_keys(file: Path, layers: tuple[int, ...]) -> None:
    """Give layers that share keys some of their own, as published checkpoints have them."""
    safetensors = pytest.importorskip("safetensors.numpy")

    tensors, rng = safetensors.load_file(file), np.random.default_rng(3)
    for i in layers:
        shapes = {"k_proj": (16, 32), "v_proj": (16, 32), "k_norm": (16,)}
        for name, shape in shapes.items():
            tensors[f"model.layers.{i}.self_attn.{name}.weight"] = rng.normal(0, 1, shape).astype(np.float32)
    safetensors.save_file(tensors, file)


def calmed(model: Any) -> Any:
    """The same with smaller steps from layer to layer: float32 alone would make 1e-6 of so many wild ones."""
    torch = pytest.importorskip("torch")

    sizes = {"post_": 0.3, "self_attn.q_norm": 0.25, "prediction_coefs": 0.2, "correction_coefs": 0.2}
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.mul_(next((size for part, size in sizes.items() if part in name), 1.0))
    return model


def as_llama_cpp_cuts(program: Program) -> Program:
    """With the deviation of a sample in place of that of the row: sqrt(n / (n - 1)) times as large."""
    n = KNOWN["intermediate_size"]
    ops = [
        replace(op, factor=op.factor * math.sqrt(n / (n - 1))) if isinstance(op, GaussianTopK) else op
        for op in program.ops
    ]
    return replace(program, ops=tuple(ops))


def test_logits_equal_those_of_transformers_and_of_llama_cpp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "hf"
    save_byte_level(folder)
    model = save_model(folder, calmed(transformers_model("Gemma3nForCausalLM", KNOWN)))
    with_unused_keys(folder / "model.safetensors", (20, 21))
    with open_input(folder) as source:
        (path,) = convert(source, tmp_path / "out.gguf", "f32")
    with GGUFFile.open(path) as gguf:
        program = build_program(gguf).for_context(256)
        letter = Tokenizer.from_gguf(gguf.metadata).encode("a")[-1]
        logits = ReferenceExecutor(program).run(Batch.single(program, TOKENS)).copy()
        assert nmse(logits, transformers_logits(model, TOKENS)) <= 1e-9
        judge = llama_cpp_answer(path, [TOKENS[:n] for n in PROMPTS_BEHIND], program.n_vocab, letter)
        take_gelu_of_a_table(monkeypatch)
        program = as_llama_cpp_cuts(program)
        rows = ReferenceExecutor(program).run(Batch.single(program, TOKENS))[np.array(PROMPTS_BEHIND) - 1]
    assert nmse(centred(rows), centred(judge.logprobs)) <= 1e-6
