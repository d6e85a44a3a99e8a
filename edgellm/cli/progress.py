"""Progress of whatever takes longer than a second, on standard error: a bar in a terminal, else one plain line.

Downloads, loading, compiling kernels and reading a long prompt all report here. Nothing is left on the screen when a
stage is over, so that an answer starts on a clean line.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from edgellm.machine.progress import STAGES
from edgellm.machine.terminal import echo, human_bytes, one_line, wipe_line

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress

PLAIN_DELAY_S = 1.0
PREFILL_DELAY_S = 0.5


class ProgressBar:
    """Shows one stage at a time. Made for a ``with`` block, which always gives the terminal back as it was."""

    def __init__(self) -> None:
        self._terminal = sys.stderr.isatty()
        self._bars: RichProgress | None = None
        self._stage: str | None = None
        self._announced = False
        self._noted = False
        self._started = 0.0
        self._timer: threading.Timer | None = None

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(self, *error: object) -> None:
        self.finish()

    def update(self, stage: str, done: int, total: int | None = None, name: str = "") -> None:
        """``done`` of ``total`` (bytes, kernels, tokens) of a stage are behind us; ``name`` is what it works on."""
        if stage != self._stage:
            self.finish()
            self._stage, self._started = stage, time.monotonic()
        if stage == "prefill" and not self._announced and time.monotonic() - self._started < PREFILL_DELAY_S:
            return
        if self._terminal:
            self._draw(stage, done, total, name)
        else:
            self._say(stage, total, name)

    def of(self, stage: str, name: str = "") -> Callable[..., None]:
        """``update`` for one stage: a function of (done, total), and of what it works on where that changes."""
        return lambda done, total, what=name: self.update(stage, done, total, what)

    def note(self, text: str) -> None:
        """One line that does not move: what is being measured must not share the CPU with a spinner."""
        self.finish()
        if self._terminal:
            echo(f"{text} ...", nl=False, err=True)
            self._noted = True
        else:
            self._say_later(f"{text} ...")

    def finish(self) -> None:
        """End the stage and wipe its line."""
        if self._noted:
            wipe_line()
            self._noted = False
        if self._timer is not None:
            self._timer.cancel()
        if self._bars is not None:
            self._bars.stop()
        self._bars, self._stage, self._timer, self._announced = None, None, None, False

    def _draw(self, stage: str, done: int, total: int | None, name: str) -> None:
        if self._bars is None:
            self._bars = _bars(stage)
            self._bars.add_task(STAGES.get(stage, stage), total=None, detail="")
            self._bars.start()
            self._announced = True
        detail = one_line(name)
        self._bars.update(self._bars.task_ids[0], completed=done, total=total or None, detail=detail)

    def _say(self, stage: str, total: int | None, name: str) -> None:
        if self._announced:
            return
        self._announced = True
        amount = human_bytes(total) if total and stage in ("pull", "write", "quantize") else total
        what = "" if stage in ("compile", "quantize") else one_line(name)
        head = f"{STAGES.get(stage, stage)} {what}".rstrip()
        line = f"{head} ({amount}) ..." if total and stage != "load" else f"{head} ..."
        if stage in ("compile", "pull", "write", "quantize"):
            echo(line, err=True)
        else:
            self._say_later(line)

    def _say_later(self, line: str) -> None:
        """Print the line unless the stage is over within a second."""
        self._timer = threading.Timer(PLAIN_DELAY_S, lambda: echo(line, err=True))
        self._timer.daemon = True
        self._timer.start()


def _bars(stage: str) -> RichProgress:
    """The columns that suit a stage: rich takes 40 ms to import, so only a terminal pays for it."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        MofNCompleteColumn,
        ProgressColumn,
        SpinnerColumn,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )
    from rich.progress import Progress as RichProgress

    columns: list[ProgressColumn] = [SpinnerColumn("line"), TextColumn("{task.description}", markup=False)]
    if stage in ("pull", "write", "quantize"):
        columns += [BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn()]
    elif stage in ("compile", "prefill", "batch"):
        columns += [MofNCompleteColumn(), BarColumn(), *([TimeRemainingColumn()] if stage == "batch" else [])]
    columns.append(TextColumn("{task.fields[detail]}", markup=False))
    return RichProgress(*columns, console=Console(stderr=True), transient=True)
