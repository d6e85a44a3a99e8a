"""The full-screen chat in a narrow terminal: whole words, whole keys, or nothing of them."""

from __future__ import annotations

import re
from typing import Any

import pytest
from chat_talk import Talk
from rich.text import Text

from edgellm.tui.app import PLACEHOLDERS, ChatApp
from edgellm.tui.commands import COMMANDS
from edgellm.tui.narrow import hints, whole_parts, words_of
from edgellm.tui.token_screen import HINT

WELCOME = "Write below. Everything stays on this machine and is saved as it is said."
KEYS = {f"{word}" for binding in ChatApp.BINDINGS if binding.show for word in binding.description.split()}  # type: ignore[union-attr]


@pytest.mark.parametrize("size", [(width, 15) for width in (32, 36, 40, 41, 42, 44, 47, 50, 59, 63)])
def test_nothing_is_cut_in_the_middle_of_a_word(run: Any, size: tuple[int, int]) -> None:
    async def steps(talk: Talk) -> None:
        shown = talk.screen_text()
        assert WELCOME in " ".join(shown.split()) and "edgellm" in shown
        assert any(f"❯ {line} " in shown for line in PLACEHOLDERS)
        keys = shown.rstrip().split("\n")[-1].split()
        assert keys[0] == "esc" and set(keys[1::2]) <= KEYS and len(keys) % 2 == 0
        await talk.ask("river")
        await talk.pilot.press("ctrl+r")
        await talk.settled()
        assert "‹ 2/2 ›" in talk.screen_text()
        foot = next(line for line in talk.screen_text().split("\n") if "‹ 2/2 ›" in line)
        assert re.fullmatch(r" *fake( · 11 tokens( · 200 t/s)?)?   ‹ 2/2 ›.*", foot)
        await talk.pilot.press("ctrl+t")
        await talk.pilot.pause()
        last = talk.screen_text().rstrip().split("\n")[-1].strip()
        assert HINT.startswith(last) and (last == HINT or HINT[len(last) :].startswith("   "))
        await talk.pilot.press("escape", "/")
        await talk.pilot.pause()
        help_words = {word.strip(".,;:") for command in COMMANDS.values() for word in command.help.split()}
        for line in talk.screen_text().split("\n"):
            if found := re.match(r"\s+/\w+\s+(?:\[?[A-Z ]+\]?(?:  |(?=…)))?(.*)…", line):
                assert {word.strip(".,;:") for word in found[1].split()} <= help_words

    run(steps, size)


@pytest.mark.parametrize(
    ("line", "width", "shown"),
    [
        ("whole", 5, "whole"),
        ("two words", 8, "two…"),
        ("two words", 9, "two words"),
        ("two words here", 10, "two words…"),
        ("two, words", 6, "two…"),
        ("enormous", 4, "eno…"),
        ("日本語 です", 6, "日本…"),
        ("anything", 0, ""),
    ],
)
def test_a_line_ends_with_a_whole_word(line: str, width: int, shown: str) -> None:
    assert words_of(line, width) == shown


def test_parts_are_shown_whole() -> None:
    assert (
        hints("Esc back   n next", 17).plain == "Esc back   n next"
        and hints("Esc back   n next", 16).plain == "Esc back"
    )
    assert [part.plain for part in whole_parts([Text("ab"), Text("cd")], 6)] == ["ab"]
