"""A file is whole under its name or not there, whatever ends the writing."""

from __future__ import annotations

import os
import stat
import sys
from pathlib import Path

import pytest

from edgellm.machine.atomic import remove_stale, whole_file


@pytest.mark.parametrize("private", [False, True])
@pytest.mark.parametrize("sync", [False, True])
def test_the_file_is_there_when_the_block_ends_and_not_before(tmp_path: Path, private: bool, sync: bool) -> None:
    target = tmp_path / "a"
    target.write_bytes(b"old")
    with whole_file(target, private=private, sync=sync) as file:
        file.write(b"new")
        assert target.read_bytes() == b"old" and Path(file.name).parent == tmp_path
    assert target.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.skipif(sys.platform == "win32", reason="rights of POSIX")
@pytest.mark.parametrize(("private", "rights"), [(False, 0o640), (True, 0o600)])
def test_rights_are_those_of_a_new_file_or_of_the_user_alone(tmp_path: Path, private: bool, rights: int) -> None:
    mask = os.umask(0o027)
    try:
        with whole_file(tmp_path / "a", private=private):
            pass
    finally:
        os.umask(mask)
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == rights


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_an_error_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    target = tmp_path / "a"
    target.write_bytes(b"old")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, step, full)
    with pytest.raises(OSError, match="No space"), whole_file(target) as file:
        file.write(b"new")
    with pytest.raises(KeyboardInterrupt), whole_file(target) as file:
        raise KeyboardInterrupt
    assert target.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_what_is_still_buffered_when_the_disk_is_full_is_no_second_error(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), whole_file(tmp_path / "a", writer=lambda _: open("/dev/full", "wb")) as file:
        file.write(b"new")
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_a_link_stays_a_link_to_the_new_file(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with whole_file(tmp_path / "link") as file:
        file.write(b"new")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real").read_bytes() == b"new"


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_what_is_no_regular_file_is_never_replaced(tmp_path: Path) -> None:
    pipe, link = tmp_path / "pipe", tmp_path / "link"
    os.mkfifo(pipe)
    link.symlink_to(pipe)
    for path in (pipe, link):
        with pytest.raises(OSError, match="regular file"), whole_file(path):
            pass
    assert stat.S_ISFIFO(pipe.stat().st_mode)
    with whole_file(link, links=False) as file:
        file.write(b"new")
    assert not link.is_symlink() and link.read_bytes() == b"new" and stat.S_ISFIFO(pipe.stat().st_mode)


@pytest.mark.skipif(not Path("/dev/fd").exists(), reason="open files have no names here")
def test_a_pipe_that_is_open_is_named_as_what_it_is() -> None:
    """Its name leads to one that nobody can open."""
    ends = os.pipe()
    try:
        with pytest.raises(OSError, match="no regular file"), whole_file(Path(f"/dev/fd/{ends[1]}")):
            raise AssertionError("it was opened")
    finally:
        for end in ends:
            os.close(end)


@pytest.mark.skipif(sys.platform == "win32", reason="there a file that is open cannot be removed")
def test_what_killed_runs_left_is_removed_and_what_is_being_written_stays(tmp_path: Path) -> None:
    (tmp_path / ".b.killed.part").write_bytes(b"half")
    (tmp_path / "mine.part").write_bytes(b"mine")
    with whole_file(tmp_path / "a") as file:
        file.write(b"new")
        remove_stale(tmp_path)
        assert sorted(path.name for path in tmp_path.iterdir()) == sorted([Path(file.name).name, "mine.part"])
    assert (tmp_path / "a").read_bytes() == b"new"
