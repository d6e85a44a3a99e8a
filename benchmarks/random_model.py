"""Write a GGUF file of a real model's shape with random, sane weights: for speed and memory, not for text.

    python benchmarks/random_model.py 1b Q4_K_M random-1b-q4_k_m.gguf

1b has the shape of Llama 3.2 1B, 4b that of Qwen3 4B, with their vocabularies' sizes and tied embeddings. Blocks are
random bytes whose scales give the weights a deviation of 1 / sqrt(n_in), so that activations stay in their range and
no two lines of the file are alike. Q4_K_M gives every tensor the type that llama.cpp's mix of that name does.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edgellm.formats.gguf_writer import TensorPlan, rows_in_chunks, write_gguf
from edgellm.formats.quant_types import QUANT_TYPES


@dataclass(frozen=True)
class Shape:
    """The hyperparameters of a model."""

    architecture: str
    n_layer: int
    n_embd: int
    n_ff: int
    n_head: int
    n_head_kv: int
    head_dim: int
    n_vocab: int
    rope_base: float


SHAPES = {
    "1b": Shape("llama", 16, 2048, 8192, 32, 8, 64, 128256, 500000.0),
    "4b": Shape("qwen3", 36, 2560, 9728, 32, 8, 128, 151936, 1000000.0),
}
MIXES = ("Q4_K_M", "Q8_0")

# float16 fields of a block: byte, and the multiple of the scale that centres the values
SCALES = {"Q8_0": ((0, 1.0),), "Q4_K": ((0, 1.0), (2, 7.5)), "Q6_K": ((208, 1.0),)}


def tensor_type(mix: str, name: str, layer: int, n_layer: int) -> str:
    """The type of a matrix: Q4_K_M keeps the embedding, and half of attn_v and ffn_down, at six bits."""
    if mix != "Q4_K_M":
        return mix
    more = layer < n_layer // 8 or layer >= 7 * n_layer // 8 or (layer - n_layer // 8) % 3 == 2
    return "Q6_K" if name == "token_embd" or (name in ("attn_v", "ffn_down") and more) else "Q4_K"


def random_matrix(name: str, shape: tuple[int, int], quant_name: str, seed: int) -> TensorPlan:
    """A matrix of random blocks, made while it is written."""
    quant = QUANT_TYPES[quant_name]
    row_nbytes = quant.row_nbytes(shape[1])

    def blocks(rng: np.random.Generator, n_rows: int, scale: float) -> np.ndarray:
        data = rng.integers(0, 256, (n_rows * row_nbytes // quant.block_nbytes, quant.block_nbytes), np.uint8)
        for at, multiple in SCALES[quant_name]:
            data[:, at : at + 2] = np.array([scale * multiple], "<f2").view(np.uint8)
        return data

    def chunks() -> Iterator[np.ndarray]:
        rng = np.random.default_rng(seed)
        sample = quant.dequantize(blocks(rng, 1, 1.0))
        scale = 1 / math.sqrt(shape[1]) / float(np.std(sample))
        for start, stop in rows_in_chunks(shape[0], row_nbytes):
            yield blocks(rng, stop - start, scale)

    return TensorPlan(name, shape, quant, chunks)


def ones(name: str, n: int) -> TensorPlan:
    """The weight of a norm."""
    return TensorPlan(name, (n,), QUANT_TYPES["F32"], lambda: [np.ones(n, np.float32)])


def tensors(shape: Shape, mix: str) -> list[TensorPlan]:
    """All tensors in the order of llama.cpp's converter."""
    s = shape
    matrices = {
        "attn_q": (s.n_head * s.head_dim, s.n_embd),
        "attn_k": (s.n_head_kv * s.head_dim, s.n_embd),
        "attn_v": (s.n_head_kv * s.head_dim, s.n_embd),
        "attn_output": (s.n_embd, s.n_head * s.head_dim),
        "ffn_gate": (s.n_ff, s.n_embd),
        "ffn_up": (s.n_ff, s.n_embd),
        "ffn_down": (s.n_embd, s.n_ff),
    }
    norms = {"attn_norm": s.n_embd, "ffn_norm": s.n_embd}
    if s.architecture == "qwen3":
        norms |= {"attn_q_norm": s.head_dim, "attn_k_norm": s.head_dim}
    embedding = tensor_type(mix, "token_embd", 0, s.n_layer)
    plans = [
        random_matrix("token_embd.weight", (s.n_vocab, s.n_embd), embedding, 0),
        ones("output_norm.weight", s.n_embd),
    ]
    for layer in range(s.n_layer):
        for name, n in norms.items():
            plans.append(ones(f"blk.{layer}.{name}.weight", n))
        for i, (name, size) in enumerate(matrices.items()):
            quant = tensor_type(mix, name, layer, s.n_layer)
            plans.append(random_matrix(f"blk.{layer}.{name}.weight", size, quant, 1 + layer * len(matrices) + i))
    return plans


def metadata(shape: Shape, name: str) -> dict[str, tuple[Any, str]]:
    """The keys that a runner needs, and a byte-level vocabulary of the right size whose words mean nothing."""
    s, a = shape, shape.architecture
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = [chr(b) for b in visible] + [chr(256 + i) for i in range(256 - len(visible))]
    words = [f"{letters[64 + i % 26]}{i}" for i in range(s.n_vocab - 259)]
    tokens = [*letters, "he", "in", *words, "<|end|>"]
    return {
        "general.architecture": (a, "STRING"),
        "general.name": (name, "STRING"),
        f"{a}.context_length": (32768, "UINT32"),
        f"{a}.embedding_length": (s.n_embd, "UINT32"),
        f"{a}.block_count": (s.n_layer, "UINT32"),
        f"{a}.feed_forward_length": (s.n_ff, "UINT32"),
        f"{a}.attention.head_count": (s.n_head, "UINT32"),
        f"{a}.attention.head_count_kv": (s.n_head_kv, "UINT32"),
        f"{a}.attention.key_length": (s.head_dim, "UINT32"),
        f"{a}.attention.value_length": (s.head_dim, "UINT32"),
        f"{a}.attention.layer_norm_rms_epsilon": (1e-6, "FLOAT32"),
        f"{a}.rope.dimension_count": (s.head_dim, "UINT32"),
        f"{a}.rope.freq_base": (s.rope_base, "FLOAT32"),
        "tokenizer.ggml.model": ("gpt2", "STRING"),
        "tokenizer.ggml.pre": ("llama-bpe", "STRING"),
        "tokenizer.ggml.tokens": (tokens, "ARRAY[STRING]"),
        "tokenizer.ggml.token_type": ([1] * (len(tokens) - 1) + [3], "ARRAY[INT32]"),
        "tokenizer.ggml.merges": (["h e", "i n"], "ARRAY[STRING]"),
        "tokenizer.ggml.eos_token_id": (len(tokens) - 1, "UINT32"),
        "tokenizer.ggml.add_bos_token": (False, "BOOL"),
    }


def write_random_model(shape_name: str, mix: str, path: Path) -> list[Path]:
    """The file of a shape and a mix, whole under its name; the parts that were written."""
    shape = SHAPES[shape_name]
    return write_gguf(path, metadata(shape, f"Random {shape_name} {mix}"), tensors(shape, mix))


def main() -> None:
    """Read the command line and write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("mix", choices=MIXES)
    parser.add_argument("path", type=Path)
    options = parser.parse_args()
    for path in write_random_model(options.shape, options.mix, options.path):
        print(f"{path}: {path.stat().st_size / 1e9:.2f} GB")


if __name__ == "__main__":
    main()
