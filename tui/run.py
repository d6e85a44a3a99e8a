"""The door to the application: open the sessions, run the screen, close everything, whatever the end."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import edgellm
from edgellm.formats.errors import EdgeLLMError
from edgellm.machine.terminal import echo
from edgellm.sessions import open_store
from edgellm.sessions.rescue import rescue_report
from edgellm.tui.safe_text import one_line

if TYPE_CHECKING:
    from edgellm.remote.model import RemoteServer
    from edgellm.tui.chat import Chat

LEAVING_S = 10.0  # for what was asked for and is not done yet, such as an export to a slow disk
PICTURE_S = 2.0  # a model waits for the first picture so long at most


@dataclass(frozen=True)
class Start:
    """What the command line said; None or empty: nothing."""

    model: str | None = None
    first: str | None = None
    system: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    load_options: Mapping[str, Any] = field(default_factory=dict)
    go_on: bool = False
    session: str | None = None
    server: RemoteServer | None = None


def known_model(name: str) -> str:
    """The model that a session names, if it is here or in the user's catalogue, else "".

    A session is untrusted: opening it must not fetch what it names.
    """
    from edgellm.store.catalogue import catalogue, installed

    with contextlib.suppress(EdgeLLMError, OSError, ValueError):
        if name in catalogue() or installed(name):
            return name
    return ""


def go_on_with(chat: Chat, session_id: int, start: Start) -> None:
    """Open a session under what the command line says, with its own model if that is here."""
    chat.open_session(session_id)
    chat.session.settings |= dict(start.settings)
    chat.session.system = start.system or chat.session.system
    known = known_model if chat.server is None else chat.server.known
    found = start.model or known(chat.session.model)
    if not found and chat.session.model:
        chat.session.notes.append(f"Its model {one_line(chat.session.model)} is not here; Ctrl-L shows what is.")
    chat.model = found or chat.model or (chat.server.first() if chat.server is not None else "")


def run_chat(start: Start) -> int:
    """Run the chat until the user leaves; the exit status."""
    from edgellm.store import DEFAULT_MODEL
    from edgellm.tui.app import ChatApp
    from edgellm.tui.chat import Chat

    store, note = open_store()

    server = start.server

    def load(name: str, progress: Any = None, **options: Any) -> Any:
        app.is_shown.wait(PICTURE_S)  # importing numba would keep the interpreter from drawing
        if server is not None:
            return server.open(name, progress)  # how it is loaded is the server's affair
        return edgellm.load(name, progress=progress, **options)

    try:
        session_id = store.find(start.session) if start.session else store.last_id() if start.go_on else None
        chat = Chat(
            store,
            load,
            start.model or ("" if server is not None else DEFAULT_MODEL),
            load_options=start.load_options,
            settings=start.settings,
            system=start.system or "",
            server=server,
        )
    except EdgeLLMError:
        store.close()
        raise

    def tell(message: Warning | str, *where: object, **more: object) -> None:
        app.call_later(app.warn, [str(message)], "Warning")  # from the thread that loads, too

    shown = warnings.showwarning
    status = 1
    try:
        if session_id is not None:
            go_on_with(chat, session_id, start)
        app = ChatApp(chat, first=start.first, note=" ".join(filter(None, (note, *chat.session.notes))))
        # called from the writer's thread, or from the screen's own
        chat.writer.failed = partial(app.call_later, app.not_saved)
        chat.writer.revived = partial(app.call_later, app.revived)
        warnings.showwarning = tell
        result = app.run()
        app.aside.wait(LEAVING_S)
        status = app.return_code or result or 0
    finally:
        warnings.showwarning = shown
        chat.writer.failed = chat.writer.revived = None
        chat.close()
        if chat.writer.unsaved:
            echo(rescue_report(chat.writer.unsaved, chat.writer.error), err=True)
            status = status or 1
    return status
