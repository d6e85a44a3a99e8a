"""A model is a program: a flat tuple of ops over named float32 buffers, run for a batch of tokens.

An architecture file writes the program; an executor (``reference``, ``cpu``, ``gpu``) runs it. This file is the whole
contract between the two. It knows no model and computes nothing.

Buffers are (rows, width) float32. A buffer of kind ``tokens`` has one row per token of the batch, one of kind
``outputs`` one row per token whose logits are wanted. Heads lie side by side in a row: (n_heads, head_dim) flattened.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, Protocol, runtime_checkable

import numpy as np

from edgellm.kernels.kv import BLOCK_TOKENS

if TYPE_CHECKING:
    from edgellm.formats.gguf import QuantizedTensor
    from edgellm.kernels.kv import KVLayer, KVPool
    from edgellm.kernels.rope import Rope
    from edgellm.kernels.token_draw import TokenDraw


@dataclass(frozen=True)
class Buffer:
    """A named (rows, width) float32 array that lives for one step."""

    name: str
    width: int
    rows: Literal["tokens", "outputs"] = "tokens"


@dataclass(frozen=True)
class Embed:
    """out[t] = scale * weight[token[t]]"""

    weight: str
    out: str
    scale: float = 1.0


@dataclass(frozen=True)
class RMSNorm:
    """out = x / sqrt(mean(x^2) + eps) * weight, over each group of len(weight) values of a row (a row, or a head)."""

    x: str
    weight: str
    out: str
    eps: float


@dataclass(frozen=True)
class Matmul:
    """out = x @ weight.T (+ bias), weight (n_out, n_in)."""

    x: str
    weight: str
    out: str
    bias: str | None = None


@dataclass(frozen=True)
class ApplyRope:
    """Rotary position embedding of every head of x, in place; ``rope`` names a row of ``Program.ropes``."""

    x: str
    head_dim: int
    rope: str


@dataclass(frozen=True)
class StoreKV:
    """Write k and v of every token of the batch to the cache of ``layer``, at the token's position."""

    k: str
    v: str
    layer: int


@dataclass(frozen=True)
class Attention:
    """out = softmax(scale * q k^T + causal and window mask) v over the cache of ``layer``; grouped queries."""

    q: str
    out: str
    layer: int
    n_heads: int
    scale: float


@dataclass(frozen=True)
class GatedUnit:
    """out = activation(gate) * up; ``gelu`` is the tanh form, as gemma uses it."""

    gate: str
    up: str
    out: str
    activation: Literal["silu", "gelu"]


@dataclass(frozen=True)
class Add:
    """out = x + y"""

    x: str
    y: str
    out: str


@dataclass(frozen=True)
class SelectOutputs:
    """out = the rows of x whose token wants logits; out is a buffer of kind ``outputs``."""

    x: str
    out: str


Op = Embed | RMSNorm | Matmul | ApplyRope | StoreKV | Attention | GatedUnit | Add | SelectOutputs


@dataclass(frozen=True)
class Program:
    """What an executor needs to know of a model. The last op writes the buffer ``logits``."""

    architecture: str
    ops: tuple[Op, ...]
    buffers: dict[str, Buffer]
    tensors: dict[str, QuantizedTensor]
    kv_layers: tuple[KVLayer, ...]
    ropes: dict[str, Rope]
    n_vocab: int
    context_length: int  # tokens the model was trained for
    n_embd: int

    @property
    def windows(self) -> tuple[int, ...]:
        """The distinct attention windows, 0 for full attention: one block table of a sequence for each."""
        return tuple(sorted({layer.window for layer in self.kv_layers}))


@dataclass(frozen=True)
class Batch:
    """n tokens of any number of sequences. Tokens of one sequence stand together, positions rising by one.

    tokens, positions, sequences   (n,) int32; ``sequences`` is the row of the token's block tables
    outputs                        (n,) bool, logits wanted
    tables                         one (n_sequences, max_blocks) int32 array for each of ``Program.windows``:
                                   the physical block that holds positions [32 b, 32 b + 32), -1 where none is kept
    """

    tokens: np.ndarray
    positions: np.ndarray
    sequences: np.ndarray
    outputs: np.ndarray
    tables: tuple[np.ndarray, ...] = field(default=())

    def __len__(self) -> int:
        return len(self.tokens)

    @classmethod
    def single(
        cls,
        program: Program,
        tokens: Sequence[int] | np.ndarray,
        start: int = 0,
        outputs: Literal["all", "last"] = "all",
    ) -> Batch:
        """Tokens of the only sequence, from position ``start`` on, in blocks 0, 1, 2 ... of a pool it has to itself."""
        n = len(tokens)
        n_blocks = (start + n + BLOCK_TOKENS - 1) // BLOCK_TOKENS
        wanted = np.full(n, outputs == "all")
        wanted[-1:] = True
        return cls(
            tokens=np.asarray(tokens, np.int32),
            positions=np.arange(start, start + n, dtype=np.int32),
            sequences=np.zeros(n, np.int32),
            outputs=wanted,
            tables=tuple(np.arange(n_blocks, dtype=np.int32)[None] for _ in program.windows),
        )


Hook = Callable[[int, Op, Callable[[str], np.ndarray]], None]
"""Called after each op with its index, the op, and a function that gives a writable view of a buffer by name."""


class Executor(Protocol):
    """Runs a program for a batch. Not safe for several threads at once: one engine owns it."""

    program: Program
    pool: KVPool
    max_tokens: int

    def run(self, batch: Batch, hook: Hook | None = None) -> np.ndarray:
        """Logits (n_outputs, n_vocab) float32 for the tokens that want them, valid until the next call.

        NumericError when one of them is NaN or infinite: whoever calls need not look again.
        """
        ...

    def close(self) -> None:
        """Stop the threads and let go of the weights and the cache. May be called twice."""
        ...


@runtime_checkable
class DecodingExecutor(Executor, Protocol):
    """An executor that can go from token to token by itself: what was drawn is the next step's token."""

    def decode(self, batch: Batch, n_steps: int, draw: TokenDraw, stop_ids: Collection[int] = ()) -> int:
        """Up to ``n_steps`` decode steps; how many tokens were drawn, the first rows of ``draw``.

        batch      the next token of one sequence; its block tables have room for all the steps
        stop_ids   one of them ends the run, as its last token

        It may end before, and with a step that gives NaN or infinity: that step's token is missing (none, when it was
        the first), and whoever asks for it with ``run`` gets the error.
        """
        ...
