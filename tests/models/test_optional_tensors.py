"""Tensors that a file of an architecture may have and need not: biases and numbers beside a matrix, several in one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf as gguf_package
import hostile_models
import numpy as np
import pytest
import raw_gguf as raw
from test_gguf_writer import llama_cpp_text
from tiny_models import EXPERTS, HYBRIDS, N_EXPERT, write_tiny_model

from edgellm.formats.errors import EdgeLLMError
from edgellm.formats.gguf import GGUFFile
from edgellm.kernels.cpu.run.executor import CPUExecutor
from edgellm.kernels.ops import ExpertMatmul, Matmul
from edgellm.kernels.program import Batch, Op
from edgellm.kernels.reference import ReferenceExecutor
from edgellm.models import build_program

TOKENS = [(7 * i) % 270 for i in range(20)]
ARCHITECTURES = (
    *("llama", "qwen2", "qwen3", "gemma", "gemma2", "gemma3", "granite", "lfm2"),
    *EXPERTS,
    "qwen35",
)
"""Those of ``write_tiny_model``."""
MATRIX_ALONE = ("ffn_gate_inp_shexp.weight", "token_embd.weight", "conv.weight", "conv1d.weight", "ssm_norm.weight")
MATRIX_ALONE += ("attn_k_b.weight", "attn_v_b.weight")
"""What is multiplied by and has nothing beside it."""


def tiny(path: Path, architecture: str, **more: Any) -> Path:
    return write_tiny_model(
        path, architecture, "F32", n_embd=64, n_ff=32, head_dim=32, n_head_kv=4 if architecture == "qwen2" else 2,
        n_head=4, tied=architecture == "qwen2", **more,
    )  # fmt: skip


def beside(path: Path) -> dict[str, np.ndarray]:
    """A bias and a number for each matrix of a file that products are with; for each expert one."""
    rng, found = np.random.default_rng(5), {}
    with GGUFFile.open(path) as gguf:
        for name, tensor in gguf.tensors.items():
            shape, base = tensor.shape, name.removesuffix(".weight")
            if len(shape) == 1 or not name.endswith(".weight") or name.endswith(MATRIX_ALONE):
                continue
            if base != "per_layer_model_proj" and not base.endswith("ffn_gate_inp"):
                found[f"{base}.scale"] = rng.uniform(0.5, 2, shape[0] if len(shape) == 3 else 1).astype(np.float32)
            if f"{base}.scale" not in gguf.tensors:  # one of Gemma 4's has it: it would not multiply the bias
                found[f"{base}.bias"] = rng.normal(0, 0.1, shape[:-1]).astype(np.float32)
        if "output.weight" not in gguf.tensors:
            found["output.bias"] = rng.normal(0, 0.1, gguf.tensors["token_embd.weight"].shape[0]).astype(np.float32)
        return {name: array for name, array in found.items() if name not in gguf.tensors}


def logits(path: Path, added: dict[str, np.ndarray] | None = None) -> np.ndarray:
    """The reference's; ``added`` is applied behind each product, whatever the program says of it."""
    added, own = added or {}, dict[str, np.ndarray]()

    def hook(_: int, op: Op, read: Any) -> None:
        if not isinstance(op, Matmul | ExpertMatmul):
            return
        out, name = read(op.out), op.weight.removesuffix(".weight")
        bias_name = "output" if name == "token_embd" else name
        scale, bias = added.get(f"{name}.scale", np.ones(1, np.float32)), added.get(f"{bias_name}.bias")
        inside = own.get(f"{name}.bias", np.zeros((1, 1), np.float32))  # what the number does not multiply
        if isinstance(op, ExpertMatmul):
            ids = read(op.ids)
            out, scale = out.reshape(*ids.shape, -1), scale[ids % len(scale)][..., None]
            bias, inside = None if bias is None else bias[ids], inside[ids % len(inside)]
        out[...] = (out - inside) * scale + inside + (0 if bias is None else bias)

    with GGUFFile.open(path) as gguf:
        own |= {name: t.dequantize().reshape(t.shape) for name, t in gguf.tensors.items() if name.endswith(".bias")}
        program = build_program(gguf)
        return ReferenceExecutor(program).run(Batch.single(program, TOKENS), hook if added else None)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_any_product_takes_a_bias_and_a_number(architecture: str, tmp_path: Path) -> None:
    plain = tiny(tmp_path / "plain.gguf", architecture)
    added = beside(plain)
    assert len(added) > 10
    path = tiny(tmp_path / "more.gguf", architecture, extra_tensors=added)
    expected, found = logits(plain, added), logits(path)
    assert np.allclose(found, expected, rtol=0, atol=1e-4 * float(expected.std()))
    assert not np.allclose(found, logits(plain), atol=0.1 * float(expected.std()))


@pytest.mark.parametrize("quant", ["Q8_0", "Q4_K"])
def test_numbers_beside_experts_on_the_cpu(quant: str, tmp_path: Path) -> None:
    names = {f"blk.0.ffn_{name}_exps": (N_EXPERT,) for name in ("gate", "up", "down")}
    scales = {f"{name}.scale": np.linspace(0.3, 2, *n).astype(np.float32) for name, n in names.items()}
    path = write_tiny_model(tmp_path / "m.gguf", "qwen3moe", quant, extra_tensors=scales)
    with GGUFFile.open(path) as gguf:
        program = build_program(gguf)
        batch = Batch.single(program, TOKENS)
        fast = CPUExecutor(program, 2, 2, 32)
        found, expected = fast.run(batch).copy(), ReferenceExecutor(program).run(batch)
        fast.close()
    assert float(((found - expected) ** 2).mean() / (expected**2).mean()) < 1e-6


def folded_models(folder: Path, architecture: str, names: tuple[str, ...]) -> tuple[Path, Path]:
    """A file with numbers beside its experts, and one whose experts are multiplied by them."""
    scales = {f"{name}.scale": np.linspace(0.3, 3, N_EXPERT).astype(np.float32) for name in names}
    path = write_tiny_model(folder / "scaled.gguf", architecture, "F32", tied=False, extra_tensors=scales)
    reader = gguf_package.GGUFReader(path)
    weights = {t.name: t.data.reshape(t.shape[::-1]).copy() for t in reader.tensors if t.name not in scales}
    for name in names:
        weights[f"{name}.weight"] *= scales[f"{name}.scale"][:, None, None]
    other = write_tiny_model(
        folder / "folded.gguf", architecture, tied=False, leave_out=tuple(weights), extra_tensors=weights
    )
    return path, other


def test_llama_cpp_multiplies_experts_by_the_same_numbers(tmp_path: Path) -> None:
    names = tuple(f"blk.{i}.ffn_{name}_exps" for i in range(2) for name in ("gate", "up", "down"))
    scaled, folded = folded_models(tmp_path, "qwen3moe", names)
    assert np.allclose(logits(scaled), logits(folded), rtol=0, atol=1e-4)
    assert llama_cpp_text(scaled) == llama_cpp_text(folded)


def gate_and_up_in_one(model: hostile_models.Model) -> None:
    """Of each expert the rows of gate, then those of up."""
    rows = {name: [dims, kind, data] for name, dims, kind, data, _ in model.tensors}
    for kind in (".weight", ".bias"):
        for name in [name for name in rows if name.endswith(f"ffn_gate_exps{kind}")]:
            dims, number, gate = rows[name]
            up = rows[name.replace("gate", "up")][2]
            n, each = dims[-1], len(gate) // dims[-1]
            runs = [part[i * each : (i + 1) * each] for i in range(n) for part in (gate, up)]
            doubled = [*dims[:-2], 2 * dims[-2], n]
            model.tensors.append([name.replace("gate", "gate_up"), doubled, number, b"".join(runs), 0])
    model.tensors = [t for t in model.tensors if "ffn_gate_exps" not in t[0] and "ffn_up_exps" not in t[0]]


@pytest.mark.parametrize("architecture", [name for name in EXPERTS if name != "gemma4"])
def test_gate_and_up_of_experts_may_be_one_tensor(architecture: str, tmp_path: Path) -> None:
    path = write_tiny_model(tmp_path / "two.gguf", architecture, "Q8_0", n_ff=64, tied=False)
    model = hostile_models.take_apart(path.read_bytes())
    gate_and_up_in_one(model)
    one = tmp_path / "one.gguf"
    one.write_bytes(model.bytes())
    with GGUFFile.open(one) as gguf:
        assert "blk.0.ffn_gate_up_exps.weight" in build_program(gguf).tensors
    assert np.allclose(logits(one), logits(path), rtol=0, atol=1e-4)
    if architecture in HYBRIDS[1:]:  # whose files llama.cpp takes so
        assert llama_cpp_text(one) == llama_cpp_text(path)


def as_ollama_wrote_it(model: hostile_models.Model, architecture: str) -> None:
    """Heads by layer, a bias without its kind, what a text does not need, and what its own runner asked for."""
    for tensor in model.tensors:
        tensor[0] = tensor[0].replace("ssm_dt.bias", "ssm_dt")
    model.tensors += [[name, [32], 0, bytes(128), 0] for name in ("mtp.fc.weight", "v.blk.0.norm1.weight", "a.x")]
    n_layer, n_kv = (model.get(f"{architecture}.{key}")[2] for key in ("block_count", "attention.head_count_kv"))
    counts = [n_kv * (i % 2) for i in range(n_layer)]
    model.put(f"{architecture}.attention.head_count_kv", (raw.ARRAY, raw.U32), counts)
    for key in ("image_token_id", "vision_start_token_id", "vision_end_token_id", "vision.block_count"):
        model.put(f"{architecture}.{key}", raw.U32, 7)
    for key in ("mrope_sections", "rope.mrope_section", "rope.dimension_sections"):
        model.put(f"{architecture}.{key}", (raw.ARRAY, raw.I32), [11, 11, 10])
    for key in ("rope.mrope_interleaved", "ssm.v_head_reordered", "norm_top_k_prob"):
        model.put(f"{architecture}.{key}", raw.BOOL, 1)


@pytest.mark.parametrize("architecture", ["qwen35", "qwen35moe"])
def test_a_hybrid_as_ollama_wrote_it_is_the_same_model(architecture: str, tmp_path: Path) -> None:
    path, other = tiny(tmp_path / "plain.gguf", architecture, n_layer=4), tmp_path / "other.gguf"
    model = hostile_models.take_apart(path.read_bytes())
    as_ollama_wrote_it(model, architecture)
    other.write_bytes(model.bytes())
    assert np.array_equal(logits(other), logits(path))
    for key, kind, value in (
        ("ssm.v_head_reordered", raw.BOOL, 0),
        ("attention.head_count_kv", (raw.ARRAY, raw.U32), [0, 2, 0, 1]),
        ("attention.head_count_kv", (raw.ARRAY, raw.U32), [2, 0, 2, 0]),
        ("attention.head_count_kv", (raw.ARRAY, raw.U32), [0, 0, 0, 0]),
        ("attention.head_count_kv", (raw.ARRAY, raw.U32), [0, 2]),
    ):
        bad = hostile_models.take_apart(other.read_bytes())
        bad.put(f"{architecture}.{key}", kind, value)
        other_bad = tmp_path / "bad.gguf"
        other_bad.write_bytes(bad.bytes())
        with GGUFFile.open(other_bad) as gguf, pytest.raises(EdgeLLMError, match=key.replace(".", r"\.")) as caught:
            build_program(gguf)
        assert caught.value.code.startswith(("MODEL_", "GGUF_KEY"))
