"""Compiled kernels on disk: one object file each, found by what it was made from, checked before it is run.

Numba's own cache keeps pickles and does not notice a change in another file; a flipped bit in one can end the process.
Here a file is 32 bytes of SHA-256, then the object. Its name holds a key over the source of every CPU kernel, the
instruction set with its features, and the versions of numba and llvmlite. The digest also says whether the kernel has
passed the self-test on this CPU (``verified_kernels.py``). Anything wrong with a file, its folder or its owner means:
compile again, quietly; only a folder that can keep nothing gets a word. It belongs to the user alone (0700).
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import importlib.metadata
import os
import stat
import tempfile
import time
import warnings
from collections.abc import Sequence
from pathlib import Path

import llvmlite.binding as llvm

from edgellm.formats import levels
from edgellm.formats.errors import ParameterError
from edgellm.kernels.cpu.compile import jit, kernel_table
from edgellm.kernels.cpu.compile.compile_crew import CompileCrew, heaviest_first
from edgellm.kernels.cpu.compile.isa import Isa
from edgellm.kernels.cpu.encoders import ENCODERS
from edgellm.machine.atomic import whole_file
from edgellm.machine.paths import kernels_dir
from edgellm.machine.progress import Progress

KEPT_S = 30 * 86400.0
"""Kernels of another version stay so long: some go back and forth between two."""

_MAX_NBYTES = 8 << 20


def default_folder() -> Path | None:
    """``$EDGELLM_KERNEL_CACHE``, or ``kernels`` in edgellm's cache folder; None when this user has no home for it."""
    try:
        return kernels_dir()
    except ParameterError:
        if os.environ.get("EDGELLM_KERNEL_CACHE") or os.environ.get("EDGELLM_HOME"):
            raise
        _tell_unkept(None)
        return None


def why_not_kept(folder: Path | None) -> str | None:
    """Why compiled kernels cannot be kept in a folder, None when they can: a sentence for the user."""
    if folder is None:
        return "there is no home folder. Set HOME, or EDGELLM_KERNEL_CACHE to a folder of yours"
    advice = "Set EDGELLM_KERNEL_CACHE to a folder of yours that can be written"
    if not _private(folder):
        return f"{folder} is no folder that belongs to this user alone, or it cannot be made. {advice}"
    try:
        with tempfile.NamedTemporaryFile(dir=folder, suffix=".part"):
            return None
    except OSError as error:
        return f"{folder}: {error.strerror or error}. {advice}"


def _tell_unkept(folder: Path | None) -> None:
    """One warning when what is compiled now will have to be compiled at every start."""
    if (reason := why_not_kept(folder)) is not None:
        warnings.warn(f"Compiled kernels cannot be kept: {reason}.", RuntimeWarning, stacklevel=2)


CPU_FOLDER = Path(__file__).parent.parent
COMPILER = tuple(f"compile/{name}.py" for name in ("isa", "jit", "numba_frontend", "kernel_table"))
GROUPS = {  # what the kernels of a group are made from: whoever edits an encoder keeps all other kernels
    "kernels": (*COMPILER, "lib", "weights", "kernels", "../../formats/levels.py"),
    "encoders": (*COMPILER, "lib", "encoders", "../../formats/levels.py"),
}


def group_of(name: str) -> str:
    """The row of GROUPS that a kernel belongs to."""
    return "encoders" if name in ENCODERS else "kernels"


def cache_key(isa: Isa, group: str = "kernels") -> str:
    """Hex digest of all that decides what the object code of a group's kernels is."""
    digest = hashlib.sha256()
    for part in GROUPS[group]:
        place = CPU_FOLDER / part
        for path in sorted(place.rglob("*.py")) if place.is_dir() else [place]:
            digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    versions = [f"{name} {importlib.metadata.version(name)}" for name in ("numba", "llvmlite", "numpy")]
    numbers = str((llvm.llvm_version_info, levels.IQ4, levels.E2M1_DOUBLED))
    for text in (isa.name, isa.triple, isa.cpu, isa.features, isa.primitives, *versions, numbers):
        digest.update(text.encode() + b"\0")
    return digest.hexdigest()


class KernelCache:
    """The kernels of one instruction set. ``folder=None`` keeps nothing on disk."""

    def __init__(self, isa: Isa, folder: Path | None) -> None:
        self.isa = isa
        self._keys: dict[str, str] = {}
        self._wanted = folder
        self.folder = folder if folder is not None and _private(folder) else None
        self.n_compiled = 0  # since this object was made, helpers included; 0 after a warm start
        self._objects: dict[str, bytes] = {}
        self._verified: set[str] = set()

    def objects(self, names: Sequence[str], progress: Progress | None = None) -> dict[str, bytes]:
        """Object code of each kernel, from disk where it is sound, compiled and kept otherwise."""
        found = self._objects
        found.update((name, code) for name in names if name not in found and (code := self._read(name)) is not None)
        missing = heaviest_first([name for name in names if name not in found])
        with CompileCrew(self.isa.name, self.folder, missing) as crew:
            for i, name in enumerate(missing):
                if not crew.claim(name):
                    continue
                if progress:
                    progress(max(i, crew.n_claimed() - 1), len(missing), name)
                self._compile(name)
            crew.wait()
        for name in missing:
            if name not in found:  # a helper has it
                code = self._read(name)
                if code is None:
                    self._compile(name)
                else:
                    found[name] = code
                    self.n_compiled += 1
        if progress and missing:
            progress(len(missing), len(missing), "")
        if missing:
            self._forget_old()
            if self._wanted is not None:
                _tell_unkept(self._wanted)
        return {name: found[name] for name in names}

    def _compile(self, name: str) -> None:
        self._objects[name] = jit.compile_object(name, kernel_table.function(name, self.isa.name), self.isa)
        self.n_compiled += 1
        self._write(name, self._objects[name])

    def _forget_old(self) -> None:
        """Delete kernels of other versions that were made long ago; whoever still needs one makes it again."""
        if self.folder is None:
            return
        current = {self._group_key(group)[:32] for group in GROUPS}
        for path in self.folder.glob("*.kernel"):
            with contextlib.suppress(OSError):
                if path.stem[-32:] not in current and path.lstat().st_mtime < time.time() - KEPT_S:
                    path.unlink()

    def key(self, name: str) -> str:
        """The digest of all that a kernel is made from."""
        return self._group_key(group_of(name))

    def _group_key(self, group: str) -> str:
        if group not in self._keys:
            self._keys[group] = cache_key(self.isa, group)
        return self._keys[group]

    def is_verified(self, name: str) -> bool:
        """Whether a kernel that ``objects`` gave has passed the self-test, now or before it was kept."""
        return name in self._verified

    def mark_verified(self, name: str) -> None:
        """Remember, on disk too, that a kernel which ``objects`` gave has passed."""
        self._verified.add(name)
        self._write(name, self._objects[name])

    def path(self, name: str) -> Path | None:
        """Where a kernel's object is kept."""
        return None if self.folder is None else self.folder / f"{name}-{self.isa.name}-{self.key(name)[:32]}.kernel"

    def _read(self, name: str) -> bytes | None:
        path = self.path(name)
        if path is None:
            return None
        try:
            with open(path, "rb", opener=_without_waiting) as file:
                info = os.fstat(file.fileno())
                if not stat.S_ISREG(info.st_mode) or info.st_size > _MAX_NBYTES or not _mine(info):
                    return None
                data = file.read(_MAX_NBYTES)
        except OSError:
            return None
        digest, code = data[:32], data[32:]
        for verified in (True, False):
            if hmac.compare_digest(digest, self._digest(name, code, verified)):
                if verified:
                    self._verified.add(name)
                return code
        return None

    def _digest(self, name: str, code: bytes, verified: bool) -> bytes:
        return hashlib.sha256(f"{name}\0{self.key(name)}\0{verified}\0".encode() + code).digest()

    def _write(self, name: str, code: bytes) -> None:
        """Keep an object; a full or read-only disk is no reason to fail."""
        path = self.path(name)
        if path is None:
            return
        with contextlib.suppress(OSError), whole_file(path, private=True, sync=False, links=False) as file:
            file.write(self._digest(name, code, self.is_verified(name)) + code)


def _without_waiting(path: str, flags: int) -> int:
    """Open a file; a pipe in its place does not keep us waiting for a writer, a link is refused."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOFOLLOW", 0))


def _mine(info: os.stat_result) -> bool:
    return not hasattr(os, "getuid") or info.st_uid == os.getuid()


def _private(folder: Path) -> bool:
    """Make the folder if need be; False if it is not a directory that this user alone can write."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        info = os.lstat(folder)
        if not stat.S_ISDIR(info.st_mode) or not _mine(info):
            return False
        if os.name == "posix" and info.st_mode & 0o077:
            os.chmod(folder, 0o700)
    except OSError:
        return False
    return True
