"""A download ends whole or not at all, whatever the server does."""

from __future__ import annotations

import errno
import hashlib
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from stand_in_hub import (
    Fault,
    Handler,
    Resource,
    StandIn,
    answer,
    chunked,
    cut_after,
    drip,
    other_body,
    ranges_of_another_file,
    redirect,
    replaced_by,
    reset_after,
    stall_after,
    stand_in,
    web_page,
    wrong_range,
)

import edgellm.store.connection
import edgellm.store.download
import edgellm.store.web
from edgellm.formats.errors import DownloadError
from edgellm.store.download import RemoteFile, download
from edgellm.store.web import fetch_page, open_url

BODY = b"GGUF" + random.Random(1).randbytes(300_013)
NEWER = b"GGUF" + random.Random(2).randbytes(300_013)
LONGER = BODY + b"more"
SHA256 = hashlib.sha256(BODY).hexdigest()


@pytest.fixture(autouse=True)
def hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(edgellm.store.download, "BACKOFF_S", 0.001)
    monkeypatch.setattr(edgellm.store.web, "BACKOFF_S", 0.001)
    monkeypatch.setattr(edgellm.store.web, "STALL_S", 0.5)
    monkeypatch.setattr(edgellm.store.download, "CHUNK_NBYTES", 4096)


@pytest.fixture
def server() -> Iterator[StandIn]:
    with stand_in() as running:
        yield running


def fetch(url: str, folder: Path, **known: object) -> Path:
    remote = RemoteFile(url, **{"sha256": SHA256, "nbytes": len(BODY), "magic": b"GGUF", **known})  # type: ignore[arg-type]
    return download(remote, folder / "model.gguf", folder / "work" / "model.gguf.part")


def leftovers(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


ENDS_WELL: dict[str, tuple[Fault, ...]] = {
    "an honest server": (),
    "a short body": (cut_after(100_000),),
    "many short bodies": tuple(cut_after(40_000) for _ in range(7)),
    "a reset connection": (reset_after(100_000),),
    "a reset before any byte": (reset_after(0),),
    "a stalled connection": (stall_after(100_000),),
    "errors 500, 503 and 429, then the file": (answer(500), answer(503), answer(429)),
    "a break, an error, then the file": (cut_after(100_000), answer(502)),
    "a wrong range": (cut_after(100_000), wrong_range(-5)),
    "a range too far on": (cut_after(100_000), wrong_range(5)),
    "416 in the middle": (cut_after(100_000), answer(416)),
    "416 with another length": (cut_after(100_000), answer(416, Content_Range="bytes */7")),
    "416 at the start": (answer(416), answer(416)),
    "206 without a range": (cut_after(100_000), answer(206)),
    "the whole file instead of a range": (cut_after(100_000), other_body(BODY)),
    "no length at all": (chunked(),),
    "a chunked body without an end": (chunked(finish=False),),
    "a redirect": (redirect("/model.gguf"),),
    "every kind of redirect": tuple(redirect("/model.gguf", status) for status in (301, 302, 303, 307, 308)),
}


@pytest.mark.parametrize("faults", ENDS_WELL.values(), ids=ENDS_WELL)
def test_a_fault_that_can_be_mended_ends_in_the_whole_file(
    server: StandIn, tmp_path: Path, faults: tuple[Fault, ...]
) -> None:
    path = fetch(server.serve("/model.gguf", BODY, *faults), tmp_path)
    assert path.read_bytes() == BODY
    assert leftovers(tmp_path) == ["model.gguf"]


ENDS_IN_AN_ERROR: dict[str, tuple[str, tuple[Fault, ...]]] = {
    "other bytes of the right length": ("PULL_CHECKSUM", (other_body(NEWER),) * 2),
    "a long body": ("PULL_CHECKSUM", (other_body(LONGER),)),
    "a long body without a length": ("PULL_CHECKSUM", (chunked(b"more"),)),
    "a file too short": ("PULL_CHECKSUM", (other_body(BODY[:1000]),)),
    "a newer version in the middle": ("PULL_CHECKSUM", (cut_after(100_000), replaced_by(NEWER))),
    "ranges of a newer version": ("PULL_CHECKSUM", (cut_after(100_000), ranges_of_another_file(NEWER))),
    "a web page": ("PULL_CONTENT", (web_page,)),
    "a web page in the middle": ("PULL_CONTENT", (cut_after(100_000), web_page)),
    "other bytes of any length": ("PULL_CHECKSUM", (other_body(b"GGUF"),)),
    "a packed body": ("PULL_CONTENT", (lambda handler, resource: handler.status(200, **{"Content-Encoding": "gzip"}),)),
    "401": ("PULL_AUTH", (answer(401),)),
    "403": ("PULL_AUTH", (answer(403),)),
    "404": ("PULL_NOT_FOUND", (answer(404),)),
    "410": ("PULL_NOT_FOUND", (answer(410),)),
    "418": ("PULL_HTTP", (answer(418),)),
    "304": ("PULL_HTTP", (answer(304),)),
    "500 for ever": ("PULL_SERVER", (answer(500),) * 9),
    "resets for ever": ("PULL_NETWORK", (reset_after(0),) * 9),
    "stalls for ever": ("PULL_TIMEOUT", (stall_after(0),) * 9),
    "416 for ever": ("PULL_RANGE", (answer(416),) * 9),
    "empty bodies for ever": ("PULL_INCOMPLETE", (cut_after(0),) * 9),
    "a redirect to a file": ("PULL_REDIRECT", (redirect("file:///etc/hostname"),)),
    "a redirect to plain http elsewhere": ("PULL_REDIRECT", (redirect("http://example.invalid/model.gguf"),)),
    "a redirect to ftp": ("PULL_REDIRECT", (redirect("ftp://127.0.0.1/model.gguf"),)),
    "a redirect to nowhere": ("PULL_REDIRECT", (redirect("https:///model.gguf"),)),
    "a redirect to a bad port": ("PULL_REDIRECT", (redirect("https://host:99999999/model.gguf"),)),
    "a redirect in a circle": ("PULL_REDIRECT", (redirect("/model.gguf"),) * 20),
}


@pytest.mark.parametrize(("code", "faults"), ENDS_IN_AN_ERROR.values(), ids=ENDS_IN_AN_ERROR)
def test_a_fault_that_cannot_be_mended_has_a_name_and_leaves_no_bad_file(
    server: StandIn, tmp_path: Path, code: str, faults: tuple[Fault, ...]
) -> None:
    url = server.serve("/model.gguf", BODY, *faults)
    with pytest.raises(DownloadError) as raised:
        fetch(url, tmp_path)
    assert raised.value.code == code
    assert not (tmp_path / "model.gguf").exists()


@pytest.mark.parametrize(("code", "faults"), ENDS_IN_AN_ERROR.values(), ids=ENDS_IN_AN_ERROR)
def test_after_any_error_the_next_pull_from_a_mended_server_is_whole(
    server: StandIn, tmp_path: Path, code: str, faults: tuple[Fault, ...]
) -> None:
    with pytest.raises(DownloadError):
        fetch(server.serve("/model.gguf", BODY, *faults), tmp_path)
    assert fetch(server.serve("/model.gguf", BODY), tmp_path).read_bytes() == BODY
    assert leftovers(tmp_path) == ["model.gguf"]


def test_a_broken_download_goes_on_where_it_stopped(server: StandIn, tmp_path: Path) -> None:
    url = server.serve("/model.gguf", BODY, cut_after(200_000), *(answer(500),) * 9)
    with pytest.raises(DownloadError, match="pull again to go on"):
        fetch(url, tmp_path)
    assert leftovers(tmp_path) == ["model.gguf.part", "model.gguf.part.json"]
    server.resources["/model.gguf"].faults.clear()
    fetch(url, tmp_path)
    assert server.asked("/model.gguf")[-1]["Range"] == "bytes=200000-"


def test_a_file_that_is_whole_already_is_not_fetched_again(server: StandIn, tmp_path: Path) -> None:
    url = server.serve("/model.gguf", BODY, cut_after(200_000), *(answer(500),) * 9)
    with pytest.raises(DownloadError):
        fetch(url, tmp_path)
    part = tmp_path / "work" / "model.gguf.part"
    part.write_bytes(BODY)
    server.resources["/model.gguf"].faults.clear()
    assert fetch(url, tmp_path).read_bytes() == BODY
    assert server.asked("/model.gguf")[-1]["Range"] == f"bytes={len(BODY)}-"


def test_bad_bytes_of_an_earlier_run_are_fetched_once_more(server: StandIn, tmp_path: Path) -> None:
    url = server.serve("/model.gguf", BODY, cut_after(200_000), *(answer(500),) * 9)
    with pytest.raises(DownloadError):
        fetch(url, tmp_path)
    part = tmp_path / "work" / "model.gguf.part"
    part.write_bytes(bytes(200_000))
    server.resources["/model.gguf"].faults.clear()
    assert fetch(url, tmp_path).read_bytes() == BODY


@pytest.mark.parametrize("note", ["", "{", "[]", '{"url": 1}', '{"other": 1}', "null"])
def test_a_spoilt_note_means_to_start_over(server: StandIn, tmp_path: Path, note: str) -> None:
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "model.gguf.part").write_bytes(b"GGUF of another file")
    (tmp_path / "work" / "model.gguf.part.json").write_text(note)
    assert fetch(server.serve("/model.gguf", BODY), tmp_path).read_bytes() == BODY


def test_without_a_checksum_only_the_same_etag_is_resumed(server: StandIn, tmp_path: Path) -> None:
    url = server.serve("/model.gguf", BODY, cut_after(100_000), replaced_by(NEWER))
    assert fetch(url, tmp_path, sha256=None, nbytes=None).read_bytes() == NEWER


def test_a_crash_between_two_versions_never_mixes_them(
    server: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = server.serve("/model.gguf", BODY, cut_after(200_000), *(answer(500),) * 9)
    with pytest.raises(DownloadError):
        fetch(url, tmp_path, sha256=None, nbytes=None)
    server.serve("/model.gguf", NEWER)

    def crash(*args: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as broken, pytest.raises(KeyboardInterrupt):
        broken.setattr(edgellm.store.download.PartialFile, "append_from", crash)
        fetch(url, tmp_path, sha256=None, nbytes=None)
    assert fetch(url, tmp_path, sha256=None, nbytes=None).read_bytes() == NEWER


def test_without_a_checksum_and_an_etag_nothing_is_resumed(server: StandIn, tmp_path: Path) -> None:
    url = server.serve("/model.gguf", BODY, cut_after(100_000), etag=None)
    assert fetch(url, tmp_path, sha256=None, nbytes=None).read_bytes() == BODY
    assert all("Range" not in headers for headers in server.asked("/model.gguf"))


def test_the_authorization_header_stays_with_its_host(server: StandIn, tmp_path: Path) -> None:
    with stand_in() as elsewhere:
        target = elsewhere.serve("/model.gguf", BODY)
        url = server.serve("/start", b"", redirect("/near"))
        server.serve("/near", b"", redirect(target))
        fetch(url, tmp_path, headers={"Authorization": "Bearer secret"})
        assert [headers.get("Authorization") for _, headers in server.requests] == ["Bearer secret"] * 2
        assert [headers.get("Authorization") for _, headers in elsewhere.requests] == [None]


@pytest.mark.parametrize(
    "url",
    [
        "http://example.invalid/model.gguf",
        "file:///etc/hostname",
        "ftp://example.invalid/model.gguf",
        "https://user:password@example.invalid/model.gguf",
        "https:///model.gguf",
        "model.gguf",
        "http://127.0.0.1.example.invalid/model.gguf",
    ],
)
def test_only_https_and_this_machine_are_opened(url: str) -> None:
    with pytest.raises(DownloadError) as raised, open_url(url):
        pass
    assert raised.value.code == "PULL_URL"
    assert "password@" not in str(raised.value)


def test_an_address_with_blanks_and_letters_of_any_kind_is_asked_for(server: StandIn) -> None:
    server.serve("/my%20models/%C3%A9.gguf", b"page")
    assert fetch_page(f"{server.url}/my models/é.gguf#top") == "page"
    server.serve("/start", b"", head(b"HTTP/1.1 302 Found", "Location: /my models/é.gguf".encode()))
    server.serve("/my%20models/%C3%83%C2%A9.gguf", b"page")  # a header's bytes are taken for Latin-1
    assert fetch_page(f"{server.url}/start") == "page"


def test_a_page_without_end_is_cut(server: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(edgellm.store.web, "PAGE_NBYTES", 1000)
    with pytest.raises(DownloadError) as raised:
        fetch_page(server.serve("/page", bytes(5000)))
    assert raised.value.code == "PULL_CONTENT"


def test_progress_rises_to_the_whole_length(server: StandIn, tmp_path: Path) -> None:
    seen: list[tuple[int, int | None]] = []
    remote = RemoteFile(server.serve("/model.gguf", BODY, cut_after(100_000)), SHA256, None, b"GGUF")
    download(remote, tmp_path / "model.gguf", tmp_path / "part", lambda done, total: seen.append((done, total)))
    assert seen == sorted(seen)
    assert seen[-1] == (len(BODY), len(BODY))


def test_a_full_disk_is_seen_before_the_first_byte(
    server: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(edgellm.store.download.shutil, "disk_usage", lambda folder: FakeUsage(1000))
    with pytest.raises(DownloadError) as raised:
        fetch(server.serve("/model.gguf", BODY), tmp_path)
    assert raised.value.code == "PULL_DISK"
    assert "EDGELLM_HOME" in str(raised.value)


class FakeUsage:
    def __init__(self, free: int) -> None:
        self.free = free


@pytest.mark.parametrize(("number", "code"), [(errno.ENOSPC, "PULL_DISK"), (errno.EIO, "PULL_WRITE")])
@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_failing_disk_has_a_name_and_leaves_no_file(
    server: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, number: int, code: str
) -> None:
    url = server.serve("/model.gguf", BODY)

    def fail(*args: object) -> None:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as broken:
        broken.setattr(edgellm.store.download.os, step, fail)
        with pytest.raises(DownloadError) as raised:
            fetch(url, tmp_path)
    assert raised.value.code == code
    assert not (tmp_path / "model.gguf").exists()
    assert fetch(url, tmp_path).read_bytes() == BODY


def test_a_disk_that_fills_up_in_the_middle_has_a_name(
    server: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")
    begin = edgellm.store.download.PartialFile.begin

    def begin_on_a_full_disk(growing: edgellm.store.download.PartialFile, origin: object) -> None:
        begin(growing, origin)  # type: ignore[arg-type]
        growing.path.symlink_to("/dev/full")

    monkeypatch.setattr(edgellm.store.download.PartialFile, "begin", begin_on_a_full_disk)
    with pytest.raises(DownloadError) as raised:
        fetch(server.serve("/model.gguf", BODY), tmp_path)
    assert raised.value.code == "PULL_DISK"


def test_the_bytes_are_on_the_disk_before_they_get_their_name(
    server: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    for step in ("fsync", "replace"):
        real = getattr(os, step)
        monkeypatch.setattr(
            edgellm.store.download.os, step, lambda *args, step=step, real=real: (order.append(step), real(*args))[1]
        )
    fetch(server.serve("/model.gguf", BODY), tmp_path)
    assert order == (["fsync", "replace"] if sys.platform == "win32" else ["fsync", "replace", "fsync"])


PULLER = """
import sys, pathlib
import edgellm.store.download
from edgellm.store.download import RemoteFile, download
edgellm.store.download.CHUNK_NBYTES = 4096
url, sha256, folder = sys.argv[1], sys.argv[2], pathlib.Path(sys.argv[3])
print("started", flush=True)
download(RemoteFile(url, sha256, None, b"GGUF"), folder / "model.gguf", folder / "model.gguf.part")
"""


@pytest.mark.usefixtures("interruptible")
@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_pull_leaves_a_part_that_the_next_one_ends(
    server: StandIn, tmp_path: Path, how: signal.Signals
) -> None:
    chance = random.Random(how)
    for number in range(4):
        folder = tmp_path / str(number)
        folder.mkdir()
        url = server.serve("/model.gguf", BODY, drip(8192, 0.01))
        child = subprocess.Popen(
            [sys.executable, "-c", PULLER, url, SHA256, str(folder)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
        assert child.stdout is not None
        child.stdout.readline()
        time.sleep(chance.uniform(0.0, 0.4))
        child.send_signal(how)
        child.wait(30)
        child.stdout.close()
        assert set(leftovers(folder)) <= {"model.gguf.part", "model.gguf.part.json"} or leftovers(folder) == [
            "model.gguf"
        ]
        remote = RemoteFile(server.serve("/model.gguf", BODY), SHA256, None, b"GGUF")
        download(remote, folder / "model.gguf", folder / "model.gguf.part")
        assert (folder / "model.gguf").read_bytes() == BODY
        assert leftovers(folder) == ["model.gguf"]


def test_random_faults_at_random_places_never_give_a_bad_file(server: StandIn, tmp_path: Path) -> None:
    chance = random.Random(7)
    bad = [
        answer(500),
        answer(416),
        web_page,
        other_body(NEWER),
        other_body(LONGER),
        chunked(b"more"),
        replaced_by(BODY),
    ]
    for number in range(60):
        faults = []
        for _ in range(chance.randrange(1, 6)):
            at = chance.randrange(len(BODY))
            faults.append(
                chance.choice([cut_after(at), reset_after(at), wrong_range(at - 150_000), chance.choice(bad)])
            )
        folder = tmp_path / str(number)
        folder.mkdir()
        url = server.serve("/model.gguf", BODY, *faults)
        for _ in range(len(faults) + 1):
            try:
                fetch(url, folder)
            except DownloadError as error:
                assert error.code.startswith("PULL_")
                assert not (folder / "model.gguf").exists()
            else:
                break
        assert (folder / "model.gguf").read_bytes() == BODY


# --- what goes on for ever -----------------------------------------------------------------------------------


@pytest.fixture
def little_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rate is judged after a tenth of a second of waiting."""
    monkeypatch.setattr(edgellm.store.connection, "WINDOW_S", 0.1)


def head(*lines: bytes) -> Fault:
    """These lines in place of a status line and headers."""

    def fault(handler: Handler, resource: Resource) -> None:
        handler.wfile.write(b"\r\n".join(lines) + b"\r\n\r\n")
        handler.close_connection = True

    return fault


def endless(piece: bytes, pause_s: float = 0.0, start: bytes = b"HTTP/1.1 200 OK\r\n") -> Fault:
    """The same bytes again and again, until the client hangs up."""

    def fault(handler: Handler, resource: Resource) -> None:
        handler.wfile.write(start)
        end = time.monotonic() + 60
        while time.monotonic() < end and not handler.server.leaving.wait(pause_s):
            handler.wfile.write(piece)

    return fault


CHUNKS = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
CRAWLS: dict[str, Fault] = {
    "a body": drip(8, 0.02),
    "headers": endless(b"A: b\r\n", 0.02),
    "one line of a header": endless(b"a", 0.02),
    "a status line": endless(b"H", 0.02, b""),
    "a body without a length": endless(b"GGUF", 0.02, b"HTTP/1.1 200 OK\r\n\r\n"),
    "chunks of a byte": endless(b"1\r\nG\r\n", 0.02, CHUNKS),
    "a trailer": endless(b"A: b\r\n", 0.02, CHUNKS + b"4\r\nGGUF\r\n0\r\n"),
    "a redirect": endless(b"A: b\r\n", 0.02, b"HTTP/1.1 302 Found\r\nLocation: /other\r\n"),
}


@pytest.mark.parametrize("fault", CRAWLS.values(), ids=CRAWLS)
def test_a_server_that_crawls_is_given_up_and_what_came_stays(
    server: StandIn, tmp_path: Path, little_patience: None, fault: Fault
) -> None:
    url = server.serve("/model.gguf", BODY, *[fault] * 99)
    with pytest.raises(DownloadError) as raised:
        fetch(url, tmp_path)
    assert raised.value.code in ("PULL_SLOW", "PULL_CONTENT")
    server.serve("/model.gguf", BODY)
    assert fetch(url, tmp_path).read_bytes() == BODY


def test_a_slow_line_that_goes_on_is_waited_for(server: StandIn, tmp_path: Path, little_patience: None) -> None:
    assert fetch(server.serve("/model.gguf", BODY[:20_000], drip(400, 0.01)), tmp_path, sha256=None, nbytes=None)


FLOODS: dict[str, Fault] = {
    "headers": endless(b"A" * 60_000 + b": b\r\n"),
    "one line of a header": endless(b"A" * 60_000),
    "answers that promise another": endless(b"HTTP/1.1 100 Continue\r\n\r\n" * 1000, 0.0, b""),
    "a trailer": endless(b"A: b\r\n" * 10_000, 0.0, CHUNKS + b"4\r\nGGUF\r\n0\r\n"),
    "extensions of a chunk": endless(b";" * 60_000, 0.0, CHUNKS + b"4"),
}


@pytest.mark.parametrize("fault", FLOODS.values(), ids=FLOODS)
def test_a_flood_around_the_body_ends(server: StandIn, tmp_path: Path, fault: Fault) -> None:
    with pytest.raises(DownloadError):
        fetch(server.serve("/model.gguf", BODY, *[fault] * 99), tmp_path)
    with pytest.raises(DownloadError):
        fetch_page(server.serve("/page", b"", *[fault] * 99))


def test_a_few_bytes_in_each_try_do_not_go_on_for_ever(server: StandIn, tmp_path: Path) -> None:
    url = server.serve("/model.gguf", BODY, *[cut_after(5)] * 99)
    with pytest.raises(DownloadError, match="pull again to go on"):
        fetch(url, tmp_path)
    assert len(server.requests) < 10


@pytest.mark.parametrize("etag", ["", None])
def test_a_chunked_body_that_is_cut_is_never_taken_for_whole(server: StandIn, tmp_path: Path, etag: str | None) -> None:
    url = server.serve("/model.gguf", BODY, *[chunked(finish=False)] * 99, etag=etag)
    with pytest.raises(DownloadError):
        fetch(url, tmp_path, sha256=None, nbytes=None)
    assert not (tmp_path / "model.gguf").exists()


def test_a_body_without_an_end_stops_before_the_disk_is_full_and_leaves_nothing(
    server: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = iter([edgellm.store.download.SPARE_NBYTES * 2] * 3)
    monkeypatch.setattr(edgellm.store.download, "LOOK_NBYTES", 1 << 16)
    monkeypatch.setattr(edgellm.store.download.shutil, "disk_usage", lambda folder: FakeUsage(next(left, 1000)))
    url = server.serve("/model.gguf", b"", endless(BODY, 0.0, b"HTTP/1.1 200 OK\r\n\r\nGGUF"))
    with pytest.raises(DownloadError) as raised:
        fetch(url, tmp_path, sha256=None, nbytes=None)
    assert raised.value.code == "PULL_DISK"
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize("fault", [chunked(), None])
def test_a_file_longer_than_its_kind_can_be_is_refused(server: StandIn, tmp_path: Path, fault: Fault | None) -> None:
    url = server.serve("/tokenizer.json", BODY, *([fault] if fault else []))
    with pytest.raises(DownloadError, match=r"more than 1,000 bytes") as raised:
        fetch(url, tmp_path, sha256=None, nbytes=None, most=1000)
    assert raised.value.code == "PULL_CONTENT"
    assert leftovers(tmp_path) == []


def test_a_disk_that_others_fill_stops_a_download_that_can_go_on(
    server: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = iter([edgellm.store.download.SPARE_NBYTES * 2] * 3)
    url = server.serve("/model.gguf", BODY)
    with monkeypatch.context() as full:
        full.setattr(edgellm.store.download, "LOOK_NBYTES", 1 << 16)
        full.setattr(edgellm.store.download.shutil, "disk_usage", lambda folder: FakeUsage(next(left, 1000)))
        with pytest.raises(DownloadError) as raised:
            fetch(url, tmp_path)
    assert raised.value.code == "PULL_DISK"
    assert "model.gguf.part" in leftovers(tmp_path)
    assert fetch(url, tmp_path).read_bytes() == BODY
    assert "Range" in server.asked("/model.gguf")[-1]


@pytest.mark.parametrize(
    "lines",
    [
        (b"HTTP/1.1 200 OK", b"Content-Encoding: gzip", b"Content-Length: 0"),
        (b"HTTP/1.1 206 Partial Content", b"Content-Encoding: br", b"Content-Range: bytes 0-3/4"),
        (b"HTTP/1.1 200 OK", b"Transfer-Encoding: gzip, chunked"),
        (b"HTTP/1.1 200 OK", b"Transfer-Encoding: gzip"),
    ],
)
def test_what_was_packed_without_being_asked_for_is_refused(server: StandIn, lines: tuple[bytes, ...]) -> None:
    with pytest.raises(DownloadError) as raised:
        fetch_page(server.serve("/page", b"", head(*lines)))
    assert raised.value.code == "PULL_CONTENT"


# --- the server's words, the user's settings -----------------------------------------------------------------


def test_the_servers_own_words_are_in_the_error_and_on_one_line(server: StandIn) -> None:
    said = "Repository not found. " + "Or closed. " * 100
    with pytest.raises(DownloadError) as raised:
        fetch_page(server.serve("/page", b"", answer(404, X_Error_Message=said)))
    assert "Repository not found" in str(raised.value) and len(str(raised.value)) < 600


@pytest.mark.parametrize(("asked", "tries"), [("2", 2), ("7200", 1), ("Wed, 21 Oct 2015 07:28:00 GMT", 2), ("soon", 2)])
def test_a_server_that_asks_to_wait_is_waited_for_but_not_for_long(
    server: StandIn, monkeypatch: pytest.MonkeyPatch, asked: str, tries: int
) -> None:
    waited: list[float] = []
    monkeypatch.setattr(edgellm.store.web.time, "sleep", waited.append)
    url = server.serve("/page", b"page", answer(429, Retry_After=asked))
    if tries == 2:
        assert fetch_page(url) == "page"
        assert max(waited) >= (2 if asked == "2" else 0)
    else:
        with pytest.raises(DownloadError, match="Try again in 7200 seconds"):
            fetch_page(url)
    assert len(server.requests) == tries


URL = "https://files.invalid/model.gguf"


@pytest.fixture
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)


@pytest.mark.parametrize("variable", ["HTTPS_PROXY", "https_proxy", "ALL_PROXY"])
@pytest.mark.parametrize("proxy", ["socks5://localhost:1080", "socks5h://u:p@host:1", "file:///etc/x", "ftp://host"])
def test_a_proxy_of_another_kind_is_named(
    no_proxy: None, monkeypatch: pytest.MonkeyPatch, variable: str, proxy: str
) -> None:
    monkeypatch.setenv(variable, proxy)
    with pytest.raises(DownloadError, match=f"{variable}.*http proxies") as raised, open_url(URL):
        pass
    assert raised.value.code == "PULL_PROXY" and "u:p" not in str(raised.value)


@pytest.mark.parametrize(
    ("proxy", "code"),
    [
        ("http://user:secret@127.0.0.1:9", "PULL_NETWORK"),
        ("127.0.0.1:9", "PULL_NETWORK"),
        ("http://127.0.0.1:port", "PULL_NETWORK"),
        ("http:///", "PULL_NETWORK"),
        ("http://[", "PULL_NETWORK"),
    ],
)
def test_a_proxy_that_fails_is_named_without_its_password(
    no_proxy: None, monkeypatch: pytest.MonkeyPatch, proxy: str, code: str
) -> None:
    monkeypatch.setenv("HTTPS_PROXY", proxy)
    with pytest.raises(DownloadError, match=r"through the proxy .*\(HTTPS_PROXY\)") as raised, open_url(URL):
        pass
    assert raised.value.code == code and "secret" not in str(raised.value)


def test_a_proxy_that_wants_a_password_says_where_to_write_it(no_proxy: None, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        monkeypatch.setenv("HTTPS_PROXY", f"http://127.0.0.1:{listening.getsockname()[1]}")

        def refuse() -> None:
            connection, _ = listening.accept()
            with connection:
                connection.recv(10_000)
                connection.sendall(b"HTTP/1.1 407 Proxy Authentication Required\r\nContent-Length: 0\r\n\r\n")

        thread = threading.Thread(target=refuse)
        thread.start()
        with pytest.raises(DownloadError, match=r"HTTPS_PROXY.*name:password@host") as raised, open_url(URL):
            pass
        thread.join()
    assert raised.value.code == "PULL_PROXY"


def test_this_machines_own_address_needs_no_proxy(
    no_proxy: None, monkeypatch: pytest.MonkeyPatch, server: StandIn
) -> None:
    monkeypatch.setenv("ALL_PROXY", "socks5://localhost:1")
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    assert fetch_page(server.serve("/page", b"page")) == "page"


@pytest.mark.parametrize("variable", ["SSL_CERT_FILE", "SSL_CERT_DIR"])
def test_certificates_that_cannot_be_read_are_named(
    no_proxy: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    (tmp_path / "garbage").write_text("no certificate")
    for path in (tmp_path / "missing", tmp_path / "garbage"):
        monkeypatch.setenv(variable, str(path))
        with pytest.raises(DownloadError, match=f"{variable}={path}") as raised, open_url(URL):
            pass
        assert raised.value.code == "PULL_TLS"
