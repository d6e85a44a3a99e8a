"""The token view: how sure the model was of every token, what else it thought of, what the samplers left of that."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from rich.text import Text
from textual import events
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Container
from textual.message import Message
from textual.screen import Screen
from textual.widgets import Static

from edgellm.generation import TokenLogprob
from edgellm.tui.dialog import ClosesOnce
from edgellm.tui.narrow import hints, whole_parts
from edgellm.tui.palette import Palette
from edgellm.tui.safe_text import visible_token
from edgellm.tui.token_text import TokenText

HINT = "Esc back   ←→ token   ↑↓ alternative   Enter branch from it   n next surprise"
NARROW = 90  # columns; below, the alternatives stand under the text
BAR = 10  # cells of a probability's bar
NAME = 14  # cells of a token
WITH_BAR = NAME + BAR + 20  # cells of a row; in less there is no bar

Branch = tuple[int, TokenLogprob]


class Alternatives(Static):
    """The likeliest tokens in one place, and which of them is marked."""

    @dataclass
    class Clicked(Message):
        """A row was clicked."""

        row: int

    HEAD = 4  # lines above the first row

    def __init__(self, palette: Palette) -> None:
        super().__init__("", markup=False, id="alternatives")
        self.palette = palette
        self.first = 0  # the first row that is in sight
        self.bar = BAR

    def show(self, tokens: Sequence[TokenLogprob], position: int, marked: int) -> list[TokenLogprob]:
        """Draw the alternatives of a token; gives the rows."""
        token = tokens[position]
        rows = alternatives_of(token)
        self.bar = BAR if not self.size or self.size.width >= WITH_BAR else 0
        text = Text(end="", no_wrap=True, overflow="ellipsis")
        text.append(f"token {position + 1} of {len(tokens)}   ", self.palette.muted)
        text.append(f"{visible_token(token.text)}\n", "bold")
        if token.logprob is not None:
            text.append(f"{percent(math.exp(token.logprob))}   {-token.logprob / math.log(2):.1f} bits\n\n")
        text.append(f"{'':2}{'token':<{NAME}} {'model':>7} {'':{self.bar}} {'sampled':>8}\n", self.palette.faint)
        rows_shown = max(self.size.height - self.HEAD, 1) if self.size else len(rows)
        self.first = max(0, min(marked - rows_shown + 1, len(rows) - rows_shown))
        for number, row in enumerate(rows[self.first :], self.first):
            text.append_text(self._row(row, row.token == token.token, number == marked))
            text.append("\n")
        kept = [row for row in rows if row.cut_by is None]
        if len(kept) < len(rows):
            text.append(f"\n{len(rows) - len(kept)} of {len(rows)} cut by the samplers", self.palette.muted)
        self.update(text)
        return rows

    def _row(self, row: TokenLogprob, is_chosen: bool, is_marked: bool) -> Text:
        probability = math.exp(row.logprob) if row.logprob is not None else 0.0
        line = Text(
            "▸ " if is_marked else "● " if is_chosen else "  ", self.palette.selected if is_marked else "", end=""
        )
        name = Text(visible_token(row.text), "bold" if is_chosen else "")
        name.truncate(NAME, overflow="ellipsis", pad=True)
        line.append_text(name)
        line.append(f" {percent(probability):>7} ")
        full = round(probability * self.bar)
        line.append("━" * full, self.palette.mark)
        line.append("━" * (self.bar - full), self.palette.faint)
        if row.cut_by is not None:
            line.append(f" ✂ {row.cut_by}", self.palette.warning)
        elif row.after is not None:
            line.append(f" {percent(math.exp(row.after)):>8}")
        if is_marked:
            line.stylize("bold")
        return line

    def on_click(self, event: events.Click) -> None:
        """Tell which row."""
        place = event.get_content_offset(self)
        if place is not None and place.y >= self.HEAD:
            self.post_message(self.Clicked(place.y - self.HEAD + self.first))


class TokenScreen(ClosesOnce, Screen[Branch]):
    """Over one answer. Gives back a place and the token to go on with, or nothing."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("up", "mark(-1)", "Up", show=False, priority=True),
        Binding("down", "mark(1)", "Down", show=False, priority=True),
        Binding("enter", "branch", "Branch", show=False, priority=True),
        Binding("escape,q,ctrl+t", "close", "Back", show=False, priority=True),
    ]

    def __init__(self, tokens: Sequence[TokenLogprob], palette: Palette, title: str) -> None:
        super().__init__()
        self.tokens, self.palette, self.title_text = tokens, palette, title
        self.marked = 0
        self.position = 0
        self.rows: list[TokenLogprob] = []
        self.head, self.hint = Static(id="head", markup=False), Static(id="token-hint", markup=False)
        self.text, self.alternatives = TokenText(tokens, palette), Alternatives(palette)

    def compose(self) -> ComposeResult:
        self._lines(self.app.size.width)
        yield self.head
        with Container(id="token-panes"):
            yield self.text
            yield self.alternatives
        yield self.hint

    def on_mount(self) -> None:
        """The keyboard moves over the text."""
        self.text.focus()

    def on_resize(self, event: events.Resize) -> None:
        """Side by side where there is room."""
        self.set_class(event.size.width < NARROW, "narrow")
        self._lines(event.size.width)

    def _lines(self, width: int) -> None:
        self.head.update(self._head(width - 4))
        self.hint.update(hints(HINT, width - 4))

    def _head(self, width: int) -> Text:
        known = [token.logprob for token in self.tokens if token.logprob is not None]
        parts = [Text("  tokens", "bold")]
        if known:
            mean = -sum(known) / len(known) / math.log(2)
            parts.append(Text(f"{len(known)} tokens, {mean:.2f} bits each", "dim"))
        scale = Text("unlikely ", "dim")
        for shade in self.palette.shades:
            scale.append(" ", shade)
        parts.append(scale.append(" sure", "dim"))
        return Text("   ", end="", no_wrap=True).join(whole_parts(parts, width))

    def on_token_text_moved(self, event: TokenText.Moved) -> None:
        """Show what else could have stood here."""
        event.stop()
        self.position = event.position
        rows = alternatives_of(self.tokens[self.position])
        chosen = self.tokens[self.position].token
        self.marked = next((i for i, row in enumerate(rows) if row.token == chosen), 0)
        self._show()

    def on_alternatives_clicked(self, event: Alternatives.Clicked) -> None:
        """The first click marks, the second branches."""
        if event.row < len(self.rows):
            if event.row == self.marked:
                self.action_branch()
                return
            self.marked = event.row
            self._show()

    def _show(self) -> None:
        self.rows = self.alternatives.show(self.tokens, self.position, self.marked)

    def action_mark(self, step: int) -> None:
        """Mark another alternative."""
        if self.rows:
            self.marked = (self.marked + step) % len(self.rows)
            self._show()

    def action_branch(self) -> None:
        """Go on from the marked alternative."""
        if self.rows:
            self.dismiss((self.position, self.rows[self.marked]))


def alternatives_of(token: TokenLogprob) -> list[TokenLogprob]:
    """The likeliest tokens, and the chosen one where it was none of them."""
    rows = list(token.top)
    if all(row.token != token.token for row in rows):
        rows.append(token)
    return rows


def percent(probability: float) -> str:
    """Two or three digits that tell, such as ``31.2 %`` or ``0.04 %``."""
    value = 100 * probability
    if value >= 0.1 or value == 0:
        return f"{value:.1f} %"
    return f"{value:.2f} %" if value >= 0.005 else "<0.01 %"
