"""Small programs of random numbers by which an op is tried: each op over buffers of its own, in odd shapes."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from edgellm.formats.gguf import QuantizedTensor, TensorStack
from edgellm.formats.quant_types import QUANT_TYPES
from edgellm.formats.stored_numbers import FLOATS
from edgellm.kernels.kv import CacheLayer
from edgellm.kernels.program import Buffer, Op, Program
from edgellm.kernels.rope import Rope

N_VOCAB = 50

# the minimum of a block in units of its scale that centres the weights on zero
_MINIMA = {"Q4_1": -7.5, "Q5_1": -15.5, "Q2_K": 1.5, "Q4_K": 7.5, "Q5_K": 15.5}


def random_tensor(rng: np.random.Generator, name: str, quant: str, shape: tuple[int, ...]) -> QuantizedTensor:
    """Random weights of a float type, or of one whose blocks have float scales: random bits under sane scales."""
    kind = QUANT_TYPES[quant]
    n_rows = int(np.prod(shape[:-1]))
    if quant in FLOATS:
        values = rng.standard_normal((n_rows, shape[-1]), np.float32) / np.float32(np.sqrt(shape[-1]))
        upper_halves = (values.view(np.uint32) >> 16).astype(np.uint16)
        data = {"F32": values, "F16": values.astype(np.float16), "BF16": upper_halves}
        return QuantizedTensor(name, shape, kind, data[quant].view(np.uint8))
    data_bytes = rng.integers(0, 256, (n_rows, kind.row_nbytes(shape[-1])), np.uint8)
    blocks = data_bytes.reshape(-1).view(kind.layout)
    scale = rng.uniform(0.001, 0.02, len(blocks)) * rng.choice((-1, 1), len(blocks))
    for field_name, (dtype, *_) in (kind.layout.fields or {}).items():
        if dtype.kind == "f":
            is_minimum = field_name in ("m", "dmin")
            blocks[field_name] = scale * _MINIMA[quant] * rng.uniform(0.8, 1.2, len(blocks)) if is_minimum else scale
    if quant == "MXFP4":
        blocks["e"] = rng.integers(118, 124, len(blocks))  # 2^(e - 128), near 0.01
    return QuantizedTensor(name, shape, kind, data_bytes)


@dataclass
class Sketch:
    """A program in the making, and the random numbers that go in.

    inputs   name -> (max_tokens, width)
    shapes   per op, what to call the case in a report
    """

    rng: np.random.Generator
    max_tokens: int
    ops: list[Op] = field(default_factory=list)
    shapes: list[str] = field(default_factory=list)
    buffers: dict[str, Buffer] = field(default_factory=dict)
    inputs: dict[str, np.ndarray] = field(default_factory=dict)
    tensors: dict[str, QuantizedTensor] = field(default_factory=dict)
    cache_layers: list[CacheLayer] = field(default_factory=list)
    ropes: dict[str, Rope] = field(default_factory=dict)
    is_encoder: bool = False

    def __post_init__(self) -> None:
        self.buffers[Program.output] = Buffer(Program.output, N_VOCAB, "outputs")

    def emit(self, shape: str, op: Op) -> None:
        """Append an op."""
        self.ops.append(op)
        self.shapes.append(shape)

    def buffer(self, width: int, dtype: str = "float32") -> str:
        """A new buffer."""
        name = f"b{len(self.buffers)}"
        self.buffers[name] = Buffer(name, width, dtype=dtype)
        return name

    def input(self, width: int) -> str:
        """A new buffer of normal random numbers, a few of them far out as in a real model."""
        name = self.buffer(width)
        values = self.rng.standard_normal((self.max_tokens, width), np.float32)
        values[:, :: max(1, width // 3)] *= 30
        self.inputs[name] = values
        return name

    def choices(self, n: int, n_chosen: int) -> str:
        """A new buffer of int32: different numbers below ``n`` in each row."""
        name = self.buffer(n_chosen, "int32")
        order = self.rng.permuted(np.tile(np.arange(n), (self.max_tokens, 1)), axis=1)
        self.inputs[name] = order[:, :n_chosen].astype(np.int32)
        return name

    def tensor(self, quant: str, shape: tuple[int, ...]) -> str:
        """A new random weight."""
        name = f"w{len(self.tensors)}"
        self.tensors[name] = random_tensor(self.rng, name, quant, shape)
        return name

    def stack(self, quant: str, shape: tuple[int, ...]) -> str:
        """A new random weight whose parts lie anywhere."""
        name = f"w{len(self.tensors)}"
        parts = [random_tensor(self.rng, f"{name}.{i}", quant, shape[1:]) for i in range(shape[0])]
        self.tensors[name] = TensorStack.of(name, parts)
        return name

    def layer(self, layer: CacheLayer) -> int:
        """A new layer of the cache."""
        self.cache_layers.append(layer)
        return len(self.cache_layers) - 1

    def rope(self, rope: Rope) -> str:
        """A new rotation."""
        name = f"r{len(self.ropes)}"
        self.ropes[name] = rope
        return name

    def program(self) -> Program:
        """The program so far."""
        caches = tuple(self.cache_layers)
        of_adapters = (part.adapter + 1 for op in self.ops for part in getattr(op, "parts", ()))
        n_adapters = max(of_adapters, default=0)
        return Program(
            "selftest", tuple(self.ops), self.buffers, self.tensors, caches, self.ropes, N_VOCAB, 4096, 0,
            n_adapters=n_adapters, is_encoder=self.is_encoder,
        )  # fmt: skip
