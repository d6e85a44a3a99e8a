"""What a model has read of a chat, kept beside the session so that going on does not read it again.

One file a session (``edgellm.engine.cache_file``), written when the chat is left, taken before its next answer. They
may be deleted at any time: a missing or refused file costs a recomputation.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

from edgellm.formats.errors import EdgeLLMError
from edgellm.machine.atomic import remove_stale
from edgellm.sessions import Session
from edgellm.sessions.tree import left_out_of, prompt_messages

LEAST_TOKENS = 128  # shorter chats are read again in no time
MOST_NBYTES = 2 << 30  # of all files together; the oldest go first


def state_path(folder: Path, session_id: int) -> Path:
    """Where the state of a session is kept."""
    return folder / f"{session_id:016x}.kv"


def tokens_of(llm: Any, session: Session, template_kwargs: Any = None) -> list[int]:
    """The tokens that stand in the cache after the last answer of the branch that is read; none before it."""
    leaf = session.tree.leaf
    if leaf is None or leaf.role != "assistant" or not leaf.tokens:
        return []
    path = leaf.path()
    messages = prompt_messages(session.system, path[:-1], left_out_of(path))
    return [*llm.prompt_ids(messages, template_kwargs=template_kwargs), *(token.token for token in leaf.tokens)]


def keep(llm: Any, folder: Path, session: Session, template_kwargs: Any = None) -> int:
    """Write the state of a session; how many tokens. 0 when it is too short or cannot be written: nobody needs it."""
    with contextlib.suppress(EdgeLLMError, OSError):
        tokens = tokens_of(llm, session, template_kwargs)
        if len(tokens) >= LEAST_TOKENS:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            n_kept: int = llm.save_state(state_path(folder, session.id), tokens)
            tidy(folder)
            return n_kept
    return 0


def take(llm: Any, folder: Path, session_id: int) -> str:
    """Give the model what it had read; "" or a line about why that was not possible."""
    path = state_path(folder, session_id)
    if not path.exists():
        return ""
    try:
        llm.load_state(path)
    except (EdgeLLMError, OSError) as error:
        return f"What was kept of this chat is read anew: {error}"
    return ""


def forget(folder: Path, session_id: int) -> None:
    """Delete the state of a session."""
    with contextlib.suppress(OSError):
        state_path(folder, session_id).unlink(missing_ok=True)


def tidy(folder: Path) -> None:
    """Delete the oldest files beyond the limit, and what a killed program left half written."""
    files = sorted(folder.glob("*.kv"), key=lambda path: -path.stat().st_mtime)
    total = 0
    for number, path in enumerate(files):
        total += path.stat().st_size
        if total > MOST_NBYTES and number:
            path.unlink(missing_ok=True)
    remove_stale(folder)
