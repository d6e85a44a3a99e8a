"""Draw the screens of the chat as SVG files, with a model that answers by heart: python benchmarks/chat_screens.py

The files in tui/screens are made with it and are what the README shows; tests/test_tui_screens.py compares them.
"""

from __future__ import annotations

import asyncio
import os
import sys
import tempfile
from collections.abc import Awaitable, Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from fake_chat_llm import FakeChatLLM  # noqa: E402

from edgellm.sessions import Session, SessionStore  # noqa: E402
from edgellm.tui import aside, meters, model_screen  # noqa: E402
from edgellm.tui.app import ChatApp  # noqa: E402
from edgellm.tui.chat import Chat  # noqa: E402
from edgellm.tui.model_screen import ModelRow  # noqa: E402

FOLDER = ROOT / "tui" / "screens"
MODELS = [
    ModelRow("smollm2", True, 98_362_432, "SmolLM2 135M Instruct, Q4_1: the small default, answers on any machine"),
    ModelRow("gemma3-270m", True, 253_113_024, "Gemma 3 270M, Q4_K_M: many languages, made to be fine-tuned"),
    ModelRow("qwen3-0.6b", False, None, "Qwen3 0.6B, Q8_0: thinks before it answers, Apache-2.0"),
    ModelRow("llama3.2-1b", False, None, "Llama 3.2 1B Instruct, Q4_K_M, Llama 3.2 community licence"),
]
Steps = Callable[[Any], Awaitable[None]]


async def asked(pilot: Any, text: str) -> None:
    """Send a text and wait for the answer."""
    app = pilot.app
    app.prompt.put(text)
    await pilot.press("enter")
    await settled(pilot)


async def settled(pilot: Any) -> None:
    """Until nothing moves."""
    while pilot.app.chat.busy or pilot.app.chat.loading is not None:
        await pilot.pause(0.02)
    await pilot.pause()


async def talk(pilot: Any) -> None:
    """A question, its answer, another answer."""
    await asked(pilot, "How does quicksort sort? Show it in Python.")


async def branches(pilot: Any) -> None:
    """Thoughts, and two answers to one message."""
    await asked(pilot, "think of a river")
    await pilot.press("ctrl+r")
    await settled(pilot)
    await pilot.press("alt+up", "space")


async def tokens(pilot: Any) -> None:
    """The token view on a word that was not the likeliest."""
    await asked(pilot, "Tell me about a river.")
    await pilot.press("ctrl+t", "right", "right", "right")


async def models(pilot: Any) -> None:
    """The model picker."""
    await pilot.press("ctrl+l")


async def settings(pilot: Any) -> None:
    """The settings with one that is set."""
    await asked(pilot, "/set temp 0.2")
    pilot.app.clear_notifications()
    await pilot.press("ctrl+g", *["down"] * 3)


async def chats(pilot: Any) -> None:
    """The list of chats."""
    for title in ("Rivers of Europe", "Sorting in Python", "A letter to the landlord"):
        session = Session(title=title, id=len(title))
        session.tree.add("user", title)
        pilot.app.chat.store.save_all(session)
    await pilot.press("ctrl+o")


async def help_page(pilot: Any) -> None:
    """All keys."""
    await pilot.press("f1")


SCREENS: dict[str, tuple[tuple[int, int], str, Steps]] = {
    "chat": ((100, 34), "edgellm-dark", talk),
    "light": ((100, 34), "edgellm-light", talk),
    "narrow": ((50, 20), "edgellm-dark", talk),
    "branches": ((80, 24), "edgellm-dark", branches),
    "tokens": ((100, 24), "edgellm-dark", tokens),
    "tokens-narrow": ((60, 26), "edgellm-dark", tokens),
    "models": ((100, 28), "edgellm-dark", models),
    "settings": ((80, 24), "edgellm-dark", settings),
    "chats": ((80, 24), "edgellm-dark", chats),
    "help": ((80, 34), "edgellm-dark", help_page),
}


async def draw(name: str, show: Callable[[ChatApp], Any]) -> Any:
    """What ``show`` makes of one screen."""
    size, theme, steps = SCREENS[name]
    with tempfile.TemporaryDirectory() as folder:
        os.environ["EDGELLM_HOME"] = folder

        def load(model: str, progress: Any = None, **options: Any) -> FakeChatLLM:
            return FakeChatLLM(model)

        chat = Chat(SessionStore(Path(folder) / "sessions.db"), load, "smollm2")
        aside.BLINK_S = 60.0  # a screen shows what is there in the end
        app = ChatApp(chat)
        app.memory = lambda: 312 << 20  # type: ignore[method-assign]
        rows, model_screen.model_rows = model_screen.model_rows, lambda: MODELS
        try:
            async with app.run_test(size=size) as pilot:
                app.theme = theme
                app.prompt.cursor_blink = False
                await settled(pilot)
                await steps(pilot)
                await pilot.pause()
                return show(app)
        finally:
            model_screen.model_rows = rows
            chat.close()


def text_of(app: ChatApp) -> str:
    """The letters on the screen."""
    strips = app.screen._compositor.render_strips(app.size)
    return "\n".join("".join(segment.text for segment in strip).rstrip() for strip in strips) + "\n"


def pictures(app: ChatApp) -> tuple[str, str]:
    """A screen as SVG and as letters."""
    return app.export_screenshot(title="edgellm"), text_of(app)


def main() -> None:
    """Write all screens."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name in SCREENS:
        svg, text = asyncio.run(draw(name, pictures))
        (FOLDER / f"{name}.txt").write_text(text, "utf-8")
        (FOLDER / f"{name}.svg").write_text(svg, "utf-8")
        print(f"{name}: {meters.human_bytes(len(svg))}")
    (FOLDER / "made-with.txt").write_text(f"textual {version('textual')}, rich {version('rich')}\n", "utf-8")


if __name__ == "__main__":
    main()
