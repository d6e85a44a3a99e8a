"""The number of threads that is worth starting: cores once each, of those that this process may use."""

from __future__ import annotations

import ctypes
import os
import struct
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from edgellm.machine import cores


def test_a_core_counts_once_and_a_cpu_that_says_nothing_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def path(name: str) -> Path:
        return tmp_path / name.lstrip("/")

    for cpu, siblings in ((0, "0,4"), (4, "0,4"), (1, "1,5"), (5, "1,5")):
        file = path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        file.parent.mkdir(parents=True)
        file.write_text(siblings + "\n")
    monkeypatch.setattr(cores, "Path", path)
    assert cores._physical({0, 1, 4, 5}) == 2
    assert cores._physical({0, 4}) == cores._physical({4}) == 1
    assert cores._physical({0, 1, 7}) == 3


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has such sets and groups")
@pytest.mark.parametrize(("quota", "expected"), [(64, 1), (1, 1)])
def test_a_process_of_one_cpu_has_one_thread(quota: int, expected: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0})
    monkeypatch.setattr(cores, "_quota", lambda: quota)
    assert cores.default_threads() == expected


class Kernel32:
    """Windows's library on a machine with cores of these CPUs, to a process with a mask."""

    def __init__(self, cpus: list[int], mask: int, knows: bool = True) -> None:
        # the second record is longer than the others: its core is of two groups
        tails = [struct.pack("<HHHH", 0, 0, 0, 0) + b"\0" * (16 * (i == 1)) for i in range(len(cpus))]
        self.records = b"".join(
            struct.pack("<II24xQ", 0, 40 + len(tail), core) + tail for core, tail in zip(cpus, tails, strict=True)
        )
        self.mask, self.knows = mask, knows

    def GetLogicalProcessorInformationEx(self, kind: int, buffer: Any, length: Any) -> int:
        fits = length._obj.value >= len(self.records)
        length._obj.value = len(self.records)
        if buffer is None or not fits or not self.knows:
            return 0
        ctypes.memmove(buffer, self.records, len(self.records))
        return 1

    def GetProcessAffinityMask(self, process: Any, ours: Any, system: Any) -> int:
        ours._obj.value, system._obj.value = self.mask, 0xFF
        return 1


@pytest.mark.parametrize(("mask", "expected"), [(0xFF, 5), (0, 5), (0b11, 1), (0b110, 2), (0b1000_0000, 1)])
def test_cores_of_windows_count_once_where_one_of_their_cpus_is_ours(
    mask: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "platform", "win32")
    library = Kernel32([0b11, 0b1100, 0b11_0000, 0b100_0000, 0b1000_0000], mask)
    monkeypatch.setattr(ctypes, "windll", SimpleNamespace(kernel32=library), raising=False)
    assert cores.default_threads() == expected


def test_a_windows_that_does_not_say_has_its_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setattr(ctypes, "windll", SimpleNamespace(kernel32=Kernel32([1], 1, knows=False)), raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    assert cores.default_threads() == 6
