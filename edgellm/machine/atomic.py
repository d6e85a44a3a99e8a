"""A file appears whole under its name, or not at all.

It grows beside its target under a temporary name and takes the target's in one step. What stood there before stays
until then; what a killed run left is removed by the next one that writes the same file.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from edgellm.machine.file_lock import try_lock


@contextlib.contextmanager
def whole_file(
    path: Path,
    *,
    private: bool = False,
    sync: bool = True,
    links: bool = True,
    writer: Callable[[io.FileIO], Any] = io.BufferedWriter,
) -> Iterator[Any]:
    """A new binary file for a ``with`` block: named ``path`` when the block ends, gone when it raises. OSError.

    private   for the eyes of this user alone, else with the rights of any new file
    sync      on the disk before it takes its name, for what cannot be made again
    links     a link stays a link to the new file, else the file takes its place
    writer    makes the file object of the block
    ``file.name`` is the temporary path. What is no regular file, such as a device, is never replaced.
    """
    target = Path(os.path.realpath(path)) if links else path
    if path.exists() and not path.is_file() and (links or not path.is_symlink()):
        raise OSError(errno.EINVAL, "it is no regular file; choose another name", str(path))
    remove_stale(target.parent, _stem(target))
    descriptor, temporary = tempfile.mkstemp(".part", _stem(target), target.parent)
    file = writer(io.FileIO(temporary, "wb", opener=lambda *_: descriptor))
    try:
        with contextlib.suppress(OSError):  # so that another run can tell it from one whose writer is dead
            _lock(descriptor)
        yield file
        file.flush()
        if not private and sys.platform != "win32":
            os.fchmod(descriptor, 0o666 & ~_umask())
        if sync:
            os.fsync(descriptor)
        if sys.platform == "win32":
            file.close()  # an open file cannot be renamed there
        take_name(Path(temporary), target, sync=sync)
    finally:
        with contextlib.suppress(OSError):  # what is still buffered when the disk is full
            file.close()
        with contextlib.suppress(OSError):
            os.unlink(temporary)


def take_name(path: Path, target: Path, *, sync: bool = True) -> None:
    """Rename in one step; with ``sync`` the folder that names the file is on the disk too."""
    os.replace(path, target)
    if not sync or sys.platform == "win32":
        return
    folder = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some file systems cannot
            raise
    finally:
        os.close(folder)


def _stem(target: Path) -> str:
    """The beginning of the names that files on their way to ``target`` have."""
    return f".{target.name}."


def remove_stale(folder: Path, stem: str = ".") -> None:
    """Remove what killed runs left under names that begin so; what another run still writes is locked and stays."""
    for name in os.listdir(folder):
        if name.startswith(stem) and name.endswith(".part"):
            with contextlib.suppress(OSError):
                path = folder / name
                descriptor = os.open(path, os.O_RDWR | getattr(os, "O_NOFOLLOW", 0))
                try:
                    free = _lock(descriptor)
                finally:
                    os.close(descriptor)
                if free:
                    path.unlink()  # Windows refuses while another process has it open


def _lock(descriptor: int) -> bool:
    return sys.platform == "win32" or try_lock(descriptor)  # Windows locks a file that is open for writing by itself


def _umask() -> int:
    mask = os.umask(0o077)
    os.umask(mask)
    return mask
