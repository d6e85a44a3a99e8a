"""Standard input as text: read when it is asked for, or when it clearly brings something, and never in silence.

With a prompt on the command line nobody may have thought of standard input at all: a loop's lines, the connection of
ssh, a pipe that a program opened for its child and never closes. So it is read then only

    a file       from its start: in ``while read`` loops it stands further on, and the rest belongs to the loop
    a pipe       which somebody made to bring something; silent for half a minute it is an error, never a guess
    a socket     that has something at once

and a terminal, or a device such as /dev/null, never. What is waited for is told after a second.
"""

from __future__ import annotations

import os
import select
import stat
import sys
import time

from edgellm.formats.errors import FormatError, ParameterError
from edgellm.formats.text_file import MAX_TEXT_NBYTES, decode_text
from edgellm.machine.terminal import note

NAME = "standard input"
TOLD_S, PATIENCE_S, AT_ONCE_S = 1.0, 30.0, 0.25
CHUNK_NBYTES = 1 << 16


def read_all() -> str:
    """All of it, until its end. FormatError TEXT_ENCODING or TEXT_SIZE."""
    descriptor = _descriptor()
    if descriptor is None:
        return sys.stdin.read() if sys.stdin is not None else ""  # replaced by a test or a notebook
    if not os.isatty(descriptor) and not _ready(descriptor, TOLD_S):
        note("waiting for text on standard input; Ctrl-C gives up.")
    return decode_text(_read(descriptor), NAME)


def is_terminal() -> bool:
    """Whether somebody sits there and types."""
    descriptor = _descriptor()
    return descriptor is not None and os.isatty(descriptor)


def brought_along() -> str | None:
    """What it brings beside a prompt; None when it is not ours to read. ParameterError STDIN_SILENT."""
    descriptor = _descriptor()
    if descriptor is None:
        return sys.stdin.read() if sys.stdin is not None else None
    mode = os.fstat(descriptor).st_mode
    if stat.S_ISREG(mode):
        ours = os.lseek(descriptor, 0, os.SEEK_CUR) == 0
    elif stat.S_ISFIFO(mode):
        ours = _arrives(descriptor)
    else:
        ours = stat.S_ISSOCK(mode) and _ready(descriptor, AT_ONCE_S)
    return decode_text(_read(descriptor), NAME) if ours else None


def _arrives(descriptor: int) -> bool:
    """True once a pipe has something, or has ended."""
    if _ready(descriptor, TOLD_S):
        return True
    note("waiting for text on standard input, which is an open pipe; --no-stdin answers without it.")
    if _ready(descriptor, PATIENCE_S - TOLD_S):
        return True
    raise ParameterError(
        f"Standard input is an open pipe that has brought nothing for {PATIENCE_S:.0f} s. Text or its end was "
        "expected. Give --no-stdin to answer the prompt alone, or -f - to wait for the text as long as it takes.",
        code="STDIN_SILENT",
    )


def _descriptor() -> int | None:
    """Its number, None where it is closed or was replaced by an object."""
    try:
        return None if sys.stdin is None else sys.stdin.fileno()
    except (OSError, ValueError):
        return None


def _ready(descriptor: int, seconds: float) -> bool:
    """Whether reading would give something, or the end, within so long."""
    if os.name != "posix":  # pipes cannot be asked there
        return True
    return bool(select.select([descriptor], [], [], seconds)[0])


def _read(descriptor: int) -> bytes:
    parts, nbytes, tell_at = [], 0, time.monotonic() + TOLD_S
    while part := os.read(descriptor, CHUNK_NBYTES):
        parts.append(part)
        nbytes += len(part)
        if nbytes > MAX_TEXT_NBYTES:
            raise FormatError(
                f"{NAME}: brings more than {MAX_TEXT_NBYTES:,} bytes. Take a part of it.", code="TEXT_SIZE"
            )
        if time.monotonic() > tell_at and not _ready(descriptor, TOLD_S):
            note(f"{nbytes:,} bytes read from standard input, waiting for its end.")
            tell_at = float("inf")
    return b"".join(parts)
