"""What a model file says about itself: the facts that ``edgellm show`` prints and a benchmark is labelled with."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from edgellm.formats.gguf import GGUFFile

# general.file_type: the mix that the file was quantized with, as llama.cpp numbers and names it
FILE_TYPES = {
    0: "all F32",
    1: "F16",
    2: "Q4_0",
    3: "Q4_1",
    7: "Q8_0",
    8: "Q5_0",
    9: "Q5_1",
    10: "Q2_K - Medium",
    11: "Q3_K - Small",
    12: "Q3_K - Medium",
    13: "Q3_K - Large",
    14: "Q4_K - Small",
    15: "Q4_K - Medium",
    16: "Q5_K - Small",
    17: "Q5_K - Medium",
    18: "Q6_K",
    19: "IQ2_XXS - 2.0625 bpw",
    20: "IQ2_XS - 2.3125 bpw",
    21: "Q2_K - Small",
    22: "IQ3_XS - 3.3 bpw",
    23: "IQ3_XXS - 3.0625 bpw",
    24: "IQ1_S - 1.5625 bpw",
    25: "IQ4_NL - 4.5 bpw",
    26: "IQ3_S - 3.4375 bpw",
    27: "IQ3_S mix - 3.66 bpw",
    28: "IQ2_S - 2.5 bpw",
    29: "IQ2_M - 2.7 bpw",
    30: "IQ4_XS - 4.25 bpw",
    31: "IQ1_M - 1.75 bpw",
    32: "BF16",
    36: "TQ1_0 - 1.69 bpw ternary",
    37: "TQ2_0 - 2.06 bpw ternary",
    38: "MXFP4 MoE",
    39: "NVFP4",
    40: "Q1_0",
    41: "Q2_0",
}


@dataclass(frozen=True)
class ModelCard:
    """The facts of one file. Whatever the file leaves out is None or empty.

    size_label       such as ``135M``; the file's own, else rounded from the parameters
    file_type        the mix in llama.cpp's words, such as ``Q4_K - Medium``
    tensor_types     type -> (tensors, bytes), the largest first
    sampling         ``general.sampling.*`` without the prefix
    """

    path: Path
    name: str | None
    architecture: str
    size_label: str
    n_params: int
    nbytes: int
    file_type: str
    tensor_types: dict[str, tuple[int, int]]
    n_layers: int | None
    n_embd: int | None
    n_heads: int | None
    n_kv_heads: int | None
    context_length: int | None
    tokenizer: str | None
    pre_tokenizer: str | None
    n_vocab: int
    chat_template: str | None
    licence: str | None
    sampling: dict[str, Any]

    @property
    def model_type(self) -> str:
        """Architecture, size and mix, as the first column of a benchmark names a model."""
        return f"{self.architecture} {self.size_label} {self.file_type}"


def model_card(gguf: GGUFFile) -> ModelCard:
    """Read the card of an open file. It computes nothing and does not need the architecture to be known."""
    architecture = gguf.architecture
    n_params = sum(math.prod(tensor.shape) for tensor in gguf.tensors.values())
    types = _tensor_types(gguf)

    def number(key: str) -> int | None:
        value = gguf.metadata.get(f"{architecture}.{key}")
        if isinstance(value, np.ndarray) and len(value):
            value = int(value.max())  # one value for each layer
        return value if isinstance(value, int) else None

    prefix = "general.sampling."
    tokens = gguf.metadata.get("tokenizer.ggml.tokens")
    return ModelCard(
        path=gguf.path,
        name=gguf.get("general.name", str),
        architecture=architecture,
        size_label=gguf.get("general.size_label", str) or _size_label(n_params),
        n_params=n_params,
        nbytes=sum(tensor.nbytes for tensor in gguf.tensors.values()),
        file_type=FILE_TYPES.get(gguf.get("general.file_type", int, -1)) or next(iter(types), "unknown"),
        tensor_types=types,
        n_layers=number("block_count"),
        n_embd=number("embedding_length"),
        n_heads=number("attention.head_count"),
        n_kv_heads=number("attention.head_count_kv"),
        context_length=number("context_length"),
        tokenizer=gguf.get("tokenizer.ggml.model", str),
        pre_tokenizer=gguf.get("tokenizer.ggml.pre", str),
        n_vocab=len(tokens) if isinstance(tokens, list) else 0,
        chat_template=gguf.get("tokenizer.chat_template", str),
        licence=gguf.get("general.license", str),
        sampling={key[len(prefix) :]: value for key, value in gguf.metadata.items() if key.startswith(prefix)},
    )


def _tensor_types(gguf: GGUFFile) -> dict[str, tuple[int, int]]:
    counts: Counter[str] = Counter()
    nbytes: Counter[str] = Counter()
    for tensor in gguf.tensors.values():
        counts[tensor.quant.name] += 1
        nbytes[tensor.quant.name] += tensor.nbytes
    return {name: (counts[name], total) for name, total in nbytes.most_common()}


def _size_label(n_params: int) -> str:
    if n_params >= 10**9:
        return f"{n_params / 1e9:.1f}B".replace(".0B", "B")
    return f"{n_params / 1e6:.0f}M" if n_params >= 10**6 else f"{n_params / 1e3:.0f}K"
