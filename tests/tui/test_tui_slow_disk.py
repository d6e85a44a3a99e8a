"""The full-screen chat when a disk, a lock or another program is slow: the screen answers every key meanwhile."""

from __future__ import annotations

import os
import sqlite3
import threading
from pathlib import Path
from typing import Any

import pytest
from chat_talk import HANG_S, Talk

from edgellm.sessions import Session, SessionStore
from edgellm.tui import actions, app, aside, kept_state, model_screen
from edgellm.tui.aside import Aside
from edgellm.tui.model_screen import ModelScreen
from edgellm.tui.sessions_screen import SessionsScreen


class Gate:
    """A function that is slow until it may go on."""

    def __init__(self, what: Any) -> None:
        self.what = what
        self.reached, self.open = threading.Event(), threading.Event()
        self.n_calls = 0

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        self.n_calls += 1
        self.reached.set()
        assert threading.current_thread() is not threading.main_thread(), "on the screen's thread"
        assert self.open.wait(HANG_S)
        return self.what(*arguments, **options)


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes a function slow."""

    def make(owner: Any, name: str) -> Gate:
        gate = Gate(getattr(owner, name))
        monkeypatch.setattr(owner, name, gate)
        monkeypatch.setattr(aside, "BLINK_S", 0.001)
        return gate

    return make


async def can_write(talk: Talk) -> None:
    """The input takes letters."""
    await talk.pilot.press(*"abc")
    assert talk.app.prompt.text.endswith("abc")
    talk.app.prompt.put("")


def test_a_search_that_takes_long_leaves_the_keys(run: Any, slow: Any) -> None:
    async def steps(talk: Talk) -> None:
        await talk.ask("river")
        await talk.ask("mountains")
        await talk.pilot.press("ctrl+o")
        await talk.until(lambda: talk.app.screen.found)
        gate = slow(talk.chat.store, "search")
        await talk.pilot.press(*"danube")
        await talk.until(gate.reached.is_set)
        assert talk.app.screen.words == "danube" and "searching" in talk.screen_text()
        await talk.pilot.press("enter")  # for what is found
        gate.open.set()
        await talk.until(lambda: len(talk.app.screen_stack) == 1)
        assert gate.n_calls <= 3  # the words between were never searched
        await talk.pilot.press("ctrl+o", *"zz", "escape")  # and one that is left behind
        await talk.until(lambda: len(talk.app.screen_stack) == 1)
        await can_write(talk)

    run(steps)


@pytest.mark.parametrize(
    ("owner", "name", "line", "done"),
    [
        (SessionStore, "load", None, lambda talk: talk.said[0] == ("user", "river")),
        (SessionStore, "delete", None, lambda talk: len(talk.chat.store.summaries()) == 1),
        (actions, "exported", "/export x.md", lambda talk: Path("x.md").exists()),
        (actions, "from_json", "/import x.json", lambda talk: talk.said == [("user", "imported")]),
        (app, "file_names", "@fi", lambda talk: "file.txt" in talk.screen_text()),
        (app, "with_files", "@file.txt say", lambda talk: talk.said[-2][1].startswith("file.txt:")),
        (app, "into_tmux", "/copy", lambda talk: True),
        (model_screen, "model_rows", "/model", lambda talk: isinstance(talk.app.screen, ModelScreen)),
        (SessionStore, "save_preset", None, lambda talk: talk.chat.store.presets()),
        (SessionStore, "save_preference", "/theme nord", lambda talk: talk.chat.store.preferences()),
        (kept_state, "keep", "/new", lambda talk: talk.said == []),
    ],
)
def test_what_takes_long_leaves_the_keys(
    run: Any, slow: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, line: str, done: Any
) -> None:
    (tmp_path / "x.json").write_text('[{"role": "user", "content": "imported"}]')
    (tmp_path / "file.txt").write_text("of a file")
    monkeypatch.setattr(app, "in_tmux", lambda: True)

    async def steps(talk: Talk) -> None:
        await talk.ask("river")
        first = talk.chat.session.id
        await talk.pilot.press("ctrl+n")
        await talk.ask("hello")
        gate = slow(talk.chat.store if owner is SessionStore else owner, name)
        if line is None:
            acts = {
                "load": lambda: talk.app.open_session(first),
                "delete": lambda: talk.app.aside.in_order(talk.chat.delete_session(first)),
                "save_preset": lambda: talk.app.save_preset("calm"),
            }
            acts[name]()
        elif line == "@fi":
            await talk.pilot.press(*line)
        else:
            await talk.write(line)
        await talk.until(gate.reached.is_set)
        if line != "@fi":
            await can_write(talk)
        gate.open.set()
        await talk.until(lambda: done(talk))

    run(steps)


def test_a_message_whose_files_are_read_can_be_taken_back(run: Any, slow: Any, tmp_path: Path) -> None:
    (tmp_path / "file.txt").write_text("of a file")

    async def steps(talk: Talk) -> None:
        gate = slow(app, "with_files")
        await talk.write("@file.txt one")
        await talk.write("two")
        assert talk.app.prompt.text == "two" and "being read" in talk.told()
        talk.app.prompt.put("")
        await talk.pilot.press("escape")
        assert talk.app.prompt.text == "@file.txt one" and talk.said == []
        gate.open.set()
        await talk.pilot.press("enter")
        await talk.until(lambda: len(talk.said) == 2 and not talk.chat.busy)
        assert talk.said[0][1].startswith("file.txt:")

    run(steps)


def test_a_sessions_file_that_another_program_holds_leaves_the_keys(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    async def steps(talk: Talk) -> None:
        await talk.ask("river")
        talk.chat.writer.flush()
        other = sqlite3.connect(talk.chat.store.path, isolation_level=None)
        other.execute("begin immediate")
        monkeypatch.setattr(aside, "BLINK_S", 0.001)
        try:
            await talk.ask("hello")
            await talk.write("/rename Waters")
            await talk.pilot.press("ctrl+o")
            await talk.until(lambda: isinstance(talk.app.screen, SessionsScreen) and talk.app.screen.found)
            await talk.pilot.press("escape")
            await can_write(talk)
        finally:
            other.execute("rollback")
            other.close()
        await talk.until(lambda: [s.title for s in talk.chat.store.summaries()] == ["Waters"])

    run(steps)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no named pipes")
def test_a_named_pipe_is_no_text_file(run: Any, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")

    async def steps(talk: Talk) -> None:
        await talk.write("/import pipe")
        await talk.write("@pipe say")
        await talk.settled()
        await can_write(talk)

    run(steps)


def test_the_newest_of_a_kind_counts_and_the_others_never_begin(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aside, "BLINK_S", 0.001)
    calls: list[Any] = []
    beside = Aside(lambda function, *arguments: calls.append((function, arguments)), lambda error: None)
    begun, told, gate = [], [], threading.Event()

    def work(number: int) -> Any:
        def slowly(unwanted: Any) -> int:
            begun.append(number)
            gate.wait(HANG_S)
            return number

        return slowly

    for number in range(5):
        beside.newest("kind", work(number), told.append)
    gate.set()
    while told != [4]:
        while calls:
            function, arguments = calls.pop(0)
            function(*arguments)
    assert begun == [0, 4]


def test_what_is_asked_for_in_order_is_done_in_order_and_before_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aside, "BLINK_S", 0.001)
    done: list[int] = []
    beside = Aside(lambda function, *arguments: None, lambda error: None)
    gate = threading.Event()
    beside.in_order(lambda: gate.wait(HANG_S))
    for number in range(20):
        beside.in_order(lambda number=number: done.append(number))  # type: ignore[misc]
    gate.set()
    beside.wait(HANG_S)
    assert done == list(range(20))


def test_sessions_are_read_while_they_are_written(tmp_path: Path) -> None:
    store = SessionStore(tmp_path / "sessions.db")
    session = Session(model="m")
    session.tree.add("user", "river", None, finish_reason="stop")
    with store.transaction():
        store.save_all(session)
        assert store.summaries() == []  # what is not committed is not there
    assert len(store.summaries()) == 1
    store.close()
