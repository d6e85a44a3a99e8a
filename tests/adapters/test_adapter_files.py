"""An adapter's file is a stranger's: what is wrong or unknown in it is an error by name before anything is computed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from adapter_files import lora_pairs, write_control_vector, write_lora
from tiny_models import write_tiny_model

from edgellm.adapters.control_vector import open_control_vector
from edgellm.adapters.lora import open_lora
from edgellm.adapters.rewrite import adapted
from edgellm.formats.errors import EdgeLLMError, FormatError, UnsupportedError
from edgellm.formats.gguf import GGUFFile
from edgellm.kernels.program import Program
from edgellm.models import build_program

Q = "blk.0.attn_q.weight"
A, B = np.ones((4, 64), np.float32), np.ones((128, 4), np.float32)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("model") / "m.gguf", "llama", "F32", n_embd=64, head_dim=32)


@pytest.fixture(scope="module")
def program(model: Path) -> Program:
    with GGUFFile.open(model) as gguf:
        return build_program(gguf)


def nan(values: np.ndarray) -> np.ndarray:
    changed = values.copy()
    changed[-1, -1] = np.nan
    return changed


LORAS: dict[str, tuple[dict[str, Any], type[EdgeLLMError], str]] = {
    "no adapter": ({"metadata": {"general.type": "model"}}, FormatError, "general.type is .?model"),
    "no type": ({"metadata": {"general.type": None}}, FormatError, "general.type is missing"),
    "another kind": ({"metadata": {"adapter.type": "ia3"}}, FormatError, "adapter.type is .?ia3.*'lora'"),
    "activated": ({"metadata": {"adapter.alora.invocation_tokens": [1, 2]}}, UnsupportedError, "invocation_tokens"),
    "unknown key": ({"metadata": {"adapter.lora.magnitude": 1.0}}, UnsupportedError, "adapter.lora.magnitude"),
    "another's key": ({"metadata": {"llama.rope.freq_base": 2.0}}, UnsupportedError, "llama.rope.freq_base"),
    "alpha is NaN": ({"alpha": float("nan")}, FormatError, "adapter.lora.alpha"),
    "alpha below 0": ({"alpha": -1.0}, FormatError, "adapter.lora.alpha"),
    "alpha is text": ({"metadata": {"adapter.lora.alpha": "16"}}, FormatError, "adapter.lora.alpha.*STRING"),
    "a norm": ({"tensors": {"blk.0.attn_norm.weight": A[0]}}, UnsupportedError, "attn_norm.weight.*no half"),
    "half a pair": ({"tensors": {"blk.0.attn_k.weight.lora_a": A}}, FormatError, "attn_k.weight.lora_b is missing"),
    "no tensors": ({"pairs": {}}, FormatError, "no tensors"),
    "ranks differ": ({"pairs": {Q: (A[:3], B)}}, FormatError, "has A"),
    "vectors": ({"pairs": {Q: (A[0], B[0])}}, FormatError, "has A"),
    "infinite rank": ({"pairs": {Q: (np.ones((5000, 64), "f4"), np.ones((128, 5000), "f4"))}}, FormatError, "5,000"),
    "NaN": ({"pairs": {Q: (nan(A), B)}}, FormatError, "lora_a holds NaN"),
    "NaN in B": ({"pairs": {Q: (A, nan(B))}}, FormatError, "lora_b holds NaN"),
}


@pytest.mark.parametrize("case", LORAS)
def test_a_lora_file_that_is_wrong_is_refused_by_name(case: str, tmp_path: Path) -> None:
    options, kind, message = LORAS[case]
    file = write_lora(tmp_path / "lora.gguf", **({"pairs": {Q: (A, B)}} | options))
    with pytest.raises(kind, match=message):
        open_lora(file)


OF_MODEL: dict[str, tuple[dict[str, Any], str]] = {
    "another architecture": ({"architecture": "qwen3"}, "qwen3.*one of a llama"),
    "another width": ({"pairs": {Q: (A[:, :32], B)}}, "attn_q.weight has A"),
    "experts": ({"pairs": {Q: (A[None], B[None])}}, "attn_q.weight has A"),
    "no such tensor": ({"pairs": {"blk.9.attn_q.weight": (A, B)}}, "blk.9.attn_q.weight, which this model has not"),
    "a norm": ({"pairs": {"blk.0.attn_norm.weight": (A, B)}}, "is not multiplied"),
    "an embedding the other way": ({"pairs": {"token_embd.weight": (np.ones((276, 4), "f4"), B)}}, "token_embd"),
}


@pytest.mark.parametrize("case", OF_MODEL)
def test_an_adapter_of_another_model_is_refused_by_name(case: str, program: Program, tmp_path: Path) -> None:
    options, message = OF_MODEL[case]
    lora = open_lora(write_lora(tmp_path / "lora.gguf", **({"pairs": {Q: (A, B)}} | options)))
    try:
        with pytest.raises(EdgeLLMError, match=message) as raised:
            adapted(program, [lora])
        assert raised.value.code.startswith("ADAPTER_")
    finally:
        lora.close()


V = np.ones(64, np.float32)
VECTORS: dict[str, tuple[Callable[[Path], Path], str]] = {
    "a model": (lambda path: write_control_vector(path, {"direction.1": V}, "llama"), "general.architecture"),
    "layer 0": (lambda path: write_control_vector(path, {"direction.0": V}), "direction.0"),
    "no number": (lambda path: write_control_vector(path, {"direction.x": V}), "direction.x"),
    "another tensor": (lambda path: write_control_vector(path, {"blk.0.attn_q.weight": A}), "attn_q"),
    "a matrix": (lambda path: write_control_vector(path, {"direction.1": A}), "shape"),
    "NaN": (lambda path: write_control_vector(path, {"direction.1": V * np.nan}), "NaN"),
    "another width": (lambda path: write_control_vector(path, {"direction.1": V[:32]}), "32 numbers"),
    "past the last layer": (lambda path: write_control_vector(path, {"direction.2": V}), "layer 2"),
}


@pytest.mark.parametrize("case", VECTORS)
def test_a_wrong_control_vector_is_refused_by_name(case: str, program: Program, tmp_path: Path) -> None:
    make, message = VECTORS[case]
    with pytest.raises(EdgeLLMError, match=message):
        vector = open_control_vector(make(tmp_path / "v.gguf"))
        try:
            adapted(program, [vector])
        finally:
            vector.close()


def test_every_cut_of_an_adapter_file_is_an_error_and_no_more(model: Path, tmp_path: Path) -> None:
    whole = write_lora(tmp_path / "lora.gguf", lora_pairs(model, ["attn_q.weight"])).read_bytes()
    for n in range(0, len(whole) - 1, max(1, len(whole) // 60)):
        (tmp_path / "cut.gguf").write_bytes(whole[:n])
        with pytest.raises(EdgeLLMError):
            open_lora(tmp_path / "cut.gguf")


def test_an_adapter_for_vectors_of_texts_is_refused(program: Program, tmp_path: Path) -> None:
    lora = open_lora(write_lora(tmp_path / "lora.gguf", {Q: (A, B)}))
    with pytest.raises(UnsupportedError, match="makes vectors"):
        adapted(replace(program, is_encoder=True), [lora])
    lora.close()
