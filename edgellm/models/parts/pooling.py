"""What a file says of the vector of a text: which rows it is made of, and what a classifier makes of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Protocol

from edgellm.formats.errors import UnsupportedError
from edgellm.formats.model_file import ModelFile
from edgellm.kernels.pooling import KINDS, Dense, Pooling, PoolingKind
from edgellm.models.parts.hparams import HParams, file_name, integer, key_of

SHARES = ("qwen3", "qwen3vl")
"""Decoders whose classifiers give shares of 1, as in llama.cpp."""


class TakesWeights(Protocol):
    """A program in the making, as far as a head needs it."""

    gguf: ModelFile
    hp: HParams

    def weight(self, name: str, *shape: int) -> str:
        """Take a tensor of this shape."""
        ...

    def row_weight(self, name: str, width: int) -> str:
        """Take a vector as a matrix of one row."""
        ...


def read_pooling(
    m: TakesWeights,
    *,
    of: PoolingKind = "last",
    activation: Literal["", "tanh", "gelu_erf"] = "tanh",
    head: Sequence[Dense] = (),
    default: PoolingKind | None = None,
) -> Pooling | None:
    """The key ``pooling_type`` and the classifier's tensors; None where the file has neither and there is no default.

    of           what a classifier reads
    activation   behind the first layer of one that has two
    head         a projection of what is pooled
    default      of a file without the key

    FormatError for shapes that do not fit, UnsupportedError for a classifier that nothing reads.
    """
    classifier = _classifier(m, activation)
    if key_of(m.gguf, "pooling_type") in m.gguf.metadata:
        kind = KINDS[integer(m.gguf, "pooling_type")]
    elif default is None:
        kind = "rank" if classifier else "none"
    else:
        kind = "rank" if classifier else default
    if kind == "rank" and not classifier:
        raise UnsupportedError(
            f"{file_name(m.gguf)}: {key_of(m.gguf, 'pooling_type')} says that it ranks texts, and it has no classifier "
            "(cls.output.weight). Take another conversion of the model.",
            code="MODEL_TENSOR_MISSING",
        )
    if kind == "none" and default is None:
        return None
    if kind != "rank":
        return Pooling(kind, head=tuple(head))
    n_scores = _n_scores(m, classifier[-1])
    shares = m.gguf.architecture in SHARES and n_scores > 1  # of one score it would be 1 whatever that is
    return Pooling(kind, of, classifier, _labels(m, n_scores), softmax=shares)


def _classifier(m: TakesWeights, activation: Literal["", "tanh", "gelu_erf"]) -> tuple[Dense, ...]:
    """cls, with the norm behind it, and cls.output, as far as the file has them; the last gives the scores."""
    tensors, layers = m.gguf.tensors, list[Dense]()
    names = [name for name in ("cls", "cls.output") if f"{name}.weight" in tensors]
    for name in names:
        shape, is_last = tensors[f"{name}.weight"].shape, name == names[-1]
        n_out = (shape[0] if len(shape) > 1 else 1) if is_last else m.hp.n_embd
        weight = f"{name}.weight"
        weight = m.row_weight(weight, m.hp.n_embd) if n_out == 1 else m.weight(weight, n_out, m.hp.n_embd)
        bias = m.weight(f"{name}.bias", n_out) if f"{name}.bias" in tensors else None
        norm = None if is_last or "cls.norm.weight" not in tensors else m.weight("cls.norm.weight", n_out)
        layers.append(Dense(weight, bias, "" if is_last else activation, norm, m.hp.eps))
    return tuple(layers)


def _n_scores(m: TakesWeights, last: Dense) -> int:
    shape = m.gguf.tensors[last.weight].shape
    return shape[0] if len(shape) > 1 else 1


def _labels(m: TakesWeights, n_scores: int) -> tuple[str, ...]:
    labels = m.gguf.metadata.get(key_of(m.gguf, "classifier.output_labels"), ())
    sound = isinstance(labels, Sequence) and not isinstance(labels, str) and all(isinstance(one, str) for one in labels)
    return tuple(labels) if sound and len(labels) == n_scores else ()
