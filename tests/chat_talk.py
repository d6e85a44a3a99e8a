"""A chat with a model that answers by heart, for tests: what a user would do and see."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fake_chat_llm import FakeChatLLM
from textual.pilot import Pilot

from edgellm.sessions import SessionStore
from edgellm.tui import aside
from edgellm.tui.app import ChatApp
from edgellm.tui.chat import Chat

HANG_S = 60


class Talk:
    """One run of the application: its parts, and what a user would do and see."""

    def __init__(self, folder: Path, **options: Any) -> None:
        self.folder = folder
        self.models: list[FakeChatLLM] = []
        self.pace: threading.Semaphore | None = None
        self.load_error: Exception | None = None
        self.chat = Chat(SessionStore(folder / "sessions.db"), self.load, options.pop("model", "fake"), **options)
        self.app = ChatApp(self.chat)
        aside.BLINK_S = HANG_S  # what is done beside the screen is done when a key was pressed
        self.pilot: Pilot[Any] = None  # type: ignore[assignment]

    def load(self, name: str, progress: Any = None, **options: Any) -> FakeChatLLM:
        if self.load_error is not None:
            raise self.load_error
        self.models.append(FakeChatLLM(name, self.pace))
        return self.models[-1]

    @property
    def llm(self) -> FakeChatLLM:
        return self.models[-1]

    @property
    def said(self) -> list[tuple[str, str]]:
        return [(node.role, node.text) for node in self.chat.session.tree.path]

    def screen_text(self) -> str:
        strips = self.app.screen._compositor.render_strips(self.app.size)
        return "\n".join("".join(segment.text for segment in strip).rstrip() for strip in strips)

    async def until(self, condition: Callable[[], object]) -> None:
        end = time.monotonic() + HANG_S
        while not condition():
            assert time.monotonic() < end, f"waited in vain; the screen:\n{self.screen_text()}"
            await self.pilot.pause(0.02)

    async def settled(self) -> None:
        await self.until(lambda: not self.chat.busy and self.chat.loading is None)
        await self.pilot.pause()

    async def write(self, text: str) -> None:
        """Put a text into the input and send it."""
        self.app.prompt.put(text)
        await self.pilot.press("enter")

    async def ask(self, text: str) -> None:
        await self.write(text)
        await self.settled()

    def told(self) -> str:
        """All notifications that are shown."""
        return "\n".join(str(note.message) for note in self.app._notifications)


def styles_of(talk: Talk, word: str) -> list[Any]:
    """The styles in which a word stands on the screen."""
    strips = talk.app.screen._compositor.render_strips(talk.app.size)
    return [segment.style for strip in strips for segment in strip if word in segment.text]
