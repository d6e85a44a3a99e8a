"""Gemma 4's own: keys that layers share, rows that are dropped behind them, tables that are looked up, hostile keys."""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cpu_programs import FORMS, cpu_executor, single_sequence
from speculation_trials import guess
from tiny_models import write_tiny_model

import edgellm
from edgellm.arguments import CACHE_TYPES
from edgellm.formats.errors import EdgeLLMError, UnsupportedError
from edgellm.formats.gguf import GGUFFile
from edgellm.kernels.cache_types import DEFAULT
from edgellm.kernels.program import Program
from edgellm.kernels.reference import ReferenceExecutor
from edgellm.memory import estimate
from edgellm.models import build_program

PROMPT = [11, 12, 13, 14, 15] * 14 + [20, 21]
GREEDY: dict[str, Any] = {"max_tokens": 16, "temperature": 0, "ignore_eos": True}
N_TOKENS = 150


def program_of(path: Path) -> Program:
    with GGUFFile.open(path) as gguf:
        return build_program(gguf)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("models") / "model.gguf", "gemma4", n_layer=5)


def test_layers_that_share_keys_have_none(path: Path) -> None:
    program = program_of(path)
    assert len(program.cache_layers) == 2
    read = [layer for op in program.ops for layer in op.read_layers()]
    assert read == [0, 1, 0, 1, 0]


def test_hidden_states_are_those_of_the_reference(path: Path) -> None:
    program = program_of(path)
    batch = replace(single_sequence(program, 40), hidden=True)
    judged = ReferenceExecutor(program, 2).run(batch)
    with closing(cpu_executor(program, 2)) as executor:
        rows = executor.run(batch)
    assert rows.shape == (40, program.n_embd)
    np.testing.assert_allclose(rows, judged, atol=1e-2 * float(np.abs(judged).max()))


@pytest.mark.parametrize("kept", [[149], [3, 70, 149], [], [0], [*range(0, N_TOKENS, 2)], [*range(149)]], ids=len)
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


@pytest.mark.parametrize(("executor", "kept"), [("reference", DEFAULT), *(("cpu", kept) for kept in CACHE_TYPES)])
def test_steps_of_any_size_and_what_is_known_give_the_same_answer(
    executor: str, kept: str, path: Path, drafts: bool, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"executor": executor, "n_threads": 2, "n_ctx": 256}
    options |= {"cache_type_k": kept, "cache_type_v": kept}
    with edgellm.load(path, **options) as llm:
        cold = list(llm.generate(PROMPT, **GREEDY).tokens)
        warm = llm.generate(PROMPT, **GREEDY)
        assert list(warm.tokens) == cold and warm.timings.reused_n > 0
        llm.save_state(tmp_path / "state", [*PROMPT, *cold])
    for n in (1, 7, 64):
        with edgellm.load(path, max_tokens_per_step=n, **options) as llm:
            assert list(llm.generate(PROMPT, **GREEDY).tokens) == cold, n
    with edgellm.load(path, **options) as llm:
        llm.load_state(tmp_path / "state")
        if drafts:
            guess(llm, [[*PROMPT, *cold]])
        restored = llm.generate(PROMPT, **GREEDY)
        assert (restored.timings.drafted_n > 0) == drafts
        assert list(restored.tokens) == cold and restored.timings.reused_n > 0


def test_the_second_table_is_looked_up_and_not_unpacked(path: Path, tmp_path: Path) -> None:
    program = program_of(path)
    table = program.tensors["per_layer_token_embd.weight"]
    executor = ReferenceExecutor(program)
    executor.run(single_sequence(program, 3))
    assert table.name not in executor._weights
    without = estimate(program, 1 << 30, 256)
    assert without.weights == (1 << 30) - table.nbytes
    odd = write_tiny_model(tmp_path / "odd.gguf", "gemma4", quants={"per_layer_token_embd.weight": "IQ3_S"})
    with pytest.raises(UnsupportedError, match=r"per_layer_token_embd\.weight is IQ3_S"):
        edgellm.load(odd, n_ctx=64)


BAD: dict[str, list[Any]] = {
    "attention.key_length_swa": [0, 1, 8, 2**32 - 1, "64"],
    "attention.value_length_swa": [0, 8, 2**32 - 1],
    "attention.value_length": [8, 64],
    "rope.dimension_count_swa": [0, 1, 3, 66, 2**32 - 1],
    "attention.sliding_window": [0, 2**32 - 1],
    "attention.sliding_window_pattern": [0, 2, [True], [True, True, True, True]],
    "attention.shared_kv_layers": [0, 1, 3, 4, 513, 2**32 - 1],
    "attention.head_count_kv": [[2, 2], [2, 2, 0, 2], [2, 2, 1, 2], [3, 3, 3, 3]],
    "feed_forward_length": [[256], [256, 256, 0, 512], 256],
    "embedding_length_per_layer_input": [0, 5, 512, 2**32 - 1],
    "final_logit_softcapping": [-1.0, float("nan"), float("inf")],
    "expert_used_count": [0, 6],
    "expert_feed_forward_length": [0, 33],
}


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, values in BAD.items() for value in values])
def test_a_key_that_cannot_be_is_a_named_error(key: str, value: Any, tmp_path: Path) -> None:
    bad = write_tiny_model(tmp_path / "bad.gguf", "gemma4", n_layer=4, metadata={f"gemma4.{key}": value})
    with pytest.raises(EdgeLLMError) as caught:
        program_of(bad)
    assert caught.value.code not in ("", "ERROR") and "bad.gguf" in str(caught.value)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_layer_scale_that_is_no_number_is_named(value: float, tmp_path: Path) -> None:
    name = "blk.0.layer_output_scale.weight"
    scale = {name: np.array([value], np.float32)}
    bad = write_tiny_model(tmp_path / "bad.gguf", "gemma4", leave_out=(name,), extra_tensors=scale)
    with pytest.raises(EdgeLLMError, match=name) as caught:
        program_of(bad)
    assert caught.value.code == "TENSOR_NAN"


@pytest.mark.parametrize("width", [16, 24, 5])
def test_a_table_of_any_width_is_right_or_named(width: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels take columns of a row 16 at a time; the reference any."""
    monkeypatch.setattr("tiny_models.OWN_INPUT", width)
    path = write_tiny_model(tmp_path / "model.gguf", "gemma4", "F32", n_layer=4)
    program = program_of(path)
    batch = single_sequence(program, 9)
    expected = ReferenceExecutor(program).run(batch)
    if width % 16:
        with pytest.raises(UnsupportedError, match="buffer own") as caught:
            cpu_executor(program, 16, 2, N_TOKENS, FORMS[0])
        assert caught.value.code == "BUFFER_COLUMNS"
        return
    executor = cpu_executor(program, 16, 2, N_TOKENS, FORMS[0])
    assert np.allclose(executor.run(batch), expected, atol=1e-2)
    executor.close()


@pytest.mark.parametrize(
    ("left_out", "added"),
    [
        (("blk.2.attn_v.weight",), {}),  # of a layer that slides
        ((), {"blk.1.attn_v.weight": np.full((256, 256), 0.01, np.float32)}),  # of one of two that see everything
        (("blk.0.attn_k.weight",), {}),
        (("blk.1.attn_k_norm.weight",), {}),
    ],
)
def test_a_matrix_that_one_layer_lost_is_named(
    left_out: tuple[str, ...], added: dict[str, np.ndarray], tmp_path: Path
) -> None:
    metadata = {"gemma4.attention.shared_kv_layers": 0}
    own = {f"blk.{i}.{name}": np.ones(size, np.float32) for i in (2, 3) for name, size in own_keys(i).items()}
    whole = {name: array for name, array in own.items() if name not in left_out}
    sound = write_tiny_model(tmp_path / "all.gguf", "gemma4", n_layer=4, metadata=metadata, extra_tensors=own)
    assert len(program_of(sound).cache_layers) == 4
    tensors = whole | added
    bad = write_tiny_model(
        tmp_path / "bad.gguf", "gemma4", n_layer=4, metadata=metadata, leave_out=left_out, extra_tensors=tensors
    )
    with pytest.raises(EdgeLLMError, match=r"blk\.\d\.attn_[vk].* is missing") as caught:
        program_of(bad)
    assert caught.value.code == "MODEL_TENSOR_MISSING"


def own_keys(layer: int) -> dict[str, tuple[int, ...]]:
    """What a layer behind the second lacks in a tiny model, as it shares keys."""
    wide = 1 + layer % 2
    found: dict[str, tuple[int, ...]] = {"attn_k.weight": (128 * wide, 256), "attn_k_norm.weight": (64 * wide,)}
    return found if wide == 2 else found | {"attn_v.weight": (128, 256)}
