"""What reaches the terminal: UTF-8, no control codes from a model or a file, numbers in the units people read."""

from __future__ import annotations

import io
import os
import re
import sys
from collections.abc import Iterable, Sequence

EXIT_INTERRUPTED = 130  # what a shell reports for a program that Ctrl-C ended

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def use_utf8() -> None:
    """Write UTF-8 whatever the locale says; a lone surrogate becomes ``?`` instead of an error.

    A stream that the caller has closed (``>&-``) swallows what is written to it.
    """
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115  (until the process ends)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding="utf-8", errors="replace")
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(encoding="utf-8", errors="replace")


def terminal_safe(text: str) -> str:
    """Text without the control characters that steer a terminal: a stranger's model could write them."""
    return _CONTROL.sub(lambda found: f"\\x{ord(found[0]):02x}", text.replace("\r\n", "\n"))


def write_answer(text: str) -> None:
    """A piece of an answer to standard output at once; bytes for a pipe are left as they are."""
    sys.stdout.write(terminal_safe(text) if sys.stdout.isatty() else text)
    sys.stdout.flush()


def error_block(error: BaseException) -> str:
    """An error as the user reads it: one block, the stable code at its end."""
    code = getattr(error, "code", None)
    message = str(error).strip() or type(error).__name__
    if isinstance(error, OSError) and error.strerror:
        message = f"{error.filename}: {error.strerror}" if error.filename is not None else error.strerror
    return f"Error: {terminal_safe(message)}" + (f" [{code}]" if isinstance(code, str) else "")


def human_bytes(nbytes: float) -> str:
    """Bytes in the unit that leaves one to four digits before the point, such as ``93.8 MiB``."""
    for unit in ("B", "KiB", "MiB"):
        if abs(nbytes) < 1000:
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1024
    return f"{nbytes:.2f} GiB"


def human_count(n: int) -> str:
    """A parameter count as llama-bench prints it: ``134.52 M``."""
    for limit, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if n >= limit:
            return f"{n / limit:.2f} {unit}"
    return str(n)


def table(headings: Sequence[str], rows: Iterable[Sequence[str]], right: Sequence[int] = ()) -> str:
    """A plain table with columns as wide as they need be; ``right`` names the columns of numbers."""
    lines = [[terminal_safe(str(cell)).replace("\n", " ") for cell in row] for row in (headings, *rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(headings))]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if i in right else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def fields(pairs: Iterable[tuple[str, object]]) -> str:
    """Names and values in two columns, one pair a line; a value of several lines is indented under itself."""
    pairs = [(name, terminal_safe(str(value))) for name, value in pairs]
    width = max((len(name) for name, _ in pairs), default=0)
    return "\n".join(f"{name.ljust(width)}  {value}".replace("\n", "\n" + " " * (width + 2)) for name, value in pairs)
