"""The dispatches of a step, written down one after the other for the GPU: a loop of native code over a table.

A step has hundreds of dispatches and each is four calls of the C interface, which take Python longer than the library.
So rows are kept as a table of whole numbers, and a few lines of LLVM IR walk it. A device takes that loop when the
header that wgpu carries has the functions as they are called here, and the loop made the calls that Python makes; else
Python walks the rows itself.
"""

from __future__ import annotations

import contextlib
import ctypes as c
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

SET_PIPELINE, SET_GROUP = "wgpuComputePassEncoderSetPipeline", "wgpuComputePassEncoderSetBindGroup"
SET_IMMEDIATES, DISPATCH = "wgpuComputePassEncoderSetImmediates", "wgpuComputePassEncoderDispatchWorkgroups"

_SIZE, _WORD, _ADDRESS = ("uint64_t", "size_t"), ("uint32_t",), ("*",)
FUNCTIONS: dict[str, tuple[tuple[str, ...], ...]] = {
    SET_PIPELINE: (_ADDRESS, _ADDRESS),
    SET_GROUP: (_ADDRESS, _WORD, _ADDRESS, _SIZE, _ADDRESS),
    SET_IMMEDIATES: (_ADDRESS, _WORD, _ADDRESS, _SIZE),
    DISPATCH: (_ADDRESS, _WORD, _WORD, _WORD),
}
"""What is called of the C interface, and what the types of its arguments end in."""

_C_TYPES = {_SIZE: c.c_size_t, _WORD: c.c_uint32, _ADDRESS: c.c_void_p}


class Dispatch(NamedTuple):
    """One row of a recording: a shader over a grid, with its immediates, and the floating point operations in it.

    The handles are the library's own; the device keeps what they stand for.
    """

    pipeline: Any
    group: Any
    x: int
    y: int
    z: int
    immediates: bytes
    nbytes: int
    flops: int


class Recording:
    """Dispatches in order: as ``rows``, and as a ``table`` (n, 7) int64 of what native code needs of them.

    A row of the table is pipeline, group, x, y, z, address and bytes of the immediates.
    """

    def __init__(self, rows: Sequence[Dispatch], address: Callable[[Any], int]) -> None:
        """``address`` tells where a handle points to."""
        self.rows = tuple(rows)
        self._immediates = np.frombuffer(b"".join(row.immediates for row in rows) or bytes(4), np.uint32)
        at = self._immediates.ctypes.data
        self.table = np.empty((len(rows), 7), np.int64)
        for i, row in enumerate(rows):
            self.table[i] = address(row.pipeline), address(row.group), row.x, row.y, row.z, at, row.nbytes
            at += row.nbytes
        self.address = self.table.ctypes.data


Walk = Callable[[Any, Recording], None]
"""Writes a recording down in an open pass of the C interface."""


def python_walk(lib: Any, null: Any) -> Walk:
    """The walk that every device can do, and the judge of the native one."""
    set_pipeline, set_group, set_immediates, dispatch = (getattr(lib, name) for name in FUNCTIONS)

    def walk(into: Any, recording: Recording) -> None:
        current = None
        for pipeline, group, x, y, z, immediates, nbytes, _ in recording.rows:
            if pipeline is not current:
                set_pipeline(into, pipeline)
                current = pipeline
            set_group(into, 0, group, 0, null)
            set_immediates(into, 0, immediates, nbytes)
            dispatch(into, x, y, z)

    return walk


def native_walk(lib: Any, ffi: Any) -> Walk | None:
    """The native loop; None where wgpu's header has other functions, or the loop does not do what Python does."""
    if not all(_is_as_called(ffi.typeof(getattr(lib, name)), kinds) for name, kinds in FUNCTIONS.items()):
        return None
    with contextlib.suppress(Exception):  # no native code may be made here: the other walk is there
        loop = _loop()
        if not _makes_the_same_calls(loop):
            return None
        addresses = [int(ffi.cast("intptr_t", ffi.addressof(lib, name))) for name in FUNCTIONS]
        functions = np.array(addresses, np.int64)

        def walk(into: Any, recording: Recording) -> None:
            loop(recording.address, len(recording.rows), functions.ctypes.data, int(ffi.cast("intptr_t", into)))

        return walk
    return None


def _is_as_called(function: Any, kinds: Sequence[tuple[str, ...]]) -> bool:
    kept = [one.cname.replace(" const", "").rstrip() for one in function.args]
    return len(kept) == len(kinds) and all(name.endswith(kind) for name, kind in zip(kept, kinds, strict=True))


@functools.cache
def _loop() -> Callable[[int, int, int, int], None]:
    """The compiled loop; its arguments are the address of a table, its rows, the functions' addresses and the pass."""
    from edgellm.kernels.cpu.compile import isa, jit

    memory = jit.CodeMemory()
    loaded = jit.KERNEL(memory.load("walk", jit.compile_ir("walk", _IR, isa.detect())))
    loaded.memory = memory  # type: ignore[attr-defined]
    return loaded


def _makes_the_same_calls(loop: Callable[[int, int, int, int], None]) -> bool:
    """Whether the loop calls what Python calls, with the same numbers, for rows that cannot be mixed up."""
    calls: list[tuple[Any, ...]] = []

    def noted(name: str) -> Any:
        return lambda *arguments: calls.append((name, *arguments))

    made = [c.CFUNCTYPE(None, *(_C_TYPES[kind] for kind in kinds))(noted(name)) for name, kinds in FUNCTIONS.items()]
    first, far = 1 << 40, (1 << 47) + 8
    numbers = [
        (first, far, 1, 2, 3, bytes(range(8))),
        (first, far + 8, 7, 32768, 5, b""),
        (far, 8, 9, 1, 65535, b"xyzw"),
    ]
    rows = [Dispatch(*row, len(row[-1]), 0) for row in numbers]
    recording, into = Recording(rows, int), far + 16
    functions = np.array([c.cast(one, c.c_void_p).value for one in made], np.int64)
    loop(recording.address, len(rows), functions.ctypes.data, into)
    native, last = list(calls), None
    calls.clear()
    for row, at in zip(rows, recording.table[:, 5].tolist(), strict=True):
        if row.pipeline != last:
            calls.append((SET_PIPELINE, into, row.pipeline))
        last = row.pipeline
        calls.append((SET_GROUP, into, 0, row.group, 0, None))
        calls.append((SET_IMMEDIATES, into, 0, at, row.nbytes))
        calls.append((DISPATCH, into, row.x, row.y, row.z))
    return native == calls


_IR = """
define void @edgellm_walk(i64 %table, i64 %n, i64 %functions, i64 %pass) {
begin:
  %row0 = inttoptr i64 %table to ptr
  %f0 = inttoptr i64 %functions to ptr
  %f1 = getelementptr i64, ptr %f0, i64 1
  %f2 = getelementptr i64, ptr %f0, i64 2
  %f3 = getelementptr i64, ptr %f0, i64 3
  %set_pipeline = load ptr, ptr %f0
  %set_group = load ptr, ptr %f1
  %set_immediates = load ptr, ptr %f2
  %dispatch = load ptr, ptr %f3
  %into = inttoptr i64 %pass to ptr
  %none = icmp eq i64 %n, 0
  br i1 %none, label %done, label %next
next:
  %i = phi i64 [ 0, %begin ], [ %i1, %rest ]
  %row = phi ptr [ %row0, %begin ], [ %row1, %rest ]
  %last = phi ptr [ null, %begin ], [ %pipeline, %rest ]
  %pipeline = load ptr, ptr %row
  %same = icmp eq ptr %pipeline, %last
  br i1 %same, label %rest, label %change
change:
  call void %set_pipeline(ptr %into, ptr %pipeline)
  br label %rest
rest:
  %p1 = getelementptr i64, ptr %row, i64 1
  %p2 = getelementptr i64, ptr %row, i64 2
  %p3 = getelementptr i64, ptr %row, i64 3
  %p4 = getelementptr i64, ptr %row, i64 4
  %p5 = getelementptr i64, ptr %row, i64 5
  %p6 = getelementptr i64, ptr %row, i64 6
  %group = load ptr, ptr %p1
  %x = load i32, ptr %p2
  %y = load i32, ptr %p3
  %z = load i32, ptr %p4
  %immediates = load ptr, ptr %p5
  %nbytes = load i64, ptr %p6
  call void %set_group(ptr %into, i32 0, ptr %group, i64 0, ptr null)
  call void %set_immediates(ptr %into, i32 0, ptr %immediates, i64 %nbytes)
  call void %dispatch(ptr %into, i32 %x, i32 %y, i32 %z)
  %i1 = add i64 %i, 1
  %row1 = getelementptr i64, ptr %row, i64 7
  %more = icmp ult i64 %i1, %n
  br i1 %more, label %next, label %done
done:
  ret void
}
"""
