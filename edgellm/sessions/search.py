"""Find words in the chats, in a time that grows with the text and no faster, and that another thread can end.

SQLite's own excerpts (FTS5 ``snippet``) take the square of a message's length. Here the index only finds the messages;
the words around a hit are cut from the beginning of each, and of all together no more than ``MOST_READ`` is read.
"""

from __future__ import annotations

import contextlib
import re
import sqlite3
import unicodedata
from collections.abc import Callable, Sequence
from pathlib import Path

READ = 1 << 16  # bytes of a message that are looked at for the place of a hit
MOST_READ = 1 << 22  # of all messages of a search
BEFORE, EXCERPT = 30, 160  # letters in front of a hit, and all of an excerpt
STEPS = 2000  # of SQLite between two looks at whether the search is still wanted

N_WORDS, LONGEST = 32, 100  # of a search: more are left out, and of a longer word its beginning is searched

_WORD = re.compile(r"\w+")


def terms_of(words: str) -> list[str]:
    """The words of a search."""
    return [word[:LONGEST] for word in _WORD.findall(words[: N_WORDS * LONGEST * 10])[:N_WORDS]]


def find_messages(
    path: Path, words: Sequence[str], limit: int, indexed: bool, unwanted: Callable[[], bool] | None
) -> list[tuple[int, int, str]]:
    """(message, session, excerpt) of the messages with all the words, or their beginnings, the best first.

    sqlite3.Error when the file cannot be read; once ``unwanted`` is true the search ends, with nothing.
    """
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as db:
        db.execute("pragma query_only = on")
        if unwanted is not None:
            db.set_progress_handler(unwanted, STEPS)
        try:
            rows = _indexed(db, words, limit) if indexed else _line_by_line(db, words, limit)
            return _with_excerpts(db, rows, words, unwanted)
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode == sqlite3.SQLITE_INTERRUPT:
                return []
            raise


def _indexed(db: sqlite3.Connection, words: Sequence[str], limit: int) -> list[tuple[int, int]]:
    query = " ".join(f'"{word}"*' for word in words)
    return db.execute(
        "select m.id, m.session from message_words w join messages m on m.id = w.rowid"
        " where message_words match ? order by rank limit ?",
        (query, limit),
    ).fetchall()


def _line_by_line(db: sqlite3.Connection, words: Sequence[str], limit: int) -> list[tuple[int, int]]:
    like = " and ".join("text like ? escape '\\'" for _ in words)
    patterns = [f"%{word.replace('_', chr(92) + '_')}%" for word in words]
    return db.execute(f"select id, session from messages where {like} limit ?", (*patterns, limit)).fetchall()


def _with_excerpts(
    db: sqlite3.Connection, rows: list[tuple[int, int]], words: Sequence[str], unwanted: Callable[[], bool] | None
) -> list[tuple[int, int, str]]:
    found, n_read = [], 0
    for message, session in rows:
        text = ""
        if n_read < MOST_READ:
            if unwanted is not None and unwanted():
                return []
            with (
                contextlib.suppress(sqlite3.Error),  # no text: another program wrote it
                db.blobopen("messages", "text", message, readonly=True) as blob,
            ):
                text = blob.read(READ).decode("utf-8", "ignore")
                n_read += len(text)
        found.append((message, session, excerpt(text, words)))
    return found


def excerpt(text: str, words: Sequence[str]) -> str:
    """The words around the first hit, on one line; the beginning of the text when it has none."""
    pattern = re.compile("|".join(rf"\b{re.escape(word)}" for word in words), re.IGNORECASE)
    hit = pattern.search(text)
    if hit is None and not text.isascii():  # an accent more or less; as many letters as before
        hit = re.compile("|".join(rf"\b{re.escape(_plain(word))}" for word in words)).search(_plain(text))
    start = max(hit.start() - BEFORE, 0) if hit is not None else 0
    if hit is not None and start:
        space = text.find(" ", start, hit.start() - 1)
        start = space + 1 if space >= 0 else start
    cut = text[start : start + EXCERPT]
    return ("…" if start else "") + " ".join(cut.split()) + ("…" if start + EXCERPT < len(text) else "")


def _plain(text: str) -> str:
    """As many letters, small and without accents, as the index has them."""
    return text.translate({ord(c): unicodedata.normalize("NFD", c.lower())[0] for c in set(text)})
