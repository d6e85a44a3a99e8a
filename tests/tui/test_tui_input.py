"""The full-screen chat: the mouse, the input, its keys and commands, and ways to leave."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
from chat_talk import Talk, styles_of
from textual import events
from textual.widgets import Input

from edgellm.tui.commands import COMMANDS
from edgellm.tui.completions import Completions
from edgellm.tui.meters import Meters
from edgellm.tui.sessions_screen import SessionsScreen
from edgellm.tui.transcript import Transcript

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
        assert "Text was expected" in talk.told()
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


@pytest.mark.parametrize("path", ["~nosuchuser/x.md", "~nosuchuser/", "n" * 300, "a\0b"])
def test_a_path_that_can_be_none_is_told_and_the_chat_goes_on(run: Any, path: str) -> None:
    async def steps(talk: Talk) -> None:
        await talk.ask(f"see @{path} here")
        assert f"see @{path} here" in talk.said[0][1]
        for command in ("/export", "/import"):
            talk.app.clear_notifications()
            await talk.write(f"{command} {path}")
            assert talk.told(), command
        talk.app.prompt.text = ""
        await talk.pilot.press("@", *"~nosuchuser/x", "tab")
        await talk.ask("river")

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
