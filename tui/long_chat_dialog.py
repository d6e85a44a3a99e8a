"""Asks what to do with a chat that does not fit the context any more. Nothing is left out without this question."""

from __future__ import annotations

from typing import ClassVar

from rich.text import Text
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.widgets import OptionList, Static
from textual.widgets.option_list import Option

from edgellm.context_overflow import ChatTooLongError, turns
from edgellm.tui.dialog import Dialog, Rows

DROP, ALWAYS, SUMMARY, SEND = "drop_oldest", "always", "summary", "send"


class LongChatDialog(Dialog[str]):
    """Gives back what to do, None to leave it."""

    TITLE_TEXT = "This chat is longer than the context"
    HINT = "Enter choose   Esc back to the message"
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding(key, f"choose('{what}')", show=False)
        for key, what in (("d", DROP), ("a", ALWAYS), ("s", SUMMARY), ("w", SEND))
    ]

    def __init__(self, error: ChatTooLongError, *, summary: bool) -> None:
        super().__init__()
        self.error, self.summary = error, summary
        self.list = Rows(*(Option(text, id=what) for what, text in self.choices()), markup=False)

    def body(self) -> ComposeResult:
        yield Static(Text(str(self.error)))
        yield self.list

    def choices(self) -> list[tuple[str, str]]:
        """What may be done, and in which words."""
        error, found = self.error, []
        if error.n_turns:
            without = f"the oldest {turns(error.n_turns)}; {error.n_kept:,} tokens stay"
            found.append((DROP, f"d  Leave out {without}. The saved chat keeps them."))
            found.append((ALWAYS, "a  The same, and in this chat from now on without asking."))
        if self.summary:
            found.append((SUMMARY, "s  Go on in a new chat that begins with a summary of this one."))
        if error.n_free > 0:
            found.append((SEND, f"w  Send it as it is: {error.n_free:,} tokens are left for the answer."))
        return found

    def on_mount(self) -> None:
        """The list has the keyboard."""
        self.list.focus()

    def on_option_list_option_selected(self, event: OptionList.OptionSelected) -> None:
        """The marked row."""
        self.action_choose(event.option.id or "")

    def action_choose(self, what: str) -> None:
        """Give it back, if it is among the choices."""
        if what in dict(self.choices()):
            self.dismiss(what)
