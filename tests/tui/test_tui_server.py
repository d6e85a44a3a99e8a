"""The full-screen chat as a client of a server: the same keys, other models."""

from __future__ import annotations

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
