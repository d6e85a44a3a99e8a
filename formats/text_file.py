"""Text that somebody named: UTF-8 with or without its mark, UTF-16 and UTF-32 by theirs, and nothing that is no text.

A byte that does not fit is an error with its place, never another character: a model would read it, and a measurement
count it.
"""

from __future__ import annotations

import codecs
import os

from edgellm.formats.errors import FormatError
from edgellm.formats.regular_file import read_regular

MAX_TEXT_NBYTES = 256 << 20

# the mark of UTF-32 begins with that of UTF-16
_MARKS = (
    (codecs.BOM_UTF8, "utf-8", "UTF-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le", "UTF-32"),
    (codecs.BOM_UTF32_BE, "utf-32-be", "UTF-32"),
    (codecs.BOM_UTF16_LE, "utf-16-le", "UTF-16"),
    (codecs.BOM_UTF16_BE, "utf-16-be", "UTF-16"),
)


def read_text(path: str | os.PathLike[str], limit: int = MAX_TEXT_NBYTES) -> str:
    """The text of a file, its ends of lines as ``\\n``.

    FormatError ``TEXT_ENCODING`` or ``TEXT_SIZE``, NotAFileError for anything but a file or the shell's own pipe, and
    OSError as ``open`` raises it.
    """
    return decode_text(read_regular(path, limit, "TEXT_SIZE", pipes=True), os.fspath(path))


def decode_text(data: bytes, name: str) -> str:
    """Bytes as text. FormatError ``TEXT_ENCODING`` with the place of the first byte that is none."""
    mark, codec, spoken = next((row for row in _MARKS if data.startswith(row[0])), (b"", "utf-8", "UTF-8"))
    try:
        text = data[len(mark) :].decode(codec)
    except UnicodeDecodeError as error:
        at = len(mark) + error.start
        raise _no_text(
            name,
            f"byte {at:,} (0x{data[at]:02x}) is no {spoken}",
            "If it is in another encoding, say Latin-1, turn it into UTF-8 first: iconv -f LATIN1 -t UTF-8",
        ) from None
    if "\0" in text:
        raise _no_text(
            name,
            f"has a zero byte at {data.index(0):,}",
            "It may be UTF-16 without its mark: iconv -f UTF-16LE -t UTF-8",
        )
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _no_text(name: str, found: str, advice: str) -> FormatError:
    return FormatError(
        f"{name}: {found}. Text was expected, in UTF-8, or in UTF-16 with its mark. {advice}", code="TEXT_ENCODING"
    )
