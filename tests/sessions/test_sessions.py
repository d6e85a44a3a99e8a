"""Sessions: the tree of messages, the file that keeps it through kill -9 and damage, and the ways in and out of it."""

from __future__ import annotations

import errno
import json
import os
import signal
import sqlite3
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgellm.formats.errors import FormatError, ParameterError
from edgellm.generation import TokenLogprob
from edgellm.sessions import (
    Session,
    SessionStore,
    SessionWriter,
    from_json,
    open_store,
    to_json,
    to_markdown,
    write_session,
)
from edgellm.sessions.rescue import rescue
from edgellm.sessions.token_records import pack, unpack
from edgellm.sessions.tree import MessageTree, prompt_messages, title_of

OTHER = TokenLogprob(5, b"\xff\x00", -2.25, (), None, "min_p")
TOKEN = TokenLogprob(7, "é".encode(), -0.5, (TokenLogprob(7, "é".encode(), -0.5, (), -0.25, None), OTHER), -0.25, None)


@pytest.fixture
def store(tmp_path: Path) -> Any:
    opened = SessionStore(tmp_path / "sessions.db")
    yield opened
    opened.close()


def talk() -> Session:
    """Two answers to one question, the second with a second question behind it."""
    session = Session(model="tiny", system="Be nice.", settings={"temperature": 0.5})
    question = session.tree.add("user", "Name a river, café style.")
    session.tree.add("assistant", "The Rhine.", question, finish_reason="stop", tokens=[TOKEN], model="tiny")
    second = session.tree.add("assistant", "<think>\nhm\n</think>\n\nThe *Danube*.", question, finish_reason="length")
    session.tree.add("user", "More?", second)
    return session


def shape(session: Session) -> list[Any]:
    """All of a session that must survive, without ids."""
    nodes = list(session.tree)
    place = {None: None} | {node: number for number, node in enumerate(nodes)}
    rows = [(place[n.parent], n.role, n.text, n.model, n.finish_reason, n.tokens, n.timings) for n in nodes]
    return [session.title, session.model, session.system, session.settings, place[session.tree.leaf], rows]


# --- the tree ---------------------------------------------------------------------------------------------------------


def test_a_branch_is_read_where_it_was_left() -> None:
    tree = MessageTree()
    question = tree.add("user", "q")
    first = tree.add("assistant", "a1", question)
    deep = tree.add("user", "q2", first)
    second = tree.add("assistant", "a2", question)
    assert [node.text for node in tree.path] == ["q", "a2"]
    assert tree.turn(second, 1) is first
    assert tree.leaf is deep
    assert tree.turn(first, -1) is second
    assert tree.path == [question, second]


def test_cutting_a_message_reads_its_sibling_or_else_its_parent() -> None:
    tree = MessageTree()
    question = tree.add("user", "q")
    first, second = tree.add("assistant", "a1", question), tree.add("assistant", "a2", question)
    tree.cut(second)
    assert tree.leaf is first
    tree.cut(first)
    assert tree.leaf is question and not question.children
    tree.cut(question)
    assert tree.leaf is None and len(tree) == 0


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("hello", ("", "hello")),
        ("<think>a\nb</think>\n\nc", ("a\nb", "c")),
        ("<think>a", ("a", "")),
        ("a</think>c", ("a", "c")),
        ("x <think> y", ("", "x <think> y")),
        ("", ("", "")),
    ],
)
def test_a_thinking_part_is_told_from_what_was_said(text: str, parts: tuple[str, str]) -> None:
    tree = MessageTree()
    assert tree.add("assistant", text).parts() == parts


def test_a_model_is_told_the_branch_with_thoughts_apart() -> None:
    session = talk()
    assert prompt_messages(session.system, session.tree.path) == [
        {"role": "system", "content": "Be nice."},
        {"role": "user", "content": "Name a river, café style."},
        {"role": "assistant", "content": "The *Danube*.", "reasoning_content": "hm"},
        {"role": "user", "content": "More?"},
    ]


def test_a_title_is_one_short_line() -> None:
    assert title_of("  a\n b ") == "a b"
    assert len(title_of("x" * 500)) == 60


# --- the store --------------------------------------------------------------------------------------------------------


def test_a_session_comes_back_as_it_was(store: SessionStore) -> None:
    session = talk()
    store.save_all(session)
    again = store.load(session.id)
    assert shape(again) == shape(session)
    assert [node.id for node in again.tree] == [node.id for node in session.tree]


def test_the_file_is_for_the_user_alone(store: SessionStore) -> None:
    assert store.path.stat().st_mode & 0o077 == 0


def test_the_list_shows_the_last_changed_first_and_titles(store: SessionStore) -> None:
    one, two = talk(), talk()
    store.save_all(one)
    store.save_all(two)
    store.save_message(one, one.tree.add("user", "again", one.tree.leaf))
    store.save(one)
    store.rename(two.id, "Rivers\nof Europe")
    listed = store.summaries()
    assert [summary.id for summary in listed] == [one.id, two.id]
    assert [summary.title for summary in listed] == ["Name a river, café style.", "Rivers of Europe"]
    assert [summary.n_messages for summary in listed] == [5, 4]
    assert store.last_id() == one.id


@pytest.mark.parametrize("words", ["danube", "Dan", "cafe river", 'the "danube', "more?"])
def test_words_are_found_in_any_branch(store: SessionStore, words: str) -> None:
    session = talk()
    store.save_all(session)
    store.save_all(Session())
    assert {hit.session.id for hit in store.search(words)} == {session.id}


@pytest.mark.parametrize("words", ["", "   ", '"', "* OR", "volga", "NEAR("])
def test_other_words_and_syntax_find_nothing(store: SessionStore, words: str) -> None:
    store.save_all(talk())
    assert store.search(words) == []


def test_changed_and_deleted_text_is_no_longer_found(store: SessionStore) -> None:
    session = talk()
    store.save_all(session)
    node = session.tree.roots[0]
    node.text = "Something about mountains"
    store.save_message(session, node)
    assert store.search("café") == [] and len(store.search("mountains")) == 1
    store.rename(session.id, "Alps")
    assert [hit.session.id for hit in store.search("alps")] == [session.id]
    store.delete(session.id)
    assert store.search("mountains") == [] and store.summaries() == []
    with pytest.raises(ParameterError, match="edgellm sessions"):
        store.load(session.id)


def test_prompts_and_presets_are_kept(store: SessionStore) -> None:
    for text in ("a", "b", "b", "a"):
        store.add_prompt(text)
    assert store.prompts() == ["a", "b", "a"]
    store.save_preset("calm", {"temperature": 0.1})
    store.save_preset("wild", {"temperature": 2.0})
    store.save_preset("wild", None)
    assert store.presets() == {"calm": {"temperature": 0.1}}


def test_a_damaged_file_is_moved_aside_and_its_copy_takes_its_place(tmp_path: Path) -> None:
    store, note = open_store(tmp_path)
    session = talk()
    store.save_all(session)
    store.close()
    assert note is None and (tmp_path / "sessions.backup.db").exists()
    (tmp_path / "sessions.db").write_bytes(b"\0" * 5000)
    again, note = open_store(tmp_path)
    assert note is not None and "damaged" in note and "copy" in note
    assert shape(again.load(session.id)) == shape(session)
    assert len(list(tmp_path.glob("sessions.damaged-*.db"))) == 1
    again.close()


def test_a_damaged_file_without_a_copy_begins_anew(tmp_path: Path) -> None:
    (tmp_path / "sessions.db").write_bytes(b"no database at all" * 100)
    store, note = open_store(tmp_path)
    assert note is not None and "anew" in note and store.summaries() == []
    store.close()


@pytest.mark.parametrize("reason", ["disk I/O error", "database or disk is full", "database is locked"])
def test_a_good_file_that_the_disk_refuses_stays_where_it_is(tmp_path: Path, monkeypatch: Any, reason: str) -> None:
    codes = {"disk I/O error": sqlite3.SQLITE_IOERR_SHMSIZE, "database or disk is full": sqlite3.SQLITE_FULL}
    store, _ = open_store(tmp_path)
    store.save_all(talk())
    store.close()

    def refused(store: SessionStore) -> None:
        error = sqlite3.OperationalError(reason)
        error.sqlite_errorcode = codes.get(reason, sqlite3.SQLITE_BUSY)
        raise error

    with monkeypatch.context() as patched:
        patched.setattr(SessionStore, "_prepare", refused)
        with pytest.raises(FormatError, match=reason) as found:
            open_store(tmp_path)
    assert found.value.code == "SESSION_WRITE" and "EDGELLM_HOME" in str(found.value)
    assert not list(tmp_path.glob("sessions.damaged-*"))
    again, note = open_store(tmp_path)
    assert note is None and len(again.summaries()) == 1
    again.close()


def test_a_folder_that_cannot_be_made_is_told_with_advice(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(FormatError, match="EDGELLM_HOME") as found:
        open_store(tmp_path / "file")
    assert found.value.code == "SESSION_WRITE"


def test_a_file_of_a_newer_program_is_left_alone(tmp_path: Path) -> None:
    store, _ = open_store(tmp_path)
    store._db.execute("pragma user_version = 99")
    store.close()
    with pytest.raises(FormatError, match="newer") as found:
        open_store(tmp_path)
    assert found.value.code == "SESSION_VERSION"


def test_damaged_tokens_cost_the_tokens_and_not_the_text(store: SessionStore) -> None:
    session = talk()
    store.save_all(session)
    store._db.execute("update token_runs set data = x'00ff'")
    assert [node.text for node in store.load(session.id).tree] == [node.text for node in session.tree]


def test_a_sqlite_without_an_index_searches_line_by_line(store: SessionStore) -> None:
    store.save_all(talk())
    store._indexed = False
    assert len(store.search("danube")) == 1


# --- the writer -------------------------------------------------------------------------------------------------------


def test_the_writer_saves_what_grows(store: SessionStore) -> None:
    session, writer = Session(), SessionWriter(store)
    question = session.tree.add("user", "q")
    writer.changed(session, question)
    answer = session.tree.add("assistant", "", question)
    for word in ("one", " two", " three"):
        answer.text += word
        answer.tokens.append(TOKEN)
        writer.changed(session, answer)
        writer.flush()
    answer.finish_reason = "stop"
    writer.changed(session, answer)
    writer.close()
    again = store.load(session.id)
    assert shape(again) == shape(session)
    assert len(again.tree.leaf.tokens) == 3  # type: ignore[union-attr]


def test_an_error_of_the_disk_is_told_once_and_nothing_is_lost(store: SessionStore, monkeypatch: Any) -> None:
    told: list[Any] = []
    session, writer = talk(), SessionWriter(store, told.append)
    broken = threading.Event()
    broken.set()
    save = store.save

    def failing(session: Session, keep_title: bool) -> bool:
        if broken.is_set():
            raise FormatError("disk full", code="SESSION_WRITE")
        return save(session, keep_title)

    monkeypatch.setattr(store, "save", failing)
    for node in session.tree:
        writer.changed(session, node)
    end = time.monotonic() + 20
    while not told and time.monotonic() < end:
        time.sleep(0.02)
    time.sleep(1)
    assert [error.code for error in told] == ["SESSION_WRITE"]
    broken.clear()
    writer.close()
    assert shape(store.load(session.id)) == shape(session)


def test_a_chat_that_another_program_deleted_is_saved_again_whole(store: SessionStore) -> None:
    told: list[Session] = []
    session, writer = talk(), SessionWriter(store, revived=told.append)
    for node in session.tree:
        writer.changed(session, node)
    other = talk()
    other.tree.roots[0].children[0].tokens = [TOKEN, TOKEN]
    for node in other.tree:
        writer.changed(other, node)
    writer.flush()
    assert told == []
    elsewhere = SessionStore(store.path)
    elsewhere.delete(session.id)
    elsewhere.close()
    writer.changed(session, session.tree.add("assistant", "more", session.tree.leaf))
    other.tree.roots[0].children[0].tokens.append(TOKEN)
    writer.changed(other, other.tree.roots[0].children[0])
    writer.close()
    assert shape(store.load(session.id)) == shape(session) and told == [session]
    assert shape(store.load(other.id)) == shape(other)


def test_a_title_that_another_program_gave_stays(store: SessionStore) -> None:
    session, writer = talk(), SessionWriter(store)
    for node in session.tree:
        writer.changed(session, node)
    writer.flush()
    store.rename(session.id, "theirs")
    writer.changed(session, session.tree.add("assistant", "more", session.tree.leaf))
    writer.flush()
    assert store.load(session.id).title == "theirs"
    session.title = "ours"
    writer.changed(session)
    writer.close()
    assert store.load(session.id).title == "ours"


def test_what_could_not_be_written_is_known_at_the_end(store: SessionStore, monkeypatch: Any) -> None:
    session, saved, writer = talk(), talk(), SessionWriter(store)
    for node in saved.tree:
        writer.changed(saved, node)
    writer.flush()

    def full(session: Session, keep_title: bool) -> bool:
        raise FormatError("disk full", code="SESSION_WRITE")

    monkeypatch.setattr(store, "save", full)
    writer.changed(session, session.tree.leaf)
    writer.close()
    assert writer.unsaved == [session] and "disk full" in str(writer.error)


def test_two_programs_write_at_once(tmp_path: Path) -> None:
    stores = [SessionStore(tmp_path / "sessions.db") for _ in range(2)]
    sessions = [[talk() for _ in range(10)] for _ in stores]
    threads = [
        threading.Thread(target=lambda s=s, many=many: [s.save_all(one) for one in many])
        for s, many in zip(stores, sessions, strict=True)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(stores[0].summaries()) == 20
    for opened in stores:
        opened.close()


KILLED = """
    import sys, time
    from pathlib import Path
    from edgellm.sessions import Session, SessionWriter, open_store
    store, _ = open_store(Path(sys.argv[1]))
    session, writer = Session(), SessionWriter(store)
    answer = session.tree.add("assistant", "")
    print("ready", flush=True)
    while True:
        answer.text += f"{time.time():.3f} "
        writer.changed(session, answer)
        time.sleep(0.005)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no kill -9")
def test_a_killed_program_loses_at_most_a_second(tmp_path: Path) -> None:
    for delay in (0.9, 1.15, 1.4):
        folder = tmp_path / str(delay)
        process = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(KILLED), str(folder)], stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        time.sleep(delay)
        killed = time.time()
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        process.stdout.close()
        store, note = open_store(folder)
        last = store.last_id()
        assert note is None and last is not None
        leaf = store.load(last).tree.leaf
        assert leaf is not None and killed - float(leaf.text.split()[-1]) < 5  # a second on a machine that is not busy
        store.close()


# --- tokens, files ----------------------------------------------------------------------------------------------------


def test_tokens_survive_packing_and_damage_is_named() -> None:
    assert unpack(pack([TOKEN, TOKEN])) == [TOKEN, TOKEN]
    for damaged in (b"", b"x", pack([TOKEN])[:-3], pack([])[:1]):
        with pytest.raises(FormatError):
            unpack(damaged)


def test_json_keeps_all_of_a_session() -> None:
    session = talk()
    again = from_json(to_json(session))
    assert shape(again) == shape(session)
    assert again.id != session.id


def test_a_model_whose_path_is_no_utf8_costs_no_chat(store: SessionStore, tmp_path: Path) -> None:
    model = os.fsdecode(b"caf\xe9.gguf")
    session = Session(model=model)
    question = session.tree.add("user", "Hi")
    session.tree.add("assistant", "Hello.", question, model=model)
    writer = SessionWriter(store)
    writer.changed(session, question)
    writer.flush()
    writer.close()
    assert [node.text for node in store.load(session.id).tree] == ["Hi", "Hello."]
    store.add_prompt(model)
    for name in ("a.json", "a.md"):
        write_session(tmp_path / name, session)
    saved = rescue(session, [tmp_path])
    assert saved is not None
    for file in (saved, tmp_path / "a.json"):
        assert [node.text for node in from_json(file.read_text("utf-8")).tree] == ["Hi", "Hello."]


def test_a_session_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: Any) -> None:
    for name, as_json, expected in (
        ("a.json", None, to_json), ("a.md", None, to_markdown), ("b", True, to_json), ("b.json", False, to_markdown)
    ):  # fmt: skip
        session = talk()
        write_session(tmp_path / name, session, as_json)
        assert (tmp_path / name).read_text("utf-8") == expected(session)

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    monkeypatch.setattr(os, "fsync", full)
    for name in ("a.json", "new.md"):
        with pytest.raises(OSError, match="space"):
            write_session(tmp_path / name, talk())
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.skipif(not Path("/dev/fd").exists(), reason="open files have no names here")
def test_a_session_is_written_into_a_pipe() -> None:
    session = talk()
    reading, writing = os.pipe()
    write_session(Path(f"/dev/fd/{writing}"), session)
    os.close(writing)
    with os.fdopen(reading, encoding="utf-8") as pipe:
        assert pipe.read() == to_markdown(session)


def test_markdown_shows_the_branch_that_is_read() -> None:
    text = to_markdown(talk())
    assert "## User" in text and "The *Danube*." in text and "> hm" in text and "Rhine" not in text


def test_the_line_chats_file_and_a_plain_list_are_read() -> None:
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    for text in (json.dumps(messages), json.dumps({"format": "edgellm-chat", "model": "m", "messages": messages})):
        session = from_json(text)
        assert session.system == "s" and [node.text for node in session.tree.path] == ["u"]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "3",
        "{}",
        '{"format": "edgellm-session"}',
        '{"format": "edgellm-session", "version": 2, "messages": []}',
        '{"format": "edgellm-session", "version": 1, "messages": [{"role": "user", "parent": 0}]}',
        '{"format": "edgellm-session", "version": 1, "messages": [{"role": "robot"}]}',
        '{"format": "edgellm-session", "version": 1, "messages": [{"role": "user", "text": 3}]}',
        '{"format": "edgellm-session", "version": 1, "messages": [{"role": "user", "tokens": [[1]]}]}',
        '{"format": "edgellm-session", "version": 1, "title": [], "messages": []}',
        '[{"role": "robot", "content": "x"}]',
        '[{"role": "user", "content": ["x"]}]',
        "[" * 100_000,
    ],
    ids=lambda text: text[:70],
)
def test_any_other_file_is_refused(text: str) -> None:
    with pytest.raises(FormatError) as found:
        from_json(text)
    assert found.value.code == "SESSION_FILE"


@given(st.recursive(st.none() | st.integers() | st.text(max_size=5), lambda x: st.lists(x, max_size=4), max_leaves=20))
@settings(max_examples=60, deadline=None)
def test_any_json_is_a_session_that_can_be_kept_or_refused_by_name(value: Any) -> None:
    for record in (value, {"format": "edgellm-session", "version": 1, "messages": value, "leaf": value}):
        try:
            session = from_json(json.dumps(record))
        except FormatError as error:
            assert error.code == "SESSION_FILE"
        else:
            assert shape(from_json(to_json(session))) == shape(session)
