"""A mapped file that is cut short while it is in use: the page that is gone reads as zeros, and that it did is known.

The system answers a read beyond the new end of the file with SIGBUS, in whatever thread of a kernel reads; no Python
code can run there, and the process would die with the terminal as it is. So the handler is machine code, made here by
LLVM: when the address lies in one of the watched maps it puts zeros in the place of the rest of that map, marks it and
returns; anything else goes to the handler that was there before. ``FileMap.check`` turns the mark into an error.

Linux and macOS on 64-bit x86 and Arm. Windows refuses to cut a mapped file short. Elsewhere nothing is installed.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import platform
import signal
import struct
import sys
import threading
from dataclasses import dataclass
from typing import Any

N_SLOTS = 1024  # maps that are watched at once; a model has a few parts
SLOT_WORDS = 3  # first address, end, whether zeros took its place

_table = (ctypes.c_int64 * (N_SLOTS * SLOT_WORDS))()
_before = ctypes.create_string_buffer(256)  # the struct sigaction that was there
_lock = threading.Lock()
_made: list[Any] = []  # the compiled handler's module and address: it must outlive every map
_stood: list[bool] = []  # once the handler has been in place


@dataclass(frozen=True)
class System:
    """The numbers of a system's C headers: flags of mmap and sigaction, offsets into their structs."""

    map_fixed_private_anonymous: int
    sa_siginfo: int
    sigaction_nbytes: int
    flags_offset: int
    address_offset: int  # si_addr in siginfo_t


LINUX = System(0x10 | 0x02 | 0x20, 4, 152, 136, 16)  # glibc and musl, x86_64 and aarch64
MACOS = System(0x10 | 0x02 | 0x1000, 0x40, 16, 12, 24)


def system() -> System | None:
    """This machine's, None where it is not known."""
    known = platform.machine().lower() in ("x86_64", "amd64", "aarch64", "arm64") and sys.maxsize > 2**32
    return {"linux": LINUX, "darwin": MACOS}.get(sys.platform) if known else None


def watch(address: int, nbytes: int) -> int:
    """Watch a map from now on; its slot, -1 when all are taken."""
    end = address + -(-nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
    with _lock:
        for slot in range(N_SLOTS):
            if not _table[SLOT_WORDS * slot + 1]:
                _table[SLOT_WORDS * slot + 2] = 0
                _table[SLOT_WORDS * slot] = address
                _table[SLOT_WORDS * slot + 1] = end  # last: from here on the handler sees it
                return slot
    return -1


def forget(slot: int) -> None:
    """Watch it no longer, before its addresses belong to something else."""
    if slot >= 0:  # without the lock: the collector may come here while this very thread holds it
        _table[SLOT_WORDS * slot + 1] = 0


def was_cut(slot: int) -> bool:
    """Whether a read beyond the file's end was answered with zeros."""
    return slot >= 0 and bool(_table[SLOT_WORDS * slot + 2])


def install() -> bool:
    """Put the handler in place, once; again when something else has taken its place. Whether it stands."""
    here = system()
    if here is None:
        return False
    with _lock, contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None, use_errno=True)
        if not _made:
            _made.extend(_compiled(here, *(_address(getattr(libc, name)) for name in ("mmap", "sigaction"))))
        handler = _made[0]
        now = ctypes.create_string_buffer(256)
        if libc.sigaction(signal.SIGBUS, None, now):
            return False
        found = int.from_bytes(now.raw[:8], sys.byteorder)
        if found == handler:
            return True
        action = ctypes.create_string_buffer(here.sigaction_nbytes)
        struct.pack_into("=Q", action, 0, handler)
        struct.pack_into("=i", action, here.flags_offset, here.sa_siginfo)
        if not _stood or found in (0, 1):  # one that came after us hands on to us: never back to it
            ctypes.memmove(_before, now, len(now))
        _stood.append(True)
        return bool(libc.sigaction(signal.SIGBUS, action, None) == 0)
    return False


def _address(function: Any) -> int:
    return int(ctypes.cast(function, ctypes.c_void_p).value or 0)


def _compiled(here: System, mmap_address: int, sigaction_address: int) -> tuple[int, Any]:
    """The handler's address, and what keeps it alive."""
    import llvmlite.binding as llvm  # 50 ms, and whoever loads a model needs it anyway

    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    machine = llvm.Target.from_default_triple().create_target_machine(opt=1)
    module = llvm.parse_assembly(str(_handler(here, mmap_address, sigaction_address)))
    engine = llvm.create_mcjit_compiler(module, machine)
    engine.finalize_object()
    return engine.get_function_address("edgellm_bus_error"), engine


def _handler(here: System, mmap_address: int, sigaction_address: int) -> Any:
    """``void edgellm_bus_error(int signal, siginfo_t *info, void *context)``: only calls that a handler may make."""
    from llvmlite import ir

    i32, i64 = ir.IntType(32), ir.IntType(64)
    module = ir.Module("bus_error")
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), [i32, i64, i64]), "edgellm_bus_error")
    entry, loop, look, mine, done, after, other = (
        function.append_basic_block(name) for name in ("entry", "loop", "look", "mine", "done", "next", "other")
    )
    at = ir.IRBuilder(entry)

    def word(address: Any) -> Any:
        return at.inttoptr(address, i64.as_pointer())

    def call(address: int, result: Any, *arguments: Any) -> Any:
        kind = ir.FunctionType(result, [argument.type for argument in arguments]).as_pointer()
        return at.call(at.inttoptr(i64(address), kind), arguments)

    fault = at.load(word(at.add(function.args[1], i64(here.address_offset))))
    first = ctypes.addressof(_table)
    at.branch(loop)

    at.position_at_end(loop)
    row = at.phi(i64)
    row.add_incoming(i64(first), entry)
    at.cbranch(at.icmp_unsigned("<", row, i64(first + ctypes.sizeof(_table))), look, other)

    at.position_at_end(look)
    end = at.load(word(at.add(row, i64(8))))
    inside = at.and_(at.icmp_unsigned(">=", fault, at.load(word(row))), at.icmp_unsigned("<", fault, end))
    at.cbranch(inside, mine, after)

    at.position_at_end(after)
    row.add_incoming(at.add(row, i64(8 * SLOT_WORDS)), after)
    at.branch(loop)

    at.position_at_end(mine)  # the rest of the map: whoever reads on need not come here for every page
    at.store(i64(1), word(at.add(row, i64(16))))
    page = at.and_(fault, i64(-mmap.PAGESIZE))
    flags = i32(here.map_fixed_private_anonymous)
    zeros = call(mmap_address, i64, page, at.sub(end, page), i32(1), flags, i32(-1), i64(0))
    at.cbranch(at.icmp_unsigned("==", zeros, page), done, other)

    at.position_at_end(other)  # back to the handler before; the read is tried again and ends there
    call(sigaction_address, i32, i32(int(signal.SIGBUS)), i64(ctypes.addressof(_before)), i64(0))
    at.branch(done)

    at.position_at_end(done)
    at.ret_void()
    return module
