"""Adapters for tests, written with the ``gguf`` package: random LoRA pairs for a model's tensors, control vectors."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from edgellm.formats.gguf import GGUFFile

FEED_FORWARD = ("ffn_gate.weight", "ffn_up.weight", "ffn_down.weight")
EXPERTS = ("ffn_gate_exps.weight", "ffn_up_exps.weight", "ffn_down_exps.weight", "ffn_gate_inp.weight")
ATTENTION = ("attn_q.weight", "attn_k.weight", "attn_v.weight", "attn_output.weight")
AROUND = ("token_embd.weight", "output.weight")


def lora_pairs(
    model: Path, endings: Sequence[str], rank: int = 4, seed: int = 0, size: float = 0.1
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Random (A, B) for the tensors of a model whose names end so."""
    rng, pairs = np.random.default_rng(seed), {}
    with GGUFFile.open(model) as gguf_file:
        for name, tensor in gguf_file.tensors.items():
            if not name.endswith(tuple(endings)):
                continue
            *more, n_out, n_in = tensor.shape
            a, b = (rank, n_in), (n_out, rank)
            if name == "token_embd.weight":  # a row for each token
                a, b = (n_out, rank), (n_in, rank)
            pairs[name] = (
                rng.standard_normal((*more, *a)).astype(np.float32) * np.float32(size),
                rng.standard_normal((*more, *b)).astype(np.float32) * np.float32(size),
            )
    assert pairs, f"no tensor of {model.name} ends so"
    return pairs


def write_lora(
    path: Path,
    pairs: dict[str, tuple[np.ndarray, np.ndarray]],
    architecture: str = "llama",
    alpha: float = 8.0,
    metadata: dict[str, Any] | None = None,
    tensors: dict[str, np.ndarray] | None = None,
    quant: str = "F32",
) -> Path:
    """An adapter file; ``metadata`` stands in place of its keys, None leaves one out; ``tensors`` are added."""
    keys = {"general.type": "adapter", "adapter.type": "lora", "adapter.lora.alpha": alpha} | (metadata or {})
    writer = gguf.GGUFWriter(path, keys.pop("general.architecture", architecture))
    for key, value in keys.items():
        if isinstance(value, str):
            writer.add_string(key, value)
        elif isinstance(value, list):
            writer.add_array(key, value)
        elif value is not None:
            writer.add_float32(key, value)
    kind = gguf.GGMLQuantizationType[quant]
    for name, (a, b) in pairs.items():
        for half, values in (("lora_a", a), ("lora_b", b)):
            writer.add_tensor(f"{name}.{half}", gguf.quants.quantize(values, kind), raw_dtype=kind)
    for name, values in (tensors or {}).items():
        writer.add_tensor(name, values)
    return _written(writer, path)


def write_control_vector(path: Path, directions: dict[str, np.ndarray], architecture: str = "controlvector") -> Path:
    """A control vector; the names of directions are whole."""
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_string("controlvector.model_hint", "llama")
    writer.add_int32("controlvector.layer_count", len(directions))
    for name, values in directions.items():
        writer.add_tensor(name, values)
    return _written(writer, path)


def _written(writer: Any, path: Path) -> Path:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def merge(model: Path, path: Path, pairs: dict[str, tuple[np.ndarray, np.ndarray]], factor: float) -> Path:
    """A copy of an F32 model whose weights are W + factor B A."""
    shutil.copy(model, path)
    with GGUFFile.open(path) as read:
        whole, places = np.memmap(path, np.uint8, "r+"), {}
        start = np.frombuffer(read._maps[0], np.uint8).ctypes.data
        for name in pairs:
            tensor = read.tensors[name]
            assert tensor.quant.name == "F32", "merging rounds"
            places[name] = (tensor.data.ctypes.data - start, tensor.nbytes, tensor.shape)
        for name, (a, b) in pairs.items():
            at, nbytes, shape = places[name]
            weights = whole[at : at + nbytes].view(np.float32).reshape(shape)
            weights += factor * (a @ b.T if name == "token_embd.weight" else b @ a)
        whole.flush()
    return path
