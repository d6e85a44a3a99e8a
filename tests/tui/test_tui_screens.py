"""The screens of the chat are those that benchmarks/chat_screens.py has drawn: run it and look at the difference."""

from __future__ import annotations

import asyncio
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import chat_screens  # noqa: E402


@pytest.mark.parametrize("name", chat_screens.SCREENS)
def test_a_screen_looks_as_it_was_drawn(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("EDGELLM_HOME", str(tmp_path))  # put back afterwards
    svg, text = asyncio.run(chat_screens.draw(name, chat_screens.pictures))
    assert text == (chat_screens.FOLDER / f"{name}.txt").read_text("utf-8")
    made_with = (chat_screens.FOLDER / "made-with.txt").read_text("utf-8")
    if made_with == f"textual {version('textual')}, rich {version('rich')}\n":  # others draw the same in other words
        assert svg == (chat_screens.FOLDER / f"{name}.svg").read_text("utf-8")
