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
    """Takes notes of what changed. ``failed`` is called on the writer's thread with the first of a row of errors."""

    def __init__(self, store: SessionStore, failed: Callable[[EdgeLLMError], None] | None = None) -> None:
        self.store = store
        self.failed = failed
        self._wake = threading.Condition()
        self._sessions: dict[int, Session] = {}
        self._nodes: dict[int, tuple[Session, MessageNode]] = {}  # in the order in which they changed
        self._n_saved: dict[int, int] = {}  # message -> tokens that are in the file
        self._broken = False
        self._closing = False
        self._writing = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="edgellm-sessions", daemon=True)
        self._thread.start()

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

    def forget(self, session: Session) -> None:
        """Write nothing more of a session that was deleted."""
        with self._writing, self._wake:
            self._sessions.pop(session.id, None)
            self._nodes = {key: pair for key, pair in self._nodes.items() if pair[0] is not session}

    def flush(self) -> None:
        """Write now what is waiting. Raises what the store raises."""
        with self._writing:
            with self._wake:
                sessions, self._sessions = self._sessions, {}
                nodes, self._nodes = self._nodes, {}
            try:
                with self.store.transaction():
                    for session in sessions.values():
                        self.store.save(session)
                    saved = {
                        node.id: self.store.save_message(session, node, self._n_saved.get(node.id, 0))
                        for session, node in nodes.values()
                    }
                self._n_saved |= saved
            except BaseException:
                with self._wake:
                    self._sessions = sessions | self._sessions
                    self._nodes = nodes | self._nodes
                raise

    def close(self) -> None:
        """Write what is waiting and end the thread. Errors were told to ``failed``."""
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
                self._broken = False
            except EdgeLLMError as error:
                if not self._broken and self.failed is not None:
                    self.failed(error)
                self._broken = True
