"""Small models that draft for one other model, from what some of its layers read: one file for each kind.

Such a file has no architecture of its own to run: its embedding, its head and its vocabulary may be those of the model
that it drafts for. ``build_draft`` makes of both the program of the draft, and says what the model's steps are to make
for it (features.py).
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from edgellm.formats.errors import FormatError, UnsupportedError
from edgellm.models.drafts.features import Features, n_layers
from edgellm.models.parts.hparams import BROKEN_FILE, HParams, file_name, hparam_error, key_of

if TYPE_CHECKING:
    from edgellm.formats.gguf import QuantizedTensor
    from edgellm.formats.model_file import ModelFile, ModelTensor
    from edgellm.kernels.program import Program
    from edgellm.models.parts.blocks import ProgramBuilder


@dataclass(frozen=True)
class Target:
    """The model that a draft is for: its sizes, and the tensors that the draft may borrow."""

    n_vocab: int
    n_embd: int
    n_layer: int
    tensors: Mapping[str, ModelTensor]

    @classmethod
    def of(cls, program: Program) -> Target:
        """That of a program."""
        return cls(program.n_vocab, program.n_embd, n_layers(program), program.tensors)


@dataclass(frozen=True)
class DraftProgram:
    """A draft for one model.

    program    of the draft, which gets features by ``Batch.embeddings`` and tokens by the model's ids
    features   what the model's steps make for it
    ids        (n,) int64, the model's id of each of the draft's own; None where they are the same
    keep       puts features into the cache of ``program``, which reads none itself then; None where that one does
    block      tokens of a block that is drafted in one step, and the id of those to come; None for one after another
    """

    program: Program
    features: Features
    ids: np.ndarray | None = None
    keep: Program | None = None
    block: tuple[int, int] | None = None


def build_draft(gguf: ModelFile, target: Target) -> DraftProgram:
    """The draft of a file for a model. FormatError for a file that contradicts itself, UnsupportedError
    ``DRAFT_MODEL`` for one that was made for another model."""
    made: DraftProgram = importlib.import_module(f"{__name__}.{gguf.architecture}").build(gguf, target)
    return made


def mismatch(gguf: ModelFile, found: str, expected: str) -> UnsupportedError:
    """The error of a draft that was made for another model."""
    return UnsupportedError(
        f"{file_name(gguf)} is a draft ({gguf.architecture}) for another model: {found}, and this model has "
        f"{expected}. Take the draft that was made for it.",
        code="DRAFT_MODEL",
    )


def target_layers(gguf: ModelFile, target: Target, n: int | None = None) -> tuple[int, ...]:
    """The layers of the model whose inputs the draft reads, one past the last for what its norm reads."""
    found: Any = gguf.metadata.get(key_of(gguf, "target_layers"))
    found = found.tolist() if isinstance(found, np.ndarray) else found
    if not isinstance(found, list) or not found or any(type(one) is not int or one < 0 for one in found):
        raise hparam_error(gguf, "target_layers", found, "an array of numbers of layers")
    if n is not None and len(found) != n:
        raise hparam_error(gguf, "target_layers", found, f"the numbers of {n} layers")
    if max(found) > target.n_layer:
        raise mismatch(gguf, f"it reads layer {max(found)}", f"{target.n_layer} layers")
    return tuple(found)


def with_vocabulary(hp: HParams, gguf: ModelFile, target: Target) -> HParams:
    """The sizes with the model's vocabulary, which has to be the file's, where it has one."""
    tokens = gguf.metadata.get("tokenizer.ggml.tokens")
    if isinstance(tokens, Sequence) and tokens and len(tokens) != target.n_vocab:
        raise mismatch(gguf, f"its vocabulary has {len(tokens)} tokens", f"{target.n_vocab}")
    return replace(hp, n_vocab=target.n_vocab)


def borrow(m: ProgramBuilder, target: Target, *, head: bool) -> None:
    """Take the model's embedding, and its head, where the file has none of its own."""
    wanted: dict[str, tuple[str, ...]] = {"token_embd.weight": ("token_embd.weight",)}
    if head:
        wanted["output.weight"] = ("output.weight", "token_embd.weight")
    for name, names in wanted.items():
        if name in m.found:
            continue
        tensor = next((target.tensors[one] for one in names if one in target.tensors), None)
        if tensor is None or tuple(tensor.shape) != (target.n_vocab, m.hp.n_embd):
            has = "none that it could borrow" if tensor is None else f"one of the shape {tuple(tensor.shape)}"
            raise mismatch(m.gguf, f"it has no {name} for rows of {m.hp.n_embd}", has)
        m.found[name] = tensor


def own(m: ProgramBuilder, name: str, *shape: int) -> QuantizedTensor:
    """A tensor that the model's program takes, of exactly this shape."""
    return cast("QuantizedTensor", m.checked(name, *shape))


def read_ids(m: ProgramBuilder, target: Target) -> np.ndarray | None:
    """The model's ids of a draft that has fewer, where the file says them."""
    tensor = m.gguf.tensors.get("d2t")
    if tensor is None:
        return None
    m.used.add("d2t")
    kind = getattr(getattr(tensor, "quant", None), "name", "?")
    if len(tensor.shape) != 1 or kind != "I64":
        raise FormatError(
            f"{file_name(m.gguf)}: d2t is {kind} of the shape {tuple(tensor.shape)}, expected a row of I64. "
            f"{BROKEN_FILE}",
            code="MODEL_SHAPE",
        )
    ids = tensor.dequantize().reshape(-1).astype(np.int64)  # far below 2^24, which float32 has exactly
    if ids.min() < 0 or ids.max() >= target.n_vocab:
        raise mismatch(m.gguf, f"it drafts the ids {ids.min()} to {ids.max()}", f"those from 0 to {target.n_vocab - 1}")
    return ids
