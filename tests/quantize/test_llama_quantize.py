"""Whole files, byte for byte as llama-quantize writes them: every family of experts, delta-nets and sliding layers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from llama_quantize import llama_quantize
from quantize_plans import FAMILIES
from tiny_models import write_tiny_model

from edgellm.formats.file_types import WRITTEN
from edgellm.formats.gguf import GGUFFile
from edgellm.quantize.inputs import open_input
from edgellm.quantize.mixes import Recipe
from edgellm.quantize.pipeline import ImportanceMatrix, plan_quantization, quantize

MIXES = ("Q4_K_M", "MXFP4_MOE", "Q3_K_L", "IQ4_XS", "Q5_0")
CASES = [(name, MIXES[(i + turn) % len(MIXES)]) for i, name in enumerate((*FAMILIES, "gemma", "gemma2", "granite"))
         for turn in (0, 2)]  # fmt: skip


def ours(source: Path, target: Path, mix: str, importance: ImportanceMatrix | None = None) -> Path:
    with open_input(source) as opened:
        quantize(plan_quantization(opened, Recipe(mix), importance=importance), target, n_threads=1)
    return target


@pytest.mark.parametrize(("architecture", "mix"), CASES)
def test_a_file_has_the_bytes_of_llama_quantize(architecture: str, mix: str, tmp_path: Path) -> None:
    source = write_tiny_model(tmp_path / "f16.gguf", architecture, "F16", n_layer=4, tied=architecture == "gemma4")
    llama_quantize(source, tmp_path / "theirs.gguf", WRITTEN[mix].number)
    assert ours(source, tmp_path / "ours.gguf", mix).read_bytes() == (tmp_path / "theirs.gguf").read_bytes()


@pytest.mark.parametrize(("architecture", "mix"), [("gemma4", "Q4_0"), ("qwen35moe", "Q2_K_S"), ("gpt-oss", "Q4_K_S")])
def test_importance_of_each_expert_gives_the_same_weights(architecture: str, mix: str, tmp_path: Path) -> None:
    source = write_tiny_model(tmp_path / "f16.gguf", architecture, "F16", n_layer=2, tied=False)
    rng, columns = np.random.default_rng(0), dict[str, np.ndarray]()
    with GGUFFile.open(source) as gguf:
        for name, tensor in gguf.tensors.items():
            n_expert = tensor.shape[0] if len(tensor.shape) == 3 else 1
            columns[name] = rng.gamma(1, 1, n_expert * tensor.shape[-1]).astype(np.float32)
    np.savez(tmp_path / "importance.npz", **columns)
    llama_quantize(source, tmp_path / "theirs.gguf", WRITTEN[mix].number, tmp_path / "importance.npz")
    path = ours(source, tmp_path / "ours.gguf", mix, ImportanceMatrix(columns))
    with GGUFFile.open(path) as written, GGUFFile.open(tmp_path / "theirs.gguf") as judge:
        assert list(written.tensors) == list(judge.tensors)
        for name, tensor in judge.tensors.items():
            assert written.tensors[name].quant is tensor.quant, name
            assert np.array_equal(written.tensors[name].data, tensor.data), name
