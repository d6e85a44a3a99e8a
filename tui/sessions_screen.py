"""The list of chats: find by any word, open, rename, delete, export."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import ClassVar

from rich.text import Text
from textual.binding import Binding, BindingType

from edgellm.sessions import SessionStore, SessionSummary
from edgellm.tui.dialog import ConfirmDialog, SearchDialog
from edgellm.tui.safe_text import one_line

Chosen = tuple[str, int]  # what to do ("open", "export", "delete") and with which session
Found = tuple[SessionSummary, str]  # and the words around a hit
SEARCHING = "Chats   searching…"


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
        Binding("ctrl+s", "choose('export')", show=False, priority=True),
    ]

    def __init__(
        self,
        store: SessionStore,
        current: int,
        rename: Callable[[int, str, Callable[[], object]], None],
        words: str = "",
        now: float | None = None,
    ) -> None:
        super().__init__(words)
        self.store, self.current, self.rename, self.now = store, current, rename, now
        self._searched: str | None = None  # the words that ``found`` is for
        self._then = ""  # what is to be done with the first that is found

    def refill(self) -> None:
        """Look for the sessions beside the screen; the last words count."""
        words, store = self.words, self.store
        self._searched = None
        self.aside.newest("search", lambda unwanted: (words, sessions_with(store, words, unwanted)), self._show)
        self.title_line.update(self.TITLE_TEXT if self._searched == words else SEARCHING)

    def _show(self, result: tuple[str, list[Found]]) -> None:
        if not self.is_on_screen:
            return
        self._searched, self.found = result
        self.title_line.update(self.TITLE_TEXT)
        width = min(max(self.size.width - 14, 20), 90)
        rows = [self._row(summary, excerpt, width) for summary, excerpt in self.found]
        self.fill(rows, "Nothing found." if self.words else "No chats yet.")
        what, self._then = self._then, ""
        if what:
            self.action_choose(what)

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
        self.action_choose("open")

    def on_option_list_option_selected(self) -> None:
        """A click opens."""
        self.action_choose("open")

    def action_choose(self, what: str) -> None:
        """Give back what is to be done with the marked session."""
        if self._searched is None:  # Enter right behind the words is meant for what they find
            self._then = what
        elif self.marked is not None:
            self.dismiss((what, self.marked[0].id))

    def action_rename(self) -> None:
        """Ask for a title."""
        if self.marked is not None:
            chat, then = self.marked[0], self.refill_if_open
            self.ask("Title of this chat", lambda title: self.rename(chat.id, title, then), one_line(chat.title))

    def refill_if_open(self) -> None:
        """Look again: something has changed."""
        if self.is_on_screen:
            self.refill()

    def on_unmount(self) -> None:
        """Nobody waits for a search any more."""
        self.aside.forget("search")

    def action_delete(self) -> None:
        """Ask, then delete."""
        if self.marked is not None:
            chat = self.marked[0]

            def answered(yes: bool | None) -> None:
                if yes:
                    self.dismiss(("delete", chat.id))

            self.app.push_screen(ConfirmDialog(f"Delete “{one_line(chat.title)}” for good?"), answered)


def sessions_with(store: SessionStore, words: str, unwanted: Callable[[], bool]) -> list[Found]:
    """The sessions that a search finds, each once; all of them without words."""
    if not words.strip():
        return [(summary, "") for summary in store.summaries()]
    found: dict[int, Found] = {}
    for hit in store.search(words, unwanted=unwanted):
        found.setdefault(hit.session.id, (hit.session, hit.excerpt))
    return list(found.values())


def ago(moment: float, now: float | None = None) -> str:
    """``5 min ago``, or a date."""
    passed = max((time.time() if now is None else now) - moment, 0)
    for limit, unit, name in ((3600, 60, "min"), (86400, 3600, "h"), (7 * 86400, 86400, "d")):
        if passed < limit:
            return f"{int(passed // unit)} {name} ago" if passed >= 60 else "now"
    return time.strftime("%Y-%m-%d", time.localtime(moment))
