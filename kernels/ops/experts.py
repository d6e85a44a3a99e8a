"""A mixture of experts: each token is sent to a few of many feed-forwards, and takes a weighted sum of what they make.

What a token's experts make lies side by side in its row, the best expert first: (n_used, width) flattened.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from edgellm.formats.quant_types import QUANT_TYPES
from edgellm.kernels.ops.sketch import Sketch
from edgellm.kernels.ops.step import Step
from edgellm.kernels.program import Op

if TYPE_CHECKING:
    from edgellm.formats.gguf import QuantizedTensor


@dataclass(frozen=True)
class Route(Op):
    """ids = the experts with the largest logits, the best first, of equals the first; probs = their softmax.

    ``over`` says what that is taken over: the logits of the chosen experts, so that their probs sum to 1, or of all.
    ids int32 and probs, (rows, n_used).

    scales   (n_expert,): what multiplies the prob of each expert
    """

    name, reads, writes, weights, by_row = "route", ("logits",), ("ids", "probs"), ("scales",), True

    logits: str
    ids: str
    probs: str
    over: Literal["chosen", "all"] = "chosen"
    scales: str | None = None

    def reference(self, step: Step) -> None:
        logits = step[self.logits]
        ids = np.argsort(-logits, axis=1, kind="stable")[:, : step[self.ids].shape[1]]
        chosen = np.take_along_axis(logits, ids, axis=1)
        powers, summed = (np.exp(x - chosen[:, :1]) for x in (chosen, logits if self.over == "all" else chosen))
        step[self.ids], step[self.probs] = ids, powers / summed.sum(axis=1, keepdims=True)
        if self.scales is not None:
            step[self.probs] = step[self.probs] * step.weight(self.scales)[ids]

    @staticmethod
    def trial(s: Sketch, variant: str = "") -> None:
        over: Literal["chosen", "all"]
        for n_expert, n_used, over in ((3, 3, "chosen"), (7, 2, "all"), (32, 4, "all"), (130, 17, "chosen")):
            logits, ids, probs = s.input(n_expert), s.buffer(n_used, "int32"), s.buffer(n_used)
            scales = s.tensor("F32", (n_expert,)) if n_expert % 2 else None
            s.emit(f"{n_used} of {n_expert} over={over}", Route(logits, ids, probs, over, scales))


@dataclass(frozen=True)
class ExpertMatmul(Op):
    """out[slot] = x @ weight[ids[slot]].T (+ bias[ids[slot]]), weight (n_expert, n_out, n_in), bias (n_expert, n_out).

    x is one row for all of a token's experts, (n_in,), or one for each, (n_used, n_in) flattened. The ids of a token
    differ.
    """

    name, reads, writes, weights, by_row = "expert_matmul", ("x", "ids"), ("out",), ("weight", "bias"), True

    x: str
    ids: str
    weight: str
    out: str
    n_used: int
    bias: str | None = None

    def reference(self, step: Step) -> None:
        weight, ids = step.weight(self.weight), step[self.ids]
        x = step[self.x].reshape(len(ids), step[self.x].shape[1] // weight.shape[2], weight.shape[2])
        out = np.empty((*ids.shape, weight.shape[1]), np.float32)
        for expert in np.unique(ids):
            token, slot = np.nonzero(ids == expert)
            out[token, slot] = x[token, slot % x.shape[1]] @ weight[expert].T
        if self.bias is not None:
            out += step.weight(self.bias)[ids]
        step[self.out] = out.reshape(len(ids), self.n_used * weight.shape[1])

    def nbytes_per_token(self, tensors: Mapping[str, QuantizedTensor]) -> int:
        """Those of the experts that a token is sent to."""
        of_experts = [tensors[name] for name in self.weight_names()]
        return sum(tensor.nbytes * self.n_used // tensor.shape[0] for tensor in of_experts)

    @staticmethod
    def trial(s: Sketch, variant: str = "f32") -> None:
        quant = variant.upper()
        block = QUANT_TYPES[quant].block_size
        for n_expert, n_used, n_out, per_slot in ((2, 1, 8, 0), (3, 3, 33, 1), (9, 2, 16, 0), (5, 4, 100, 1)):
            n_in = {1: (37, 40), 32: (96, 544), 256: (768, 256)}[block][per_slot]
            weight = (s.stack if n_expert % 2 else s.tensor)(quant, (n_expert, n_out, n_in))
            x = s.input(n_in * n_used if per_slot else n_in)
            bias = s.tensor("F32", (n_expert, n_out)) if n_expert % 3 == 0 else None
            op = ExpertMatmul(x, s.choices(n_expert, n_used), weight, s.buffer(n_used * n_out), n_used, bias)
            s.emit(f"{n_used} of {n_expert} n_out={n_out} n_in={n_in}", op)


@dataclass(frozen=True)
class ExpertSum(Op):
    """out = the sum over slots of probs[slot] * x[slot], slot by slot; x (n_used, width) flattened."""

    name, reads, writes, by_row = "expert_sum", ("x", "probs"), ("out",), True

    x: str
    probs: str
    out: str

    def reference(self, step: Step) -> None:
        probs = step[self.probs]
        x = step[self.x].reshape(*probs.shape, step[self.out].shape[1])
        step[self.out] = sum(probs[:, i, None] * x[:, i] for i in range(probs.shape[1]))

    @staticmethod
    def trial(s: Sketch, variant: str = "") -> None:
        for width, n_used in ((1, 1), (17, 2), (100, 3), (256, 8)):
            op = ExpertSum(s.input(width * n_used), s.input(n_used), s.buffer(width))
            s.emit(f"width={width} of {n_used}", op)
