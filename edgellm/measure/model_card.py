"""What a model file says about itself: the facts that ``edgellm show`` prints and a benchmark is labelled with."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgellm.formats.file_types import LABELS, size_label, type_counts

if TYPE_CHECKING:
    from edgellm.formats.gguf import GGUFFile


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
    types = type_counts((tensor.quant.name, tensor.nbytes) for tensor in gguf.tensors.values())

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
        size_label=gguf.get("general.size_label", str) or size_label(n_params),
        n_params=n_params,
        nbytes=sum(tensor.nbytes for tensor in gguf.tensors.values()),
        file_type=LABELS.get(gguf.get("general.file_type", int, -1)) or next(iter(types), "unknown"),
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
