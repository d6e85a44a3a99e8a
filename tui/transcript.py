"""The conversation on the screen: one widget that draws lines, however long the chat is.

It follows the end only while the reader is there. A message can be chosen with the keyboard or the mouse; what to do
with it is the application's affair. While an answer grows the model needs the processor: a line is drawn once and kept,
only lines that differ are drawn again, and the scrollbar comes after.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass
from typing import ClassVar

from rich.cells import cell_len
from rich.segment import Segment
from rich.text import Text
from textual import events
from textual.binding import Binding, BindingType
from textual.geometry import Offset, Region, Size
from textual.message import Message
from textual.scroll_view import ScrollView
from textual.selection import Selection
from textual.strip import Strip

from edgellm.sessions import MessageNode
from edgellm.tui.markdown import CodeBlock
from edgellm.tui.message_view import MessageView, Place
from edgellm.tui.painting import paint, strip_of
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
        self.n_left_out = 0
        self._left_out: Container[int] = ()
        self._starts: list[int] = [0]  # first line of each view, and one after the last
        self._strips: dict[int, Strip] = {}
        self._bar_shows: tuple[int, float] = (0, 0.0)  # lines, and the first that is visible
        self._pressed: tuple[int, int] | None = None

    # -- what is shown ---------------------------------------------------------------------------------------------

    def show(self, path: Sequence[MessageNode], left_out: Container[int] = (), *, to_end: bool = True) -> None:
        """Draw another path; messages that it shares with the last one stay as they are drawn.

        left_out   the places of the messages that the model is not told any more
        """
        self._left_out = left_out
        self.n_left_out = sum(1 for number in range(len(path)) if number in left_out)
        known = {view.node.id: view for view in self.views}
        self.views = [known.get(n.id) or MessageView(n, self.palette, self.text_width) for n in path]
        if self.chosen not in path:
            self.chosen = None
        self._draw_from(0)
        if to_end:
            self.scroll_end(animate=False, immediate=True, x_axis=False)

    def grow(self) -> None:
        """The last message has more text: paint what differs. The scrollbar waits for ``show_bar``."""
        if not self.views:
            return
        follows, before, top = self.at_end, self.virtual_size.height, self.scroll_offset.y
        changed = self._measure_from(len(self.views) - 1)
        if follows:  # the watchers would draw the scrollbar and everything else
            self.set_reactive(Transcript.scroll_y, float(self.max_scroll_y))
            self.set_reactive(Transcript.scroll_target_y, float(self.max_scroll_y))
        visible = Region(0, self.scroll_offset.y, *self.scrollable_content_region.size)
        if top == self.scroll_offset.y:
            end = max(before, self.virtual_size.height)
            visible = visible.intersection(Region(0, changed, visible.width, end - changed))
        if visible:
            rows = visible.translate((0, -self.scroll_offset.y))
            paint(self, rows.translate((0, self.gutter.top)), self._rows(rows.y, rows.bottom))

    def show_bar(self) -> None:
        """Bring the scrollbar up to date."""
        shown = (self.virtual_size.height, self.scroll_y)
        if shown != self._bar_shows:
            self._scroll_update(self.virtual_size)
            self.vertical_scrollbar.position = self.scroll_y
            self._bar_shows = (self.virtual_size.height, self.scroll_y)

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
        self._measure_from(first)
        self.show_bar()
        if follows:
            self.scroll_end(animate=False, immediate=True, x_axis=False)
        self.refresh()

    def _measure_from(self, first: int) -> int:
        """Make the lines of the views from the ``first`` on; the number of the first line that differs."""
        n_codes = sum(len(view.codes) for view in self.views[:first])
        del self._starts[first + 1 :]
        changed = None
        for at, view in enumerate(self.views[first:], first):
            siblings = self.siblings_of(view.node)
            number = siblings.index(view.node) + 1 if view.node in siblings else 1
            place = Place(number, len(siblings), view.node is self.growing, n_codes + 1, at in self._left_out)
            line = self._starts[-1] + view.update(place)
            changed = line if changed is None else min(changed, line)
            n_codes += len(view.codes)
            self._starts.append(self._starts[-1] + len(view.lines))
        changed = changed or 0
        for y in [y for y in self._strips if y >= changed or not changed]:
            del self._strips[y]
        n_lines = self._starts[-1] if self.views else len(self.welcome)
        # the reactive would lay out the whole screen; only the scrollbar has to know
        self.set_reactive(Transcript.virtual_size, Size(self.scrollable_content_region.width, n_lines))
        return changed

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

    def render_lines(self, crop: Region) -> list[Strip]:
        """The visible part. Textual would render each line again after a scroll; here it is kept by its number."""
        first = crop.y - self.gutter.top
        lines = enumerate(self._rows(first, first + crop.height), first + self.scroll_offset.y)
        return [strip.apply_offsets(0, y).crop(*crop.column_span) for y, strip in lines]

    def render_line(self, y: int) -> Strip:
        """One line of the visible part."""
        return self._rows(y, y + 1)[0].apply_offsets(0, y + self.scroll_offset.y)

    def _rows(self, first: int, end: int) -> list[Strip]:
        """Visible lines; those before 0 are padding."""
        top, selection = self.scroll_offset.y, self.text_selection
        kept = self._strips if selection is None else {}
        numbers = [y + top if y >= 0 else -1 for y in range(first, end)]
        missing = [y for y in numbers if y not in kept]
        if missing:
            filters, (_, ground) = self.get_line_filters(), self.background_colors
            for y in missing:
                strip = self._strip(y, selection)
                for line_filter in filters:
                    strip = strip.apply_filter(line_filter, ground)
                kept[y] = strip
        return [kept[y] for y in numbers]

    def _line(self, y: int) -> tuple[Text, bool]:
        """The text of a line and whether its message is marked."""
        if y < 0:
            return Text(""), False
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

    def _strip(self, y: int, selection: Selection | None) -> Strip:
        width, base = self.scrollable_content_region.width, self.palette.base
        text, is_marked = self._line(y)
        row = text
        span = selection.get_span(y) if selection is not None else None
        if span is not None:
            row = text.copy()
            start, end = (max(value - self._left, 0) if value >= 0 else value for value in span)
            row.stylize(self.palette.selection, start, len(row) if end < 0 else end)
        left = [Segment(" " * self._left, base)]
        if is_marked:
            left = [Segment(" " * (self._left - 2), base), Segment("▎ ", base + self.palette.selected)]
        return strip_of(left, row, width, base, self.app.console)

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
