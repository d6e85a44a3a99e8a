"""The full-screen chat's dialogs: one at a time, each closed once, and the keys of the chat wait meanwhile."""

from __future__ import annotations

import asyncio
import contextlib
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from chat_talk import Talk
from textual import events
from textual.widgets import OptionList

from edgellm.context_overflow import ChatTooLongError
from edgellm.sessions import SessionStore
from edgellm.tui import model_screen
from edgellm.tui.app import ChatApp
from edgellm.tui.dialog import ConfirmDialog, LineDialog
from edgellm.tui.long_chat_dialog import LongChatDialog
from edgellm.tui.model_screen import ModelRow, ModelScreen
from edgellm.tui.screen_rules import Palette
from edgellm.tui.sessions_screen import SessionsScreen
from edgellm.tui.token_screen import TokenScreen

OPENING = ("ctrl+p", "ctrl+o", "ctrl+l", "ctrl+g", "ctrl+t", "f1")
KEYS = sorted({key for binding in ChatApp.BINDINGS for key in binding.key.split(",")} - {"ctrl+c", "ctrl+q", "ctrl+z"})  # type: ignore[union-attr]


@pytest.fixture(autouse=True)
def few_models(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [ModelRow("fake", True, 1, "one"), ModelRow("other", True, 2, "another")]
    monkeypatch.setattr(model_screen, "model_rows", lambda: rows)


def at_once(talk: Talk, *keys: str) -> None:
    for key in keys:
        talk.app.post_message(events.Key(key, key if len(key) == 1 else None))


@pytest.mark.parametrize("first", OPENING)
def test_keys_of_the_chat_wait_while_a_dialog_is_open(run: Any, first: str) -> None:
    async def steps(talk: Talk) -> None:
        await talk.ask("river")
        said = list(talk.said)
        await talk.pilot.press(first)
        await talk.until(lambda: len(talk.app.screen_stack) == 2)
        opened = talk.app.screen
        for key in KEYS:
            if key not in ("escape", first) and not (key == "ctrl+r" and isinstance(opened, SessionsScreen)):
                await talk.pilot.press(key)
                assert talk.app.screen_stack[1:] == [opened], key
        await talk.pilot.press("escape")
        await talk.until(lambda: len(talk.app.screen_stack) == 1)
        assert talk.said == said and not talk.chat.busy

    run(steps)


def test_keys_that_come_at_once_open_one_thing(run: Any) -> None:
    async def steps(talk: Talk) -> None:
        await talk.ask("river")
        for keys in [*product(OPENING, OPENING), ("ctrl+p", "ctrl+g", "ctrl+p", "ctrl+o", "ctrl+g")]:
            at_once(talk, *keys)
            await talk.pilot.pause()
            await talk.pilot.pause()
            assert len(talk.app.screen_stack) <= 2, keys
            while len(talk.app.screen_stack) > 1:  # on a busy machine it opens behind the first Escape
                await talk.pilot.press("escape")
        for _ in range(50):  # or behind the last one, and takes the key
            while len(talk.app.screen_stack) > 1:
                await talk.pilot.press("escape")
            if not talk.app.prompt.text:
                await talk.pilot.press("x")
        assert talk.app.prompt.text == "x"

    run(steps)


@pytest.mark.parametrize("n_clicks", [2, 3])
@pytest.mark.parametrize("key", ["ctrl+o", "ctrl+l", "ctrl+g", "ctrl+p"])
def test_several_clicks_on_a_list_choose_once(run: Any, key: str, n_clicks: int) -> None:
    async def steps(talk: Talk) -> None:
        await talk.ask("river")
        await talk.pilot.press(key)
        await talk.until(lambda: len(talk.app.screen_stack) == 2 and talk.app.screen.query(OptionList))
        await talk.pilot.pause(0.3)  # the palette gathers
        await talk.pilot.click(OptionList, offset=(4, 0), times=n_clicks)
        await talk.pilot.pause()
        await talk.settled()
        assert len(talk.app.screen_stack) == (3 if key == "ctrl+g" else 1) or key == "ctrl+p"
        while len(talk.app.screen_stack) > 1:
            await talk.pilot.press("escape")
        await talk.pilot.press("x")
        assert talk.app.prompt.text == "x"

    run(steps)


def test_a_screen_that_is_closed_closes_nothing_else(run: Any) -> None:
    async def steps(talk: Talk) -> None:
        await talk.ask("river")
        given: list[Any] = []
        for screen in (LineDialog("A line"), ConfirmDialog("Sure?"), ModelScreen([], "fake")):
            talk.app.push_screen(screen, given.append)
            await talk.pilot.pause()
            screen.dismiss("one")  # type: ignore[arg-type]
            screen.dismiss("two")  # type: ignore[arg-type]
            await talk.pilot.pause()
            assert given.pop() == "one" and not given and len(talk.app.screen_stack) == 1
        under, over = LineDialog("A line"), ConfirmDialog("Sure?")
        talk.app.push_screen(under, given.append)
        talk.app.push_screen(over, given.append)
        under.dismiss("early")
        assert talk.app.screen is over and not given

    run(steps)


def test_the_token_view_branches_once_however_often_it_is_clicked(run: Any) -> None:
    async def steps(talk: Talk) -> None:
        await talk.ask("river")
        await talk.pilot.press("ctrl+t")
        await talk.until(lambda: isinstance(talk.app.screen, TokenScreen))
        await talk.pilot.pause()
        await talk.pilot.click("#alternatives", offset=(6, 6), times=3)
        await talk.settled()
        assert len(talk.app.screen_stack) == 1
        assert len(talk.chat.session.tree.roots[0].children) == 2

    run(steps)


def test_the_key_that_opens_a_page_closes_it(run: Any) -> None:
    async def steps(talk: Talk) -> None:
        await talk.ask("river")
        for key, heading in (("f1", "Keys and commands"), ("ctrl+t", "0.94 bits each")):
            await talk.pilot.press(key)
            await talk.until(lambda: len(talk.app.screen_stack) == 2 and heading in talk.screen_text())  # noqa: B023
            await talk.pilot.press(key)
            await talk.until(lambda: len(talk.app.screen_stack) == 1 and heading not in talk.screen_text())  # noqa: B023

    run(steps)


ROWS = {  # that stand in each list, wherever it is scrolled to
    "ctrl+p": "Sampling, context",
    "ctrl+o": "2 messages",
    "ctrl+l": "another",
    "ctrl+g": "Tokens of context",
    "ctrl+t": "2 of 11",
    "f1": "Edit a message of yours",
    "/": "Leave; everything is saved.",
}


@pytest.mark.parametrize("key", [*OPENING, "/"])
def test_lists_may_be_open_in_a_terminal_that_has_no_room_for_a_row(run: Any, key: str) -> None:
    async def steps(talk: Talk) -> None:
        await talk.ask("river")
        await talk.pilot.press(key)
        await talk.until(lambda: key == "/" or (len(talk.app.screen_stack) == 2 and talk.app.screen.query("*")))
        await talk.pilot.pause(0.3)  # the palette gathers
        opened = talk.app.screen_stack[:]
        for width, height in ((1, 20), (6, 20), (4, 1)):
            await talk.pilot.resize_terminal(width, height)
            await talk.pilot.press("pageup", "pagedown", "down")
        await talk.pilot.resize_terminal(100, 30)
        await talk.until(lambda: ROWS[key] in talk.screen_text())
        assert talk.app.screen_stack == opened
        await talk.pilot.press("escape", "escape")
        await talk.until(lambda: len(talk.app.screen_stack) == 1)
        await talk.until(lambda: "The Danube flows" in talk.screen_text() and ROWS[key] not in talk.screen_text())

    run(steps)


def open_all(app: ChatApp) -> None:
    """One of each kind, over each other: ``ScreenRules`` lets the application do that, and the user one alone."""
    for verb in ("command_palette", "chats", "models", "settings", "tokens", "keys"):
        getattr(app, f"action_{verb}")()
    for screen in (ModelScreen([], "fake"), LineDialog("A line"), ConfirmDialog("Sure?")):
        app.push_screen(screen)
    app.push_screen(LongChatDialog(ChatTooLongError(900, 512, 2, 300), summary=True))
    assert len({type(screen) for screen in app.screen_stack}) == 10


@pytest.mark.parametrize("n_turns", range(3))
@pytest.mark.parametrize("way", ["the terminal goes", "leave", "close"])
def test_a_dialog_may_be_closed_at_any_moment_while_it_opens(run: Any, tmp_path: Path, way: str, n_turns: int) -> None:
    """Textual composes nothing on a screen that goes, and tells it all the same that it is there."""

    async def steps(talk: Talk) -> None:
        await talk.ask("river")
        open_all(talk.app)
        for _ in range(n_turns):  # of the event loop
            await asyncio.sleep(0)
        if way == "leave":
            talk.app.action_leave()
        elif way == "close":
            while len(talk.app.screen_stack) > 1:
                screen = talk.app.screen
                screen._action_escape() if isinstance(screen, Palette) else screen.dismiss()
            await talk.pilot.press("x")
            assert talk.app.prompt.text == "x" and "The Danube flows" in talk.screen_text()

    talk = run(steps)
    assert talk.app.return_code == (0 if way == "leave" else None)
    with contextlib.closing(SessionStore(tmp_path / "sessions.db")) as store:
        assert [node.text for node in store.load(store.last_id()).tree.path] == [text for _, text in talk.said]


def test_chats_that_are_written_while_their_list_opens_are_found(run: Any) -> None:
    async def steps(talk: Talk) -> None:
        await talk.ask("river")
        talk.chat.writer.flush()
        for n_turns in range(4):
            screen = SessionsScreen(talk.chat.store, 0, talk.app.rename_session)
            talk.app.push_screen(screen)
            for _ in range(n_turns):
                await asyncio.sleep(0)
            screen.refill_if_open()
            await talk.until(lambda: screen.found and screen.list.option_count == 1)  # noqa: B023
            await talk.pilot.press("escape")
            await talk.until(lambda: len(talk.app.screen_stack) == 1)

    run(steps)
