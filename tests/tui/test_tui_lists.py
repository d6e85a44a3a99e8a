"""The full-screen chat: sessions, models, settings, and what is told of them."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path
from typing import Any

import pytest
from chat_talk import HANG_S, Talk

from edgellm.formats.errors import FormatError, ModelNotFoundError
from edgellm.tui.app import ChatApp
from edgellm.tui.commands import COMMANDS
from edgellm.tui.dialog import Dialog
from edgellm.tui.help_screen import HelpScreen
from edgellm.tui.kept_state import tokens_of
from edgellm.tui.meters import Meters
from edgellm.tui.model_screen import ModelRow, ModelScreen, model_rows
from edgellm.tui.run import Start, run_chat
from edgellm.tui.sessions_screen import SessionsScreen
from edgellm.tui.settings_screen import SettingsScreen

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
        talk.chat.delete_session(session)()
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
        talk.chat.writer.flush()
        assert len(talk.chat.store.summaries()) == 2
        (tmp_path / "bad.json").write_text("{}")
        await talk.write("/import bad.json")
        assert "no session" in talk.told()

    run(steps)
    assert "The Danube" in (tmp_path / "river.md").read_text("utf-8")
    assert json.loads((tmp_path / "chat.json").read_text("utf-8"))["format"] == "edgellm-session"


@pytest.mark.parametrize("imports", [True, False])
def test_a_chat_that_comes_or_goes_ends_the_editing_of_a_message(run: Any, imports: bool) -> None:
    async def steps(talk: Talk) -> None:
        await talk.ask("river")
        await talk.write("/export chat.json")
        talk.chat.writer.flush()
        await talk.write("/edit")
        assert talk.app.editing is not None
        if imports:
            talk.app.send("/import chat.json")
        else:
            await talk.pilot.press("ctrl+o", "ctrl+x", "y", "escape")
        await talk.pilot.pause()
        await talk.until(lambda: talk.app.editing is None)

    run(steps)


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
            await talk.until(lambda: not isinstance(talk.app.screen, Dialog))
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
heavy = ("numpy", "numba", "pygments", "markdown_it", "edgellm.store.catalogue")
print([name for name in heavy if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout == "[]\n", done.stdout + done.stderr


def test_a_warning_on_the_way_is_told_on_the_screen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[tuple[Any, ...]] = []

    def run(app: ChatApp) -> int:
        warnings.warn("kernels cannot be kept", RuntimeWarning, stacklevel=1)
        return 0

    monkeypatch.setenv("EDGELLM_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(ChatApp, "run", run)
    monkeypatch.setattr(ChatApp, "call_later", lambda app, call, *given: told.append((call.__name__, *given)))
    before = warnings.showwarning
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        assert run_chat(Start()) == 0
    assert told == [("warn", ["kernels cannot be kept"], "Warning")]
    assert warnings.showwarning == before


def test_a_link_that_leads_nowhere_keeps_no_list_of_models_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EDGELLM_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "gone.gguf").symlink_to(tmp_path / "nowhere")
    (tmp_path / "here.gguf").write_bytes(b"GGUF")
    names = [row.name for row in model_rows()]
    assert "here.gguf" in names and "gone.gguf" not in names
