"""The chat on terminals with less: without colours, with none of a screen, and the bytes that copy out of it."""

from __future__ import annotations

import asyncio
import base64
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from fake_chat_llm import FakeChatLLM

from edgellm.cli.chat import has_screen
from edgellm.sessions import SessionStore
from edgellm.tui.app import ChatApp
from edgellm.tui.chat import Chat


def app_in(folder: Path, load: Any = None) -> ChatApp:
    chat = Chat(SessionStore(folder / "sessions.db"), load or (lambda name, **options: FakeChatLLM(name)), "fake")
    return ChatApp(chat)


def test_no_colour_leaves_only_grey(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("EDGELLM_HOME", str(tmp_path))

    async def show() -> set[Any]:
        app = app_in(tmp_path)
        async with app.run_test(size=(80, 24)) as pilot:
            assert app.no_color and app.palette.cursor.reverse
            app.prompt.put("river")
            await pilot.press("enter")
            while app.chat.busy or app.chat.loading is not None:
                await pilot.pause(0.02)
            await pilot.press("ctrl+t", "right")
            await pilot.pause()
            strips = app.screen._compositor.render_strips(app.size)
            lines = [strip.apply_filter(f, app.background_colors[0]) for strip in strips for f in app._filters[:1]]
            styles = [segment.style for line in lines for segment in line if segment.style]
            app.chat.close()
            return {c.triplet for style in styles for c in (style.color, style.bgcolor) if c is not None and c.triplet}

    triplets = asyncio.run(show())
    assert triplets and all(max(t) - min(t) <= 1 for t in triplets)


@pytest.mark.parametrize(("term", "expected"), [("dumb", False), ("xterm-256color", True)])
def test_a_dumb_terminal_gets_the_line_chat(term: str, expected: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", term)
    for stream in (sys.stdin, sys.stdout):
        monkeypatch.setattr(stream, "isatty", lambda: True, raising=False)
    assert has_screen() is expected


def test_copying_writes_osc_52(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TMUX", raising=False)
    monkeypatch.setenv("EDGELLM_HOME", str(tmp_path))
    written: list[str] = []

    async def show() -> None:
        app = app_in(tmp_path)
        async with app.run_test():
            assert app._driver is not None
            monkeypatch.setattr(app._driver, "write", written.append)
            app.copy_to_clipboard("Žluť\n")
        app.chat.close()

    asyncio.run(show())
    coded = base64.b64encode("Žluť\n".encode()).decode()
    assert f"\x1b]52;c;{coded}\a" in "".join(written)


def test_a_pull_shows_how_far_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGELLM_HOME", str(tmp_path))
    ready = threading.Event()

    def load(name: str, progress: Any = None, **options: Any) -> FakeChatLLM:
        if name == "far":
            progress("pull", 52 << 20, 100 << 20, "far.gguf")
            assert ready.wait(60)
        return FakeChatLLM(name)

    async def show() -> None:
        app = app_in(tmp_path, load)
        async with app.run_test(size=(100, 30)) as pilot:
            while app.chat.loading is not None or app.chat.llm is None:
                await pilot.pause(0.02)
            await pilot.press("ctrl+l", *"far", "enter")
            for _ in range(500):
                await pilot.pause(0.02)
                strips = app.screen._compositor.render_strips(app.size)
                text = "\n".join("".join(segment.text for segment in strip) for strip in strips)
                if "52 MiB of 100 MiB" in text:
                    break
            ready.set()
            assert "52 MiB of 100 MiB" in text, text
            while app.chat.loading is not None:
                await pilot.pause(0.02)
            assert app.chat.llm.name == "far"
        app.chat.close()

    asyncio.run(show())
