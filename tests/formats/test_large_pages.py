"""Large pages: files are written in pieces that can become them, and a mapping asks for them."""

from __future__ import annotations

import io
import mmap
import os
from pathlib import Path

import numpy as np
import pytest

from edgellm.formats.gguf_writer import TensorPlan, write_gguf
from edgellm.formats.large_pages import LARGE_PAGE_NBYTES, LargePageWriter, large_page_share
from edgellm.formats.mapped_file import map_file
from edgellm.formats.quant_types import QUANT_TYPES

PIECES = (1, 100, LARGE_PAGE_NBYTES - 101, LARGE_PAGE_NBYTES, 3 * LARGE_PAGE_NBYTES + 7, 0, 12345)


class _Slow(io.RawIOBase):
    """Takes at most ``most`` bytes at a time and remembers where each call began; then the disk is full."""

    def __init__(self, most: int, room: int = 1 << 40) -> None:
        self.most, self.room = most, room
        self.data = bytearray()
        self.calls: list[tuple[int, int]] = []

    def writable(self) -> bool:
        return True

    def tell(self) -> int:
        return len(self.data)

    def write(self, piece: memoryview) -> int:  # type: ignore[override]
        n = min(len(piece), self.most, self.room - len(self.data))
        if n == 0 and len(piece):
            raise OSError(28, "No space left on device")
        self.calls.append((len(self.data), len(piece)))
        self.data += piece[:n]
        return n


@pytest.mark.parametrize("most", [1 << 40, 1_000_000])
def test_a_file_is_the_same_whatever_the_pieces_and_calls_begin_and_end_at_large_pages(most: int) -> None:
    data = np.random.default_rng(0).integers(0, 256, sum(PIECES), dtype=np.uint8).tobytes()
    raw = _Slow(most)
    writer = LargePageWriter(raw)
    at = 0
    for n in PIECES:
        assert writer.write(data[at : at + n]) == n
        at += n
    writer.flush()
    assert bytes(raw.data) == data
    for start, nbytes in raw.calls[:-1]:
        assert most < LARGE_PAGE_NBYTES or start % LARGE_PAGE_NBYTES == 0
        assert (start + nbytes) % LARGE_PAGE_NBYTES == 0


def test_a_full_disk_is_told_and_closing_still_closes() -> None:
    raw = _Slow(1 << 40, room=LARGE_PAGE_NBYTES + 5)
    writer = LargePageWriter(raw)
    with pytest.raises(OSError, match="No space"):
        writer.write(bytes(3 * LARGE_PAGE_NBYTES))
    with pytest.raises(OSError, match="No space"):
        writer.close()
    assert raw.closed and writer.closed


def _maps_large(path: Path) -> bool:
    """Whether this system maps a file of whole large pieces by large pages at all."""
    with path.open("wb", buffering=0) as file:
        for _ in range(4):
            file.write(bytes(LARGE_PAGE_NBYTES))
        os.fsync(file.fileno())
    return _read_through(map_file(path)) == 1.0


def _read_through(mapped: mmap.mmap) -> float | None:
    pages = np.frombuffer(mapped, np.uint8)[::4096]
    assert pages.sum(dtype=np.int64) >= 0
    return large_page_share(mapped)


def test_a_file_that_edgellm_writes_is_mapped_by_large_pages(tmp_path: Path) -> None:
    if not _maps_large(tmp_path / "probe"):
        pytest.skip("this system or file system maps no file by large pages")
    shape = (4096, 4096)
    rows = np.ones(shape, np.float32).view(np.uint8)
    tensor = TensorPlan("a", shape, QUANT_TYPES["F32"], lambda: (rows[i : i + 100] for i in range(0, 4096, 100)))
    path = tmp_path / "a.gguf"
    write_gguf(path, {"general.architecture": ("llama", "STRING")}, [tensor])
    share = _read_through(map_file(path))
    assert share is not None and share > 0.9


def test_the_share_of_a_mapping_that_was_never_read_is_not_known(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(8192))
    with path.open("rb") as file:
        assert large_page_share(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)) in (None, 0.0)
