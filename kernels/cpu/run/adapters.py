"""Rules for the ops of adapters, whose weights are packed here. ``low`` is the lowering of a program, lowering.py."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any

import numpy as np

from edgellm.formats.errors import UnsupportedError
from edgellm.formats.stored_numbers import encode_plain
from edgellm.kernels.cpu.lib import layout
from edgellm.kernels.cpu.weights import FLOAT
from edgellm.kernels.ops import AdapterDown, AdapterUp, AddDirection
from edgellm.kernels.ops.adapters import AdapterWeight

ALONE_WORK = 1 << 16
"""Products of a token that are left to one thread: a few microseconds."""
CHUNK = layout.ROW_ALIGN


def _records(low: Any, records: Sequence[dict[str, int]]) -> int:
    """Address of one record for each part, as layout.py has them."""
    table = low.memory.zeros(len(records), layout.ADAPTER_NBYTES // 8, "int64")
    for row, record in zip(table, records, strict=True) if low.memory.real else ():
        for name, value in record.items():
            row[getattr(layout, name) // 8] = value
    return int(table.ctypes.data)


def _kind(low: Any, parts: Sequence[AdapterWeight]) -> str:
    """The type that all of them are packed in: their own where it is one."""
    kinds = {low.program.tensors[part.weight].quant.name for part in parts}
    return str(*kinds) if len(kinds) == 1 and kinds <= set(FLOAT) else "F32"


def _packed(low: Any, name: str, kind: str, block: int) -> tuple[int, int, int, int]:
    """Address of the rows of a matrix, or of all experts' ones, ``block`` at a time with the columns outermost; how
    many blocks, the bytes of one and of an expert."""
    tensor = low.program.tensors[name]
    n_rows, n_columns = tensor.shape[-2:]
    n_experts, n_blocks = (tensor.shape[0] if len(tensor.shape) == 3 else 1), -(-n_rows // block)
    nbytes = n_blocks * n_columns * block * {"F32": 4, "F16": 2, "BF16": 2}[kind]
    key = f"{name} {kind} packed"
    if key not in low.vectors:

        def pack() -> np.ndarray:
            rows = np.zeros((n_experts, n_blocks * block, n_columns), np.float32)
            rows[:, :n_rows] = tensor.dequantize().reshape(n_experts, n_rows, n_columns)
            blocks = rows.reshape(n_experts, n_blocks, block, n_columns).transpose(0, 1, 3, 2)
            return encode_plain(np.ascontiguousarray(blocks).reshape(-1, block), kind)

        low.vectors[key] = low.memory.take(nbytes * n_experts, pack).ctypes.data
    return low.vectors[key], n_blocks, nbytes // n_blocks, nbytes


def adapter_down(low: Any, op: AdapterDown) -> None:
    """A record for each chunk of rows."""
    kind, records, work = _kind(low, op.parts), list[dict[str, int]](), 0
    n_in = low.program.tensors[op.parts[0].weight].shape[-1]
    for part in op.parts:
        address, n_chunks, nbytes, of_expert = _packed(low, part.weight, kind, CHUNK)
        work += n_chunks * CHUNK * n_in * op.n_used
        for i in range(n_chunks):
            records.append(
                {
                    "ADAPTER": part.adapter, "ADAPTER_WEIGHTS": address + i * nbytes, "ADAPTER_EXPERT": of_expert,
                    "ADAPTER_FIRST": (part.first + i * CHUNK) * 4,
                }
            )  # fmt: skip
    arguments = layout.ADAPTER_DOWN(
        **low.slots(op.x, n_in), **_ids(low, op.ids), **low.where(out=op.out),
        out_slot=low.width(op.out) // op.n_used * 4, n_used=op.n_used, n_in=n_in, chunks=_records(low, records),
        n_chunks=len(records), row_kind=low.row_kind(op.x),
    )  # fmt: skip
    low.emit(op, f"adapter_down_{kind.lower()}", arguments, alone=work <= ALONE_WORK)


def adapter_up(low: Any, op: AdapterUp) -> None:
    """A record for each part."""
    kind, records, work = _kind(low, op.parts), list[dict[str, int]](), 0
    n_out = low.width(op.out) // op.n_used
    if op.n_used > 1 and n_out % layout.ROW_ALIGN:
        raise UnsupportedError(
            f"{op.parts[0].weight}: experts with {n_out} rows; the CPU kernels of adapters take multiples of "
            f"{layout.ROW_ALIGN}.",
            code="MODEL_SHAPE",
        )
    for part in op.parts:
        address, _, _, of_expert = _packed(low, part.weight, kind, layout.STRIP)
        rank = low.program.tensors[part.weight].shape[-1]
        work += rank * n_out * op.n_used
        records.append(
            {
                "ADAPTER": part.adapter, "ADAPTER_WEIGHTS": address, "ADAPTER_EXPERT": of_expert,
                "ADAPTER_FIRST": part.first * 4, "ADAPTER_RANK": rank, "ADAPTER_FACTOR": _bits(part.factor),
            }
        )  # fmt: skip
    arguments = layout.ADAPTER_UP(
        **low.where(h=op.h, out=op.out), **_ids(low, op.ids), h_slot=low.width(op.h) // op.n_used * 4,
        out_slot=n_out * 4, n_used=op.n_used, n_out=layout.padded(n_out), parts=_records(low, records),
        n_parts=len(records), row_kind=low.row_kind(op.out),
    )  # fmt: skip
    low.emit(op, f"adapter_up_{kind.lower()}", arguments, alone=work <= ALONE_WORK)


def _ids(low: Any, ids: str | None) -> dict[str, int]:
    return {"ids": 0, "ids_row": 0} if ids is None else low.where(ids=ids)


def _bits(value: float) -> int:
    return int(struct.unpack("<q", struct.pack("<d", value))[0])


def add_direction(low: Any, op: AddDirection) -> None:
    """A record for each part."""
    records = [
        {
            "ADAPTER": part.adapter, "ADAPTER_WEIGHTS": low.vector(part.weight), "ADAPTER_FACTOR": _bits(part.factor),
        }
        for part in op.parts
    ]  # fmt: skip
    arguments = layout.ADD_DIRECTION(
        **low.where(x=op.x), width=low.width(op.x), parts=_records(low, records), n_parts=len(records),
        row_kind=low.row_kind(op.x),
    )  # fmt: skip
    low.emit(op, "add_direction", arguments, alone=low.width(op.x) * len(records) <= layout.ALONE_WIDTH)


RULES: dict[type, Any] = {AdapterDown: adapter_down, AdapterUp: adapter_up, AddDirection: add_direction}
