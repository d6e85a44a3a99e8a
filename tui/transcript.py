"""The conversation on the screen: one widget that draws lines, however long the chat is.

It follows the end only while the reader is there. A message can be chosen with the keyboard or the mouse; what to do
with it is the application's affair.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

from rich.cells import cell_len
from rich.segment import Segment
from rich.style import Style
from rich.text import Text
from textual import events
from textual.binding import Binding, BindingType
from textual.geometry import Offset, Size
from textual.message import Message
from textual.scroll_view import ScrollView
from textual.selection import Selection
from textual.strip import Strip

from edgellm.sessions import MessageNode
from edgellm.tui.markdown import CodeBlock
from edgellm.tui.message_view import MessageView, Place
from edgellm.tui.palette import Palette

MARGIN = 2  # cells left and right of the text
MAX_WIDTH = 104  # of the text: longer lines are hard to read
NEAR = 1  # lines from the end that still count as the end

_WORD = re.compile(r"[\w~/-]+(?:[.:@%+#=&?]+[\w/-]+)*")  # paths and addresses whole, without the full stop behind


class Transcript(ScrollView, can_focus=True):
    """Draws a path of messages. The last one may be growing. A click marks, but leaves the keyboard to the input."""

    FOCUS_ON_CLICK = False
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("up,k", "choose(-1)", "Previous", show=False),
        Binding("down,j", "choose(1)", "Next", show=False),
        Binding("space,enter", "fold", "Fold", show=False),
        Binding("home,g", "scroll_home", "Top", show=False),
        Binding("end,G", "scroll_end", "End", show=False),
        Binding("pageup", "page_up", "Page up", show=False),
        Binding("pagedown", "page_down", "Page down", show=False),
        Binding("e", "app.edit", "Edit", show=False),
        Binding("r", "app.regenerate", "Again", show=False),
        Binding("plus", "app.go_on", "Continue", show=False),
        Binding("left_square_bracket", "app.turn(-1)", "Branch", show=False),
        Binding("right_square_bracket", "app.turn(1)", "Branch", show=False),
        Binding("c,y", "app.copy", "Copy", show=False),
        Binding("t", "app.tokens", "Tokens", show=False),
        Binding("question_mark", "app.keys", "Help", show=False),
        *(Binding(str(n), f"app.copy({n})", "Copy code", show=False) for n in range(1, 10)),
    ]

    @dataclass
    class CodeClicked(Message):
        """The head of a code block was clicked."""

        block: CodeBlock

    def __init__(
        self, palette: Palette, siblings_of: Callable[[MessageNode], Sequence[MessageNode]], **options: str
    ) -> None:
        super().__init__(**options)  # type: ignore[arg-type]
        self.palette = palette
        self.siblings_of = siblings_of
        self.views: list[MessageView] = []
        self.growing: MessageNode | None = None
        self.chosen: MessageNode | None = None
        self.welcome: list[Text] = []
        self._starts: list[int] = [0]  # first line of each view, and one after the last
        self._strips: dict[int, Strip] = {}
        self._pressed: tuple[int, int] | None = None

    # -- what is shown ---------------------------------------------------------------------------------------------

    def show(self, path: Sequence[MessageNode], *, to_end: bool = True) -> None:
        """Draw another path; messages that it shares with the last one stay as they are drawn."""
        known = {view.node.id: view for view in self.views}
        self.views = [known.get(n.id) or MessageView(n, self.palette, self.text_width) for n in path]
        if self.chosen not in path:
            self.chosen = None
        self._draw_from(0)
        if to_end:
            self.scroll_end(animate=False, immediate=True, x_axis=False)

    def grow(self) -> None:
        """The last message has more text."""
        if self.views:
            self._draw_from(len(self.views) - 1)

    def redraw(self, palette: Palette | None = None) -> None:
        """Draw everything anew: the width or the colours have changed."""
        self.palette = palette or self.palette
        folds = {view.node.id: view.unfolded for view in self.views}
        self.views = [MessageView(view.node, self.palette, self.text_width) for view in self.views]
        for view in self.views:
            view.unfolded = folds[view.node.id]
        self._draw_from(0)

    @property
    def text_width(self) -> int:
        """Cells of a line of text."""
        return max(min(self.scrollable_content_region.width - 2 * MARGIN, MAX_WIDTH), 8)

    @property
    def codes(self) -> list[CodeBlock]:
        """All code blocks in order; the first has the number 1."""
        return [code for view in self.views for code in view.codes]

    @property
    def at_end(self) -> bool:
        """Whether the reader sees the end."""
        return self.scroll_offset.y >= self.max_scroll_y - NEAR

    def _draw_from(self, first: int) -> None:
        follows = self.at_end
        n_codes = sum(len(view.codes) for view in self.views[:first])
        del self._starts[first + 1 :]
        changed = None
        for view in self.views[first:]:
            siblings = self.siblings_of(view.node)
            number = siblings.index(view.node) + 1 if view.node in siblings else 1
            place = Place(number, len(siblings), view.node is self.growing, n_codes + 1)
            line = self._starts[-1] + view.update(place)
            changed = line if changed is None else min(changed, line)
            n_codes += len(view.codes)
            self._starts.append(self._starts[-1] + len(view.lines))
        n_lines = self._starts[-1] if self.views else len(self.welcome)
        self._strips = {} if not changed else {y: strip for y, strip in self._strips.items() if y < changed}
        size = Size(self.scrollable_content_region.width, n_lines)
        if size != self.virtual_size:
            # the reactive would lay out the whole screen; only the scrollbar has to know
            self.set_reactive(Transcript.virtual_size, size)
            self._scroll_update(size)
        if follows:
            self.scroll_end(animate=False, immediate=True, x_axis=False)
        self.refresh()

    # -- choosing --------------------------------------------------------------------------------------------------

    def choose(self, node: MessageNode | None) -> None:
        """Mark a message, and bring it into sight."""
        self.chosen = node
        self._strips = {}
        for number, view in enumerate(self.views):
            if view.node is node:
                top, end = self._starts[number], self._starts[number + 1]
                height = self.scrollable_content_region.height
                if top < self.scroll_offset.y or end > self.scroll_offset.y + height:
                    self.scroll_to(y=max(top - 1, 0) if end - top >= height else end - height, animate=False)
        self.refresh()

    def action_choose(self, step: int) -> None:
        """Mark the message before or after the marked one."""
        nodes = [view.node for view in self.views]
        if not nodes:
            return
        at = nodes.index(self.chosen) + step if self.chosen in nodes else len(nodes) - 1
        self.choose(nodes[max(0, min(at, len(nodes) - 1))])

    def action_fold(self) -> None:
        """Fold or unfold the marked message, or the last with something to fold."""
        views = [v for v in self.views if v.fold_line >= 0 and (self.chosen is None or v.node is self.chosen)]
        if views:
            self.fold(views[-1])

    def fold(self, view: MessageView) -> None:
        """Turn the fold of a message."""
        going_on = view.node is self.growing and view.node.role != "user"
        view.unfolded = not (view.unfolded if view.unfolded is not None else going_on)
        self._draw_from(self.views.index(view))

    # -- events ----------------------------------------------------------------------------------------------------

    def on_resize(self, event: events.Resize) -> None:
        """New lines for a new width."""
        if any(view.width != self.text_width for view in self.views):
            self.redraw()
        elif not self.views:
            self._draw_from(0)

    def on_focus(self) -> None:
        """The keyboard needs a message to be on."""
        if self.chosen is None:
            self.action_choose(0)

    def on_blur(self) -> None:
        """No message is marked while the user writes."""
        if self.chosen is not None and self.app.app_focus:
            self.choose(None)

    def on_mouse_down(self, event: events.MouseDown) -> None:
        """Remember where a click began."""
        self._pressed = (event.x, event.y)

    def on_mouse_up(self, event: events.MouseUp) -> None:
        """A click, not the end of a selection: fold, copy, or mark."""
        pressed, self._pressed = self._pressed, None
        place = event.get_content_offset(self)
        if pressed != (event.x, event.y) or event.button != 1 or place is None:
            return
        y = place.y + self.scroll_offset.y
        number = bisect_right(self._starts, y) - 1
        if not 0 <= number < len(self.views):
            return
        view, line = self.views[number], y - self._starts[number]
        code = next((code for code in view.codes if code.line == line), None)
        if code is not None:
            self.post_message(self.CodeClicked(code))
        elif line == view.fold_line:
            self.fold(view)
        else:
            self.choose(view.node)

    def on_click(self, event: events.Click) -> None:
        """A double click selects a word, a third the line; Textual's own way is to select everything."""
        event.prevent_default()
        place = event.get_content_offset(self)
        if place is None or event.chain not in (2, 3):
            return
        y = place.y + self.scroll_offset.y
        plain, at = self._line(y)[0].plain, place.x - self._left
        spans = [(0, len(plain))] if event.chain == 3 else [word.span() for word in _WORD.finditer(plain)]
        for start, end in spans:
            if cell_len(plain[:start]) <= at < cell_len(plain[:end]) or event.chain == 3:
                offsets = (Offset(self._left + start, y), Offset(self._left + end, y))
                self.screen.selections = {self: Selection(*offsets)}

    # -- lines -----------------------------------------------------------------------------------------------------

    def render_line(self, y: int) -> Strip:
        """One line of the visible part."""
        y += self.scroll_offset.y
        strip = self._strips.get(y)
        if strip is None or self.text_selection is not None:
            strip = self._strip(y)
            if self.text_selection is None:
                self._strips[y] = strip
        return strip.apply_offsets(0, y)

    def _line(self, y: int) -> tuple[Text, bool]:
        """The text of a line and whether its message is marked."""
        if not self.views:
            return (self.welcome[y] if y < len(self.welcome) else Text("")), False
        number = bisect_right(self._starts, y) - 1
        if number >= len(self.views):
            return Text(""), False
        view = self.views[number]
        at = y - self._starts[number]
        return view.lines[at], view.node is self.chosen and at < len(view.lines) - 1

    @property
    def _left(self) -> int:
        spare = self.scrollable_content_region.width - self.text_width - 2 * MARGIN
        return MARGIN + max(spare, 0) // 2

    def _strip(self, y: int) -> Strip:
        width, base = self.scrollable_content_region.width, self.palette.base
        text, is_marked = self._line(y)
        selection = self.text_selection
        row = text
        span = selection.get_span(y) if selection is not None else None
        if span is not None:
            row = text.copy()
            start, end = (max(value - self._left, 0) if value >= 0 else value for value in span)
            row.stylize(self.palette.selection, start, len(row) if end < 0 else end)
        gutter = "▎" if is_marked else " "
        left = [
            Segment(" " * (self._left - 2), base),
            Segment(gutter + " ", base + self.palette.selected if is_marked else base),
        ]
        segments = [s for s in row.render(self.app.console) if s.text != "\n"]
        ground = base + row.style if isinstance(row.style, Style) else base  # rich leaves it out of a row without spans
        body = [Segment(s.text, ground + s.style if isinstance(s.style, Style) else ground) for s in segments]
        return Strip([*left, *body]).adjust_cell_length(width, base)

    def get_selection(self, selection: Selection) -> tuple[str, str] | None:
        """The selected text without the margin."""
        margin = " " * self._left
        lines = [margin + self._line(y)[0].plain for y in range(self.virtual_size.height)]
        chosen = selection.extract("\n".join(lines)).split("\n")
        return "\n".join(line.removeprefix(margin).rstrip() for line in chosen), "\n"

    def selection_updated(self, selection: Selection | None) -> None:
        """Draw the selection."""
        self._strips = {}
        self.refresh()
