"""The AMX form: int8 tiles for products with many tokens; everything else is the AVX-512 form's.

A tile is a register of 16 rows x 64 bytes, and ``tdpbssd`` multiplies two of them: 16 x 16 int32 sums over up to 64
int8 each. Here are the primitives that ``amx_matmul.py`` calls, as LLVM IR, for this form and (doing nothing) for all
others, and the permission that Linux wants a process to ask for before its first tile instruction.

    tiles 0 1 2    sums (16 tokens x 16 rows), of falling weight
    tiles 0 1, 2 3 or two of them for each of two runs, so that one is multiplied while the other is stored
    tiles 4 5      activations (16 tokens), high and low bytes
    tiles 6 7      weights (16 rows), low and high bytes
"""

from __future__ import annotations

import ctypes
import functools
import os
import sys
import warnings

_SYS_ARCH_PRCTL = 158  # x86-64 Linux
_REQUEST_PERMISSION, _TILE_DATA = 0x1023, 18  # ARCH_REQ_XCOMP_PERM, the number of the tiles' state component


@functools.cache
def permitted() -> bool:
    """Whether this process may use the tiles that its CPU has: asks Linux for it, once. Warns where Linux refuses.

    A thread's tiles are 8 KiB of state that Linux (5.16 and later) saves only for processes that asked; their threads
    and children inherit the permission.
    """
    if not sys.platform.startswith("linux") or sys.maxsize < 2**32:
        return False
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.syscall(_SYS_ARCH_PRCTL, _REQUEST_PERMISSION, _TILE_DATA) == 0:
        return True
    warnings.warn(
        f"This CPU has AMX, but the system does not let this process use it ({os.strerror(ctypes.get_errno())}): the "
        "slower avx512_vnni kernels are used. The numbers are the same.",
        RuntimeWarning,
        stacklevel=2,
    )
    return False


def _define(name: str, arguments: tuple[str, ...], body: str) -> str:
    parameters = ", ".join(f"i64 %{argument}" for argument in arguments)
    return f'define void @"edgellm.{name}"({parameters}) alwaysinline {{\n{body}  ret void\n}}\n'


def _load(tile: int, address: str, stride: str) -> str:
    return f"  call void @llvm.x86.tileloadd64(i8 {tile}, ptr %{address}, i64 {stride})\n"


def _multiply(total: int, x: int, w: int) -> str:
    return f"  call void @llvm.x86.tdpbssd(i8 {total}, i8 {x}, i8 {w})\n"


def _zero(*tiles: int) -> str:
    return "".join(f"  call void @llvm.x86.tilezero(i8 {tile})\n" for tile in tiles)


def _store(*tiles: int) -> str:
    lines = ""
    for i, tile in enumerate(tiles):
        lines += f"  %a{i} = add i64 %out, {1024 * i}\n  %p{i} = inttoptr i64 %a{i} to ptr\n"
        lines += f"  call void @llvm.x86.tilestored64(i8 {tile}, ptr %p{i}, i64 64)\n"
    return lines


_PLACES = (
    "  %ph = inttoptr i64 %x to ptr\n  %al = add i64 %x, %low\n  %pl = inttoptr i64 %al to ptr\n"
    "  %wl = inttoptr i64 %w to ptr\n"
)


def _run(high: int, low: int) -> str:
    """A run of one plane, from zero."""
    loads = _load(6, "wl", "64") + _load(4, "ph", "%stride") + _load(5, "pl", "%stride")
    return _PLACES + _zero(high, low) + loads + _multiply(high, 4, 6) + _multiply(low, 5, 6)


def _step() -> str:
    """Four products for two planes, each as soon as it can be; the two middle ones have the same weight."""
    body = _PLACES.replace("%low", "64") + "  %aw = add i64 %w, %high\n  %wh = inttoptr i64 %aw to ptr\n"
    body += _load(4, "ph", "%stride") + _load(7, "wh", "64") + _multiply(0, 4, 7)
    body += _load(6, "wl", "64") + _multiply(1, 4, 6)
    return body + _load(5, "pl", "%stride") + _multiply(2, 5, 6) + _multiply(1, 5, 7)


_RUN = ("x", "low", "stride", "w")
_PRIMITIVES: dict[str, tuple[tuple[str, ...], str]] = {
    "tile_config": (
        ("address",),
        "  %p = inttoptr i64 %address to ptr\n  call void @llvm.x86.ldtilecfg(ptr %p)\n",
    ),
    "tile_release": ((), "  call void @llvm.x86.tilerelease()\n"),
    "tile_run_a": (_RUN, _run(0, 1)),
    "tile_run_b": (_RUN, _run(2, 3)),
    "tile_store_a": (("out",), _store(0, 1)),
    "tile_store_b": (("out",), _store(2, 3)),
    "tile_zero": ((), _zero(0, 1, 2)),
    "tile_step": (("x", "stride", "w", "high"), _step()),
    "tile_store": (("out",), _store(0, 1, 2)),
}
"""Arguments, all int64, and body."""

_DECLARE = """
declare void @llvm.x86.ldtilecfg(ptr)
declare void @llvm.x86.tilerelease()
declare void @llvm.x86.tilezero(i8)
declare void @llvm.x86.tileloadd64(i8, ptr, i64)
declare void @llvm.x86.tilestored64(i8, ptr, i64)
declare void @llvm.x86.tdpbssd(i8, i8, i8)
"""


def primitives(has_tiles: bool) -> str:
    """LLVM IR of the tile primitives. Without tiles ``has_tiles`` is 0 and LLVM drops what depends on it."""
    head = f'define i64 @"edgellm.has_tiles"() alwaysinline {{\n  ret i64 {int(has_tiles)}\n}}\n'
    functions = [_define(name, args, body if has_tiles else "") for name, (args, body) in _PRIMITIVES.items()]
    return (_DECLARE if has_tiles else "") + head + "".join(functions)
