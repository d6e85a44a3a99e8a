"""Sessions in one SQLite file of the user's data folder, with a full-text index over every message.

    sessions    id, title, model, system, settings (JSON), leaf, created, updated
    messages    id, session, parent, number, role, text, model, finish_reason, timings (JSON), created
    token_runs  message, start, data: the tokens of an answer in runs, as they came (see ``token_records``)
    prompts     what the user typed, for the input's history           presets     settings saved by name
    preferences such as the theme

The journal is a write-ahead log: what was committed survives kill -9, and a reader never waits for a writer. A
``SessionStore`` may be used from any thread.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from edgellm.formats.errors import EdgeLLMError, FormatError, ParameterError
from edgellm.formats.json_text import parse_json
from edgellm.machine.atomic import whole_file
from edgellm.sessions import records
from edgellm.sessions.search import find_messages, terms_of
from edgellm.sessions.settings import as_json, checked_all
from edgellm.sessions.token_records import pack, unpack
from edgellm.sessions.tree import MessageNode, MessageTree, Session, title_of

T = TypeVar("T")

VERSION = 1  # PRAGMA user_version
BUSY_S = 5.0  # another program may be writing
N_PROMPTS = 1000  # of the input's history
BACKUP_S = 86400.0  # a copy is made at most so often
ADVICE = (
    "Chats are kept there. Check the disk's free space and the folder's rights, or set EDGELLM_HOME to another folder; "
    "`edgellm chat --plain` saves nothing."
)

SCHEMA = """
create table sessions (id integer primary key, title text not null, model text not null, system text not null,
    settings text not null, leaf integer, created real not null, updated real not null);
create table messages (id integer primary key, session integer not null references sessions on delete cascade,
    parent integer, number integer not null, role text not null, text text not null, model text not null,
    finish_reason text, timings text not null, created real not null);
create index messages_of_session on messages (session, number);
create table token_runs (message integer not null references messages on delete cascade, start integer not null,
    data blob not null, primary key (message, start)) without rowid;
create table prompts (id integer primary key, text text not null);
create table presets (name text primary key, settings text not null);
create table preferences (name text primary key, value text not null);
"""
INDEX = """
create virtual table message_words using fts5 (text, content='messages', content_rowid='id',
    tokenize='unicode61 remove_diacritics 2');
create trigger words_in after insert on messages begin
    insert into message_words (rowid, text) values (new.id, new.text); end;
create trigger words_out after delete on messages begin
    insert into message_words (message_words, rowid, text) values ('delete', old.id, old.text); end;
create trigger words_changed after update of text on messages when old.text is not new.text begin
    insert into message_words (message_words, rowid, text) values ('delete', old.id, old.text);
    insert into message_words (rowid, text) values (new.id, new.text); end;
"""


@dataclass(frozen=True)
class SessionSummary:
    """A session in a list."""

    id: int
    title: str
    model: str
    updated: float
    n_messages: int

    @property
    def short_name(self) -> str:
        """What the command line calls it."""
        return f"{self.id:016x}"[:8]


@dataclass(frozen=True)
class SearchHit:
    """A message that was found: the session, and the words around the hit."""

    session: SessionSummary
    message: int
    excerpt: str


def open_store(folder: Path | None = None) -> tuple[SessionStore, str | None]:
    """The user's store and, when its file was damaged, a sentence about what was done. Never raises for a bad file.

    A damaged file is moved aside and the last copy takes its place.
    """
    if folder is None:
        from edgellm.machine.paths import sessions_dir

        folder = sessions_dir()
    path = folder / "sessions.db"
    try:
        return SessionStore(path), None
    except FormatError as error:
        if error.code != "SESSION_STORE":
            raise
    aside = path.with_name(f"sessions.damaged-{time.strftime('%Y%m%d-%H%M%S')}.db")
    for suffix in ("", "-wal", "-shm"):
        with contextlib.suppress(FileNotFoundError):
            os.replace(f"{path}{suffix}", f"{aside}{suffix}")
    backup = path.with_suffix(".backup.db")
    note = f"The file of your sessions was damaged and is kept as {aside.name}."
    with contextlib.suppress(OSError, EdgeLLMError):
        day = time.strftime("%d %B", time.localtime(backup.stat().st_mtime))
        path.write_bytes(backup.read_bytes())
        return SessionStore(path), f"{note} The copy of {day} took its place."
    path.unlink(missing_ok=True)
    return SessionStore(path), f"{note} There was no copy: the list begins anew."


class SessionStore:
    """The open file. FormatError SESSION_STORE when it is damaged or from a newer program."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock, self._reading_lock = threading.RLock(), threading.Lock()  # a reader waits for no writer
        try:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            if not path.exists():
                os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))
            self._db = sqlite3.connect(path, timeout=BUSY_S, check_same_thread=False, isolation_level=None)
            self._reader = sqlite3.connect(path, timeout=BUSY_S, check_same_thread=False, isolation_level=None)
        except (OSError, sqlite3.Error) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            raise FormatError(f"{path}: {reason}. {ADVICE}", code="SESSION_WRITE") from error
        try:
            self._db.execute("pragma journal_mode = wal")
            self._db.execute("pragma synchronous = normal")
            self._db.execute("pragma foreign_keys = on")
            self._prepare()
        except sqlite3.DatabaseError as error:
            self._reader.close()
            self._db.close()
            raise _refused(path, error) from error

    def close(self) -> None:
        """May be called twice. Once a day a copy is left beside the file."""
        with self._lock, contextlib.suppress(sqlite3.Error, OSError):
            self._backup()
        with self._reading_lock:
            self._reader.close()
        with self._lock:
            self._db.close()

    # -- sessions --------------------------------------------------------------------------------------------------

    def save(self, session: Session, keep_title: bool = False) -> bool:
        """Write what a session says about itself; its messages are written one by one. Whether it was there already.

        keep_title   that of the file: another program may have given it one
        """
        leaf = session.tree.leaf.id if session.tree.leaf is not None else None
        row = (*map(records.sound, (session.title, session.model, session.system)), as_json(session.settings))
        with self.transaction() as db:
            known = db.execute("select 1 from sessions where id = ?", (session.id,)).fetchone() is not None
            db.execute(
                "insert into sessions values (?, ?, ?, ?, ?, ?, ?, ?) on conflict (id) do update set "
                "title = case when ?9 then title else ?2 end, model = ?3, system = ?4, "
                "settings = ?5, leaf = ?6, updated = ?8",
                (session.id, *row, leaf, session.created, time.time(), keep_title),
            )
        return known

    def save_message(self, session: Session, node: MessageNode, n_saved: int = 0) -> int:
        """Write a message as it is now and its tokens from ``n_saved`` on; the number of tokens that are saved."""
        tokens = node.tokens[n_saved:]
        parent = node.parent.id if node.parent is not None else None
        text, model = records.sound(node.text), records.sound(node.model)
        row = (node.id, session.id, parent, node.role, text, model, node.finish_reason)
        with self.transaction() as db:
            db.execute(
                "insert into messages (id, session, parent, role, text, model, finish_reason, timings, created, number)"
                " values (?, ?, ?, ?, ?, ?, ?, ?, ?, (select 1 + coalesce(max(number), 0) from messages where"
                " session = ?2)) on conflict (id) do update set"
                " text = ?5, model = ?6, finish_reason = ?7, timings = ?8",
                (*row, json.dumps(node.timings), node.created),
            )
            if tokens:
                db.execute("insert or replace into token_runs values (?, ?, ?)", (node.id, n_saved, pack(tokens)))
        return n_saved + len(tokens)

    def save_all(self, session: Session) -> None:
        """Write a session and all its messages."""
        with self.transaction():
            self.save(session)
            for node in session.tree:
                self.save_message(session, node)

    def load(self, session_id: int) -> Session:
        """A session with its whole tree. ParameterError when there is none of this id."""
        with self._reading() as db:
            row = db.execute("select * from sessions where id = ?", (session_id,)).fetchone()
            if row is None:
                raise ParameterError(f"There is no session {session_id}. `edgellm sessions` lists them.")
            messages = db.execute("select * from messages where session = ? order by number", (session_id,)).fetchall()
            runs = db.execute(
                "select message, data from token_runs where message in (select id from messages where session = ?)"
                " order by message, start",
                (session_id,),
            ).fetchall()
        return _session_of(row, messages, runs)

    def find(self, name: str) -> int:
        """The session whose short name begins so. ParameterError unless there is exactly one."""
        with self._reading() as db:
            ids = [row[0] for row in db.execute("select id from sessions")]
        found = [one for one in ids if name and f"{one:016x}".startswith(name.lower())]
        if len(found) != 1:
            what = f"{len(found)} sessions begin" if found else "No session begins"
            raise ParameterError(f"{what} with {name!r}. `edgellm sessions` shows their names.")
        return int(found[0])

    def last_id(self) -> int | None:
        """The session that was changed last."""
        with self._reading() as db:
            row = db.execute("select id from sessions order by updated desc limit 1").fetchone()
        return None if row is None else int(row[0])

    def summaries(self) -> list[SessionSummary]:
        """All sessions, the one changed last first."""
        with self._reading() as db:
            return [_summary(row) for row in db.execute(f"{SUMMARIES} group by s.id order by s.updated desc")]

    def search(self, words: str, limit: int = 200, unwanted: Callable[[], bool] | None = None) -> list[SearchHit]:
        """Messages and titles with all the words, or their beginnings; the best first, at most ``limit``.

        It ends early, with nothing, once ``unwanted`` says so, which another thread may bring about.
        """
        terms = terms_of(words)
        if not terms:
            return []
        try:
            found = find_messages(self.path, terms, limit, self._indexed, unwanted)
        except sqlite3.Error as error:
            raise _refused(self.path, error) from error
        if unwanted is not None and unwanted():
            return []
        known = {summary.id: summary for summary in self.summaries()}
        hits = [SearchHit(known[session], message, text) for message, session, text in found if session in known]
        lowered, n_left = [term.lower() for term in terms], max(limit - len(hits), 0)
        titled = [s for s in known.values() if all(term in s.title.lower() for term in lowered)]
        with_hits = {hit.session.id for hit in hits}
        return hits + [SearchHit(s, 0, "") for s in titled if s.id not in with_hits][:n_left]

    def rename(self, session_id: int, title: str) -> None:
        """Give a session a title; an empty one takes it back to its first words."""
        with self.transaction() as db:
            db.execute("update sessions set title = ? where id = ?", (title_of(title), session_id))

    def delete(self, session_id: int) -> None:
        """A session and all its messages."""
        with self.transaction() as db:
            db.execute("delete from sessions where id = ?", (session_id,))

    # -- the input's history, presets ------------------------------------------------------------------------------

    def add_prompt(self, text: str) -> None:
        """Remember what was typed, unless it was the last."""
        text = records.sound(text)
        with self.transaction() as db:
            last = db.execute("select text from prompts order by id desc limit 1").fetchone()
            if last is None or last[0] != text:
                db.execute("insert into prompts (text) values (?)", (text,))
                db.execute("delete from prompts where id <= (select max(id) from prompts) - ?", (N_PROMPTS,))

    def prompts(self) -> list[str]:
        """What was typed, the oldest first."""
        with self._reading() as db:
            return [text for (text,) in db.execute("select text from prompts order by id")]

    def presets(self) -> dict[str, dict[str, Any]]:
        """Settings by the names they were saved under."""
        with self._reading() as db:
            rows = db.execute("select * from presets order by name").fetchall()
        found: dict[str, dict[str, Any]] = {}
        for name, text in rows:
            with contextlib.suppress(FormatError, ValueError, TypeError):  # what stands in it is for its user to check
                found[str(name)] = dict(_parsed(text))
        return found

    def save_preset(self, name: str, settings: dict[str, Any] | None) -> None:
        """Keep settings under a name; None forgets them."""
        with self.transaction() as db:
            db.execute("delete from presets where name = ?", (name,))
            if settings is not None:
                db.execute("insert into presets values (?, ?)", (name, as_json(settings)))

    def preferences(self) -> dict[str, str]:
        """What a program keeps for the next time, such as its theme."""
        with self._reading() as db:
            return dict(db.execute("select * from preferences").fetchall())

    def save_preference(self, name: str, value: str) -> None:
        """Keep one of them."""
        with self.transaction() as db:
            db.execute("insert or replace into preferences values (?, ?)", (name, value))

    # -- the file --------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """All or nothing, also over several calls; FormatError SESSION_STORE when the file cannot be written."""
        with self._lock:
            if self._db.in_transaction:
                yield self._db
                return
            try:
                self._db.execute("begin immediate")
                yield self._db
                self._db.execute("commit")
            except BaseException as error:
                with contextlib.suppress(sqlite3.Error):
                    self._db.execute("rollback")
                if isinstance(error, sqlite3.Error):
                    raise _refused(self.path, error) from error
                raise

    @contextlib.contextmanager
    def _reading(self) -> Iterator[sqlite3.Connection]:
        with self._reading_lock:
            try:
                yield self._reader
            except sqlite3.Error as error:
                raise _refused(self.path, error) from error

    def _prepare(self) -> None:
        version = self._db.execute("pragma user_version").fetchone()[0]
        if version > VERSION:
            raise FormatError(
                f"{self.path} was written by a newer edgellm (version {version}, this one knows {VERSION}). "
                "Update edgellm, or set EDGELLM_HOME to another folder.",
                code="SESSION_VERSION",
            )
        self._db.execute("begin immediate")
        if self._db.execute("pragma user_version").fetchone()[0] == 0:
            for statement in SCHEMA.split(";\n"):
                self._db.execute(statement)
            with contextlib.suppress(sqlite3.OperationalError):  # a SQLite without FTS5 searches line by line
                for statement in re.split(r"(?<=;)\n(?=create)", INDEX.strip()):
                    self._db.execute(statement)
            self._db.execute(f"pragma user_version = {VERSION}")
        self._db.execute("commit")
        self._indexed = bool(self._db.execute("select 1 from sqlite_master where name = 'message_words'").fetchone())

    def _backup(self) -> None:
        target = self.path.with_suffix(".backup.db")
        with contextlib.suppress(FileNotFoundError):
            if time.time() - target.stat().st_mtime < BACKUP_S:
                return
        if self._db.execute("pragma quick_check(1)").fetchone()[0] != "ok":
            return  # the last good copy is worth more
        with whole_file(target, private=True) as file:
            self._db.execute("vacuum into ?", (file.name,))


SUMMARIES = """
select s.id, s.title, s.model, s.updated, count(m.id),
    (select text from messages where session = s.id and role = 'user' order by number limit 1)
from sessions s left join messages m on m.session = s.id
"""


def _summary(row: Sequence[Any]) -> SessionSummary:
    session_id, title, model, updated, n_messages, first = row
    try:
        updated = records.moment(updated)
    except ParameterError:
        updated = 0.0
    return SessionSummary(
        session_id, title_of(str(title)) or title_of(str(first or "")), str(model), updated, n_messages
    )


def _session_of(row: Sequence[Any], messages: Sequence[Any], runs: Sequence[Any]) -> Session:
    """A session from its rows. Another program may have written them: what cannot be taken is told in its notes."""
    session_id, title, model, system, settings, leaf, created, _ = row
    notes: dict[str, int] = {}

    def taken(check: Callable[[], T], instead: T) -> T:
        try:
            return check()
        except (FormatError, ParameterError, ValueError, TypeError) as error:
            notes[str(error)] = notes.get(str(error), 0) + 1
            return instead

    nodes: dict[int, MessageNode] = {}
    for node_id, _, parent, _, role, text, answered_by, reason, timings, at in messages:
        node = MessageNode(
            taken(partial(records.role, role), "user"),
            taken(partial(records.text, "text", text), ""),
            nodes.get(parent),
            taken(partial(records.text, "model", answered_by), ""),
            taken(partial(records.finish_reason, reason), None),
            timings=taken(lambda timings=timings: records.timings(_parsed(timings)), {}),  # type: ignore[misc]
            id=node_id,
            created=taken(partial(records.moment, at), 0.0),
        )
        if parent is not None and node.parent is None:
            notes["a message follows none that is there"] = notes.get("a message follows none that is there", 0) + 1
        nodes[node_id] = node
    for message, data in runs:
        with contextlib.suppress(FormatError):  # the text is whole; the token view shows the rest
            nodes[message].tokens += unpack(data)
    none: tuple[dict[str, Any], list[str]] = ({}, [])
    kept, refused = taken(lambda: checked_all(_parsed(settings)), none)
    tree = MessageTree()
    tree.fill(list(nodes.values()), nodes.get(leaf))
    session = Session(
        tree,
        title_of(taken(partial(records.text, "title", title), "")),
        taken(partial(records.text, "model", model), ""),
        taken(partial(records.text, "system", system), ""),
        kept,
        session_id,
        taken(partial(records.moment, created), 0.0),
    )
    session.notes = [*refused, *(f"{note} ({n} times)" if n > 1 else note for note, n in notes.items())]
    return session


def _parsed(text: str) -> Any:
    """The other way round. FormatError SESSION_STORE for a value that was changed from outside."""
    return parse_json(text, "The file of your sessions", "SESSION_STORE", advice=ADVICE, infinities=True)


def _refused(path: Path, error: sqlite3.Error) -> FormatError:
    """A file that is damaged, or one that a full disk or a missing right keeps from being used: it must stay."""
    code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR) & 0xFF  # the primary one
    if code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_ERROR):
        return FormatError(f"{path}: {error}. Restart to bring back the last copy.", code="SESSION_STORE")
    return FormatError(f"{path}: {error}. {ADVICE}", code="SESSION_WRITE")
