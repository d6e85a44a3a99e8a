"""The two files of a batch in OpenAI's form: requests, a line for each, and answers, a line for each as they come.

A line of answers has an id that is made of its request's line, so the file of answers alone says what is done: a batch
that was killed goes on with the same two files. A line counts once it ends and is on the disk; a torn one is cut off,
and anything else that is not of this batch is refused and left as it is.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import sys
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

import msgspec

from edgellm.formats.errors import EdgeLLMError, FormatError, ParameterError
from edgellm.formats.regular_file import open_regular
from edgellm.machine.file_lock import try_lock
from edgellm.server.bodies import MAX_BODY_NBYTES

MAX_LINE_NBYTES = MAX_BODY_NBYTES + (64 << 10)
MAX_ID_CHARS = 512
PREFIX = "batch_req_"
_BEGINS = b'{"id":"' + PREFIX.encode()  # every line of answers


class RequestLine(msgspec.Struct, forbid_unknown_fields=True):
    """A line as it must be; the body is read by the endpoint."""

    custom_id: str
    method: str
    url: str
    body: msgspec.Raw


class _Named(msgspec.Struct):
    custom_id: str


class _Routed(msgspec.Struct):
    model: str = ""


class _Replied(msgspec.Struct):
    status_code: int = 0


class _Answered(msgspec.Struct):
    id: str
    response: _Replied | None = None
    error: msgspec.Raw = msgspec.Raw(b"null")

    @property
    def is_wrong(self) -> bool:
        return bytes(self.error) != b"null" or (self.response is not None and self.response.status_code >= 400)


class Place(NamedTuple):
    """Where a request stands in its file.

    number      of the line, from 1 on
    id          of the line that answers it
    model       that it asks for; "" where it names none, or cannot be read
    """

    number: int
    offset: int
    nbytes: int
    id: str
    model: str


def read_line(raw: bytes) -> tuple[str | None, RequestLine | None, str]:
    """The custom_id, the line, and what is wrong with it where there is none."""
    if len(raw) > MAX_LINE_NBYTES:
        return None, None, f"the line has more than {MAX_LINE_NBYTES >> 20} MiB."
    try:
        line = msgspec.json.decode(raw, type=RequestLine)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        said = str(error).replace("`", "").rstrip(".")
        return _custom_id(raw), None, f"it is no request of a batch: {said}. See OpenAI's form of a batch."
    if not line.custom_id or len(line.custom_id) > MAX_ID_CHARS:
        return None, None, f"custom_id must have 1 to {MAX_ID_CHARS} characters."
    if line.method != "POST":
        return line.custom_id, None, f"method is {line.method[:40]!r}. It must be POST."
    return line.custom_id, line, ""


def _custom_id(raw: bytes) -> str | None:
    try:
        found = msgspec.json.decode(raw, type=_Named).custom_id
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
    return found if 0 < len(found) <= MAX_ID_CHARS else None


class Requests:
    """The file of requests, read through once: every line has its place, every custom_id is there once. A context."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.places: list[Place] = []
        self._file = open_regular(path)
        try:
            self._index()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Requests:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the file."""
        self._file.close()

    def _index(self) -> None:
        seen: dict[str, int] = {}
        for number, offset, nbytes in _lines(self._file):
            raw = self._read(offset, nbytes)
            custom_id, line, _ = read_line(raw)
            if custom_id is not None and seen.setdefault(custom_id, number) != number:
                raise FormatError(
                    f"{self.path}: custom_id {custom_id[:80]!r} stands in the lines {seen[custom_id]} and {number}. "
                    "Answers are told apart by it: give each line its own.",
                    code="BATCH",
                )
            # what has no name of its own is known by its place
            name = b"" if custom_id is not None else b"%d:" % number
            digest = hashlib.blake2b(name + raw.strip(), digest_size=12).hexdigest()
            self.places.append(Place(number, offset, nbytes, PREFIX + digest, _model(line)))
        if not self.places:
            raise FormatError(f"{self.path}: it has no line. A batch has a JSON object on each.", code="BATCH")

    def read(self, place: Place) -> bytes:
        """The line at a place, of one that is too long the beginning."""
        return self._read(place.offset, place.nbytes)

    def _read(self, offset: int, nbytes: int) -> bytes:
        back = self._file.tell()
        self._file.seek(offset)
        raw = self._file.read(min(nbytes, MAX_LINE_NBYTES + 1))
        self._file.seek(back)
        return raw


def _model(line: RequestLine | None) -> str:
    with contextlib.suppress(msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        if line is not None:
            return msgspec.json.decode(line.body, type=_Routed).model
    return ""


def _lines(file: BinaryIO) -> Iterator[tuple[int, int, int]]:
    """(number, offset, bytes) of each line that is not blank, without its end; a mark at the file's begin is none."""
    number, offset = 1, 0
    while piece := file.readline(1 << 20):
        start, blank = offset, not piece.strip(b" \t\r\n\xef\xbb\xbf" if offset == 0 else b" \t\r\n")
        offset += len(piece)
        while not piece.endswith(b"\n") and (piece := file.readline(1 << 20)):
            offset += len(piece)
            blank = blank and not piece.strip()
        if start == 0:
            file.seek(0)
            start = 3 if file.read(3) == b"\xef\xbb\xbf" else 0
            file.seek(offset)
        if not blank:
            yield number, start, offset - start - piece.endswith(b"\n")
        number += 1


class Answers:
    """The file of answers: opened where it is, or new; lines are added and never changed. A context.

    known   the ids that a line of this batch may have
    done    those that were there; ``n_wrong`` of them with an error
    """

    def __init__(self, path: Path, known: Collection[str]) -> None:
        self.path = path
        self.done: set[str] = set()
        self.n_wrong = 0
        flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0)
        is_new = not path.exists()
        if not is_new:
            open_regular(path).close()  # a pipe or a device is refused by name
        self._file: BinaryIO = os.fdopen(os.open(path, flags, 0o666), "r+b")
        self._pending: list[bytes] = []
        self._writing = asyncio.Lock()
        try:
            self._take(known)
            if is_new:
                _sync_folder(path.parent)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Answers:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the file."""
        self._file.close()

    def _take(self, known: Collection[str]) -> None:
        """Find out what is done, and cut a torn line."""
        if not try_lock(self._file.fileno()):
            raise EdgeLLMError(f"{self.path}: another process writes answers to it. Wait for its end.", code="BATCH")
        end = 0
        for number, line in enumerate(self._file, 1):
            if not line.endswith(b"\n"):
                if not (line.startswith(_BEGINS[: len(line)]) or not line.strip(b"\0")):
                    raise self._strange(number)
                break
            try:
                answered = msgspec.json.decode(line, type=_Answered)
            except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
                raise self._strange(number) from None
            found = answered.id
            if found not in known:
                raise FormatError(
                    f"{self.path}, line {number}: it answers no line of this batch, or one that has been changed "
                    "since. Give another file for the answers.",
                    code="BATCH",
                )
            if found in self.done:
                raise FormatError(f"{self.path}, line {number}: the request is answered twice.", code="BATCH")
            self.done.add(found)
            self.n_wrong += answered.is_wrong
            end += len(line)
        self._file.truncate(end)
        self._file.seek(end)
        os.fsync(self._file.fileno())

    def _strange(self, number: int) -> FormatError:
        return FormatError(
            f"{self.path}, line {number}: it is no answer of a batch. Give another file for the answers; this one is "
            "left as it is.",
            code="BATCH",
        )

    async def add(self, line: bytes) -> None:
        """Add a line; it is on the disk when this returns. Lines that come meanwhile go there together."""
        self._pending.append(line + b"\n")
        async with self._writing:
            if self._pending:  # else whoever had the lock before wrote it
                lines, self._pending = b"".join(self._pending), []
                await asyncio.to_thread(self._write, lines)

    def _write(self, lines: bytes) -> None:
        left = memoryview(lines)
        while left:
            left = left[os.write(self._file.fileno(), left) :]
        os.fsync(self._file.fileno())


def _sync_folder(folder: Path) -> None:
    """A new name is on the disk too, where the system can say so."""
    if sys.platform == "win32":
        return
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def check_apart(requests: Path, answers: Path) -> None:
    """ParameterError where both names are one file."""
    with contextlib.suppress(OSError):
        if requests.samefile(answers):
            raise ParameterError(f"{answers} is the file of the requests. Give another one for the answers.")
