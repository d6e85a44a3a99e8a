"""Bring one file here whole, or not at all.

The bytes grow in ``<name>.part`` with a note beside it (``.part.json``: where from, how long, which version). After any
break the next call goes on from there, when the server still offers the very same file. Length and sha256 are proved
before the file gets its name, and the name appears in one atomic step.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from edgellm.formats.errors import DownloadError, EdgeLLMError, FormatError
from edgellm.formats.json_text import parse_json
from edgellm.formats.large_pages import LargePageWriter
from edgellm.formats.regular_file import read_regular
from edgellm.machine.atomic import take_name
from edgellm.machine.progress import ByteProgress
from edgellm.store.connection import LEAST_RATE
from edgellm.store.web import BACKOFF_S, Answer, TransientError, open_url, pause, shown

MAX_TRIES = 5  # in a row that brought next to nothing
CHUNK_NBYTES = 1 << 18
LOOK_NBYTES = 8 << 20  # between two looks at the room on the disk: others write there too
MOST_NBYTES = 1 << 45  # of one file
MAX_NOTE_NBYTES = 1 << 16
SPARE_NBYTES = 64 << 20  # stays free on the disk

_CONTENT_RANGE = re.compile(r"bytes (?:(\d+)-(\d+)|\*)/(\d+|\*)")


@dataclass(frozen=True)
class RemoteFile:
    """What to fetch, and what is known of it beforehand. ``magic`` are the bytes that such a file begins with, ``most``
    how many it may have at all."""

    url: str
    sha256: str | None = None
    nbytes: int | None = None
    magic: bytes = b""
    most: int = MOST_NBYTES
    headers: Mapping[str, str] | None = None

    @property
    def where(self) -> str:
        """The URL as messages may show it."""
        return shown(self.url)


@dataclass(frozen=True)
class _Origin:
    """Which file the bytes of a .part belong to."""

    url: str
    sha256: str | None = None
    etag: str | None = None
    nbytes: int | None = None


class PartialFile:
    """The bytes that are here so far, their running sha256, and the note of where they come from."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.note = path.with_name(path.name + ".json")
        self.origin: _Origin | None = None
        self.resumed = False
        self.restart()

    def go_on_from_disk(self, remote: RemoteFile) -> None:
        """Take up what an earlier run left, if its note says that it is the same file."""
        try:
            note = read_regular(self.note, MAX_NOTE_NBYTES, "PULL_NOTE")
            origin = _Origin(**parse_json(note, self.note.name, "PULL_NOTE"))
            if origin.sha256 != remote.sha256 or (not remote.sha256 and origin.url != remote.url):
                return
            with self.path.open("rb") as file:
                while piece := file.read(1 << 20):
                    self.hash.update(piece)
                    self.nbytes += len(piece)
        except (OSError, TypeError, FormatError):
            self.restart()
            return
        self.origin, self.resumed = origin, self.nbytes > 0

    def restart(self) -> None:
        """Forget all bytes; the file itself is emptied by the next write."""
        self.nbytes = 0
        self.hash = hashlib.sha256()
        self.resumed = False

    def begin(self, origin: _Origin) -> None:
        """Note the origin before its first byte is written; bytes of another one are gone before that."""
        self.path.unlink(missing_ok=True)
        self.note.write_text(json.dumps(asdict(origin)))
        self.origin = origin

    def append_from(self, answer: Answer, limit: int | None, report: Callable[[], None]) -> None:
        """Write the answer's body behind the bytes that are here, never beyond ``limit`` bytes in all."""
        raw = self.path.open("r+b" if self.nbytes else "wb", buffering=0)
        if self.nbytes:
            raw.truncate(self.nbytes)
            raw.seek(self.nbytes)
        with LargePageWriter(raw) as file:  # what waits in it is written however this ends
            looked_at = self.nbytes
            while limit is None or self.nbytes < limit:
                piece = answer.read(CHUNK_NBYTES if limit is None else min(CHUNK_NBYTES, limit - self.nbytes))
                if not piece:
                    break
                if self.nbytes >= looked_at:
                    check_space(self.path.parent, len(piece))
                    looked_at = self.nbytes + LOOK_NBYTES
                file.write(piece)
                self.hash.update(piece)
                self.nbytes += len(piece)
                report()

    def discard(self) -> None:
        """Delete the bytes and the note."""
        self.path.unlink(missing_ok=True)
        self.note.unlink(missing_ok=True)
        self.origin = None
        self.restart()


def place(path: Path, target: Path) -> None:
    """Rename ``path`` to ``target`` so that a power cut leaves either the old or the whole new file."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())
    target.parent.mkdir(parents=True, exist_ok=True)
    take_name(path, target)


def check_space(folder: Path, nbytes: int) -> None:
    """DownloadError PULL_DISK when ``nbytes`` more do not fit on the disk of ``folder``."""
    free = shutil.disk_usage(folder).free
    if nbytes + SPARE_NBYTES > free:
        raise DownloadError(
            f"{folder}: {nbytes / 1e6:,.0f} MB are needed and {free / 1e6:,.0f} MB are free. "
            "Make room, or set EDGELLM_HOME to a folder on a larger disk.",
            code="PULL_DISK",
        )


def download(
    remote: RemoteFile,
    target: Path,
    part: Path,
    progress: ByteProgress | None = None,
    prove: Callable[[Path], None] | None = None,
) -> Path:
    """Fetch ``remote`` into ``part`` and rename it to ``target`` once it is proved whole.

    ``prove`` may look at the whole file before it gets its name, and raise an EdgeLLMError to have it thrown away.
    DownloadError with a PULL_ code; ``part`` stays for the next call where going on makes sense. One caller at a time.
    """
    part.parent.mkdir(parents=True, exist_ok=True)
    try:
        growing = PartialFile(part)
        growing.go_on_from_disk(remote)
        _fetch_with_patience(remote, growing, progress)
        if growing.resumed and not _is_whole(remote, growing):
            growing.discard()  # the bytes of an earlier run may be the bad ones: once more from the start
            _fetch_with_patience(remote, growing, progress)
        if not _is_whole(remote, growing):
            found = growing.hash.hexdigest()
            growing.discard()
            raise DownloadError(
                f"{remote.where}: the bytes have sha256 {found}, expected {remote.sha256}, and were thrown away. "
                "Try again; if it happens twice, the file on the server is not the right one.",
                code="PULL_CHECKSUM",
            )
        if prove is not None:
            try:
                prove(part)
            except EdgeLLMError:
                growing.discard()
                raise
        place(part, target)
        growing.note.unlink(missing_ok=True)
    except OSError as error:
        raise _disk_failure(error, part) from error
    return target


def _disk_failure(error: OSError, path: Path) -> DownloadError:
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    advice = "Make room on the disk" if full else "Check the disk and the rights of the folder"
    return DownloadError(
        f"{path}: {error.strerror or error}. {advice}, then pull again.", code="PULL_DISK" if full else "PULL_WRITE"
    )


def _is_whole(remote: RemoteFile, growing: PartialFile) -> bool:
    return remote.sha256 is None or growing.hash.hexdigest() == remote.sha256


def _fetch_with_patience(remote: RemoteFile, growing: PartialFile, progress: ByteProgress | None) -> None:
    """Ask again after each break, until the length is right or MAX_TRIES in a row brought nothing."""
    fruitless = 0
    while True:
        before, began = growing.nbytes, time.monotonic()
        try:
            _fetch_rest(remote, growing, progress)
            return
        except TransientError as error:
            least = LEAST_RATE * max(1.0, time.monotonic() - began)  # a few bytes in each try would go on for ever
            fruitless = 0 if growing.nbytes - before >= least else fruitless + 1
            if fruitless >= MAX_TRIES:
                have = f" {growing.nbytes / 1e6:,.1f} MB are here: pull again to go on." if growing.nbytes else ""
                raise DownloadError(f"{error}{have}", code=error.code) from error
            pause(error, BACKOFF_S * 2**fruitless)


def _fetch_rest(remote: RemoteFile, growing: PartialFile, progress: ByteProgress | None) -> None:
    """One request for what is missing. TransientError when it is worth another."""
    headers = dict(remote.headers or {})
    etag = growing.origin.etag if growing.origin else None
    if not etag and not (growing.origin and growing.origin.sha256):  # nothing would prove that more is of the same file
        growing.restart()
    if growing.nbytes:
        headers["Range"] = f"bytes={growing.nbytes}-"
        if etag and not etag.startswith("W/"):
            headers["If-Range"] = etag
    with open_url(remote.url, headers) as answer:
        total = _where_it_starts(remote, growing, answer)
        if answer.status == 416:
            return
        if total is not None and total > remote.most:
            raise _too_long(remote)
        limit = total if total is not None else (remote.nbytes or remote.most) + 1
        if not growing.nbytes:
            growing.begin(_Origin(remote.url, remote.sha256, answer.headers.get("ETag"), total))
        if total is not None:
            check_space(growing.path.parent, total - growing.nbytes)
        try:
            growing.append_from(answer, limit, _reporter(growing, total, progress))
        except DownloadError as error:
            if error.code == "PULL_DISK" and total is None:  # it may have no end at all
                growing.discard()
            raise
    expected = total if total is not None else remote.nbytes
    if expected is None and growing.nbytes > remote.most:
        growing.discard()
        raise _too_long(remote)
    if expected is not None and growing.nbytes > expected:
        growing.discard()
        raise _wrong_length(remote, f"more than {expected:,}")
    least = len(remote.magic) if expected is None else expected
    if growing.nbytes < least:
        raise TransientError(
            f"{remote.where}: the server stopped after {growing.nbytes:,} of {least:,} bytes. Check the network.",
            code="PULL_INCOMPLETE",
        )


def _where_it_starts(remote: RemoteFile, growing: PartialFile, answer: Answer) -> int | None:
    """Make the answer fit the bytes that are here, and give the length of the whole file when it is known."""
    if answer.status == 200:
        growing.restart()
        _check_beginning(remote, answer)
        total = answer.length()
    else:
        match = _CONTENT_RANGE.fullmatch(answer.headers.get("Content-Range", ""))
        start = int(match[1]) if match and match[1] else None
        total = int(match[3]) if match and match[3] != "*" else None
        whole_already = answer.status == 416 and total == growing.nbytes > 0
        before, etag = growing.origin, answer.headers.get("ETag")
        same = growing.nbytes == 0
        if before is not None:
            same = (not etag or etag == (before.etag or etag)) and total in (None, before.nbytes or total)
        if (start != growing.nbytes and not whole_already) or not same:
            growing.discard()
            raise TransientError(
                f"{remote.where}: the server no longer has the same file, or sent another range than asked for.",
                code="PULL_RANGE",
            )
        growing.resumed = growing.nbytes > 0
    if remote.nbytes is not None and total is not None and total != remote.nbytes:
        growing.discard()
        raise _wrong_length(remote, f"{total:,}")
    return total


def _too_long(remote: RemoteFile) -> DownloadError:
    return DownloadError(
        f"{remote.where}: the server's file has more than {remote.most:,} bytes, which no such file has.",
        code="PULL_CONTENT",
    )


def _wrong_length(remote: RemoteFile, found: str) -> DownloadError:
    return DownloadError(
        f"{remote.where}: the server's file has {found} bytes, expected {remote.nbytes:,}. It is another file.",
        code="PULL_CHECKSUM",
    )


def _check_beginning(remote: RemoteFile, answer: Answer) -> None:
    """Look at the first bytes before anything is kept: a web page in place of a model is the commonest mistake."""
    first = answer.peek(len(remote.magic))
    if not first.startswith(remote.magic[: len(first)]):
        kind = answer.headers.get("Content-Type", "something else").split(";")[0]
        raise DownloadError(
            f"{remote.where}: the server sent {kind} that begins with {first!r}, expected {remote.magic!r}. "
            "Open the address in a browser: it may be a page about the file instead of the file.",
            code="PULL_CONTENT",
        )


def _reporter(growing: PartialFile, total: int | None, progress: ByteProgress | None) -> Callable[[], None]:
    """A function that tells ``progress`` how far it is, ten times a second at most, and once at the end."""
    if progress is None:
        return lambda: None
    last = 0.0

    def report() -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= 0.1 or growing.nbytes == total:
            last = now
            progress(growing.nbytes, total)

    return report
