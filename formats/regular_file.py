"""Open a file that somebody named: a pipe may wait for ever for a writer, and a device need never end.

What is looked at is the descriptor that is read. A pipe is taken only where the caller says so, and only one that the
shell has opened already: ``/dev/stdin``, or ``<(command)``.
"""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path
from typing import BinaryIO

from edgellm.formats.errors import FormatError

# O_NONBLOCK: a pipe would be waited for
FLAGS = os.O_RDONLY | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
_SHELLS_OWN = re.compile(r"/dev/(stdin|fd/\d+)|/proc/self/fd/\d+")


class NotAFileError(FormatError):
    """A directory, pipe, socket or device stands where a regular file was expected; ``kind`` says which."""

    code = "NOT_A_FILE"

    def __init__(self, path: str | os.PathLike[str], kind: str) -> None:
        super().__init__(f"{path}: is {kind}, and a regular file was expected. Give the path of a file.")
        self.kind = kind


def open_descriptor(path: str | os.PathLike[str], *, pipes: bool = False, flags: int = FLAGS) -> int:
    """A descriptor of the file, for reading. NotAFileError, or OSError as ``os.open`` raises it."""
    try:
        descriptor = os.open(path, flags)
    except OSError:
        if os.path.isdir(path):  # Windows refuses to open one
            raise NotAFileError(path, "a directory") from None
        if is_socket(path):
            raise NotAFileError(path, "a socket") from None
        raise
    try:
        mode = os.fstat(descriptor).st_mode
        if pipes and stat.S_ISFIFO(mode) and _SHELLS_OWN.fullmatch(os.fspath(path)):
            os.set_blocking(descriptor, True)
        elif not stat.S_ISREG(mode):
            raise NotAFileError(path, kind_of(mode))
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def open_regular(path: str | os.PathLike[str], *, pipes: bool = False) -> BinaryIO:
    """The file, open for reading bytes. NotAFileError, or OSError as ``open`` raises it."""
    return open(open_descriptor(path, pipes=pipes), "rb")


def read_regular(path: str | os.PathLike[str], limit: int, code: str, *, pipes: bool = False) -> bytes:
    """All of the file, FormatError ``code`` when it is longer than ``limit`` bytes. Else as ``open_regular``."""
    with open_regular(path, pipes=pipes) as file:
        data = file.read(limit + 1)
        if len(data) > limit:
            nbytes = max(os.fstat(file.fileno()).st_size, len(data))
            raise FormatError(
                f"{path}: is {nbytes:,} bytes long, expected up to {limit:,}. Take a part of it.", code=code
            )
    return data


def kind_of(mode: int) -> str:
    """What a file is that is no regular one."""
    if stat.S_ISDIR(mode):
        return "a directory"
    if stat.S_ISFIFO(mode):
        return "a pipe"
    return "a socket" if stat.S_ISSOCK(mode) else "a device"


def is_socket(path: str | os.PathLike[str]) -> bool:
    """Whether a socket stands there, which cannot be opened at all."""
    try:
        return stat.S_ISSOCK(Path(path).stat().st_mode)
    except (OSError, ValueError):
        return False
