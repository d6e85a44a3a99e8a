"""The list of chats: find by any word, open, rename, delete, export."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import ClassVar

from rich.text import Text
from textual.binding import Binding, BindingType
from textual.widgets import OptionList
from textual.widgets.option_list import Option

from edgellm.sessions import SessionStore, SessionSummary
from edgellm.tui.dialog import ConfirmDialog, LineDialog, SearchDialog
from edgellm.tui.safe_text import one_line

Chosen = tuple[str, int]  # what to do ("open", "export", "delete") and with which session


class SessionsScreen(SearchDialog[Chosen]):
    """Gives back what to do with which session; ``rename(session_id, title)`` is done while it is open."""

    TITLE_TEXT = "Chats"
    HINT = "Enter open   ^R rename   ^X delete   ^S export   Esc close"
    PLACEHOLDER = "Search titles and every message"
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("pagedown", "move(10)", show=False, priority=True),
        Binding("pageup", "move(-10)", show=False, priority=True),
        Binding("ctrl+r", "rename", show=False, priority=True),
        Binding("ctrl+x,delete", "delete", show=False, priority=True),
        Binding("ctrl+s", "export", show=False, priority=True),
    ]

    def __init__(
        self,
        store: SessionStore,
        current: int,
        rename: Callable[[int, str], None],
        words: str = "",
        now: float | None = None,
    ) -> None:
        super().__init__(words)
        self.store, self.current, self.rename, self.now = store, current, rename, now

    def refill(self) -> None:
        """The sessions that the search finds, each once."""
        if self.words.strip():
            found: dict[int, tuple[SessionSummary, str]] = {}
            for hit in self.store.search(self.words):
                found.setdefault(hit.session.id, (hit.session, hit.excerpt))
            self.found = list(found.values())
        else:
            self.found = [(summary, "") for summary in self.store.summaries()]
        options = self.query_one(OptionList)
        options.clear_options()
        width = max(self.size.width - 14, 20)
        options.add_options([Option(self._row(summary, excerpt, min(width, 90))) for summary, excerpt in self.found])
        if not self.found:
            options.add_option(Option(Text("Nothing found." if self.words else "No chats yet.", "dim"), disabled=True))
        else:
            options.highlighted = 0

    def _row(self, summary: SessionSummary, excerpt: str, width: int) -> Text:
        when = ago(summary.updated, self.now)
        facts = f"{summary.n_messages} message{'s' if summary.n_messages != 1 else ' '}  {when:>10}"
        title = Text("● " if summary.id == self.current else "  ")
        title.append(one_line(summary.title) or "(empty)")
        title.truncate(max(width - len(facts) - 2, 10), overflow="ellipsis", pad=True)
        row = Text(end="", no_wrap=True).append_text(title).append("  " + facts, "dim")
        if excerpt:
            row.append("\n    " + one_line(excerpt), "dim")
        return row

    def on_input_submitted(self) -> None:
        """Open the marked session."""
        self._choose("open")

    def on_option_list_option_selected(self) -> None:
        """A click opens."""
        self._choose("open")

    @property
    def marked(self) -> SessionSummary | None:
        """The session under the bar."""
        at = self.query_one(OptionList).highlighted
        return self.found[at][0] if at is not None and at < len(self.found) else None

    def _choose(self, what: str) -> None:
        if self.marked is not None:
            self.dismiss((what, self.marked.id))

    def action_export(self) -> None:
        """Write the marked session to a file."""
        self._choose("export")

    def action_rename(self) -> None:
        """Ask for a title."""
        summary = self.marked
        if summary is None:
            return

        def renamed(title: str | None) -> None:
            if title is not None:
                self.rename(summary.id, title)
                self.refill()

        self.app.push_screen(LineDialog("Title of this chat", one_line(summary.title)), renamed)

    def action_delete(self) -> None:
        """Ask, then delete."""
        summary = self.marked
        if summary is None:
            return

        def confirmed(yes: bool | None) -> None:
            if yes:
                self.dismiss(("delete", summary.id))

        self.app.push_screen(ConfirmDialog(f"Delete “{one_line(summary.title)}” for good?"), confirmed)


def ago(moment: float, now: float | None = None) -> str:
    """``5 min ago``, or a date."""
    passed = max((time.time() if now is None else now) - moment, 0)
    for limit, unit, name in ((3600, 60, "min"), (86400, 3600, "h"), (7 * 86400, 86400, "d")):
        if passed < limit:
            return f"{int(passed // unit)} {name} ago" if passed >= 60 else "now"
    return time.strftime("%Y-%m-%d", time.localtime(moment))
