"""What encoders have and decoders do not: rows by position or type, attention within a text, both ways."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from edgellm.kernels.ops.sketch import Sketch
from edgellm.kernels.ops.step import Step
from edgellm.kernels.program import Op

Index = Literal["positions", "types", "none"]
POSITIONS = 704  # of trials


@dataclass(frozen=True)
class AddRows(Op):
    """out[t] = x[t] + weight[position of t], or of its type; the table has a row for each that there may be.

    Of "none" it has the one that is for every token.
    """

    name, reads, writes, weights, by_row = "add_rows", ("x",), ("out",), ("weight",), False

    x: str
    weight: str
    out: str
    of: Index

    def reference(self, step: Step) -> None:
        if self.of == "none":
            step[self.out] = step[self.x] + step.weight(self.weight)
            return
        numbers = step.batch.positions if self.of == "positions" else step.types
        step[self.out] = step[self.x] + step.weight(self.weight)[numbers]

    @staticmethod
    def trial(s: Sketch, variant: str = "") -> None:
        shapes: tuple[tuple[int, str, Index], ...] = (
            (40, "F32", "positions"), (33, "F16", "types"), (64, "F32", "types"), (48, "F32", "none"),
        )  # fmt: skip
        for width, quant, of in shapes:
            weight = s.tensor(quant, ({"positions": POSITIONS, "types": 2, "none": 1}[of], width))
            op = AddRows(s.input(width), weight, s.buffer(width), of)
            s.emit(f"width={width} of={of}", op)


@dataclass(frozen=True)
class SelfAttention(Op):
    """out = softmax(scale * q k^T) v over the tokens of the same text in the batch, before and behind; nothing is kept.

    Grouped queries: heads of k and v are ``n_kv_heads``.

    reach   tokens further away are not seen; 0: all are
    fades   scores lose a head's slope for each token of the distance, see ``alibi_slopes``
    """

    name, reads, writes = "self_attention", ("q", "k", "v"), ("out",)

    q: str
    k: str
    v: str
    out: str
    n_heads: int
    n_kv_heads: int
    scale: float
    reach: int = 0
    fades: bool = False

    def reference(self, step: Step) -> None:
        q, k, v, out = step[self.q], step[self.k], step[self.v], step[self.out]
        group = self.n_heads // self.n_kv_heads
        slopes = alibi_slopes(self.n_heads)
        queries, result = (_heads(rows, self.n_heads) for rows in (q, out))
        keys, values = (_heads(rows, self.n_kv_heads) for rows in (k, v))
        for segment in step.segments:
            rows, number = segment.rows, np.arange(segment.stop - segment.start)
            distance = np.abs(number[:, None] - number[None, :])
            for head in range(self.n_heads):
                scores = queries[rows, head] @ keys[rows, head // group].T * np.float32(self.scale)
                if self.fades:
                    scores -= slopes[head] * distance.astype(np.float32)
                if self.reach:
                    scores[distance > self.reach] = -np.inf
                weights = np.exp(scores - scores.max(axis=1, keepdims=True))
                total = weights.sum(axis=1, keepdims=True, dtype=np.float64).astype(np.float32)
                result[rows, head] = (weights @ values[rows, head // group]) / total
        step[self.out] = result.reshape(out.shape)

    @staticmethod
    def trial(s: Sketch, variant: str = "") -> None:
        shapes = ((1, 2, 32, 0), (3, 1, 64, 0), (1, 3, 40, 5), (2, 2, 17, 64), (1, 1, 7, 0))
        fading = ((3, 2, 24, 0), (1, 4, 32, 5))
        for group, heads, dim, reach in (*shapes, *fading):
            n_heads, fades = group * heads, (group, heads, dim, reach) in fading
            q, k, v = (s.input(n * dim) for n in (n_heads, heads, heads))
            op = SelfAttention(q, k, v, s.buffer(n_heads * dim), n_heads, heads, dim**-0.5, reach, fades)
            s.emit(f"heads={n_heads}/{heads} head_dim={dim} reach={reach} fades={fades}", op)


def alibi_slopes(n_heads: int) -> np.ndarray:
    """What a token's distance costs in each head, (n_heads,) float32: ALiBi's 2^(-8 / n), 2^(-16 / n) ..., where n is
    the power of two up to the number of heads; those beyond it have the odd ones of twice as many heads."""
    n = 1 << (n_heads.bit_length() - 1)
    powers = [8 * (i + 1) / n for i in range(n)] + [4 * (2 * i + 1) / n for i in range(n_heads - n)]
    return np.array([2.0**-power for power in powers], np.float32)


def _heads(rows: np.ndarray, n: int) -> np.ndarray:
    """(n_tokens, n heads, head size)"""
    return rows.reshape(len(rows), n, rows.shape[1] // n)
