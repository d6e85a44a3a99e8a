"""From the hidden states of a text to its one vector, and to what a classifier makes of that: plain numpy.

A text is pooled by itself, so its vector has the same bits whatever it shared its steps with.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np

if TYPE_CHECKING:
    from edgellm.formats.gguf import QuantizedTensor

PoolingKind = Literal["none", "mean", "cls", "last", "rank"]
KINDS: tuple[PoolingKind, ...] = get_args(PoolingKind)
"""In the order of the numbers that GGUF files have for them."""


@dataclass(frozen=True)
class Dense:
    """x becomes activation(weight x + bias), then its layer norm where it has one; names of tensors."""

    weight: str
    bias: str | None = None
    activation: Literal["", "tanh", "gelu_erf"] = ""
    norm: str | None = None
    eps: float = 1e-5


@dataclass(frozen=True)
class Pooling:
    """What becomes of the rows of a text.

    kind      none: they stay; mean; cls: the first row; last; rank: a classifier's scores of the row ``of``
    of        what the classifier reads
    head      the layers behind it, of a classifier or a projection
    labels    the names of the scores, where the file has them
    softmax   the scores are shares of 1
    """

    kind: PoolingKind
    of: PoolingKind = "cls"
    head: tuple[Dense, ...] = ()
    labels: tuple[str, ...] = ()
    softmax: bool = False

    @property
    def rows(self) -> PoolingKind:
        """Which rows of a text are wanted."""
        return self.of if self.kind == "rank" else self.kind

    def through_head(self, x: np.ndarray, tensors: Mapping[str, np.ndarray]) -> np.ndarray:
        """What the head makes of pooled rows (n_embd,) float32; rows of a text that is not pooled stay as they are.

        tensors   those of ``head``, float32
        """
        for layer in self.head:
            x = _dense(x, layer, tensors)
        return _softmax(x) if self.softmax else x

    def tensor_names(self) -> list[str]:
        """The tensors of the head."""
        names = [name for one in self.head for name in (one.weight, one.bias, one.norm)]
        return [name for name in names if name is not None]


def head_tensors(pooling: Pooling, tensors: Mapping[str, QuantizedTensor]) -> dict[str, np.ndarray]:
    """What ``Pooling.through_head`` needs of a program's tensors, as float32."""
    return {name: tensors[name].dequantize().reshape(tensors[name].shape) for name in pooling.tensor_names()}


def _dense(x: np.ndarray, layer: Dense, tensors: Mapping[str, np.ndarray]) -> np.ndarray:
    x = tensors[layer.weight] @ x
    if layer.bias is not None:
        x = x + tensors[layer.bias]
    if layer.activation:
        x = np.tanh(x) if layer.activation == "tanh" else _gelu(x)
    if layer.norm is not None:
        centred = x - x.mean()
        x = centred / np.sqrt(np.mean(np.square(centred)) + np.float32(layer.eps)) * tensors[layer.norm]
    return x


def _gelu(x: np.ndarray) -> np.ndarray:
    shares = [0.5 + 0.5 * math.erf(value * 0.5**0.5) for value in x.tolist()]
    return x * np.array(shares, np.float32)


def _softmax(x: np.ndarray) -> np.ndarray:
    weights = np.exp(x - x.max())
    return weights / weights.sum()
