"""All keys and commands on one page."""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar

from rich.table import Table
from rich.text import Text
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import VerticalScroll
from textual.widgets import Static

from edgellm.tui.commands import COMMANDS
from edgellm.tui.dialog import Dialog

KEYS = {
    "Writing": (
        ("Enter", "Send"),
        ("Ctrl-J, Alt-Enter, \\ Enter", "New line"),
        ("↑ ↓ at the edges", "What you wrote before"),
        ("/ and @", "Commands; a file to bring in (Tab completes)"),
        ("Esc", "Stop the answer; what was said stays"),
        ("Ctrl-C", "Stop, clear the line, then leave"),
    ),
    "Reading (Tab or Alt-↑ goes there, Tab comes back)": (
        ("↑ ↓ PgUp PgDn Home End", "Move"),
        ("Space", "Fold thoughts and long messages"),
        ("e", "Edit a message of yours and branch"),
        ("r   +", "Another answer; continue a cut one"),
        ("[  ]", "Other branches"),
        ("c   1-9", "Copy the message; a code block by its number"),
        ("t", "The token view"),
        ("Mouse", "Click marks; draw or double-click selects, ^C copies; a code block's head copies it"),
    ),
    "Everywhere": (
        ("^N ^O", "New chat; all chats"),
        ("^L ^G", "Models; settings"),
        ("^T ^R ^Y", "Token view, another answer, copy the answer"),
        ("^P", "Palette: everything by name, themes too"),
        ("F1, ? on an empty line", "This page"),
        ("^Z   ^_", "Suspend, fg comes back; undo"),
        ("^Q, Ctrl-D on an empty line", "Leave"),
    ),
}


class HelpScreen(Dialog[None]):
    """Closed by the key that opens it, too."""

    TITLE_TEXT = "Keys and commands"
    BINDINGS: ClassVar[list[BindingType]] = [Binding("f1,question_mark,q", "close", show=False)]

    def __init__(self) -> None:
        super().__init__()
        self.page = VerticalScroll(id="help")

    def body(self) -> ComposeResult:
        with self.page:
            for title, rows in {**KEYS, "Commands": [(c.usage, c.help) for c in COMMANDS.values()]}.items():
                yield Static(Text(title), classes="section")
                yield Static(_table(rows))

    def on_mount(self) -> None:
        """Scroll with the keyboard at once."""
        self.page.focus()


def _table(rows: Iterable[tuple[str, str]]) -> Table:
    table = Table.grid(padding=(0, 2), expand=True)
    table.add_column(style="bold", no_wrap=False, ratio=2)
    table.add_column(ratio=3)
    for key, meaning in rows:
        table.add_row(Text(key), Text(meaning))
    return table
