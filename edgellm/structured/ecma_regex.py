"""JSON Schema's regular expressions are ECMA's; llguidance reads Rust's. What both write alike and mean differently is
written out, or refused by name.
"""

from __future__ import annotations

import re

from edgellm.formats.errors import UnsupportedError

SPACE = r"\t-\r \x{A0}\x{1680}\x{2000}-\x{200A}\x{2028}\x{2029}\x{202F}\x{205F}\x{3000}\x{FEFF}"
NO_SPACE = (
    r"\x{0}-\x{8}\x{E}-\x{1F}\x{21}-\x{9F}\x{A1}-\x{167F}\x{1681}-\x{1FFF}\x{200B}-\x{2027}\x{202A}-\x{202E}"
    r"\x{2030}-\x{205E}\x{2060}-\x{2FFF}\x{3001}-\x{FEFE}\x{FF00}-\x{10FFFF}"
)
LINE = r"[^\n\r\x{2028}\x{2029}]"  # what ``.`` is
_PART = re.compile(r"\\.|\[\^?(?:\\.|[^\]\\])*\]|.", re.DOTALL)
_IN_CLASS = re.compile(r"\\.|--|[\[&~]", re.DOTALL)


def rust_regex(pattern: str, place: str) -> str:
    """The same language for Rust; UnsupportedError for a class that cannot be had."""

    def part(found: re.Match[str]) -> str:
        text = found.group()
        if text in ("\\s", "\\S"):
            return f"[{SPACE if text == chr(92) + 's' else NO_SPACE}]"
        if text == ".":
            return LINE
        return _class(text, place) if len(text) > 1 and text[0] == "[" else text

    return _PART.sub(part, pattern)


def _class(text: str, place: str) -> str:
    """A class of characters; Rust has sets within sets and operations on them."""
    if text == "[^]":
        return r"[\x{0}-\x{10FFFF}]"

    def part(found: re.Match[str]) -> str:
        piece = found.group()
        if piece == "--":
            raise UnsupportedError(f"{place} has a range that begins or ends with a hyphen. Escape it.", code="SCHEMA")
        return {"\\s": SPACE, "\\S": NO_SPACE}.get(piece, piece if piece[0] == "\\" else "\\" + piece)

    if text == "[]":
        raise UnsupportedError(f"{place} has an empty class of characters, which nothing matches.", code="SCHEMA")
    return text[0] + _IN_CLASS.sub(part, text[1:])
