"""A mixture of experts: each token is sent to a few of many feed-forwards, and takes a weighted sum of what they make.

What a token's experts make lies side by side in its row, the best expert first: (n_used, width) flattened.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from edgellm.formats.quant_types import QUANT_TYPES
from edgellm.kernels.ops.elementwise import sigmoid
from edgellm.kernels.ops.sketch import Sketch
from edgellm.kernels.ops.step import Step
from edgellm.kernels.program import Op

if TYPE_CHECKING:
    from edgellm.formats.gguf import QuantizedTensor


Over = Literal["chosen", "all"]
Scores = Literal["softmax", "sigmoid"]
_CHOICES: tuple[tuple[int, int, Over, Scores, bool, tuple[int, int]], ...] = (
    (7, 2, "chosen", "sigmoid", True, (1, 1)),
    (33, 4, "all", "sigmoid", False, (1, 1)),
    (18, 3, "chosen", "softmax", True, (1, 1)),
    (30, 5, "all", "softmax", True, (6, 2)),
    (128, 8, "chosen", "sigmoid", True, (8, 4)),
)
"""Experts, those that are used, and how they are chosen, in trials."""


@dataclass(frozen=True)
class Route(Op):
    """ids = the experts with the largest scores, the best first, of equals the first; probs = their weights.

    Scores are the softmax of the logits, or the sigmoid of each. Weights are the scores of the chosen experts: divided
    by their sum, or as they are. ids int32 and probs, (rows, n_used).

    over     "chosen": weights sum to 1 ("all" leaves them)
    scales   (n_expert,): what multiplies the weight of each expert
    scores   what the scores are
    bias     (n_expert,): added to the scores for the choice alone
    factor   multiplies all weights
    groups   (n, n_used): experts stand in n groups; those of the n_used whose two best sum highest can be chosen
    best     1 where the best expert of a group alone counts for it
    """

    name, reads, writes, weights, by_row = "route", ("logits",), ("ids", "probs"), ("scales", "bias"), True

    logits: str
    ids: str
    probs: str
    over: Over = "chosen"
    scales: str | None = None
    scores: Scores = "softmax"
    bias: str | None = None
    factor: float = 1.0
    groups: tuple[int, int] = (1, 1)
    best: int = 2

    def reference(self, step: Step) -> None:
        logits = step[self.logits]
        by = self._choice(logits, step.weight(self.bias) if self.bias is not None else None)
        ids = np.argsort(-by, axis=1, kind="stable")[:, : step[self.ids].shape[1]]
        chosen = np.take_along_axis(logits, ids, axis=1)
        if self.scores == "sigmoid":
            weights = sigmoid(chosen)
            summed = weights.sum(axis=1, keepdims=True) + np.float32(1e-20) if self.over == "chosen" else np.float32(1)
        else:
            largest = logits.max(axis=1, keepdims=True)
            weights = np.exp(chosen - largest)
            summed = np.exp((logits if self.over == "all" else chosen) - largest).sum(axis=1, keepdims=True)
        step[self.ids], step[self.probs] = ids, weights / summed
        if self.factor != 1.0:
            step[self.probs] = step[self.probs] * np.float32(self.factor)
        if self.scales is not None:
            step[self.probs] = step[self.probs] * step.weight(self.scales)[ids]

    @property
    def by_logits(self) -> bool:
        """Whether the experts with the largest logits are chosen."""
        return self.scores == "softmax" and self.bias is None and self.groups == (1, 1)

    def _choice(self, logits: np.ndarray, bias: np.ndarray | None) -> np.ndarray:
        """What experts are chosen by, (rows, n_expert)."""
        if self.by_logits:
            return logits
        if self.scores == "sigmoid":
            scores = sigmoid(logits)
        else:
            powers = np.exp(logits - logits.max(axis=1, keepdims=True))
            scores = powers / powers.sum(axis=1, keepdims=True)
        scores = scores if bias is None else scores + bias
        n, n_used = self.groups
        groups = scores.reshape(len(scores), n, scores.shape[1] // n)
        best = np.sort(groups, axis=2)[:, :, -self.best :].sum(axis=2)
        rank = np.argsort(np.argsort(-best, axis=1, kind="stable"), axis=1, kind="stable")
        return np.where((rank < n_used)[:, :, None], groups, -np.inf).reshape(scores.shape)

    @staticmethod
    def trial(s: Sketch, variant: str = "") -> None:
        over: Over
        for n_expert, n_used, over in ((3, 3, "chosen"), (7, 2, "all"), (32, 4, "all"), (130, 17, "chosen")):
            logits, ids, probs = s.input(n_expert), s.buffer(n_used, "int32"), s.buffer(n_used)
            scales = s.tensor("F32", (n_expert,)) if n_expert % 2 else None
            s.emit(f"{n_used} of {n_expert} over={over}", Route(logits, ids, probs, over, scales))
        for n_expert, n_used, over, kind, biased, groups in _CHOICES:
            logits, ids, probs = s.input(n_expert), s.buffer(n_used, "int32"), s.buffer(n_used)
            bias = s.tensor("F32", (n_expert,)) if biased else None
            for best in (1, 2) if groups != (1, 1) else (2,):
                op = Route(logits, ids, probs, over, None, kind, bias, 2.5 if biased else 1.0, groups, best)
                s.emit(f"{n_used} of {n_expert} over={over} {kind} biased={biased} groups={groups} by {best}", op)


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
