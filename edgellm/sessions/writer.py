"""Writes sessions while they happen: a thread of its own, so that no screen and no model ever waits for a disk.

What changed is written within half a second, in one transaction, with what the growing answer has by then.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

from edgellm.formats.errors import EdgeLLMError
from edgellm.sessions.store import SessionStore
from edgellm.sessions.tree import MessageNode, Session

PERIOD_S = 0.4  # between two writings; a killed program loses at most so much and the writing itself


class SessionWriter:
    """Takes notes of what changed. Both functions are called on the writer's thread.

    failed     with the first of a row of errors
    revived    with a session that another program had deleted: it was written again, whole
    """

    def __init__(
        self,
        store: SessionStore,
        failed: Callable[[EdgeLLMError], object] | None = None,
        revived: Callable[[Session], object] | None = None,
    ) -> None:
        self.store = store
        self.failed, self.revived = failed, revived
        self._wake = threading.Condition()
        self._sessions: dict[int, Session] = {}
        self._nodes: dict[int, tuple[Session, MessageNode]] = {}  # in the order in which they changed
        self._n_saved: dict[int, int] = {}  # message -> tokens that are in the file
        self._titles: dict[int, str] = {}  # of the sessions that are in the file, as we last knew them there
        self.error: EdgeLLMError | None = None  # of the last writing, which is tried again
        self._closing = False
        self._writing = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="edgellm-sessions", daemon=True)
        self._thread.start()

    @property
    def unsaved(self) -> list[Session]:
        """The sessions with something that is not in the file."""
        with self._wake:
            return list((self._sessions | {session.id: session for session, _ in self._nodes.values()}).values())

    def changed(self, session: Session, node: MessageNode | None = None) -> None:
        """Write the session's own row soon, and the message."""
        with self._wake:
            if not self._sessions:  # else the thread knows; to wake it for every token would cost the model its pace
                self._wake.notify()
            self._sessions[session.id] = session
            if node is not None:
                self._nodes[node.id] = (session, node)

    def known(self, session: Session) -> None:
        """The tokens of a session that was just loaded are in the file already."""
        self._n_saved.update((node.id, len(node.tokens)) for node in session.tree)
        self._titles[session.id] = session.title

    def forget(self, session: Session) -> None:
        """Write nothing more of a session that was deleted."""
        with self._writing, self._wake:
            self._sessions.pop(session.id, None)
            self._titles.pop(session.id, None)
            self._nodes = {key: pair for key, pair in self._nodes.items() if pair[0] is not session}

    def flush(self) -> None:
        """Write now what is waiting. Raises what the store raises."""
        with self._writing:
            with self._wake:
                sessions, self._sessions = self._sessions, {}
                nodes, self._nodes = self._nodes, {}
            try:
                revived = self._write(sessions, nodes)
            except BaseException:
                with self._wake:
                    self._sessions = sessions | self._sessions
                    self._nodes = nodes | self._nodes
                    self._wake.notify()  # whoever fails here may have taken them before the thread woke
                raise
        for session in revived:
            if self.revived is not None:
                self.revived(session)

    def _write(self, sessions: dict[int, Session], nodes: dict[int, tuple[Session, MessageNode]]) -> list[Session]:
        """All of it or nothing; the sessions that another program had deleted meanwhile."""
        known, saved, revived, titles = self._n_saved, {}, [], {}
        with self.store.transaction():
            for session in sessions.values():
                title = titles[session.id] = session.title
                if not self.store.save(
                    session, self._titles.get(session.id) == title
                ):  # new, or deleted: its last messages alone would be no chat
                    whole = {node.id: (session, node) for node in session.tree}
                    nodes = whole | nodes
                    known = {key: n for key, n in known.items() if key not in whole}
                    if session.id in self._titles:
                        revived.append(session)
            for session, node in nodes.values():
                saved[node.id] = self.store.save_message(session, node, known.get(node.id, 0))
        self._n_saved |= saved
        self._titles |= titles
        return revived

    def close(self) -> None:
        """Write what is waiting and end the thread. ``unsaved`` says what could not be written, ``error`` why."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        self._thread.join()

    def _run(self) -> None:
        closing = False
        while not closing:
            with self._wake:
                while not self._sessions and not self._closing:
                    self._wake.wait()
                if not self._closing:
                    self._wake.wait_for(lambda: self._closing, PERIOD_S)
                closing = self._closing
            try:
                self.flush()
                self.error = None
            except EdgeLLMError as error:
                first, self.error = self.error is None, error
                if first and self.failed is not None:
                    self.failed(error)
