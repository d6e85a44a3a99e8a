"""An answer token by token: each on a ground that says how likely it was, with a cursor that goes over them."""

from __future__ import annotations

import codecs
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from rich.cells import cell_len
from rich.segment import Segment
from rich.style import Style
from textual import events
from textual.binding import Binding, BindingType
from textual.geometry import Size
from textual.message import Message
from textual.scroll_view import ScrollView
from textual.strip import Strip

from edgellm.generation import TokenLogprob
from edgellm.tui.palette import Palette, shade_of
from edgellm.tui.safe_text import safe_text

PART = "◌"  # a token that is only part of a character
NEWLINE = "⏎"


def token_pieces(tokens: Sequence[TokenLogprob]) -> list[str]:
    """What each token shows; together they are the text, but for marks where a character spans tokens."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    return [safe_text(decoder.decode(token.bytes)) or PART for token in tokens]


def laid_out(pieces: Sequence[str], width: int) -> list[list[tuple[int, str]]]:
    """Rows of (token, what it shows there); a token is split only at newlines, or when it is wider than a row."""
    rows: list[list[tuple[int, str]]] = [[]]
    used = 0
    for number, piece in enumerate(pieces):
        parts = piece.split("\n")
        for i, part in enumerate(parts):
            if i < len(parts) - 1:
                part += NEWLINE
            while part:
                room = width - used
                size = cell_len(part)
                if size > room and used and size <= width:
                    rows.append([])
                    used, room = 0, width
                head = part if size <= room else _head(part, max(room, 2))
                rows[-1].append((number, head))
                used += cell_len(head)
                part = part[len(head) :]
                if part:
                    rows.append([])
                    used = 0
            if i < len(parts) - 1:
                rows.append([])
                used = 0
    return rows


def _head(text: str, width: int) -> str:
    size = 0
    for i, letter in enumerate(text):
        size += cell_len(letter)
        if size > width:
            return text[: max(i, 1)]
    return text


class TokenText(ScrollView, can_focus=True):
    """The coloured text. The arrows move over tokens and rows; a click goes to a token."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("left,h", "step(-1)", "Previous token", show=False),
        Binding("right,l", "step(1)", "Next token", show=False),
        Binding("ctrl+up,shift+up,pageup", "row(-1)", "Row up", show=False),
        Binding("ctrl+down,shift+down,pagedown", "row(1)", "Row down", show=False),
        Binding("home", "jump(0)", "First token", show=False),
        Binding("end", "jump(-1)", "Last token", show=False),
        Binding("n", "unlikely(1)", "Next unlikely token", show=False),
        Binding("N", "unlikely(-1)", "Previous unlikely token", show=False),
    ]

    @dataclass
    class Moved(Message):
        """The cursor stands on another token."""

        position: int

    def __init__(self, tokens: Sequence[TokenLogprob], palette: Palette, position: int = 0) -> None:
        super().__init__()
        self.tokens, self.palette, self.position = tokens, palette, position
        self.pieces = token_pieces(tokens)
        self.rows: list[list[tuple[int, str]]] = []
        self.row_of: list[int] = []

    def on_resize(self, event: events.Resize) -> None:
        """Lay the tokens out anew."""
        width = max(self.scrollable_content_region.width - 4, 8)
        self.rows = laid_out(self.pieces, width)
        self.row_of = [0] * len(self.pieces)
        for number, row in reversed(list(enumerate(self.rows))):
            for token, _ in row:
                self.row_of[token] = number
        self.virtual_size = Size(width + 4, len(self.rows))
        self.move(self.position)

    def move(self, position: int) -> None:
        """Put the cursor on a token and bring it into sight."""
        if not self.tokens:
            return
        self.position = max(0, min(position, len(self.tokens) - 1))
        row = self.row_of[self.position] if self.row_of else 0
        top, height = self.scroll_offset.y, max(self.scrollable_content_region.height, 1)
        if not top <= row < top + height:
            self.scroll_to(y=max(row - height // 2, 0), animate=False)
        self.refresh()
        self.post_message(self.Moved(self.position))

    def action_step(self, step: int) -> None:
        """To the next token."""
        self.move(self.position + step)

    def action_jump(self, position: int) -> None:
        """To the first or the last token."""
        self.move(position if position >= 0 else len(self.tokens) - 1)

    def action_row(self, step: int) -> None:
        """To the token above or below."""
        row = max(0, min(self.row_of[self.position] + step, len(self.rows) - 1))
        column = self._column(self.position)
        while 0 < row < len(self.rows) - 1 and not self.rows[row]:
            row += step
        self._go(row, column)

    def action_unlikely(self, step: int) -> None:
        """To the next token that the model had found less likely than another."""
        at = self.position + step
        while 0 <= at < len(self.tokens):
            token = self.tokens[at]
            if token.top and token.top[0].token != token.token:
                self.move(at)
                return
            at += step

    def _column(self, position: int) -> int:
        column = 0
        for token, text in self.rows[self.row_of[position]]:
            if token == position:
                return column
            column += cell_len(text)
        return column

    def _go(self, row: int, column: int) -> None:
        used, found = 0, None
        for token, text in self.rows[row]:
            found = token
            used += cell_len(text)
            if used > column:
                break
        if found is not None:
            self.move(found)

    def on_click(self, event: events.Click) -> None:
        """Go to the token that was clicked."""
        place = event.get_content_offset(self)
        if place is not None and 0 <= place.y + self.scroll_offset.y < len(self.rows):
            self._go(place.y + self.scroll_offset.y, max(place.x - 2, 0))

    def render_line(self, y: int) -> Strip:
        """Tokens of one row on their grounds."""
        width, base = self.scrollable_content_region.width, self.palette.base
        y += self.scroll_offset.y
        segments = [Segment("  ", base)]
        for token, text in self.rows[y] if y < len(self.rows) else ():
            segments.append(Segment(text, base + self._style(token)))
        return Strip(segments).adjust_cell_length(width, base)

    def _style(self, token: int) -> Style:
        if token == self.position:
            return self.palette.cursor
        logprob = self.tokens[token].logprob
        return self.palette.base if logprob is None else shade_of(self.palette, math.exp(logprob))
