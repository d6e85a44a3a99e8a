"""Write a source as a GGUF file of plain numbers: F32, F16, BF16, or what the source itself keeps."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from edgellm.formats.errors import ParameterError
from edgellm.formats.file_types import WRITTEN, type_counts
from edgellm.formats.gguf_header import TypedMetadata
from edgellm.formats.gguf_writer import TensorPlan, file_nbytes, rows_in_chunks, write_gguf
from edgellm.formats.quant_types import QUANT_TYPES, QuantType
from edgellm.formats.stored_numbers import FLOATS, encode_plain
from edgellm.machine.progress import Progress
from edgellm.quantize.input_model import InputModel, InputTensor

FULL = (
    *("_norm.weight", "shortconv.conv.weight", "ssm_conv1d.weight"),
    *("altup_correct_coef.weight", "altup_predict_coef.weight"),
)
"""What is float32 whatever other matrices are."""
OUT_TYPES = ("auto", "f32", "f16", "bf16")
CHUNK_NBYTES = 8 << 20  # of float32 made at once


@dataclass(frozen=True)
class Conversion:
    """What a conversion writes. ``nbytes`` are those of the file, were it one."""

    metadata: TypedMetadata
    tensors: list[TensorPlan]
    nbytes: int

    def types(self) -> dict[str, tuple[int, int]]:
        """type -> (tensors, bytes), the largest first."""
        return type_counts((tensor.quant.name, tensor.nbytes) for tensor in self.tensors)


def plan_conversion(source: InputModel, outtype: str = "auto") -> Conversion:
    """The type of every tensor, and the size of it all; no weight is read.

    outtype   "f32", "f16", "bf16", or "auto": matrices as the source keeps them. What a scheme has packed becomes the
              type of the source's plain matrices. Vectors and norms are always F32.
    """
    if outtype not in OUT_TYPES:
        raise ParameterError(f"outtype is {outtype!r}. It must be one of {', '.join(OUT_TYPES)}.")
    unpacked = _plain_type(source)
    plans = []
    for tensor in source.tensors.values():
        quant = _out_type(tensor, outtype, unpacked, source.kind)
        plans.append(TensorPlan(tensor.name, tensor.shape, quant, _Chunks(tensor, quant)))
    metadata = dict(source.metadata)
    file_type = _file_type(plans)
    if file_type is not None:
        metadata["general.file_type"] = (file_type, "UINT32")
    return Conversion(metadata, plans, file_nbytes(metadata, plans))


def convert(
    source: InputModel,
    target: str | os.PathLike[str],
    outtype: str = "auto",
    *,
    max_part_nbytes: int | None = None,
    max_part_tensors: int | None = None,
    progress: Progress | None = None,
) -> list[Path]:
    """Write ``source`` to ``target`` and give the files; see ``plan_conversion`` and ``write_gguf``."""
    plan = plan_conversion(source, outtype)
    return write_gguf(
        target,
        plan.metadata,
        plan.tensors,
        max_part_nbytes=max_part_nbytes,
        max_part_tensors=max_part_tensors,
        progress=progress,
    )


@dataclass(frozen=True)
class _Chunks:
    """The bytes of a tensor in another type, some rows at a time."""

    tensor: InputTensor
    quant: QuantType

    def __call__(self) -> Iterator[np.ndarray]:
        tensor = self.tensor
        if self.quant is tensor.quant:
            yield from tensor.stored_chunks()
            return
        for start, stop in rows_in_chunks(tensor.n_rows, 4 * tensor.n_in, CHUNK_NBYTES):
            yield encode_plain(tensor.rows(start, stop), self.quant.name).reshape(-1)


def _plain_type(source: InputModel) -> str:
    """The type of most matrices that no scheme has packed, BF16 where there are none."""
    kinds = Counter(
        tensor.quant.name
        for tensor in source.tensors.values()
        if len(tensor.shape) > 1 and not tensor.quantized and tensor.quant.name in FLOATS
    )
    return kinds.most_common(1)[0][0] if kinds else "BF16"


def _out_type(tensor: InputTensor, outtype: str, unpacked: str, kind: str) -> QuantType:
    is_matrix = len(tensor.shape) > 1 and tensor.name.endswith((".weight", ".lora_a", ".lora_b"))
    is_matrix = is_matrix and not tensor.name.endswith(FULL)
    if outtype == "auto":
        if kind == "gguf" or not tensor.quantized:
            return tensor.quant
        return QUANT_TYPES[unpacked if is_matrix else "F32"]
    if tensor.quant.name in ("I8", "I16", "I32", "I64"):
        return tensor.quant
    return QUANT_TYPES[outtype.upper() if is_matrix else "F32"]


def _file_type(plans: list[TensorPlan]) -> int | None:
    """The number for the type of most matrices; None for a type that is not plain, whose number the source has."""
    kinds = Counter(plan.quant.name for plan in plans if len(plan.shape) > 1)
    name = kinds.most_common(1)[0][0] if kinds else ""
    return WRITTEN[name].number if name in FLOATS else None
