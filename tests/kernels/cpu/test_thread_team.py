"""The thread team under hammering: every op runs once on every thread, in order, and no start or stop hangs."""

from __future__ import annotations

import ctypes
import faulthandler
import functools
import random
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import numpy as np
import pytest
from cpu_programs import FORMS, kernel_cache, load_kernel

from edgellm.kernels.cpu.compile import isa, jit
from edgellm.kernels.cpu.compile.kernel_table import TEAM
from edgellm.kernels.cpu.lib import draw_layout, layout
from edgellm.kernels.cpu.lib import team_layout as at
from edgellm.kernels.cpu.lib.simd import atomic_add, atomic_load, load_i64, store_i64
from edgellm.kernels.cpu.run import threads
from edgellm.kernels.cpu.run.threads import ThreadTeam

HANG_S = 300  # a hang, not slowness: the whole file takes seconds


@pytest.fixture(autouse=True)
def hang_guard() -> Iterator[None]:
    """End the test run with the stacks of all threads when one waits for ever."""
    faulthandler.dump_traceback_later(HANG_S, exit=True)
    yield
    faulthandler.cancel_dump_traceback_later()


# Kernels of the test. Arguments of a row: address of cells (int64), a number.
CELLS, NUMBER = layout.ARGUMENTS, layout.ARGUMENTS + 8


def count(op, step, thread, n_threads):  # type: ignore[no-untyped-def]
    """cells[thread] += number; cells[7] += 1 whoever comes."""
    cells = load_i64(op + CELLS)
    store_i64(cells + thread * 8, load_i64(cells + thread * 8) + load_i64(op + NUMBER))
    atomic_add(cells + 56, 1)


def fold(op, step, thread, n_threads):  # type: ignore[no-untyped-def]
    """Thread 0 alone: cells[8] = 3 cells[8] + the sum of all threads' cells + number, wrapping."""
    if thread == 0:
        cells = load_i64(op + CELLS)
        total = load_i64(cells + 64) * 3 + load_i64(op + NUMBER)
        for i in range(8):
            total += load_i64(cells + i * 8)
        store_i64(cells + 64, total)


def share(op, step, thread, n_threads):  # type: ignore[no-untyped-def]
    """Items dealt by the row's work counter; each is added to cells[9] by whoever takes it."""
    item = atomic_add(op + layout.COUNTER, 1)
    while item < load_i64(op + NUMBER):
        atomic_add(load_i64(op + CELLS) + 72, item)
        item = atomic_add(op + layout.COUNTER, 1)


def linger(op, step, thread, n_threads):  # type: ignore[no-untyped-def]
    """A thread that is late by a number of turns of its own."""
    cells = load_i64(op + CELLS)
    for _ in range(load_i64(op + NUMBER) * (thread + 1)):
        atomic_load(cells + 56)


def draw_next(record, step, thread, n_threads):  # type: ignore[no-untyped-def]
    """In place of the vocabulary kernel: one more than the last token, in the next row."""
    row = load_i64(record + draw_layout.ROW)
    token = load_i64(row - draw_layout.ROW_NBYTES + draw_layout.TOKEN) + 1
    store_i64(row + draw_layout.TOKEN, token)
    store_i64(record + draw_layout.ROW, row + draw_layout.ROW_NBYTES)


@functools.cache
def kernels() -> tuple[jit.CodeMemory, dict[str, int], list[object]]:
    """Addresses of the team's kernels and of the five above."""
    code, addresses = jit.CodeMemory(), {}
    for name, data in kernel_cache(FORMS[0]).objects(TEAM).items():
        addresses[name] = code.load(name, data)
    kept: list[object] = [code]
    for function in (count, fold, share, linger, draw_next):
        memory, kernel = load_kernel(function.__name__, function, isa.detect())
        kept.append((memory, kernel))
        addresses[function.__name__] = ctypes.cast(kernel, ctypes.c_void_p).value or 0
    return code, addresses, kept


def make_team(n_threads: int) -> ThreadTeam:
    code, addresses, _ = kernels()
    return ThreadTeam(addresses, n_threads, code)


class Table:
    """A table of ops over 16 cells, and what the cells must hold after a run on ``n_threads`` threads."""

    def __init__(self, ops: list[tuple[str, int]], n_threads: int) -> None:
        _, addresses, _ = kernels()
        self.ops, self.n_threads = ops, n_threads
        self.cells = np.zeros(16, np.int64)
        self.rows = np.zeros((len(ops), layout.OP_FIELDS), np.int64)
        for row, (name, number) in zip(self.rows, ops, strict=True):
            row[[layout.KERNEL // 8, CELLS // 8, NUMBER // 8]] = addresses[name], self.cells.ctypes.data, number
            row[layout.FLAGS // 8] = layout.MEET | layout.MEET_ALONE
        self.step = np.zeros(layout.STEP_FIELDS, np.int64)
        self.step[layout.N_TOKENS // 8] = 2

    def run(self, team: ThreadTeam) -> None:
        self.cells[:] = 0
        self.rows[:, layout.COUNTER // 8] = 0
        team.run(self.rows.ctypes.data, 0, len(self.ops), self.step.ctypes.data)

    def expected(self) -> np.ndarray:
        cells = np.zeros(16, np.int64)
        for name, number in self.ops:
            if name == "count":
                cells[: self.n_threads] += number
                cells[7] += self.n_threads
            elif name == "fold":
                cells[8] = cells[8] * 3 + number + cells[:8].sum()
            elif name == "share":
                cells[9] += number * (number - 1) // 2
        return cells


def random_table(rng: random.Random, n_threads: int, n_ops: int) -> Table:
    return Table(
        [(rng.choice(("count", "fold", "share", "linger")), rng.randrange(20)) for _ in range(n_ops)], n_threads
    )


def test_twenty_thousand_short_tables_with_pauses_between() -> None:
    """Pauses around the 3 ms after which a worker sleeps: it is woken at every stage of falling asleep."""
    rng = random.Random(0)
    for n_threads, n_runs in ((1, 4000), (2, 14000), (3, 1400), (4, 600)):
        team = make_team(n_threads)
        tables = [random_table(rng, n_threads, n) for n in (1, 1, 2, 3, 5, 8) for _ in range(5)]
        expected = [table.expected() for table in tables]
        for i in range(n_runs):
            which = rng.randrange(len(tables))
            tables[which].run(team)
            assert np.array_equal(tables[which].cells, expected[which]), (n_threads, i)
            if i % 40 == 0:
                time.sleep(rng.choice((0, 0.0001, 0.001, 0.003, 0.004, 0.006)))
            elif i % 40 == 1:
                end = time.perf_counter() + rng.random() * 0.005
                while time.perf_counter() < end:
                    pass
        team.close()


def parked(team: ThreadTeam) -> bool:
    """Whether all workers sleep."""
    return all(team._fields[(at.WORKERS + i * at.LINE) // 8] == at.PARKED for i in range(1, team.n_threads))


def wait_until(condition: Callable[[], bool]) -> None:
    while not condition():
        time.sleep(0.001)


@pytest.mark.parametrize("n_threads", [1, 2, 4])
def test_a_team_wakes_from_sleep_every_time(n_threads: int) -> None:
    team, table = make_team(n_threads), Table([("count", 3), ("fold", 1), ("share", 9)], n_threads)
    for _ in range(30):
        wait_until(lambda: parked(team))
        table.run(team)
        assert np.array_equal(table.cells, table.expected())
    team.close()


@pytest.mark.parametrize("n_threads", [1, 2, 4])
@pytest.mark.parametrize("n_stops", [1, 8_000_000], ids=["awake", "asleep"])
def test_a_run_of_decode_steps_wakes_workers_that_fell_asleep_within_it(n_threads: int, n_stops: int) -> None:
    """What lies between two steps takes no time, or so long that every worker sleeps."""
    team, table = make_team(n_threads), Table([("count", 3), ("fold", 1), ("share", 9)], n_threads)
    n_rows = 3
    table.step[layout.N_TOKENS // 8] = n_rows
    tokens, positions = np.zeros(n_rows, np.int32), np.array([40, 2, 7], np.int32)
    stops = [np.full(n_stops, -7), np.array([-7, 1015]), np.array([], np.int64)]
    table.step[[layout.TOKENS // 8, layout.POSITIONS // 8]] = tokens.ctypes.data, positions.ctypes.data
    pairs, nbytes = np.array([[1000, 2000]]), np.array([64])
    table.step[layout.ROPES // 8] = pairs.ctypes.data
    rows = np.zeros((n_rows, 60, draw_layout.ROW_FIELDS), np.int64)
    records = np.zeros((n_rows, draw_layout.FIELDS), np.int64)
    token = draw_layout.TOKEN // 8
    n_returns, wake = 0, team._wake_parked

    def counted() -> None:
        nonlocal n_returns
        n_returns += team._run_fields[at.WAKE // 8] != 0
        wake()

    team._wake_parked = counted  # type: ignore[method-assign]
    for stop, n in ((8, 8), (40, 15)):  # the steps that were asked for; the stop id
        rows[:, 0, token], positions[:], pairs[:] = (0, 1000, 2000), (40, 2, 7), [[1000, 2000]]
        records[:, draw_layout.ROW // 8] = rows[:, 1].ctypes.data + np.arange(n_rows) * rows.strides[0]
        table.cells[:] = 0
        table.rows[:, layout.COUNTER // 8] = 0
        draw, addresses = kernels()[1]["draw_next"], [record.ctypes.data for record in records]
        made = team.decode(table.rows.ctypes.data, 3, table.step.ctypes.data, stop, draw, addresses, nbytes, stops)
        assert made == n
        assert rows[:, 1 : n + 1, token].tolist() == [[base + i for i in range(1, n + 1)] for base in (0, 1000, 2000)]
        assert tokens.tolist() == [n - 1, 1000 + n - 1, 2000 + n - 1]
        assert positions.tolist() == [40 + n - 1, 2 + n - 1, 7 + n - 1]
        assert pairs.tolist() == [[1000 + 64 * (n - 1), 2000 + 64 * (n - 1)]]
        assert table.cells[:n_threads].tolist() == [3 * n] * n_threads
        assert table.cells[9] == 36 * n, "every step begins with fresh counters"
    if n_stops > 1 and n_threads > 1:
        assert n_returns, "nobody slept, so nothing was tried"
    team.close()


@pytest.mark.parametrize("n_threads", [1, 2])
def test_a_run_ends_with_its_step_when_somebody_waits(n_threads: int) -> None:
    team, table = make_team(n_threads), Table([("count", 1)], n_threads)
    tokens, positions, row = np.zeros(1, np.int32), np.zeros(1, np.int32), np.zeros((40, 8), np.int64)
    table.step[layout.N_TOKENS // 8] = 1
    table.step[[layout.TOKENS // 8, layout.POSITIONS // 8]] = tokens.ctypes.data, positions.ctypes.data
    record, nothing = np.zeros(draw_layout.FIELDS, np.int64), np.zeros(0, np.int64)
    for wanted, n in ((False, 5), (True, 1), (False, 5)):
        record[draw_layout.ROW // 8] = row.ctypes.data + row.strides[0]
        team.hurry(wanted)
        arguments = 5, kernels()[1]["draw_next"], [record.ctypes.data], nothing, [nothing]
        assert team.decode(table.rows.ctypes.data, 1, table.step.ctypes.data, *arguments) == n
    team.close()


@pytest.mark.parametrize("n_threads", [1, 2, 4])
def test_close_while_asleep_while_awake_and_before_the_first_run(n_threads: int) -> None:
    for state in ("never run", "asleep", "awake") * 10:
        team, table = make_team(n_threads), Table([("count", 1)], n_threads)
        if state != "never run":
            table.run(team)
        if state == "asleep":
            wait_until(lambda team=team: parked(team))
        team.close()
        team.close()
        assert not any(thread.is_alive() for thread in team._threads)


def test_a_thread_that_waits_for_long_gives_its_core_away_on_every_system(monkeypatch: pytest.MonkeyPatch) -> None:
    for platform in ("linux", "win32"):
        function = ctypes.CDLL(None).getpid if platform == "win32" else ctypes.CDLL(None).sched_yield
        monkeypatch.setattr(sys, "platform", platform)
        monkeypatch.setattr(
            ctypes, "windll", SimpleNamespace(kernel32=SimpleNamespace(SwitchToThread=function)), raising=False
        )
        assert threads._yield_function() == ctypes.cast(function, ctypes.c_void_p).value


def test_a_team_is_made_used_and_closed_many_times() -> None:
    before = threading.active_count()
    rng = random.Random(1)
    for i in range(200):
        n_threads = 1 + i % 4
        team, table = make_team(n_threads), random_table(rng, n_threads, 4)
        for _ in range(i % 3):
            table.run(team)
            assert np.array_equal(table.cells, table.expected())
        team.close()
    assert threading.active_count() == before


def test_more_threads_than_cores_finish() -> None:
    """The cells know seven threads; what counts here is that all meet, on cores that others want too."""
    n_threads = 7
    team, table = make_team(n_threads), Table([("count", 1), ("fold", 0), ("linger", 50), ("share", 30)] * 5, n_threads)
    for _ in range(30):
        table.run(team)
        assert np.array_equal(table.cells, table.expected())
    team.close()


def test_a_team_keeps_its_pace_beside_busy_python_threads() -> None:
    """Others hold Python's lock while workers wake: late, but never wrong and never stuck."""
    stop = threading.Event()

    def busy() -> None:
        while not stop.is_set():
            sum(range(1000))

    others = [threading.Thread(target=busy, daemon=True) for _ in range(3)]
    for thread in others:
        thread.start()
    team, table = make_team(2), Table([("count", 2), ("fold", 5)] * 3, 2)
    for i in range(60):
        table.run(team)
        assert np.array_equal(table.cells, table.expected())
        if i % 10 == 0:
            time.sleep(0.01)
    stop.set()
    for thread in others:
        thread.join()
    team.close()


def test_two_teams_do_not_disturb_each_other() -> None:
    """Each run by a Python thread of its own, as two loaded models are."""
    wrong: list[int] = []

    def hammer(seed: int) -> None:
        rng, team = random.Random(seed), make_team(2)
        for i in range(300):
            table = random_table(rng, 2, 4)
            table.run(team)
            if not np.array_equal(table.cells, table.expected()):
                wrong.append(i)
        team.close()

    pair = [threading.Thread(target=hammer, args=(seed,)) for seed in (1, 2)]
    for thread in pair:
        thread.start()
    for thread in pair:
        thread.join()
    assert not wrong


def test_ops_left_to_one_thread_are_done_once_and_in_order() -> None:
    """With one token a row marked ALONE runs on thread 0 only; with more on all, and MEET keeps the order."""
    team = make_team(3)
    for n_tokens, runs in ((1, 1), (2, 3)):
        table = Table([("count", 5), ("fold", 0), ("count", 1), ("fold", 2)], 3)
        table.rows[:, layout.FLAGS // 8] |= layout.ALONE
        table.step[layout.N_TOKENS // 8] = n_tokens
        for _ in range(500):
            table.run(team)
            assert table.cells[7] == 2 * runs
            assert (table.cells[:3] == [6, 6 * (runs == 3), 6 * (runs == 3)]).all()
    team.close()


def test_jobs_of_fewer_threads_leave_the_others_out_who_sleep_and_come_back() -> None:
    rng = random.Random(3)
    team = make_team(3)
    tables = {n: [random_table(rng, n, size) for size in (1, 2, 5)] for n in (1, 2, 3)}
    for i in range(300):
        team.at_once = rng.choice((1, 2, 3))
        table = rng.choice(tables[team.at_once])
        table.run(team)
        assert np.array_equal(table.cells, table.expected()), (team.at_once, i)
        if i % 30 == 0:
            time.sleep(rng.choice((0, 0.0001, 0.003, 0.004, 0.006)))
    team.at_once = 1
    while not parked(team):
        tables[1][0].run(team)  # jobs that others do keep nobody awake
    team.at_once = 3
    for table in tables[3]:
        table.run(team)
        assert np.array_equal(table.cells, table.expected())
    team.close()


def test_no_rows_are_no_work_and_hold_nobody_up() -> None:
    team, table = make_team(2), Table([("count", 3), ("share", 9)], 2)
    table.cells[:] = 5
    team.run(table.rows.ctypes.data, 2, 2, table.step.ctypes.data)
    assert (table.cells == 5).all()
    table.run(team)
    assert np.array_equal(table.cells, table.expected())
    team.close()
