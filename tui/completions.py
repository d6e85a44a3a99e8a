"""The list above the input: commands after ``/``, files after ``@``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.text import Text
from textual.widgets import OptionList
from textual.widgets.option_list import Option

from edgellm.tui.narrow import words_of


class Completions(OptionList, can_focus=False):
    """Shows (word, meaning) rows; driven by the keys of the input."""

    def __init__(self, **options: Any) -> None:
        super().__init__(markup=False, compact=True, **options)
        self.words: list[str] = []
        self.display = False

    def offer(self, rows: Sequence[tuple[str, str]]) -> None:
        """Show these, or nothing."""
        self.words = [word for word, _ in rows]
        width = max((len(word) for word in self.words), default=0)
        self.clear_options()
        for word, meaning in rows:
            room = self.app.size.width - 7  # margins, padding, scrollbar
            text = Text(word.ljust(width + 2)).append(words_of(meaning, max(room - width - 2, 0)), "dim")
            text.truncate(room, overflow="ellipsis")
            self.add_option(Option(text))
        self.display = bool(rows)
        if rows:
            self.highlighted = 0

    def move(self, step: int) -> None:
        """Go up or down, round and round."""
        if self.words:
            self.highlighted = ((self.highlighted or 0) + step) % len(self.words)

    @property
    def chosen(self) -> str:
        """The word that would be taken; "" for none."""
        return self.words[self.highlighted or 0] if self.words else ""
