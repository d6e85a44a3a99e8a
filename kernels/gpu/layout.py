"""Where the buffers of a program are on the device.

Buffers that products of one input fill (q, k and v; gate and up) lie side by side in one row, so that one dispatch can
fill them all. A row is filled up to whole pieces of 32 floats, and what it is filled with stays zero.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from edgellm.formats.errors import UnsupportedError
from edgellm.kernels.gpu.cuts import Cut, find_cuts
from edgellm.kernels.gpu.order import in_order
from edgellm.kernels.ops import Matmul, Op
from edgellm.kernels.program import Buffer, Program

MAX_OUTPUTS = 32
"""Rows of an ``outputs`` buffer, at most: more logits than that are computed in turns."""

MAX_BINDING = 1 << 31
"""Bytes that one binding has where it is not known yet which device it is."""

PIECE = 32


class Place(NamedTuple):
    """Columns of a device buffer: from ``at`` on, ``row`` numbers to the next row."""

    buffer: Any
    at: int
    row: int
    width: int
    rows: str


def runs_of_products(ops: Sequence[Op]) -> Iterator[list[Matmul]]:
    """Products of one input that stand together, each with an output of its own."""
    for is_product, group in itertools.groupby(ops, lambda op: isinstance(op, Matmul)):
        run: list[Matmul] = []
        for op in group if is_product else ():
            assert isinstance(op, Matmul)
            if run and (op.x != run[0].x or op.out in {other.out for other in run}):
                yield run
                run = []
            run.append(op)
        if run:
            yield run


def _side_by_side(ops: Sequence[Op], buffers: Mapping[str, Buffer]) -> list[tuple[str, ...]]:
    """Names of buffers that go into one row."""
    groups = {tuple(op.out for op in run) for run in runs_of_products(ops) if len(run) > 1}
    parents = {buffer.of for buffer in buffers.values()}
    often = {name for name, n in Counter(itertools.chain(*groups)).items() if n > 1}
    inputs = {op.x for op in ops if isinstance(op, Matmul)}

    def stands(names: tuple[str, ...]) -> bool:
        if any(name in often or name in parents or buffers[name].of for name in names):
            return False
        if len({buffers[name].rows for name in names}) > 1 or len(names) != len(set(names)):
            return False
        # a product reads whole pieces of its input
        return not inputs.intersection(names) or all(buffers[name].width % PIECE == 0 for name in names)

    return sorted(names for names in groups if stands(names))


def row_counts(program: Program, max_tokens: int, max_binding: int) -> dict[str, int]:
    """Rows that a buffer of each kind has."""
    widest = max((padded(b.width) for b in program.buffers.values() if b.rows == "outputs"), default=1)
    return {"tokens": max_tokens, "outputs": max(1, min(MAX_OUTPUTS, max_binding // (4 * widest)))}


def padded(width: int) -> int:
    """Numbers of a row, filled up to whole pieces."""
    return -(-width // PIECE) * PIECE


class Memory(Protocol):
    """What makes buffers on a device, or counts their bytes."""

    def buffer(self, nbytes: int) -> Any:
        """One of ``size`` bytes, this many or a few more."""
        ...


class _Sized(NamedTuple):
    size: int


class _Counted:
    """The ``Memory`` of no device."""

    def __init__(self) -> None:
        self.nbytes = 0

    def buffer(self, nbytes: int) -> _Sized:
        self.nbytes += nbytes
        return _Sized(nbytes)


def buffers_nbytes(program: Program, rows: Mapping[str, int]) -> int:
    """Bytes of all buffers of a program."""
    counted = _Counted()
    place_buffers(counted, program, rows, find_cuts(program.ops, program.buffers))
    return counted.nbytes


class Places(NamedTuple):
    """Where each buffer of a program is, and where products leave those whose rows stand in another order."""

    of: dict[str, Place]
    made: dict[str, Place]


def place_buffers(device: Memory, program: Program, rows: Mapping[str, int], cuts: Mapping[str, Cut]) -> Places:
    """Make the buffers of ``program``."""
    buffers, places, ops = program.buffers, dict[str, Place](), in_order(program.ops, cuts, program)
    together = _side_by_side(ops, buffers)
    halves = {name for cut in cuts.values() for name in (cut.first, cut.second)}
    beside = halves.union(*together)
    alone = [(name,) for name, buffer in buffers.items() if not buffer.of and name not in beside]
    for names in (*together, *alone):
        row = padded(sum(buffers[name].width for name in names))
        kind, at = buffers[names[0]].rows, 0
        made = device.buffer(4 * (row * rows[kind] + PIECE))  # the last expert's input is read in whole pieces, too
        for name in names:
            places[name] = Place(made, at, row, buffers[name].width, kind)
            at += buffers[name].width
    made = _cut_places(device, buffers, cuts, places)
    for name, buffer in buffers.items():
        if buffer.of:
            whole = places[buffer.of]
            places[name] = whole._replace(at=whole.at + buffer.first, width=buffer.width)
    for op in ops:
        if isinstance(op, Matmul) and not _is_readable(places[op.x]):
            raise UnsupportedError(
                f"buffer {op.x}: the gpu device multiplies whole groups of {PIECE} columns, and these are "
                f"{places[op.x].at} to {places[op.x].at + places[op.x].width} of {places[op.x].row}.",
                code="BUFFER_COLUMNS",
            )
    return Places(places, made)


def _cut_places(
    device: Memory, buffers: Mapping[str, Buffer], cuts: Mapping[str, Cut], places: dict[str, Place]
) -> dict[str, Place]:
    """Place halves in what is cut, and what is cut in a buffer of its own where it has another order."""
    made: dict[str, Place] = {}
    for name, cut in cuts.items():  # those that are halves themselves come behind what they are halves of
        whole, width = places[name], buffers[cut.first].width
        places[cut.first] = whole._replace(width=width)
        places[cut.second] = whole._replace(at=whole.at + width, width=whole.width - width)
        if cut.order is not None:
            made[name], row = whole, padded(whole.width)
            n_rows = whole.buffer.size // 4 // whole.row
            places[name] = Place(device.buffer(4 * row * n_rows), 0, row, whole.width, whole.rows)
    return made


def _is_readable(place: Place) -> bool:
    """Whether a product can read it four numbers at a time, in whole pieces."""
    return place.at % 4 == 0 and (place.width % PIECE == 0 or place.at + padded(place.width) == place.row)
