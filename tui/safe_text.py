"""Text of models and untrusted files made fit for a screen: nothing in it can steer the terminal or hide."""

from __future__ import annotations

from edgellm.machine.terminal import one_line, terminal_safe

__all__ = ["one_line", "safe_text", "short_name", "visible_token"]


def safe_text(text: str) -> str:
    """Text in which every control character has become ``\\x1b``-like letters; tabs are four spaces."""
    return terminal_safe(text).replace("\t", "    ")


def short_name(model: str) -> str:
    """A model's name on a line: of a path the file."""
    return one_line(model.rpartition("/")[2] if model.lower().endswith(".gguf") else model)


def visible_token(text: str) -> str:
    """A token as a list shows it: its spaces and newlines can be seen."""
    shown = safe_text(text.replace("\t", "⇥"))
    return shown.replace("\n", "⏎").replace(" ", "·") if shown.strip(" \n") == "" else shown.replace("\n", "⏎")
