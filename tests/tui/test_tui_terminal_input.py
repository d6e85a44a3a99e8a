"""The full-screen chat's input: pastes, what cannot be drawn, what a terminal sends, and a terminal that is gone."""

from __future__ import annotations

import asyncio
import os
import select
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from chat_talk import HANG_S, Talk
from textual import events
from textual._xterm_parser import XTermParser
from textual.binding import Binding
from textual.widgets import Input

from edgellm.tui.completions import Completions
from edgellm.tui.dialog import LineDialog
from edgellm.tui.hidden_text import HiddenText
from edgellm.tui.paste_reader import PasteReader
from edgellm.tui.safe_text import safe_text

LOG = "\n".join(f"line {i} of a log" for i in range(40))
LOOKS_LIKE_ONE = "[pasted 1: 40 lines, 669 characters]"


async def paste(talk: Talk, text: str) -> None:
    talk.app.prompt.post_message(events.Paste(text))
    await talk.pilot.pause()


# --- the word for a large paste ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keys", "full"),
    [
        (["backspace"], "before  after"),
        (["left", "delete"], "before  after"),
        (["ctrl+w"], "before  after"),
        (["backspace", "ctrl+underscore"], f"before {LOG} after"),
        (["backspace", "ctrl+underscore", "redo"], "before  after"),
        (["x", "left", "left", "y"], f"before y{LOG}x after"),
        (["left", "right", "z"], f"before {LOG}z after"),
        (["shift+left", "backspace"], "before  after"),
        (["shift+left", "shift+left", "shift+right", "q"], "before q after"),
        (["home", "right", "shift+end", "w"], "bw"),
    ],
)
def test_the_word_for_a_paste_is_one_unit(run: Any, keys: list[str], full: str) -> None:
    async def steps(talk: Talk) -> None:
        prompt = talk.app.prompt
        await talk.pilot.press(*"before ")
        await paste(talk, LOG)
        await talk.pilot.press(*" after", *["left"] * 6)
        assert prompt.full_text == f"before {LOG} after"
        for key in keys:
            if key == "redo":
                prompt.redo()
            else:
                await talk.pilot.press(key)
        assert prompt.full_text == full

    run(steps)


def test_what_looks_like_the_word_for_a_paste_is_text(run: Any) -> None:
    async def steps(talk: Talk) -> None:
        await paste(talk, LOG)
        word = talk.app.prompt.text
        await paste(talk, word)  # even the word itself, with its last letter
        await talk.pilot.press(*LOOKS_LIKE_ONE)
        assert talk.app.prompt.full_text == LOG + word + LOOKS_LIKE_ONE
        await talk.pilot.press("enter")
        await talk.settled()
        assert talk.said[0][1] == LOG + word + LOOKS_LIKE_ONE

    run(steps)


def test_a_paste_is_copied_cut_and_recalled_in_full(run: Any) -> None:
    async def steps(talk: Talk) -> None:
        prompt = talk.app.prompt
        await paste(talk, LOG)
        await talk.pilot.press("home", "shift+end")
        assert prompt.selected_text == LOG
        await talk.pilot.press("ctrl+x")
        assert prompt.text == "" and talk.app.clipboard == LOG
        await talk.pilot.press("ctrl+v", "!")
        assert prompt.full_text == f"{LOG}!" and len(prompt.text) < 80
        await talk.pilot.press("enter")
        await talk.settled()
        await talk.pilot.press("d", "up")
        assert prompt.full_text == f"{LOG}!" and len(prompt.text) < 80
        await paste(talk, LOG)
        await talk.pilot.press("up", "down", "down")
        await talk.pilot.pause()
        assert talk.said[0][1] == f"{LOG}!"

    run(steps)


# --- control characters -----------------------------------------------------------------------------------------------

STEERING = "a\x1b[31mred\x1b]52;c;ZXZpbA==\x07\x00\x7f\x85b\x0bc\x0cd\u2028e\u202ef\x9bg\U00100000\U0010fffdh\ud800"


def test_control_characters_are_drawn_as_marks_and_sent_as_they_are(run: Any) -> None:
    async def steps(talk: Talk) -> None:
        for put in (lambda: paste(talk, STEERING), lambda: _put(talk, STEERING)):
            talk.app.prompt.put("")
            await put()
            assert talk.app.prompt.full_text == STEERING and talk.app.prompt.document.line_count == 1
            shown = talk.screen_text()
            assert safe_text(shown) == shown and "\u241b[31mred" in shown
        await talk.pilot.press("home", "right", "delete", "x")
        assert talk.app.prompt.full_text == "ax" + STEERING[2:]

    run(steps)


async def _put(talk: Talk, text: str) -> None:
    talk.app.prompt.put(text)
    await talk.pilot.pause()


def test_a_message_with_control_characters_is_edited_without_steering(run: Any, tmp_path: Any) -> None:
    (tmp_path / "log.txt").write_text("\x1b[2J\x1b[1;1Hgone\r\n")

    async def steps(talk: Talk) -> None:
        await talk.ask("@log.txt sum")
        await talk.write("/edit")
        await talk.pilot.pause()
        shown = talk.screen_text()
        assert "\x1b" not in shown and "\u241b[2J" in shown
        assert talk.app.prompt.full_text == talk.said[0][1]

    run(steps)


def test_a_line_takes_all_lines_of_a_paste_and_nothing_that_steers(run: Any) -> None:
    async def steps(talk: Talk) -> None:
        talk.app.push_screen(LineDialog("A line"))
        await talk.pilot.pause()
        line = talk.app.screen.query_one(Input)
        line.post_message(events.Paste("one\r\ntwo \x1b[31m"))
        await talk.pilot.pause()
        assert line.value == "one two \\x1b[31m"
        assert "\x1b" not in talk.screen_text()

    run(steps)


def test_what_is_hidden_comes_back_to_the_last_character() -> None:
    hidden = HiddenText()
    everything = "".join(map(chr, range(0x3000))) + "".join(map(chr, range(0xD7F0, 0xE010))) + STEERING
    held = hidden.hide(everything)
    assert hidden.shown(held) == everything and len(held) == len(everything)
    drawn = hidden.drawn(held)
    assert len(drawn) == len(held) and safe_text(drawn.replace("\t", "")) == drawn.replace("\t", "")


# --- what a terminal sends --------------------------------------------------------------------------------------------

START, END = "\x1b[200~", "\x1b[201~"


def read(*bursts: str) -> list[str]:
    """What comes of it: pastes as their text in quotes, keys by their names."""
    reader = PasteReader(XTermParser())
    found = [message for burst in bursts for message in reader.feed(burst)]
    return [repr(m.text) if isinstance(m, events.Paste) else getattr(m, "key", type(m).__name__) for m in found]


@pytest.mark.parametrize(
    "text",
    [
        "plain",
        "",
        "esc \x1b alone",
        "\x1b[31mred\x1b[0m and more than thirty-two characters behind it, with q and \x11 and \x03 and \r",
        "\x1b\x1b\x1b[<0;1;1M\x1b[A\x1b",
        "a\r\nb\rc\nd\x00e\x7f",
        f"its own end {END}\x11\x03 and the rest",
        f"its own start {START} and end {END} and the rest",
        "ends like its end \x1b[201",
        "x" * 100_000 + "\x1b" + "y" * 100_000,
    ],
)
def test_a_paste_is_text_until_its_end(text: str) -> None:
    assert read(f"a{START}{text}{END}b") == ["a", repr(text), "b"]


@pytest.mark.parametrize("n", [1, 2, 3, 5, 7])
def test_a_paste_may_come_in_parts_of_any_size(n: int) -> None:
    sent = f"a{START}one \x1b[31m two{END}b{START}{END}c"
    assert read(*(sent[i : i + n] for i in range(0, len(sent), n))) == ["a", repr("one \x1b[31m two"), "b", "''", "c"]


def test_keys_are_read_as_ever() -> None:
    assert read("a\x1b[A", "\x1b[1;5C", "\r") == ["a", "up", "ctrl+right", "enter"]


def test_a_paste_whose_end_is_lost_is_not() -> None:
    reader = PasteReader(XTermParser())
    assert list(reader.feed(f"{START}half\x1b[2")) == [] and reader.pasting and list(reader.tick()) == []
    (paste,) = reader.end()
    assert isinstance(paste, events.Paste) and paste.text == "half\x1b[2" and not reader.pasting
    assert [m.key for m in reader.feed("q") if isinstance(m, events.Key)] == ["q"]


@pytest.mark.skipif(sys.platform == "win32", reason="there are no pseudo-terminals")
@pytest.mark.parametrize("keys", [b"", b"\x0f\x07\x10\x0c"])
def test_a_terminal_that_is_gone_ends_the_chat(tmp_path: Path, keys: bytes) -> None:
    """Without the signal, as behind a broken connection: nobody reads what is written, and nothing can be read."""
    import pty

    ours, theirs = pty.openpty()
    chat = subprocess.Popen(
        [sys.executable, "-m", "edgellm", "chat", "./none.gguf"],
        stdin=theirs, stdout=theirs, stderr=theirs, env={**os.environ, "EDGELLM_HOME": str(tmp_path), "TERM": "xterm"},
    )  # fmt: skip
    try:
        os.close(theirs)
        shown, end = b"", time.monotonic() + HANG_S
        while "none.gguf" not in shown.decode(errors="replace") or select.select([ours], [], [], 1.0)[0]:
            assert time.monotonic() < end
            shown += os.read(ours, 1 << 16)
        os.write(ours, keys)
        os.close(ours)
        assert chat.wait(HANG_S) == 129
    finally:
        chat.kill()
        chat.wait()


@pytest.mark.parametrize("key", ["ctrl+o", "ctrl+g", "ctrl+l", "ctrl+t", "f1"])
def test_a_screen_that_opens_while_the_chat_ends_is_no_fault(run: Any, key: str) -> None:
    """It gets no parts any more: Textual composes nothing once the application ends."""

    async def steps(talk: Talk) -> None:
        action = {binding.key: binding.action for binding in talk.app.BINDINGS if isinstance(binding, Binding)}[key]
        talk.app.exit(3, return_code=3)
        await talk.app.run_action(action)
        await asyncio.sleep(0.1)  # it is mounted meanwhile
        assert talk.app.return_code == 3

    run(steps)


# --- completion -------------------------------------------------------------------------------------------------------


def test_tab_behind_a_name_stays_in_the_input(run: Any, tmp_path: Any) -> None:
    (tmp_path / "notes.txt").write_text("x")

    async def steps(talk: Talk) -> None:
        for text, after in (("@notes.txt", "@notes.txt "), ("@nothing", "@nothing"), ("/system", "/system ")):
            talk.app.prompt.put(text)
            await talk.until(lambda: not talk.app.query_one(Completions).display)
            await talk.pilot.press("tab")
            await talk.until(lambda after=after: talk.app.prompt.text == after)
            assert talk.app.focused is talk.app.prompt
        talk.app.prompt.put("words")
        await talk.pilot.pause()
        await talk.pilot.press("tab")
        assert talk.app.focused is talk.app.transcript

    run(steps)
