"""A LoRA adapter: for some weights W of a model a pair A (rank, n_in), B (n_out, rank); W + scale alpha/rank B A.

    general.type          "adapter"              adapter.type        "lora"
    general.architecture  that of its model      adapter.lora.alpha  0: pairs count as they are
    tensors               NAME.lora_a and NAME.lora_b for a tensor NAME of the model

Of experts each has a pair: A (n_expert, rank, n_in), B (n_expert, n_out, rank). Of token_embd.weight A is (n_vocab,
rank), a row for each token. These are llama.cpp's files.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from edgellm.adapters.adapter_file import checked_keys, digest_of, finite, refused, value_of, wrong
from edgellm.formats.findings import short
from edgellm.formats.gguf import GGUFFile, QuantizedTensor

KEYS = ("adapter.type", "adapter.lora.alpha", "adapter.lora.task_name", "adapter.lora.prompt_prefix")
INVOCATION = "adapter.alora.invocation_tokens"
MAX_RANK = 4096
MAX_ALPHA = 1e6
PAIR = (".lora_a", ".lora_b")


@dataclass(frozen=True)
class LoraPair:
    """What an adapter adds to one weight; ``factor`` is alpha / rank."""

    weight: str
    a: QuantizedTensor
    b: QuantizedTensor
    factor: float

    @property
    def rank(self) -> int:
        """Of the branch."""
        return self.b.shape[-1]


@dataclass(frozen=True)
class LoraAdapter:
    """An open adapter file, proved but for what only its model can tell."""

    name: str
    path: Path
    architecture: str
    alpha: float
    pairs: dict[str, LoraPair]
    digest: str
    gguf: GGUFFile

    @property
    def ranks(self) -> list[int]:
        """Those that occur."""
        return sorted({pair.rank for pair in self.pairs.values()})

    def close(self) -> None:
        """Let go of the file."""
        self.gguf.close()


def open_lora(path: Path, name: str | None = None) -> LoraAdapter:
    """Open the file and prove it. FormatError or UnsupportedError with a code that begins with ``ADAPTER_``."""
    gguf = GGUFFile.open(path)
    try:
        found = _lora(gguf, name or path.stem)
        gguf.check()
        return found
    except BaseException:
        gguf.close()
        raise


def _lora(gguf: GGUFFile, name: str) -> LoraAdapter:
    path = gguf.path
    for key, expected in (("general.type", "adapter"), ("adapter.type", "lora")):
        if (value := gguf.get(key, str)) != expected:
            found = f"{key} is {short(value)}" if value is not None else f"{key} is missing"
            raise wrong(path, found, repr(expected), "Give the file of a LoRA adapter.")
    if INVOCATION in gguf.metadata:
        what = f"is an activated LoRA ({INVOCATION}), which counts from some tokens of a text on"
        raise refused(path, what, "edgellm has adapters that count for all of it: take one of these.")
    checked_keys(gguf, KEYS)
    expected = f"a number from 0 to {MAX_ALPHA:g}"
    alpha = value_of(
        gguf, "adapter.lora.alpha", float, 0.0, lambda a: math.isfinite(a) and 0 <= a <= MAX_ALPHA, expected
    )
    pairs, architecture = _pairs(gguf, alpha), gguf.require("general.architecture", str)
    return LoraAdapter(name, path, architecture, alpha, pairs, digest_of(gguf, alpha), gguf)


def _pairs(gguf: GGUFFile, alpha: float) -> dict[str, LoraPair]:
    """All tensors, two and two. A name without its other half, or of another kind, is an error."""
    halves: dict[str, dict[str, QuantizedTensor]] = {}
    for name, tensor in gguf.tensors.items():
        suffix = next((one for one in PAIR if name.endswith(one)), None)
        if suffix is None:
            what = f"has the tensor {short(name)}, which is no half of a pair (.lora_a, .lora_b)"
            raise refused(gguf.path, what, "Without it the answers would be wrong: merge the adapter into its model.")
        halves.setdefault(name.removesuffix(suffix), {})[suffix] = tensor
    if not halves:
        raise wrong(gguf.path, "has no tensors", "pairs of them")
    pairs = {}
    for weight, of_weight in halves.items():
        if missing := [suffix for suffix in PAIR if suffix not in of_weight]:
            raise wrong(gguf.path, f"{short(weight + missing[0])} is missing", "both halves of each pair")
        a, b = (finite(of_weight[suffix], gguf.path) for suffix in PAIR)
        shapes = f"{short(weight)} has A {a.shape} and B {b.shape}"
        rank, of_a = b.shape[-1], a.shape[-1 if weight == "token_embd.weight" else -2 if len(a.shape) > 1 else 0]
        if len(a.shape) != len(b.shape) or len(a.shape) not in (2, 3) or rank != of_a or a.shape[:-2] != b.shape[:-2]:
            raise wrong(gguf.path, shapes, "A (rank, n_in) and B (n_out, rank), or such matrices of all experts")
        if rank > MAX_RANK:
            raise wrong(gguf.path, f"{short(weight)} has the rank {rank:,}", f"up to {MAX_RANK:,}")
        pairs[weight] = LoraPair(weight, a, b, alpha / rank if alpha else 1.0)
    return pairs
