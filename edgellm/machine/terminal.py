"""What reaches the terminal, and the only way there: UTF-8, nothing that steers it, numbers in units people read.

Whatever came from a file, a name, a server or a model may hold control codes. ``echo`` makes them visible;
``hand_over`` gives a program behind a pipe the text as it is; ``json_text`` spells them as JSON does.
"""

from __future__ import annotations

import io
import json
import math
import os
import re
import sys
from collections.abc import Iterable, Sequence
from typing import Any

import click

EXIT_INTERRUPTED = 130  # what a shell reports for a program that Ctrl-C ended

# C0 and C1 but tab and newline; marks that turn the direction of text around; separators of lines; lone surrogates
UNSAFE = "\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff"
_UNSAFE = re.compile(f"[{UNSAFE}]")


def use_utf8() -> None:
    """Write UTF-8 whatever the locale says; a lone surrogate becomes ``?`` instead of an error.

    What is read keeps bytes that are none as lone surrogates, which ``LineInput`` refuses. A stream that the caller has
    closed (``>&-``) is empty, and swallows what is written to it.
    """
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115  (until the process ends)
    if sys.stdin is None:
        sys.stdin = open(os.devnull, encoding="utf-8")  # noqa: SIM115  (until the process ends)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding="utf-8", errors="replace")
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(encoding="utf-8", errors="surrogateescape")


def terminal_safe(text: str) -> str:
    """Text in which characters that steer a terminal, or hide what is written, have become ``\\x1b``-like letters."""
    return _UNSAFE.sub(lambda found: _spelled(ord(found[0])), text.replace("\r\n", "\n"))


def one_line(text: str) -> str:
    """The same on a single line: a name may hold newlines."""
    return " ".join(terminal_safe(text).split())


def _spelled(code: int) -> str:
    return f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}"


def echo(text: str = "", *, err: bool = False, nl: bool = True) -> None:
    """Write text for a person's eyes to standard output, or to standard error."""
    click.echo(terminal_safe(text), err=err, nl=nl)


def note(text: str) -> None:
    """What a person should know beside the result: on standard error."""
    echo(f"Note: {text}", err=True)


def hand_over(text: str) -> None:
    """A piece of a file or an answer to standard output at once; a pipe gets it as it is."""
    sys.stdout.write(terminal_safe(text) if sys.stdout.isatty() else text)
    sys.stdout.flush()


def wipe_line() -> None:
    """Take back what stands on the last line of the terminal."""
    click.echo("\r\x1b[2K", nl=False, err=True)


def json_text(value: Any, indent: int | None = 2) -> str:
    """JSON that steers no terminal: what ``terminal_safe`` would touch is spelled by JSON's own escapes.

    Numbers that JSON does not have, NaN and the infinities, become null.
    """
    try:
        text = json.dumps(value, indent=indent, ensure_ascii=False, allow_nan=False)
    except ValueError:
        text = json.dumps(_finite(value), indent=indent, ensure_ascii=False)
    return json_safe(text)


def json_safe(text: str) -> str:
    """The same for text that is JSON already: these characters stand nowhere but in strings."""
    return _UNSAFE.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list | tuple) else value


def error_block(error: BaseException) -> str:
    """An error as the user reads it: one block, the stable code at its end."""
    code = getattr(error, "code", None)
    message = str(error).strip() or type(error).__name__
    if isinstance(error, OSError) and error.strerror:
        message = f"{error.filename}: {error.strerror}" if error.filename is not None else error.strerror
    return f"Error: {terminal_safe(message)}" + (f" [{code}]" if isinstance(code, str) else "")


def human_bytes(nbytes: float, digits: int = 1) -> str:
    """Bytes in the unit that leaves one to four digits before the point, such as ``93.8 MiB``; GiB always have two."""
    for unit in ("B", "KiB", "MiB"):
        if abs(nbytes) < 1000:
            return f"{nbytes:.{0 if unit == 'B' else digits}f} {unit}"
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
