"""Kernels run as a program of an Arm Linux, under qemu: objects that ``jit`` made, linked by hand, with their memory.

Python for Arm is not needed: the program is a static ELF file of the kernels, a start that calls them one after the
other, and an image of the memory that they read and write. It prints the image and ends.
"""

from __future__ import annotations

import shutil
import struct
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

QEMU = next((path for name in ("qemu-aarch64", "qemu-aarch64-static") if (path := shutil.which(name))), None)

CODE, IMAGE = 0x400000, 0x10000000  # addresses

RET, SVC = 0xD65F03C0, 0xD4000001
MEMSET = (
    0xB40000A2,  # cbz x2, to ret
    0xAA0003E3,  # mov x3, x0
    0x38001461,  # strb w1, [x3], 1
    0xF1000442,  # subs x2, x2, 1
    0x54FFFFC1,  # b.ne to strb
    RET,
)
PRINT = (  # from x19 to x20; x8 names the system call: write 64, exit_group 94
    0xD2800020,  # mov x0, 1
    0xAA1303E1,  # mov x1, x19
    0xCB130282,  # sub x2, x20, x19
    0xD2800808,  # mov x8, 64
    SVC,
    0x8B000273,  # add x19, x19, x0
    0xEB14027F,  # cmp x19, x20
    0x54FFFF23,  # b.lo to the first
    0xD2800000,  # mov x0, 0
    0xD2800BC8,  # mov x8, 94
    SVC,
)


def _set(register: int, value: int) -> list[int]:
    """movz and movk: a register has a value below 2^32."""
    return [0xD2800000 | (value & 0xFFFF) << 5 | register, 0xF2A00000 | (value >> 16) << 5 | register]


class _Section:
    """An object's section that the program keeps, and where."""

    def __init__(self, data: bytes, alignment: int) -> None:
        self.data, self.alignment, self.address = bytearray(data), alignment, 0


class _Linker:
    def __init__(self) -> None:
        self.sections: list[_Section] = []
        self.symbols: dict[str, int] = {}
        self.relocations: list[tuple[_Section, int, int, tuple[_Section | None, int, str], int]] = []
        self.pending: list[tuple[str, _Section, int]] = []

    def add(self, code: bytes) -> None:
        """The code and constants of a relocatable ELF object, and what they refer to."""
        start, n = struct.unpack_from("<Q", code, 40)[0], struct.unpack_from("<H", code, 60)[0]
        heads = [struct.unpack_from("<IIQQQQIIQQ", code, start + 64 * i) for i in range(n)]
        body = [code[h[4] : h[4] + h[5]] if h[1] != 8 else b"" for h in heads]
        kept = {i: _Section(body[i], h[8]) for i, h in enumerate(heads) if h[1] == 1 and h[2] & 2}
        self.sections += kept.values()
        symbols: list[tuple[_Section | None, int, str]] = []
        for i, head in enumerate(heads):
            if head[1] != 2:
                continue
            names = body[head[6]]
            for name_at, info, _, section, value, _ in struct.iter_unpack("<IBBHQQ", body[i]):
                name = names[name_at : names.index(b"\0", name_at)].decode()
                symbols.append((kept.get(section), value, name))
                if section in kept and info >> 4:
                    self.pending.append((name, kept[section], value))
        for i, head in enumerate(heads):
            if head[1] == 4 and head[7] in kept:
                for at, info, addend in struct.iter_unpack("<QQq", body[i]):
                    self.relocations.append((kept[head[7]], at, info & 0xFFFFFFFF, symbols[info >> 32], addend))

    def link(self) -> bytes:
        """Everything from CODE on; ``symbols`` has the addresses then."""
        end = CODE
        for section in self.sections:
            section.address = end = -(-end // max(section.alignment, 16)) * max(section.alignment, 16)
            end += len(section.data)
        self.symbols = {name: section.address + value for name, section, value in self.pending}
        for section, at, kind, (home, value, name), addend in self.relocations:
            goal = (home.address + value if home is not None else self.symbols[name]) + addend
            _apply(section.data, at, kind, goal, section.address + at)
        program = bytearray(end - CODE)
        for section in self.sections:
            program[section.address - CODE : section.address - CODE + len(section.data)] = section.data
        return bytes(program)


_LOW_12 = {277: 0, 278: 0, 284: 1, 285: 2, 286: 3, 299: 4}  # add, loads and stores of 1, 2, 4, 8 and 16 bytes


def _apply(data: bytearray, at: int, kind: int, goal: int, place: int) -> None:
    """One relocation, by its number in the ABI for Arm's ELF files."""
    if kind in (260, 261):  # relative data
        struct.pack_into("<q" if kind == 260 else "<i", data, at, goal - place)
        return
    word = struct.unpack_from("<I", data, at)[0]
    if kind in (282, 283):  # b, bl
        word |= ((goal - place) >> 2) & 0x3FFFFFF
    elif kind == 275:  # adrp
        pages = (goal >> 12) - (place >> 12)
        word |= (pages & 3) << 29 | (pages >> 2 & 0x7FFFF) << 5
    elif kind in _LOW_12:
        word |= ((goal & 0xFFF) >> _LOW_12[kind]) << 10
    else:
        raise NotImplementedError(f"relocation {kind}")
    struct.pack_into("<I", data, at, word)


def _start(linker: _Linker, calls: Sequence[tuple[str, int, int]], image: tuple[int, int]) -> _Section:
    """Where a program begins: calls of kernels (name, op, step) on one thread, then the image is printed."""
    words: list[int] = []
    section = _Section(b"", 16)
    for name, op, step in calls:
        words += [*_set(0, op), *_set(1, step), *_set(2, 0), *_set(3, 1)]
        goal = (None, 0, f"edgellm_{name}")
        linker.relocations.append((section, len(words) * 4, 283, goal, 0))
        words.append(0x94000000)
    words += [*_set(19, image[0]), *_set(20, image[1]), *PRINT]
    section.data += struct.pack(f"<{len(words)}I", *words)
    return section


def run(objects: dict[str, bytes], calls: Sequence[tuple[str, int, int]], image: bytes, cpu: str = "max") -> bytes:
    """The image after the calls; addresses in it are those of IMAGE."""
    linker = _Linker()
    start, memset = _start(linker, calls, (IMAGE, IMAGE + len(image))), _Section(struct.pack("<6I", *MEMSET), 16)
    linker.sections += [start, memset]
    linker.pending.append(("memset", memset, 0))
    for code in objects.values():
        linker.add(code)
    program = linker.link()
    program += bytes(-len(program) % 4096)
    header = struct.pack("<16sHHIQQQIHHHHHH", b"\x7fELF\2\1\1", 2, 183, 1, start.address, 64, 0, 0, 64, 56, 2, 0, 0, 0)
    for flags, offset, address, nbytes in (
        (5, 4096, CODE, len(program)),
        (6, 4096 + len(program), IMAGE, len(image)),
    ):
        header += struct.pack("<IIQQQQQQ", 1, flags, offset, address, address, nbytes, nbytes, 4096)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "program"
        path.write_bytes(header.ljust(4096, b"\0") + program + image)
        path.chmod(0o700)
        done = subprocess.run([str(QEMU), "-cpu", cpu, str(path)], capture_output=True, timeout=300)
    assert done.returncode == 0, (done.returncode, done.stderr[-500:])
    return done.stdout
