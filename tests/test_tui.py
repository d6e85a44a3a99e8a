"""The full-screen chat with a model that answers by heart: what keys and commands do, and what is on the screen."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import threading
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from fake_chat_llm import FakeChatLLM
from textual import events
from textual.pilot import Pilot
from textual.widgets import Input

from edgellm.formats.errors import ContextFullError, FormatError, ModelNotFoundError
from edgellm.sessions import SessionStore
from edgellm.tui.app import ChatApp
from edgellm.tui.chat import Chat
from edgellm.tui.commands import COMMANDS
from edgellm.tui.completions import Completions
from edgellm.tui.dialog import Dialog
from edgellm.tui.help_screen import HelpScreen
from edgellm.tui.kept_state import tokens_of
from edgellm.tui.meters import Meters
from edgellm.tui.model_screen import ModelRow, ModelScreen
from edgellm.tui.sessions_screen import SessionsScreen
from edgellm.tui.settings_screen import SettingsScreen
from edgellm.tui.token_screen import TokenScreen
from edgellm.tui.token_text import TokenText
from edgellm.tui.transcript import Transcript

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


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs ``steps(talk)`` in an application of a given size."""
    monkeypatch.setenv("EDGELLM_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("TMUX", raising=False)

    def start(
        steps: Callable[[Talk], Awaitable[None]],
        size: tuple[int, int] = (100, 30),
        toasts: bool = False,
        **options: Any,
    ) -> Talk:
        talk = Talk(tmp_path, **options)

        async def all_of_it() -> None:
            async with talk.app.run_test(size=size, notifications=toasts) as talk.pilot:
                await talk.pilot.pause()
                await talk.settled()
                await steps(talk)

        try:
            asyncio.run(all_of_it())
        finally:
            talk.chat.close()
        return talk

    return start


def styles_of(talk: Talk, word: str) -> list[Any]:
    """The styles in which a word stands on the screen."""
    strips = talk.app.screen._compositor.render_strips(talk.app.size)
    return [segment.style for strip in strips for segment in strip if word in segment.text]


# --- talking ----------------------------------------------------------------------------------------------------------


def test_a_message_is_answered_shown_and_saved(run: Any, tmp_path: Path) -> None:
    async def steps(talk: Talk) -> None:
        await talk.pilot.press(*"hello")
        await talk.pilot.press("enter")
        await talk.settled()
        assert talk.said == [("user", "hello"), ("assistant", "echo: hello")]
        assert "❯ hello" in talk.screen_text() and "echo: hello" in talk.screen_text()

    talk = run(steps)
    store = SessionStore(tmp_path / "sessions.db")
    again = store.load(store.last_id() or 0)
    assert [node.text for node in again.tree.path] == ["hello", "echo: hello"]
    assert len(again.tree.path[-1].tokens) == 2 and store.prompts() == ["hello"]
    assert talk.llm.closed
    store.close()


def test_markdown_is_drawn_and_code_blocks_are_copied_by_number(run: Any) -> None:
    async def steps(talk: Talk) -> None:
        await talk.ask("code")
        text = talk.screen_text()
        assert "copy 1" in text and "copy 2" in text and "```" not in text
        await talk.write("/copy 2")
        assert talk.app.clipboard == "second"
        await talk.write("/copy 3")
        assert "no code block 3" in talk.told()
        await talk.pilot.press("ctrl+y")
        assert talk.app.clipboard.startswith("```\nfirst")
        await talk.pilot.press("alt+up", "1")
        assert talk.app.clipboard == "first"

    run(steps)


def test_nothing_that_a_model_says_steers_the_terminal(run: Any) -> None:
    async def steps(talk: Talk) -> None:
        await talk.ask("evil")
        text = talk.screen_text()
        assert "\x1b" not in text and "\x07" not in text and "\u202e" not in text
        assert "\\x1b[31mred" in text and "[bold]markup[/bold]" in text
        await talk.pilot.press("ctrl+t")
        await talk.pilot.pause()
        assert "\x1b" not in talk.screen_text()
        await talk.pilot.press("escape")
        await talk.write("/rename [red]x[/red] \x1b[2J")
        await talk.pilot.press("ctrl+o")
        await talk.pilot.pause()
        assert "[red]x[/red]" in talk.screen_text() and "\x1b" not in talk.screen_text()

    run(steps)


def test_escape_stops_the_answer_and_keeps_what_was_said(run: Any) -> None:
    async def steps(talk: Talk) -> None:
        await talk.write("forever")
        await talk.until(lambda: len(talk.chat.session.tree.path[-1].tokens) > 20)
        await talk.pilot.press(*"next")  # the input is usable meanwhile
        assert talk.app.prompt.text == "next"
        await talk.pilot.press("escape")
        await talk.settled()
        node = talk.chat.session.tree.leaf
        assert node is not None and node.finish_reason == "cancelled" and node.text.startswith("on and")
        assert "stopped" in talk.screen_text() and talk.app.prompt.text == "next"
        await talk.pilot.press("enter")
        await talk.settled()
        assert talk.said[-1] == ("assistant", "echo: next")

    run(steps)


def test_an_answer_that_ends_while_the_screens_are_taken_down_is_not_drawn(run: Any) -> None:
    async def steps(talk: Talk) -> None:
        await talk.write("forever")
        await talk.until(lambda: talk.chat.answering)
        take_down, answering = talk.app._close_all, talk.chat.answering

        async def take_down_and_beat() -> None:
            await take_down()
            talk.chat.stop()
            assert answering is not None and answering.finished.wait(HANG_S)
            talk.app.tick()

        talk.app._close_all = take_down_and_beat  # type: ignore[method-assign]

    run(steps)


def test_the_view_follows_the_end_only_while_the_reader_is_there(run: Any) -> None:
    async def steps(talk: Talk) -> None:
        transcript = talk.app.transcript
        await talk.write("forever")
        await talk.until(lambda: transcript.max_scroll_y > 10)
        assert transcript.at_end
        transcript.scroll_to(y=0, animate=False)
        before = transcript.virtual_size.height
        await talk.until(lambda: transcript.virtual_size.height > before + 5)
        assert transcript.scroll_offset.y == 0
        transcript.scroll_end(animate=False)
        await talk.pilot.pause()
        before = transcript.virtual_size.height
        await talk.until(lambda: transcript.virtual_size.height > before + 5)
        assert transcript.at_end
        await talk.pilot.resize_terminal(50, 20)  # while it streams
        before = transcript.virtual_size.height
        await talk.until(lambda: transcript.virtual_size.height > before + 5)
        await talk.pilot.press("escape")

    run(steps)


def test_thoughts_fold(run: Any) -> None:
    async def steps(talk: Talk) -> None:
        await talk.ask("think")
        assert "▸ thought · 10 words" in talk.screen_text() and "asks for" not in talk.screen_text()
        await talk.pilot.press("alt+up", "space")
        assert "▾ thought" in talk.screen_text() and "asks for a river" in talk.screen_text()
        await talk.pilot.press("c")
        assert talk.app.clipboard == "The **Danube**."
        await talk.pilot.press("escape")
        await talk.ask("river")
        assert talk.llm.requests[-1][0][1] == {
            "role": "assistant",
            "content": "The **Danube**.",
            "reasoning_content": "The user asks for a river.\nThe Danube is one.",
        }

    run(steps)


def test_an_error_is_told_and_the_words_come_back(run: Any) -> None:
    async def steps(talk: Talk) -> None:
        talk.llm.fail = ContextFullError("The prompt has 99 tokens, the context has room for 64.")
        await talk.ask("too long")
        assert "room for 64" in talk.told() and talk.app.prompt.text == "too long"
        await talk.pilot.press("enter")
        await talk.settled()
        assert talk.said == [("user", "too long"), ("assistant", "echo: too long")]

    run(steps)


@pytest.mark.parametrize("size", [(80, 24), (40, 12)])
def test_notes_leave_the_input_in_sight_and_go_with_the_next_message(run: Any, size: tuple[int, int]) -> None:
    async def steps(talk: Talk) -> None:
        await talk.write("/nothing")
        await talk.until(lambda: "no command" in talk.screen_text())
        await talk.write("/set foo 3")
        await talk.until(lambda: "Known: temperature" in talk.screen_text())
        assert "no command" not in talk.screen_text()
        assert "PARAMETER" not in talk.screen_text()
        await talk.pilot.pause(0.1)
        top, words, bottom, keys = talk.screen_text().split("\n")[-4:]
        assert top.endswith("─╮") and "❯ Write a message" in words and bottom.endswith("─╯") and "Stop" in keys

    run(steps, size, toasts=True)


# --- branches ---------------------------------------------------------------------------------------------------------


def test_regenerate_edit_and_switch_branches(run: Any) -> None:
    async def steps(talk: Talk) -> None:
        await talk.ask("one")
        await talk.pilot.press("ctrl+r")
        await talk.settled()
        assert "‹ 2/2 ›" in talk.screen_text()
        await talk.pilot.press("alt+up", "up", "e")
        assert talk.app.prompt.text == "one"
        await talk.ask("two")
        assert talk.said == [("user", "two"), ("assistant", "echo: two")]
        assert len(talk.chat.session.tree) == 5
        await talk.pilot.press("alt+left")
        assert talk.said == [("user", "one"), ("assistant", "echo: one")]
        await talk.write("/branch")
        assert talk.said[0] == ("user", "one")  # the last place with branches: the answers
        await talk.pilot.press("alt+up", "up", "right_square_bracket")
        assert talk.said == [("user", "two"), ("assistant", "echo: two")]

    run(steps)


def test_a_draft_comes_back_after_editing_an_earlier_message(run: Any) -> None:
    async def steps(talk: Talk) -> None:
        await talk.ask("one")
        for way_out in ("escape", "enter"):
            talk.app.prompt.put("half a thought")
            await talk.pilot.press("alt+up", "up", "e")
            assert talk.app.prompt.text == "one"
            await talk.pilot.press(way_out)
            await talk.settled()
            assert talk.app.prompt.text == "half a thought" and talk.app.editing is None
        assert len(talk.said) == 2  # the second time sent it

    run(steps)


def test_escape_leaves_editing(run: Any) -> None:
    async def steps(talk: Talk) -> None:
        await talk.ask("one")
        await talk.write("/edit")
        await talk.pilot.pause()
        assert talk.app.editing is not None and "editing" in talk.screen_text()
        await talk.pilot.press("escape")
        assert talk.app.editing is None and talk.app.prompt.text == ""
        await talk.ask("two")
        assert len(talk.said) == 4

    run(steps)


def test_a_cut_answer_goes_on_where_it_ended(run: Any) -> None:
    async def steps(talk: Talk) -> None:
        await talk.write("/set n 3")
        await talk.ask("river")
        assert talk.said[-1][1] == "The Danube flows" and "cut off" in talk.screen_text()
        await talk.write("/set n 100")
        await talk.write("/continue")
        await talk.settled()
        assert talk.said[-1][1] == "The Danube flows and so it went on."
        prompt = talk.llm.requests[-1][0]
        assert talk.llm.tokenizer.decode(prompt) == "<prompt>riverThe Danube flows"
        assert len(talk.chat.session.tree.path[-1].tokens) == 8

    run(steps)


def test_the_token_view_shows_alternatives_and_branches_from_one(run: Any) -> None:
    async def steps(talk: Talk) -> None:
        await talk.ask("river")
        await talk.pilot.press("ctrl+t")
        await talk.pilot.pause()
        assert isinstance(talk.app.screen, TokenScreen)
        await talk.pilot.press("right", "right")
        await talk.pilot.pause()
        text = talk.screen_text()
        assert "token 3 of 11" in text and "crosses" in text and "min_p" in text and "cut by the samplers" in text
        await talk.pilot.press("left", "down", "enter")
        await talk.settled()
        assert talk.said[-1][1] == "The Rhine and so it went on."
        assert len(talk.chat.session.tree.roots[0].children) == 2
        node = talk.chat.session.tree.leaf
        assert node is not None and [t.text for t in node.tokens[:2]] == ["The", " Rhine"]
        await talk.write("/branch")
        assert talk.said[-1][1].startswith("The Danube flows")

    run(steps)


def test_the_token_cursor_moves_by_rows_surprises_and_the_mouse(run: Any) -> None:
    async def steps(talk: Talk) -> None:
        await talk.ask("sort")
        await talk.pilot.press("ctrl+t")
        await talk.pilot.pause()
        view = talk.app.screen.query_one(TokenText)
        await talk.pilot.press("pagedown", "pagedown")
        assert view.row_of[view.position] > 0
        await talk.pilot.press("home", "n")
        token = view.tokens[view.position]
        assert token.top[0].token != token.token
        await talk.pilot.press("end")
        assert view.position == len(view.tokens) - 1
        await talk.pilot.click(TokenText, offset=(3, 1))
        assert view.position == 0
        await talk.pilot.resize_terminal(60, 20)
        await talk.pilot.pause()
        assert view.position == 0 and "token 1 of" in talk.screen_text()

    run(steps)


# --- the mouse --------------------------------------------------------------------------------------------------------


async def select(talk: Talk, word: str) -> str:
    """Draw the mouse over the first ten letters of the line that begins with a word; what is selected then."""
    row = next(y for y, line in enumerate(talk.screen_text().split("\n")) if word in line)
    await talk.pilot.mouse_down(offset=(2, row))
    await talk.pilot.hover(offset=(8, row))
    await talk.pilot.hover(offset=(11, row))
    await talk.pilot.mouse_up(offset=(11, row))
    await talk.pilot.pause()
    return str(talk.app.screen.get_selected_text())


@pytest.mark.parametrize("theme", ["edgellm-dark", "edgellm-light", "nord"])
def test_selected_text_can_be_read(run: Any, theme: str) -> None:
    async def steps(talk: Talk) -> None:
        talk.app.theme = theme
        await talk.ask("river")
        selected = await select(talk, "The Danube")
        assert selected == "The Danube"
        (style,) = [style for style in styles_of(talk, selected) if style.bgcolor != talk.app.palette.base.bgcolor]
        differences = (abs(a - b) for a, b in zip(style.color.triplet, style.bgcolor.triplet, strict=True))
        assert sum(differences) > 200

    run(steps)


def test_what_is_selected_is_copied_out_of_tmux(run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tmux = tmp_path / "bin" / "tmux"
    tmux.parent.mkdir()
    tmux.write_text(f"#!/bin/sh\necho $* >> {tmp_path}/asked\ncat > {tmp_path}/buffer\n")
    tmux.chmod(0o755)

    async def steps(talk: Talk) -> None:
        monkeypatch.setenv("TMUX", "/tmp/tmux-0/default,1,0")
        monkeypatch.setenv("PATH", f"{tmux.parent}:/usr/bin:/bin")
        written: list[str] = []
        monkeypatch.setattr(talk.app._driver, "write", written.append)
        await talk.ask("river")
        await select(talk, "The Danube")
        await talk.pilot.press("ctrl+c")
        assert (tmp_path / "buffer").read_text() == "The Danube" == talk.app.clipboard
        assert "Copied" in talk.told() and "once more" not in talk.told()
        assert (tmp_path / "asked").read_text() == "load-buffer -w -\n" and "]52;" not in "".join(written)  # once

    run(steps)


@pytest.mark.parametrize(("n_clicks", "selected"), [(2, "Danube"), (3, "The Danube flows")])
def test_a_double_click_selects_a_word_and_a_third_the_line(run: Any, n_clicks: int, selected: str) -> None:
    async def steps(talk: Talk) -> None:
        await talk.ask("river")
        row = next(y for y, line in enumerate(talk.screen_text().split("\n")) if "The Danube" in line)
        await talk.pilot.click(Transcript, offset=(8, row - talk.app.transcript.region.y), times=n_clicks)
        await talk.pilot.pause()
        found = talk.app.screen.get_selected_text() or ""
        assert found.startswith(selected) and (n_clicks == 3 or found == selected) and "\n" not in found

    run(steps)


def test_a_click_marks_a_message_and_the_next_letters_are_still_written(run: Any) -> None:
    async def steps(talk: Talk) -> None:
        await talk.ask("river")
        await talk.ask("hello")
        row = next(y for y, line in enumerate(talk.screen_text().split("\n")) if "The Danube" in line)
        await talk.pilot.click(offset=(8, row))
        assert talk.app.transcript.chosen is talk.chat.session.tree.path[1]
        await talk.pilot.press(*"ear")  # in the conversation: edit, answer again
        assert talk.app.prompt.text == "ear" and talk.app.editing is None and not talk.chat.busy
        await talk.pilot.press("enter")
        await talk.settled()
        assert talk.app.transcript.chosen is None and talk.said[-1][1] == "echo: ear"

    run(steps)


# --- the input --------------------------------------------------------------------------------------------------------


def test_keys_that_come_at_once_act_in_their_order(run: Any) -> None:
    """As they do over a slow line, or while a long answer is drawn."""

    async def steps(talk: Talk) -> None:
        def at_once(*keys: str) -> None:
            for key in keys:
                talk.app.post_message(events.Key(key, key if len(key) == 1 else None))

        for keys, text in (
            ("abc", "abc"),
            (("ctrl+u", *"def"), "def"),
            (("backspace", "g", "left", "h"), "dehg"),
            (("end", "ctrl+j", "x", "up", "home", "y"), "ydehg\nx"),
            (("end", "ctrl+w", "z"), "z\nx"),
        ):
            at_once(*keys)
            await talk.until(lambda text=text: talk.app.prompt.text == text)
        talk.app.post_message(events.Key("ctrl+o", None))
        await talk.until(lambda: isinstance(talk.app.screen, SessionsScreen))
        at_once(*"abc", "backspace", "x", "home", "y", "ctrl+k", "z")
        await talk.until(lambda: talk.app.screen.query_one(Input).value == "yz")

    run(steps)


def test_messages_of_several_lines_and_the_history(run: Any) -> None:
    async def steps(talk: Talk) -> None:
        await talk.pilot.press("a", "ctrl+j", "b", "backslash", "enter", "c", "enter")
        await talk.settled()
        assert talk.said[0] == ("user", "a\nb\nc")
        await talk.ask("second")
        await talk.pilot.press("x", "up")
        assert talk.app.prompt.text == "second"
        await talk.pilot.press("up")
        assert talk.app.prompt.text == "a\nb\nc"
        await talk.pilot.press("down", "down")
        assert talk.app.prompt.text == "x"

    run(steps)


def test_a_large_paste_shows_as_one_word_and_is_sent_whole(run: Any) -> None:
    async def steps(talk: Talk) -> None:
        from textual.events import Paste

        big = "\r\n".join(f"line {i}" for i in range(5000))
        talk.app.prompt.post_message(Paste(big))
        await talk.pilot.pause()
        assert "5000 lines" in talk.app.prompt.text and len(talk.app.prompt.text) < 80
        await talk.pilot.press("enter")
        await talk.settled()
        assert talk.said[0][1] == big.replace("\r\n", "\n")
        talk.app.transcript.scroll_home(animate=False)
        await talk.pilot.pause()
        assert "… 4988 more lines" in talk.screen_text()

    run(steps)


def test_a_large_paste_stays_one_word_when_it_comes_back(run: Any) -> None:
    async def steps(talk: Talk) -> None:
        talk.pace = threading.Semaphore(0)
        talk.llm.pace = talk.pace
        await talk.write("river")
        pasted = "words\n" * 40
        talk.app.prompt.post_message(events.Paste(pasted))
        await talk.pilot.pause()
        await talk.pilot.press("enter")  # the answer is still coming
        assert talk.app.prompt.text.startswith("[pasted 1: 41 lines") and talk.app.prompt.full_text == pasted
        await talk.pilot.press("escape")
        await talk.settled()
        talk.llm.pace = None
        await talk.pilot.press("enter")
        await talk.settled()
        assert talk.said[-2] == ("user", pasted)
        await talk.pilot.press("up")
        assert talk.app.prompt.text.startswith("[pasted 1: 41 lines")
        talk.app.prompt.put("x" * 1_000_000)  # of another day's history
        assert len(talk.app.prompt.text) < 100 and len(talk.app.prompt.full_text) == 1_000_000
        await talk.pilot.pause()

    run(steps)


def test_joiners_of_letters_and_emoji_can_be_typed(run: Any) -> None:
    async def steps(talk: Talk) -> None:
        for letter in "می\u200cخ 👩\u200d👧":
            talk.app.prompt.post_message(events.Key(letter, letter))
        await talk.pilot.pause()
        assert talk.app.prompt.text == "می\u200cخ 👩\u200d👧"

    run(steps)


def test_a_line_typed_faster_than_the_list_is_sent_as_it_is(run: Any) -> None:
    async def steps(talk: Talk) -> None:
        await talk.pilot.press(*"/se")
        assert talk.app.query_one(Completions).display
        for letter in "t temp 0.5":  # without a pause: the list still shows what fits /se
            talk.app.prompt.insert(letter)
        talk.app.prompt.post_message(events.Key("enter", "\r"))
        await talk.until(lambda: talk.chat.session.settings)
        assert talk.chat.session.settings == {"temperature": 0.5} and talk.app.prompt.text == ""

    run(steps)


def test_after_a_suspension_all_of_the_screen_is_drawn(run: Any) -> None:
    async def steps(talk: Talk) -> None:
        asked: list[Any] = []
        refresh = talk.app.refresh
        talk.app.refresh = lambda *a, **options: asked.append(options) or refresh(*a, **options)  # type: ignore
        talk.app.app_resume_signal.publish(talk.app)
        await talk.pilot.pause()
        assert {"layout": True} in asked

    run(steps)


def test_every_command_can_be_reached_with_the_arrows(run: Any) -> None:
    async def steps(talk: Talk) -> None:
        await talk.pilot.press("/", "up")
        assert "/quit" in talk.screen_text()
        assert "❯ /" in talk.screen_text()  # the list leaves room for the input
        assert talk.app.query_one(Completions).virtual_size.height == len(COMMANDS)  # no row is broken

    run(steps, (40, 12))


def test_the_meters_show_what_fits_after_a_resize(run: Any) -> None:
    async def steps(talk: Talk) -> None:
        await talk.ask("river")
        await talk.pilot.resize_terminal(50, 20)
        await talk.until(lambda: talk.app.query_one(Meters).size.width == 50)
        await talk.pilot.pause(0.1)
        assert "t/s" in talk.screen_text() and "reused" not in talk.screen_text()
        await talk.pilot.resize_terminal(120, 30)
        await talk.until(lambda: "reused + " in talk.screen_text())

    run(steps)


@pytest.mark.parametrize("size", [(100, 30), (60, 20), (40, 12)])
def test_the_token_views_marked_row_and_way_out_are_in_sight(run: Any, size: tuple[int, int]) -> None:
    async def steps(talk: Talk) -> None:
        await talk.ask("river")
        await talk.pilot.press("ctrl+t", *["right"] * 3, *["down"] * 4)
        await talk.pilot.pause()
        shown = talk.screen_text()
        assert "▸  along" in shown and "min_p" in shown and "The Danube" in shown and "Esc back" in shown
        assert "  sampled" in shown and "\n  sampled" not in shown  # no row is broken

    run(steps, size)


def test_a_dialog_leaves_the_input_whole(run: Any) -> None:
    async def steps(talk: Talk) -> None:
        for key in ("ctrl+o", "ctrl+g", "f1"):
            await talk.pilot.press(key)
            await talk.pilot.pause()
            prompt_row = talk.app.screen_stack[0].query_one("#prompt-row")
            assert talk.app.screen.query_one("#dialog").region.bottom <= prompt_row.region.y
            await talk.pilot.press("escape")

    run(steps, (80, 24))


def test_commands_are_completed(run: Any) -> None:
    async def steps(talk: Talk) -> None:
        await talk.pilot.press("slash")
        assert talk.app.query_one(Completions).display
        await talk.pilot.press(*"se", "down", "tab")
        assert talk.app.prompt.text == "/set "
        await talk.pilot.press(*"temp", "space", *"0.25", "enter")
        assert talk.chat.session.settings == {"temperature": 0.25}
        await talk.write("/frobnicate")
        assert "/help" in talk.told() and talk.app.prompt.text == "/frobnicate"

    run(steps)


def test_a_file_is_completed_and_brought_in(run: Any, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("rivers: Rhône", "utf-8")
    (tmp_path / "picture.bin").write_bytes(b"\0\1\2")

    async def steps(talk: Talk) -> None:
        await talk.pilot.press("at", *"no", "tab", *"sum", "enter")
        await talk.settled()
        assert talk.said[0][1] == "notes.txt:\n```\nrivers: Rhône\n```\n\n@notes.txt sum"
        await talk.write("@picture.bin")
        assert "no text file" in talk.told()
        await talk.ask("mail@me.org")
        assert talk.said[-2][1] == "mail@me.org"

    run(steps)


def test_files_with_spaces_are_completed_and_missing_ones_are_told(run: Any, tmp_path: Path) -> None:
    (tmp_path / "my notes").mkdir()
    (tmp_path / "my notes" / "the list.txt").write_text("milk and bread")

    async def steps(talk: Talk) -> None:
        await talk.pilot.press("@", "m", "y", "tab")
        assert talk.app.prompt.text == '@"my notes/'
        await talk.pilot.press("t", "h", "tab")
        assert talk.app.prompt.text == '@"my notes/the list.txt" '
        await talk.pilot.press(*"buy", "enter")
        await talk.settled()
        assert "milk and bread" in talk.said[0][1]
        assert talk.chat.session.shown_title == '@"my notes/the list.txt" buy'
        await talk.write("see @nothing.txt and me@home.org")
        assert "no file nothing.txt;" in talk.told()

    run(steps)


def test_control_c_stops_then_clears_then_leaves(run: Any) -> None:
    async def steps(talk: Talk) -> None:
        await talk.write("forever")
        await talk.until(lambda: talk.chat.session.tree.path[-1].tokens)
        await talk.pilot.press("ctrl+c")
        await talk.settled()
        assert talk.chat.session.tree.path[-1].finish_reason == "cancelled"
        talk.app._interrupted = 0.0
        talk.app.prompt.put("draft")
        await talk.pilot.press("ctrl+c")
        assert talk.app.prompt.text == "" and "once more" in talk.told()
        await talk.pilot.press("ctrl+c")

    assert run(steps).app.return_code == 130


@pytest.mark.parametrize("keys", [["ctrl+q"], ["ctrl+d"], ["slash", "q", "u", "i", "t", "enter", "enter"]])
def test_ways_to_leave(run: Any, keys: list[str]) -> None:
    async def steps(talk: Talk) -> None:
        await talk.pilot.press(*keys)

    assert run(steps).app.return_code == 0


# --- sessions, models, settings ---------------------------------------------------------------------------------------


def test_sessions_are_found_opened_renamed_and_deleted(run: Any) -> None:
    async def steps(talk: Talk) -> None:
        await talk.ask("river")
        await talk.pilot.press("ctrl+n")
        await talk.ask("mountains")
        await talk.pilot.press("ctrl+o")
        await talk.pilot.pause()
        assert isinstance(talk.app.screen, SessionsScreen) and len(talk.app.screen.found) == 2
        await talk.pilot.press(*"danube")
        await talk.pilot.pause()
        assert "Danube" in talk.screen_text()
        await talk.pilot.press("enter")
        await talk.pilot.pause()
        assert talk.said[0] == ("user", "river")
        await talk.pilot.press("ctrl+o", "ctrl+r", *"ABC", "enter")
        await talk.pilot.pause()
        assert "riverABC" in talk.screen_text() or "mountainsABC" in talk.screen_text()
        await talk.pilot.press("ctrl+x", "y")
        await talk.pilot.pause()
        assert len(talk.chat.store.summaries()) == 1
        await talk.pilot.press("escape")

    run(steps)


def test_the_chat_that_is_open_keeps_the_title_it_gets_in_the_list(run: Any) -> None:
    async def steps(talk: Talk) -> None:
        await talk.ask("river")
        await talk.pilot.press("ctrl+o")
        await talk.pilot.pause()
        await talk.pilot.press("ctrl+r", "ctrl+u", *"Waters", "enter")
        assert "Waters" in talk.screen_text()
        await talk.pilot.press("escape")
        await talk.ask("hello")
        talk.chat.writer.flush()
        assert talk.chat.store.summaries()[0].title == "Waters" == talk.chat.session.shown_title
        await talk.write("/rename")
        assert talk.chat.session.shown_title == "river" and "river" in talk.told()

    run(steps)


def test_a_full_disk_is_told_and_the_chat_goes_on(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    async def steps(talk: Talk) -> None:
        def full(*arguments: Any) -> None:
            raise FormatError("sessions.db: database or disk is full.", code="SESSION_WRITE")

        with monkeypatch.context() as patched:
            talk.chat.writer.failed = lambda error: talk.app.call_from_thread(talk.app.complain, error)
            for name in ("save", "add_prompt", "rename", "save_preset"):
                patched.setattr(talk.chat.store, name, full)
            await talk.ask("river")
            assert talk.app.prompt.text == "" and "The Danube" in talk.screen_text()
            await talk.until(lambda: "disk is full" in talk.told())
            await talk.pilot.press("ctrl+g", "s", *"calm", "enter")
            await talk.pilot.press("escape")
            await talk.write("/rename Waters")
            assert talk.chat.session.shown_title == "Waters"
        await talk.until(lambda: [s.title for s in talk.chat.store.summaries()] == ["Waters"])

    run(steps)


def test_what_the_model_has_read_is_kept_and_taken_back(run: Any, tmp_path: Path) -> None:
    async def steps(talk: Talk) -> None:
        await talk.ask("sort " * 200)
        node = talk.chat.session.tree.leaf
        assert node is not None
        session, n_tokens = talk.chat.session.id, len(tokens_of(talk.llm, talk.chat.session))
        await talk.pilot.press("ctrl+n")
        (file,) = (tmp_path / "kv").glob("*.kv")
        talk.app.open_session(session)
        assert talk.llm.restored == []  # nothing is read before it is needed
        await talk.ask("river")
        assert talk.llm.restored == [n_tokens]
        await talk.pilot.press("ctrl+n")
        file.write_bytes(b"damaged")
        talk.app.open_session(session)
        await talk.ask("river")
        assert "read anew" in talk.told() and talk.said[-1][1].startswith("The Danube")
        talk.chat.delete_session(session)
        assert not file.exists()

    run(steps)


def test_a_session_that_is_open_can_be_deleted(run: Any) -> None:
    async def steps(talk: Talk) -> None:
        await talk.ask("river")
        await talk.pilot.press("ctrl+o", "ctrl+x", "y", "escape")
        await talk.pilot.pause()
        assert talk.said == [] and talk.chat.store.summaries() == []
        await talk.ask("again")
        talk.chat.writer.flush()
        assert len(talk.chat.store.summaries()) == 1

    run(steps)


def test_chats_are_exported_and_imported(run: Any, tmp_path: Path) -> None:
    async def steps(talk: Talk) -> None:
        await talk.ask("river")
        await talk.write("/export")
        await talk.write("/export chat.json")
        await talk.pilot.press("ctrl+n")
        await talk.write("/import chat.json")
        assert talk.said[0][1] == "river"
        assert len(talk.chat.store.summaries()) == 2
        (tmp_path / "bad.json").write_text("{}")
        await talk.write("/import bad.json")
        assert "no session" in talk.told()

    run(steps)
    assert "The Danube" in (tmp_path / "river.md").read_text("utf-8")
    assert json.loads((tmp_path / "chat.json").read_text("utf-8"))["format"] == "edgellm-session"


def test_an_export_leaves_the_files_that_are_there(run: Any, tmp_path: Path) -> None:
    (tmp_path / "notes.md").write_text("mine")

    async def steps(talk: Talk) -> None:
        await talk.ask("river")
        await talk.write("/export notes.md")
        assert "another name" in talk.told() and (tmp_path / "notes.md").read_text() == "mine"

    run(steps)


def test_the_model_is_switched_and_the_conversation_stays(run: Any) -> None:
    async def steps(talk: Talk) -> None:
        await talk.ask("river")
        rows = [ModelRow("fake", True, 1, "one"), ModelRow("other", False, 2, "another")]
        from edgellm.tui import model_screen

        model_screen_rows = model_screen.model_rows
        model_screen.model_rows = lambda: rows
        try:
            await talk.pilot.press("ctrl+l")
            await talk.pilot.pause()
            assert isinstance(talk.app.screen, ModelScreen)
            await talk.pilot.press(*"oth", "enter")
        finally:
            model_screen.model_rows = model_screen_rows
        await talk.settled()
        assert [model.name for model in talk.models] == ["fake", "other"] and talk.models[0].closed
        await talk.ask("hello")
        assert len(talk.llm.requests[-1][0]) == 3 and talk.chat.session.model == "other"
        first = talk.chat.session.tree.path[1]
        talk.app.transcript.choose(first)
        assert first.model == "fake"
        with pytest.raises(Exception, match="fake"):
            talk.chat.branch(first, 0, first.tokens[0])

    run(steps)


def test_a_model_that_cannot_be_loaded_is_told_and_another_can_be_chosen(run: Any) -> None:
    async def steps(talk: Talk) -> None:
        talk.load_error = ModelNotFoundError("nothing: neither a file nor a model of the catalogue.")
        await talk.write("/model nothing")
        await talk.settled()
        assert "neither a file" in talk.told()
        assert talk.chat.model == "fake" and talk.chat.llm is talk.models[0] and not talk.models[0].closed
        await talk.ask("river")
        assert talk.said[-1][1].startswith("The Danube")
        talk.load_error = None
        await talk.write("/model other")
        await talk.settled()
        assert talk.chat.llm.name == "other" and talk.models[0].closed

    run(steps)


def test_a_model_that_fails_while_it_loads_brings_the_last_one_back(run: Any) -> None:
    async def steps(talk: Talk) -> None:
        load = talk.chat.load

        def failing(name: str, progress: Any = None, **options: Any) -> Any:
            if name == "broken":
                progress("load", 0, 2, name)  # the model before is closed here
                raise FormatError("broken.gguf ends in the middle.")
            return load(name, progress, **options)

        talk.chat.load = failing
        await talk.write("/model broken")
        await talk.settled()
        assert "ends in the middle" in talk.told() and talk.models[0].closed
        assert talk.chat.model == "fake" and talk.chat.llm is talk.models[1]

    run(steps)


def test_a_message_without_a_model_comes_back_with_the_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGELLM_HOME", str(tmp_path / "home"))
    talk = Talk(tmp_path)
    talk.load_error = ModelNotFoundError("no such model")

    async def steps() -> None:
        async with talk.app.run_test(size=(100, 30)) as talk.pilot:
            await talk.settled()
            talk.app.clear_notifications()
            await talk.write("river")
            await talk.settled()
            assert "no such model" in talk.told() and talk.app.prompt.text == "river" and not talk.chat.busy
            talk.load_error = None
            await talk.pilot.press("enter")
            await talk.settled()
            assert talk.said[-1][1].startswith("The Danube") and len(talk.chat.session.tree) == 2

    try:
        asyncio.run(steps())
    finally:
        talk.chat.close()


def test_escape_leaves_a_pull_and_keeps_the_model(run: Any) -> None:
    async def steps(talk: Talk) -> None:
        load, pulling, ended = talk.chat.load, threading.Event(), threading.Event()

        def far(name: str, progress: Any = None, **options: Any) -> Any:
            if name != "far":
                return load(name, progress, **options)
            try:
                for done in range(100_000):
                    progress("pull", done, 100_000, name)
                    pulling.set()
                    time.sleep(0.01)
            finally:
                ended.set()

        talk.chat.load = far
        await talk.write("/model far")
        await talk.until(pulling.is_set)
        await talk.write("river")
        await talk.pilot.press("escape")  # the message that waits for it comes back
        assert talk.app.prompt.text == "river" and "…" not in talk.screen_text() and talk.chat.loading is not None
        await talk.pilot.press("escape")
        await talk.until(ended.is_set)
        assert talk.chat.model == "fake" and talk.chat.llm is talk.models[0] and not talk.models[0].closed

    run(steps)


def test_a_message_may_be_sent_while_the_model_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGELLM_HOME", str(tmp_path / "home"))
    talk, ready = Talk(tmp_path), threading.Event()
    load = talk.chat.load

    def slowly(name: str, progress: Any = None, **options: Any) -> Any:
        progress("compile", 3, 12, "matmul")
        assert ready.wait(HANG_S)
        return load(name, progress, **options)

    talk.chat.load = slowly

    async def steps() -> None:
        async with talk.app.run_test(size=(100, 30)) as talk.pilot:
            await talk.until(lambda: "compiling kernels for your CPU 3/12" in talk.screen_text())
            await talk.write("river")
            assert "❯ river" in talk.screen_text() and talk.chat.busy
            ready.set()
            await talk.settled()
            assert talk.said[-1][1].startswith("The Danube")

    try:
        asyncio.run(steps())
    finally:
        talk.chat.close()


def test_settings_are_shown_changed_reset_and_saved_by_name(run: Any) -> None:
    async def steps(talk: Talk) -> None:
        await talk.pilot.press("ctrl+g")
        await talk.pilot.pause()
        screen = talk.app.screen
        assert isinstance(screen, SettingsScreen)
        names = [row.name for row in screen.rows]
        from textual.widgets import OptionList

        screen.query_one(OptionList).highlighted = names.index("temperature")
        await talk.pilot.press("enter", *"0.3", "enter")
        assert talk.chat.session.settings["temperature"] == 0.3
        await talk.pilot.press("enter", "backspace", "backspace", "backspace", *"hot", "enter")
        assert talk.chat.session.settings["temperature"] == 0.3 and "takes" in talk.told()
        assert any(row.name == "min_p" and row.source == "model file" for row in screen.rows)
        await talk.pilot.press("s", *"calm", "enter", "delete")
        assert "temperature" not in talk.chat.session.settings
        await talk.pilot.press("p", "enter")
        assert talk.chat.session.settings == {"temperature": 0.3}
        await talk.pilot.press("escape")
        await talk.write("/system Answer briefly.")
        await talk.ask("river")
        messages, options = talk.llm.requests[-1]
        assert messages[0] == {"role": "system", "content": "Answer briefly."} and options["temperature"] == 0.3

    run(steps)


def test_a_new_context_size_loads_the_model_again(run: Any) -> None:
    async def steps(talk: Talk) -> None:
        await talk.ask("river")
        await talk.write("/set n_ctx 512")
        await talk.settled()
        assert len(talk.models) == 2 and len(talk.said) == 2

    run(steps)


def test_every_command_is_in_the_help_and_the_palette(run: Any) -> None:
    async def steps(talk: Talk) -> None:
        await talk.pilot.press("question_mark")
        await talk.pilot.pause()
        assert isinstance(talk.app.screen, HelpScreen)
        await talk.pilot.press("escape")
        titles = [command.title for command in talk.app.get_system_commands(talk.app.screen)]
        for name in COMMANDS:
            assert any(title.startswith(f"/{name}") for title in titles)
        await talk.pilot.press("ctrl+p")
        await talk.pilot.pause()
        assert "Search" in talk.screen_text()

    run(steps)


def test_a_theme_is_kept(run: Any, tmp_path: Path) -> None:
    async def steps(talk: Talk) -> None:
        await talk.write("/theme edgellm-light")
        await talk.pilot.pause()

    run(steps)

    async def again(talk: Talk) -> None:
        assert talk.app.theme == "edgellm-light"

    run(again)


def test_the_meters_show_the_engines_figures(run: Any) -> None:
    async def steps(talk: Talk) -> None:
        await talk.ask("river")
        shown = str(talk.app.query_one(Meters).render())
        assert "45/4,096" in shown and "200 t/s" in shown and "21 reused + 13 read" in shown and "0.04 s" in shown

    run(steps)


@pytest.mark.parametrize("size", [(120, 40), (80, 24), (50, 20), (30, 10), (12, 4), (200, 60)])
def test_every_screen_fits_every_size(run: Any, size: tuple[int, int]) -> None:
    async def steps(talk: Talk) -> None:
        await talk.ask("sort")
        for key in ("ctrl+t", "ctrl+o", "ctrl+g", "f1", "ctrl+p"):
            await talk.pilot.press(key)
            await talk.pilot.pause()
            lines = talk.screen_text().splitlines()
            assert len(lines) <= size[1]
            await talk.pilot.press("escape")
            await talk.pilot.pause()
            assert not isinstance(talk.app.screen, Dialog)
        assert "❯" in talk.screen_text()

    run(steps, size)


def test_the_first_picture_needs_neither_numpy_nor_a_parser(tmp_path: Path) -> None:
    code = f"""
import asyncio, sys
from pathlib import Path
import edgellm.cli.chat, edgellm.tui.run
from edgellm.sessions import SessionStore
from edgellm.tui.app import ChatApp
from edgellm.tui.chat import Chat

def load(name, **options):
    raise OSError("no model here")

async def show():
    chat = Chat(SessionStore(Path({str(tmp_path)!r}) / "sessions.db"), load, "none")
    async with ChatApp(chat).run_test() as pilot:
        await pilot.press("a")
        assert pilot.app.prompt.text == "a"
    chat.close()

asyncio.run(show())
print([name for name in ("numpy", "numba", "pygments", "markdown_it", "edgellm.catalogue") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout == "[]\n", done.stdout + done.stderr
