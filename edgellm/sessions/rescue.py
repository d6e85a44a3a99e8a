"""Chats that their own file did not take, because the disk is full or may not be written: put them anywhere else."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

from edgellm.sessions.exchange import to_json, to_markdown
from edgellm.sessions.records import sound
from edgellm.sessions.tree import Session


def rescue_folders() -> list[Path]:
    """Where a copy may go, the most likely to be found again first."""
    return [Path.cwd(), Path.home(), Path(tempfile.gettempdir())]


def rescue(session: Session, folders: Iterable[Path]) -> Path | None:
    """Write a session as JSON, for the user alone, into the first of the folders that takes all of it; None: none."""
    data = sound(to_json(session)).encode()
    for folder in folders:
        path = folder / f"edgellm-chat-{session.id:016x}.json"
        try:
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o600)
        except OSError:
            continue
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            return path
        except OSError:
            path.unlink(missing_ok=True)
    return None


def rescue_report(sessions: Sequence[Session], error: BaseException | None) -> str:
    """Write copies of chats that could not be saved; what to tell their user, with the chat itself as a last resort."""
    lines = [f"Not saved: {error or 'the file of your chats could not be written.'}"]
    folders = rescue_folders()
    for session in sessions:
        title = session.shown_title or "a chat"
        path = rescue(session, folders)
        if path is not None:
            lines.append(f'"{title}" was written to {path}. `edgellm sessions import {path}` brings it back.')
        else:
            lines.append(f'"{title}" could be written nowhere else either. This is its text:\n\n{to_markdown(session)}')
    return "\n".join(lines)
