"""Rows of the embedding, looked up by token."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from edgellm.kernels.ops.step import Step
from edgellm.kernels.program import Op

if TYPE_CHECKING:
    from edgellm.formats.gguf import QuantizedTensor


@dataclass(frozen=True)
class Embed(Op):
    """out[t] = scale * weight[token[t]]"""

    name, writes, weights = "embed", ("out",), ("weight",)

    weight: str
    out: str
    scale: float = 1.0

    def reference(self, step: Step) -> None:
        step[self.out] = step.weight(self.weight)[step.batch.tokens] * np.float32(self.scale)

    def nbytes_per_token(self, tensors: Mapping[str, QuantizedTensor]) -> int:
        """One row."""
        return int(tensors[self.weight].data.shape[1])
