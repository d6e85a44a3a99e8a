"""The full-screen chat as a client of a server: the same keys, other models."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from chat_talk import Talk
from scripted_executor import scripted_llm, tokenizer_metadata
from served import served
from server_client import scripted_server
from tool_template import TOOL_TEMPLATE

from edgellm.remote.model import RemoteServer
from edgellm.sessions import SessionStore
from edgellm.tui.token_screen import TokenScreen

HANG_S = 60
KEY = "a-key-that-nobody-sees"


@pytest.fixture(autouse=True, scope="module")
def _tokenizer() -> None:
    tokenizer_metadata()  # from the user's models, before a chat has a home of its own


def remote_talk(monkeypatch: pytest.MonkeyPatch, run: Any, url: str, steps: Any, **options: Any) -> Talk:
    server = RemoteServer(url, KEY)
    monkeypatch.setattr(Talk, "load", lambda self, name, progress=None, **more: server.open(name, progress))
    talk: Talk = run(steps, model=server.first(), server=server, **options)
    return talk


def test_a_chat_with_a_server_streams_thinks_branches_goes_on_and_is_saved(
    run: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    llm = scripted_llm(["<think>\nHm.\n</think>\n\nThe Danube.", "The Rhine.", " It flows.", "Again."], TOOL_TEMPLATE)

    async def steps(talk: Talk) -> None:
        text = talk.screen_text()
        assert "It goes to 127.0.0.1" in text and "stays on this machine" not in text
        await talk.ask("Which river?")
        text = talk.screen_text()
        assert "thought · 1 words" in text and "The Danube." in text and "/8,192" in text
        assert "t/s" in text and talk.chat.session.model == f"scripted@{talk.chat.server.authority}"  # type: ignore[union-attr]
        await talk.pilot.press("ctrl+r")
        await talk.settled()
        assert "The Rhine." in talk.screen_text() and "‹ 2/2 ›" in talk.screen_text()
        await talk.pilot.press("ctrl+t")
        await talk.pilot.pause()
        assert isinstance(talk.app.screen, TokenScreen) and "token 1 of" in talk.screen_text()
        await talk.pilot.press("right", "down", "enter")
        await talk.settled()
        assert talk.said[-1][1].startswith("The") and "‹ 3/3 ›" in talk.screen_text()
        await talk.pilot.press("ctrl+l")
        await talk.until(lambda: "Models of the server" in talk.screen_text())
        await talk.pilot.press("escape")
        await talk.write("/set n_ctx 100")
        assert "is the server's" in talk.told()

    with served(scripted_server(llm)) as url:
        remote_talk(monkeypatch, run, url, steps)
    for path in tmp_path.rglob("*"):
        assert not path.is_file() or KEY.encode() not in path.read_bytes(), path
    store = SessionStore(tmp_path / "sessions.db")
    assert len(store.load(store.last_id() or 0).tree) == 4
    store.close()


def test_a_server_that_goes_away_is_told_and_what_it_said_stays(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from stand_in_server import delta, stand_in

    with stand_in() as server:
        server.streams(delta("The Danube"))

        async def steps(talk: Talk) -> None:
            await talk.ask("Which river?")
            assert talk.said[-1] == ("assistant", "The Danube") and "stopped" in talk.screen_text()
            assert "was lost" in talk.told()
            server.streams(delta(" flows.", "stop"))
            await talk.write("/continue")
            await talk.settled()
            assert talk.said[-1] == ("assistant", "The Danube flows.")
            assert server.asked[-1][1]["messages"][-1] == {"role": "assistant", "content": "The Danube"}

        remote_talk(monkeypatch, run, server.url, steps)


def test_escape_stops_the_server(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    llm = scripted_llm(lambda prompt: "on and " * 2000)
    llm.engine.executor.pause_s = 0.01  # type: ignore[attr-defined]
    server = scripted_server(llm)

    async def steps(talk: Talk) -> None:
        await talk.write("Go on.")
        await talk.until(lambda: talk.chat.session.tree.path[-1].text)
        await talk.pilot.press("escape")
        await talk.settled()
        node = talk.chat.session.tree.path[-1]
        assert node.finish_reason == "cancelled" and node.text.startswith("on and")
        await talk.until(lambda: not server.active)

    with served(server) as url:
        remote_talk(monkeypatch, run, url, steps)


def test_escape_stops_while_a_long_chat_is_counted(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from stand_in_server import Say, delta, stand_in

    with stand_in() as server:
        counted, silent = threading.Event(), threading.Event()

        def wait(say: Say) -> None:
            counted.set()
            silent.wait(HANG_S)

        server.replies |= {
            "/props": (200, {"default_generation_settings": {"n_ctx": 64}}),
            "/apply-template": (200, wait),
        }

        async def steps(talk: Talk) -> None:
            await talk.write("Which river?")
            await talk.until(counted.is_set)
            await talk.pilot.press("escape")
            await talk.settled()
            assert not silent.is_set() and not talk.told() and talk.app.prompt.text == "Which river?"
            silent.set()
            server.replies["/apply-template"] = (200, {"prompt": "x"})
            server.replies["/tokenize"] = (200, {"tokens": [1]})
            server.streams(delta("The Danube.", "stop"))
            await talk.pilot.press("enter")
            await talk.settled()
            assert talk.said == [("user", "Which river?"), ("assistant", "The Danube.")]

        remote_talk(monkeypatch, run, server.url, steps)


def test_an_answer_that_does_not_end_is_left_and_touches_its_message_no_more(
    run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from stand_in_server import delta, stand_in

    with stand_in() as server:
        server.streams(delta("The Danube", "stop"))
        deaf = threading.Event()

        async def steps(talk: Talk) -> None:
            await talk.until(lambda: talk.chat.llm is not None)
            stream = talk.chat.llm.stream

            def endless(*arguments: Any, cancel: Any, **options: Any) -> Iterator[Any]:
                for chunk in stream(*arguments, **options):
                    yield chunk
                    deaf.wait(HANG_S)

            monkeypatch.setattr(talk.chat.llm, "stream", endless)
            await talk.write("Which river?")
            await talk.until(lambda: talk.chat.session.tree.path[-1].text)
            answering = talk.chat.answering
            assert answering is not None
            talk.chat.halt()
            node = talk.chat.session.tree.path[-1]
            assert not talk.chat.busy and node.text == "The Danube" and node.finish_reason == "cancelled"
            monkeypatch.setattr(talk.chat.llm, "stream", stream)
            server.streams(delta(" flows.", "stop"))
            await talk.write("/continue")
            await talk.settled()
            deaf.set()
            answering.wait(HANG_S)
            assert (node.text, node.finish_reason) == ("The Danube flows.", "stop")

        remote_talk(monkeypatch, run, server.url, steps)
