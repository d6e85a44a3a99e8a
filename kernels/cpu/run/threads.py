"""A team of threads that runs op tables: Python starts and wakes them, native code keeps them in step (team.py)."""

from __future__ import annotations

import ctypes
import sys
import threading
from collections.abc import Sequence

import numpy as np

from edgellm.kernels.cpu.compile.jit import KERNEL
from edgellm.kernels.cpu.lib import team_layout as at


def aligned_zeros(nbytes: int, alignment: int = 64) -> np.ndarray:
    """Zero bytes that begin at a cache line."""
    raw = np.zeros(nbytes + alignment, np.uint8)
    start = -raw.ctypes.data % alignment
    return raw[start : start + nbytes]


class ThreadTeam:
    """n threads; the caller of ``run`` is the first. ``addresses`` are the loaded team_* kernels, kept by ``code``.

    ``at_once`` may be set to fewer of them, which then do what follows.
    """

    def __init__(self, addresses: dict[str, int], n_threads: int, code: object = None) -> None:
        self.n_threads = self.at_once = n_threads
        self._code = code  # idle workers spin in it
        kernels = (KERNEL(addresses[f"team_{name}"]) for name in ("publish", "lead", "work", "decode"))
        self._publish, self._lead, self._work, self._decode = kernels
        self._record = aligned_zeros(at.WORKERS + n_threads * at.LINE)
        self._fields = self._record.view(np.int64)
        self._fields[at.N_THREADS // 8] = n_threads
        self._fields[at.YIELD // 8] = _yield_function()
        self._parked = np.zeros(max(n_threads, 1), np.int64)
        self._parked_view = self._parked[1:]
        self._record_address, self._parked_address = self._record.ctypes.data, self._parked.ctypes.data
        self._run_fields = np.zeros(at.DECODE_FIELDS, np.int64)
        self._run_fields_address = self._run_fields.ctypes.data
        self._wake = [threading.Semaphore(0) for _ in range(n_threads)]
        self._stopping = False
        self._threads = [
            threading.Thread(target=self._worker, args=(i,), name=f"edgellm-cpu-{i}", daemon=True)
            for i in range(1, n_threads)
        ]
        for i, thread in enumerate(self._threads, 1):
            self._fields[(at.WORKERS + i * at.LINE) // 8] = at.PARKED
            thread.start()

    def run(self, ops: int, first: int, last: int, step: int) -> None:
        """Run rows [first, last) of the op table at ``ops`` for the step record at ``step``."""
        if last <= first:
            return
        self._announce(ops, first, last, step, 0)
        self._lead(self._record_address, 0, 0, 0)

    def decode(
        self,
        ops: int,
        n_rows: int,
        step: int,
        n_steps: int,
        top_k: int,
        records: Sequence[int],
        angles: np.ndarray,
        stop_ids: Sequence[np.ndarray],
    ) -> int:
        """Up to ``n_steps`` decode steps in a row, the first n_rows rows each; how many were made.

        The step with the first end of a row is the last: by one of its stop ids, or because nothing could be drawn.

        top_k        address of the kernel
        records      addresses of its records, one for each token of the step, with room for so many draws
        angles       int64, for each rope the bytes from one step's angles to the next's
        stop_ids     int64, of each token
        """
        given = np.array(records, np.int64)
        stops = np.array([(ids.ctypes.data, len(ids)) for ids in stop_ids], np.int64)
        arrays = (stops.ctypes.data, angles.ctypes.data, len(angles))
        fields = (self._parked_address, top_k, given.ctypes.data, len(given), n_steps, 0, *arrays, 0)
        self._run_fields[: len(fields)] = fields
        self._announce(ops, 0, n_rows, step, self._run_fields_address)
        while True:
            self._decode(self._record_address, self._run_fields_address, 0, 0)
            if not self._run_fields[at.WAKE // 8]:
                return int(self._run_fields[at.N_DONE // 8])
            self._wake_parked()

    def hurry(self, wanted: bool) -> None:
        """Whether runs shall end with the step that they are at; from any thread, also before one begins."""
        self._run_fields[at.WAITED_FOR // 8] = wanted

    def _announce(self, ops: int, first: int, last: int, step: int, draws: int) -> None:
        self._fields[at.JOB // 8 : at.JOB // 8 + 6] = ops, first, last, step, draws, self.at_once
        self._publish(self._record_address, self._parked_address, 0, 0)
        self._wake_parked()

    def _wake_parked(self) -> None:
        for i, parked in enumerate(self._parked_view.tolist()):
            if parked:
                self._wake[i + 1].release()

    def _worker(self, thread: int) -> None:
        generation = np.zeros(1, np.int64)
        while True:
            self._wake[thread].acquire()
            if self._stopping:
                return
            self._work(self._record.ctypes.data, thread, int(generation[0]), generation.ctypes.data)

    def close(self) -> None:
        """End the threads. Safe to call twice."""
        self._stopping = True
        for thread, wake in zip(self._threads, self._wake[1:], strict=True):
            wake.release()
            # the garbage collector may call this on a worker, which then ends by itself
            while thread.is_alive() and thread is not threading.current_thread():
                wake.release()
                thread.join(0.05)


def _yield_function() -> int:
    """Address of what lets another thread run on this core, which takes nothing and returns an int."""
    if sys.platform == "win32":
        function = ctypes.windll.kernel32.SwitchToThread
    else:
        function = ctypes.CDLL(None).sched_yield
    return ctypes.cast(function, ctypes.c_void_p).value or 0
