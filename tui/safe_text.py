"""Text of models and strangers' files made fit for a screen: nothing in it can steer the terminal or hide."""

from __future__ import annotations

import re

# C0 and C1 but tab and newline; marks that turn the direction of text around; lone surrogates
_UNSAFE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
_TAB = "    "


def safe_text(text: str) -> str:
    """Text in which every control character has become ``\\x1b``-like letters; tabs are four spaces."""
    text = text.replace("\r\n", "\n").replace("\t", _TAB)
    return _UNSAFE.sub(lambda found: _spelled(ord(found[0])), text)


def one_line(text: str) -> str:
    """The same on a single line."""
    return " ".join(safe_text(text).split())


def short_name(model: str) -> str:
    """A model's name on a line: of a path the file."""
    return one_line(model.rpartition("/")[2] if model.lower().endswith(".gguf") else model)


def visible_token(text: str) -> str:
    """A token as a list shows it: its spaces and newlines can be seen."""
    shown = safe_text(text.replace("\t", "⇥"))
    return shown.replace("\n", "⏎").replace(" ", "·") if shown.strip(" \n") == "" else shown.replace("\n", "⏎")


def _spelled(code: int) -> str:
    return f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}"
