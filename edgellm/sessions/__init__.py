"""Chats that outlive the program: a tree of messages, a SQLite file that keeps them, files to carry them away.

Knows nothing of a screen. A session is a tree because a reader may ask again, edit or branch from a token: no text is
ever thrown away, and a leaf of the tree is the conversation that is being read.
"""

from edgellm.sessions.exchange import from_json, to_json, to_markdown, write_session
from edgellm.sessions.store import SearchHit, SessionStore, SessionSummary, open_store
from edgellm.sessions.tree import MessageNode, MessageTree, Session
from edgellm.sessions.writer import SessionWriter

__all__ = [
    "MessageNode",
    "MessageTree",
    "SearchHit",
    "Session",
    "SessionStore",
    "SessionSummary",
    "SessionWriter",
    "from_json",
    "open_store",
    "to_json",
    "to_markdown",
    "write_session",
]
