"""The input: several lines, history, large pastes kept out of sight, and the text that is being completed."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, ClassVar

from rich.text import Text
from textual import events
from textual.binding import Binding, BindingType
from textual.message import Message
from textual.widgets import TextArea
from textual.widgets.text_area import Edit, EditResult, Location, Selection

from edgellm.tui.hidden_text import HiddenText
from edgellm.tui.own_keys import acts

LARGE_PASTE = 4000  # characters, or
LARGE_PASTE_LINES = 30  # lines: more than this shows as one word until it is sent
LARGE_TEXT = 40_000  # characters that are edited as they are: a megabyte took 4 s
JOINERS = ("\u200c", "\u200d")  # zero-width

_WORD = re.compile(r"(?:^/\S*|(?<!\S)@(?:\"[^\"]*|[^\s\"]*))$")


class PromptInput(TextArea):
    """Enter sends; Ctrl-J, Shift-Enter or Alt-Enter begin a new line, and so does Enter behind a backslash."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("ctrl+j,shift+enter,alt+enter", "new_line", "New line", show=False),
        Binding("ctrl+d", "delete_or_leave", "Leave", show=False),
        Binding("ctrl+underscore", "undo", "Undo", show=False),
    ]

    @dataclass
    class Sent(Message):
        """The user has sent a text."""

        text: str

    @dataclass
    class Word(Message):
        """The word before the cursor that may be completed: ``/...`` at the start, or ``@...``; "" for none."""

        word: str

    @dataclass
    class Completing(Message):
        """A key for the list of completions: "up", "down", "accept", "close"."""

        key: str

    def __init__(self, earlier: list[str], **options: Any) -> None:
        self._hidden = HiddenText()
        super().__init__(soft_wrap=True, tab_behavior="focus", show_line_numbers=False, compact=True, **options)
        self.set_reactive(TextArea.cursor_blink, False)  # else the screen is composed twice a second for ever
        self.earlier = earlier
        self.completing = False
        self.whole_word = ""  # the name or command before the cursor, when nothing can be added to it
        self._at: int | None = None  # place in the history, None: what the user is writing
        self._draft = ""

    # -- sending ---------------------------------------------------------------------------------------------------

    @property
    def full_text(self) -> str:
        """The text with its large pastes."""
        return self._hidden.shown(self.text)

    def put(self, text: str) -> None:
        """Show a text to be edited; what was pasted at large is one word again."""
        held = self._hidden.hide_pastes(text)
        self.load_text(held if len(held) <= LARGE_TEXT else self._hidden.fold(text))
        self.move_cursor(self.document.end)
        self._at = None

    def send(self) -> None:
        """Give the text away and begin anew."""
        text = self.full_text
        if not text.strip():
            return
        self._at = None
        self.load_text("")
        self.post_message(self.Sent(text))

    def remember(self, text: str) -> None:
        """Add a text to the history."""
        if not self.earlier or self.earlier[-1] != text:
            self.earlier.append(text)

    def action_new_line(self) -> None:
        """Break the line."""
        self.insert("\n")

    def action_delete_or_leave(self) -> None:
        """Ctrl-D: the end of the input where there is none."""
        if self.text:
            self.action_delete_right()
        else:
            self.app.exit(0, return_code=0)

    # -- keys ------------------------------------------------------------------------------------------------------

    async def _on_key(self, event: events.Key) -> None:
        key = event.key
        if self.completing and self.word() and key in ("up", "down", "tab", "enter", "escape"):
            self.post_message(self.Completing({"tab": "accept", "enter": "accept", "escape": "close"}.get(key, key)))
        elif event.character in JOINERS:  # Textual takes them for no letters; Persian and family emoji need them
            self.insert(str(event.character))
        elif event.character == "?" and not self.text:
            await self.run_action("app.keys")
        elif key == "enter":
            if self.text.endswith("\\") and self.cursor_at_end_of_text:
                self.action_delete_left()
                self.insert("\n")
            else:
                self.send()
        elif key == "tab" and (word := self.word()):  # it completes, and never leaves a word
            if word == self.whole_word:
                self.insert(" ")
        elif not self._goes_back(key) and not await acts(self, event):
            await super()._on_key(event)
            return
        event.stop()
        event.prevent_default()

    def _goes_back(self, key: str) -> bool:
        """Whether an arrow at the edge of the text went through the history."""
        if key == "up" and self.cursor_at_first_line:
            return self._recall(-1)
        return key == "down" and self.cursor_at_last_line and self._recall(1)

    def _recall(self, step: int) -> bool:
        """Go through the history; False where it ends."""
        at = (len(self.earlier) if self._at is None else self._at) + step
        if not 0 <= at <= len(self.earlier) or (at == len(self.earlier) and self._at is None):
            return False
        if self._at is None:
            self._draft = self.full_text
        text = self._draft if at == len(self.earlier) else self.earlier[at]
        self.put(text)
        self._at = None if at == len(self.earlier) else at
        return True

    # -- what is pasted, and what cannot be drawn --------------------------------------------------------------------

    async def _on_paste(self, event: events.Paste) -> None:
        """A large paste becomes one word; it is sent in full."""
        event.stop()
        event.prevent_default()
        self._paste(event.text)

    def action_paste(self) -> None:
        """Ctrl-V: what was copied here."""
        self._paste(self.app.clipboard)

    def _paste(self, text: str) -> None:
        text = text.replace("\r\n", "\n").replace("\r", "\n")
        is_large = len(text) > LARGE_PASTE or text.count("\n") + 1 > LARGE_PASTE_LINES
        if text:
            self._change(self._hidden.fold(text) if is_large else self._hidden.hide(text), *self.selection)

    def edit(self, edit: Edit) -> EditResult:
        """Every change of the text goes through here. What comes in can be drawn, and so can what is taken out."""
        edit.text = self._hidden.hide(edit.text)
        return self._whole_edit(edit)

    def _change(self, held: str, start: Location, end: Location) -> None:
        self._whole_edit(Edit(held, start, end, maintain_selection_offset=False))

    def _whole_edit(self, edit: Edit) -> EditResult:
        """The word for a paste goes as a whole."""
        top, bottom = edit.top, edit.bottom
        is_insertion = top == bottom
        bottom = self._outside(bottom, to_end=True)
        edit.from_location, edit.to_location = bottom if is_insertion else self._outside(top, to_end=False), bottom
        result = super().edit(edit)
        return EditResult(result.end_location, self._hidden.shown(result.replaced_text))

    def _outside(self, location: Location, *, to_end: bool) -> Location:
        """A place inside the word for a paste, moved to one of its ends; any other place as it is."""
        row, column = location
        if row < self.document.line_count:
            for start, end in self._hidden.words(self.document.get_line(row)):
                if start < column < end:
                    return row, end if to_end else start
        return location

    def validate_selection(self, selection: Selection) -> Selection:
        """The cursor steps over the word for a paste."""
        was = self.selection.end
        cursor = self._outside(selection.end, to_end=selection.end > was)
        if selection.is_empty:
            return Selection.cursor(cursor)
        return Selection(self._outside(selection.start, to_end=selection.start > selection.end), cursor)

    @property
    def selected_text(self) -> str:
        """What is marked, with its large pastes: what is copied."""
        return self._hidden.shown(super().selected_text)

    def get_line(self, line_index: int) -> Text:
        """A line as it is drawn."""
        return Text(self._hidden.drawn(self.document.get_line(line_index)), end="", no_wrap=True)

    # -- completion ------------------------------------------------------------------------------------------------

    def on_text_area_changed(self) -> None:
        """Tell what stands before the cursor."""
        self.post_message(self.Word(self.word()))

    def word(self) -> str:
        """The word before the cursor that may be completed."""
        row, column = self.cursor_location
        before = self.document.get_line(row)[:column]
        found = _WORD.search(before)
        if found is None or (found[0].startswith("/") and row):
            return ""
        return found[0]

    def complete(self, replacement: str) -> None:
        """Put ``replacement`` in the place of the word."""
        row, column = self.cursor_location
        start = (row, column - len(self.word()))
        self.replace(replacement, start, (row, column))
        self.move_cursor((row, start[1] + len(replacement)))
