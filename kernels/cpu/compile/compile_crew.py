"""Processes that compile kernels beside us on the first start: numba holds Python's lock, so threads would not help.

Each process takes the next kernel that nobody has taken, compiles it and leaves it in the cache on disk. Who takes one
first is settled by making a file for it. Nothing depends on a helper: what it does not bring is compiled by whoever
asked, so a program that cannot start Python again, or a helper that dies, costs time and nothing else.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

MAX_HELPERS = 3
LEAST_HEAVY = 2  # a helper needs half a second before it begins
WAIT_S = 60.0  # for what a helper has begun
LIGHT = 3
HELPER = "edgellm.kernels.cpu.compile.compile_helper"


class CompileCrew:
    """Helpers for the kernels ``names`` of a form, which go to the cache in ``folder``. For a ``with`` block."""

    def __init__(self, form: str, folder: Path | None, names: Sequence[str]) -> None:
        self._claims: Path | None = None
        self._helpers: list[subprocess.Popen[bytes]] = []
        n_heavy = sum(_weight(name) < LIGHT for name in names)
        if folder is None or n_heavy < LEAST_HEAVY or not _python_can_be_started():
            return
        with contextlib.suppress(OSError):
            self._claims = Path(tempfile.mkdtemp(prefix=".claims-", dir=folder))
            command = [sys.executable, "-m", HELPER, form, str(folder), str(self._claims), *names]
            for _ in range(min(_n_cores() - 1, MAX_HELPERS)):
                self._helpers.append(
                    subprocess.Popen(
                        command,
                        stdin=subprocess.DEVNULL,
                        stdout=subprocess.DEVNULL,
                        stderr=subprocess.DEVNULL,
                        creationflags=getattr(subprocess, "CREATE_NO_WINDOW", 0),
                    )
                )

    def claim(self, name: str) -> bool:
        """Whether the kernel is ours to compile."""
        return self._claims is None or claim(self._claims, name)

    def n_claimed(self) -> int:
        """Kernels that somebody has taken."""
        return 0 if self._claims is None else len(os.listdir(self._claims))

    def wait(self) -> None:
        """Until the helpers have ended; one that takes too long is stopped."""
        for helper in self._helpers:
            with contextlib.suppress(subprocess.TimeoutExpired):
                helper.wait(WAIT_S)

    def __enter__(self) -> CompileCrew:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for helper in self._helpers:
            helper.kill()
            helper.wait()
        if self._claims is not None:
            shutil.rmtree(self._claims, ignore_errors=True)


def heaviest_first(names: Sequence[str]) -> list[str]:
    """The kernels that take seconds before those that take tenths."""
    return sorted(names, key=_weight)


def _weight(name: str) -> int:
    """0 for the kernel that takes longest, LIGHT for those that take tenths of a second."""
    kinds = ("attention", "matmul_", "embed_")
    return next((i for i, kind in enumerate(kinds) if name.startswith(kind)), LIGHT)


def claim(claims: Path, name: str) -> bool:
    """Whether this process is the first to take a kernel; ``claims`` is a folder of theirs."""
    try:
        os.close(os.open(claims / name, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
    except FileExistsError:
        return False
    except OSError:  # the folder is gone or the disk is full
        return True
    return True


def _n_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _python_can_be_started() -> bool:
    """Not in a frozen program or one that has Python inside: their executable is something else."""
    return not getattr(sys, "frozen", False) and Path(sys.executable or "").name.lower().startswith("python")
