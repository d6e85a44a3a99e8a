"""What a narrow terminal shows: whole keys, whole hints and whole words, or nothing of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.cells import cell_len, set_cell_size
from rich.console import Console
from rich.text import Text
from textual.app import ComposeResult
from textual.widgets import Footer
from textual.widgets._footer import FooterKey

GAP = 3  # cells between two hints
PLAIN = Console(width=1000, color_system=None, force_terminal=False, legacy_windows=False, _environ={})  # for wrapping


class WholeFooter(Footer):
    """Textual's line of keys, with those that fit."""

    def compose(self) -> ComposeResult:
        """The keys from the left."""
        n_cells = 0
        for key in super().compose():
            if isinstance(key, FooterKey):
                n_cells += cell_len(f" {key.key_display} {key.description} ")
            if n_cells - 1 > self.app.size.width:  # the last blank may be missing
                return
            yield key

    def on_resize(self) -> None:
        """Others fit now."""
        self.call_after_refresh(self.recompose)


def whole_parts(parts: Sequence[Text], width: int, gap: int = GAP) -> Iterator[Text]:
    """The parts, from the first, that fit beside each other."""
    n_cells = -gap
    for part in parts:
        n_cells += gap + part.cell_len
        if n_cells > width:
            return
        yield part


def hints(line: str, width: int, style: str = "dim") -> Text:
    """Of hints with three spaces between them those that fit."""
    found = whole_parts([Text(part) for part in line.split(" " * GAP)], width)
    return Text((" " * GAP).join(part.plain for part in found), style, no_wrap=True, end="")


def folded(text: Text, width: int) -> list[Text]:
    """Lines no wider than ``width``, without the blanks at their ends; words longer than that are folded."""
    lines = list(text.wrap(PLAIN, width, overflow="fold"))
    for line in lines:
        line.rstrip()
    return lines or [Text("")]


def words_of(line: str, width: int) -> str:
    """A line, or as many whole words of it as fit with an ellipsis; of a word that is too long its beginning."""
    if cell_len(line) <= width:
        return line
    cut = set_cell_size(line, max(width - 1, 0))
    if line[len(cut.rstrip()) : len(cut.rstrip()) + 1].strip() and " " in cut.strip():
        cut = cut.rpartition(" ")[0]
    return f"{cut.rstrip(' ,;:-')}…" if width > 0 else ""
