"""Searching the chats: what is found of them, in which time, and that reading waits for nobody who writes."""

from __future__ import annotations

import sqlite3
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from edgellm.sessions import Session, SessionStore
from edgellm.sessions.search import excerpt


@pytest.fixture
def store(tmp_path: Path) -> Any:
    opened = SessionStore(tmp_path / "sessions.db")
    yield opened
    opened.close()


def test_a_search_takes_no_longer_than_its_text(store: SessionStore) -> None:
    """SQLite's own excerpts took the square of a message's length: hours for this one."""
    session = Session(model="m")
    session.tree.add("user", "normal start of text " * 300_000, None, finish_reason="stop")
    session.tree.add("user", "söng " * 300_000 + " last", None, finish_reason="stop")
    store.save_all(session)
    begun = time.monotonic()
    for words in ("s", "st", "start of", "song", "last", "nothing", "s " * 10_000, "s" * 100_000):
        store.search(words)
    assert time.monotonic() - begun < 60
    assert [hit.excerpt[:12] for hit in store.search("song")] == ["söng söng sö"]
    assert len(store.search("last")) == 1  # beyond what is looked at for the excerpt


@pytest.mark.parametrize("indexed", [True, False])
def test_a_search_that_nobody_wants_any_more_ends_with_nothing(store: SessionStore, indexed: bool) -> None:
    session = Session(model="m")
    for i in range(300):
        session.tree.add("user", f"river {i}", None, finish_reason="stop")
    store.save_all(session)
    store._indexed = indexed
    asked = iter([False, True])
    assert store.search("river", unwanted=lambda: next(asked, True)) == []
    assert len(store.search("river", limit=400, unwanted=lambda: False)) == 300


@pytest.mark.parametrize(
    ("text", "words", "found"),
    [
        ("The Danube flows.", ["danube"], "The Danube flows."),
        ("a " * 100 + "Zürich is  \n a town", ["zurich"], "…a a a a a a a a a a a a a a Zürich is a town"),
        ("a " * 100 + "Danube " + "b " * 200, ["dan"], "…a a a a a a a a a a a a a a Danube " + "b " * 62 + "b…"),
        ("x" * 500 + " y", ["y"], "…" + "x" * 29 + " y"),
        ("nothing of it " * 20, ["river"], ("nothing of it " * 20)[:160].strip() + "…"),
        ("", ["river"], ""),
        ("İİİ ﬁsh", ["fish"], "İİİ ﬁsh"),
    ],
)
def test_an_excerpt_shows_the_words_around_the_first_hit(text: str, words: list[str], found: str) -> None:
    assert excerpt(text, words) == found


def test_readers_do_not_wait_for_a_writer(store: SessionStore) -> None:
    session = Session(model="m")
    session.tree.add("user", "river", None, finish_reason="stop")
    store.save_all(session)
    other = sqlite3.connect(store.path, isolation_level=None)
    other.execute("begin immediate")  # another program writes
    writer = threading.Thread(target=store.rename, args=(session.id, "Waters"))
    writer.start()
    try:
        time.sleep(0.05)
        assert len(store.search("river")) == len(store.summaries()) == 1 and store.load(session.id).tree.path
        assert writer.is_alive()  # still waiting
    finally:
        other.execute("rollback")
        other.close()
        writer.join()
