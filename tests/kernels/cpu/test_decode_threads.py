"""The number of threads that decodes fastest, on a machine and a clock that are made up."""

from __future__ import annotations

import random
from collections.abc import Callable, Collection
from types import SimpleNamespace

import pytest

from edgellm.kernels.cpu.run import decode_threads
from edgellm.kernels.cpu.run.decode_threads import DecodeThreads

Step = Callable[[int, float], float]  # seconds of a step, by threads and the time of day
RUN_S = 0.025  # steps of one call, as the engine makes them


class Machine:
    """A team of ``most`` threads that answers, in runs of steps, on a clock of its own."""

    def __init__(self, most: int, step_s: Step, kin: Collection[DecodeThreads] = ()) -> None:
        self.threads = DecodeThreads(SimpleNamespace(n_threads=most, at_once=most), kin)
        self.most, self.step_s, self.now = most, step_s, 0.0
        self.used: list[int] = []  # by call

    def answer(self, seconds: float) -> float:
        """Steps made in so long, as a share of those that the best number of threads would have made."""
        end, n_made, n_best = self.now + seconds, 0.0, 0.0
        while self.now < end:
            step_s = self.step_s(self.threads.n, self.now)
            n_steps = max(1, int(RUN_S / step_s))
            n_made += n_steps
            n_best += n_steps * step_s / min(self.step_s(n, self.now) for n in range(1, self.most + 1))
            self.used.append(self.threads.n)
            self.now += n_steps * step_s
            self.threads.took(n_steps * step_s, n_steps)
        return n_made / n_best


@pytest.mark.parametrize("slow", [1, 20], ids=["small model", "large model"])
@pytest.mark.parametrize(
    ("most", "step_ms", "best"),
    [
        (1, lambda n, now: 8.0, 1),
        (2, lambda n, now: 8.0 / n, 2),
        (2, lambda n, now: 8.0 * n, 1),
        (8, lambda n, now: 32.0 / n, 8),  # more are always faster
        (16, lambda n, now: 8 / min(n, 8) + 0.03 * n, 8),  # memory is full with eight
        (16, lambda n, now: 4.0, 16),  # no difference: all stay
        (12, lambda n, now: 4.0 + 4 * (n > 3), 3),  # the others share what one core has
        (8, lambda n, now: 32.0 / n + 200 * (now < 0.3), 8),  # at first the file comes in
    ],
)
def test_the_fastest_number_of_threads_is_found_and_kept(most: int, step_ms: Step, best: int, slow: int) -> None:
    machine = Machine(most, lambda n, now: slow * step_ms(n, now) / 1e3)
    machine.answer(slow * 4)
    assert machine.threads.found
    machine.used.clear()
    assert machine.answer(slow * 60) > 0.98
    assert machine.used.count(best) > 0.93 * len(machine.used)
    assert machine.threads.kept == best


def test_trials_end_where_fewer_threads_are_much_slower() -> None:
    machine = Machine(8, lambda n, now: 0.032 / n)
    machine.answer(30)
    assert set(machine.used) == {8, 6}


def test_all_threads_of_a_machine_where_nothing_changes_try_nothing_again() -> None:
    machine = Machine(2, lambda n, now: 0.022 / n**0.3)
    machine.answer(1)
    machine.used.clear()
    machine.answer(600)
    assert set(machine.used) == {2}


def shared(n: int, now: float, until: float = 60) -> float:
    """Two cores; from 20 s on others have half of the second, for which all meetings wait."""
    alone, both = 0.023, 0.019
    return alone if n == 1 else both * (2 if 20 <= now < until else 1)


def test_fewer_threads_decode_while_another_program_has_a_core_and_all_of_them_when_it_has_gone() -> None:
    machine = Machine(2, shared)
    machine.answer(20)
    assert machine.threads.n == 2
    assert machine.answer(2) > 0.85, "the first seconds, in which it is found"
    assert machine.answer(38) > 0.98
    assert machine.used.count(1) > 0.9 * 40 / 0.023
    machine.answer(7)
    machine.used.clear()
    assert machine.answer(60) > 0.99
    assert set(machine.used) == {2}


def test_a_neighbour_that_was_there_before_is_found_at_once_and_missed_when_it_goes() -> None:
    machine = Machine(4, lambda n, now: 0.06 / min(n, 3) * (1 + (n == 4) * (now < 30)))
    machine.answer(2)
    assert machine.threads.n == 3
    machine.answer(40)
    assert machine.threads.kept == 3, "the fourth brings nothing"


def test_rounds_that_change_nothing_become_seldom() -> None:
    machine = Machine(2, lambda n, now: 0.02 * n)
    machine.answer(60)
    first = machine.used.count(2)
    machine.used.clear()
    machine.answer(60)
    assert 0 < machine.used.count(2) < first
    assert machine.used.count(2) < 0.02 * len(machine.used)


@pytest.mark.parametrize("seed", range(4))
def test_steps_that_are_disturbed_at_random_cost_little(seed: int) -> None:
    rng, clock = random.Random(seed), [0.0, 0.0]

    def noisy(n: int, now: float) -> float:
        if now != clock[0]:
            clock[:] = now, rng.random() ** 8 * 0.06
        return 0.023 / n**0.27 + clock[1]

    machine = Machine(2, noisy)
    machine.answer(5)
    machine.used.clear()
    assert machine.answer(300) > 0.95
    assert machine.used.count(2) > 0.7 * len(machine.used)


def test_steps_of_several_texts_begin_with_what_was_found_for_others_and_hear_of_a_change() -> None:
    kin: list[DecodeThreads] = []

    def step_s(n: int, now: float) -> float:
        return 0.02 * n if now < 60 else 0.02 / n

    one = Machine(2, step_s, kin)
    kin.append(one.threads)
    one.answer(2)
    four = Machine(2, step_s, kin)
    kin.append(four.threads)
    assert (four.threads.kept, four.threads.found) == (1, True)
    for machine in (one, four):
        machine.answer(60 - machine.now)
    assert [threads.kept for threads in kin] == [1, 1]
    one.answer(5)
    assert one.threads.kept == 2
    four.answer(0.5)
    assert four.threads.kept == 2


def test_an_answer_that_grows_is_tried_again_and_keeps_its_threads() -> None:
    machine = Machine(2, lambda n, now: (0.02 + 0.001 * now) / n**0.5)
    machine.answer(60)
    assert machine.threads.kept == 2
    assert 0 < machine.used.count(1) < 0.05 * len(machine.used)


def test_a_team_has_so_many_threads_within_its_decode_steps_and_all_of_them_elsewhere(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = [0.0]
    monkeypatch.setattr(decode_threads, "perf_counter", lambda: clock[0])
    team = SimpleNamespace(n_threads=8, at_once=8)
    threads, used = DecodeThreads(team), set[int]()
    for _ in range(60):
        with threads as trial:
            used.add(team.at_once)
            trial.n_steps = 4
            clock[0] += 0.025
        assert team.at_once == 8
    assert threads.found
    assert used == {8, 6, 4, 3, 2, 1}


def test_an_answer_after_a_pause_finds_out_soon_that_the_neighbour_has_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(decode_threads, "perf_counter", lambda: clock[0])
    threads = DecodeThreads(SimpleNamespace(n_threads=2, at_once=2))

    def answer(seconds: float, step_s: Callable[[int], float]) -> None:
        end = clock[0] + seconds
        while clock[0] < end:
            with threads:
                clock[0] += step_s(threads.n)

    answer(30, lambda n: 0.02 * n)
    assert threads.kept == 1
    clock[0] += 20
    answer(0.5, lambda n: 0.02 / n)
    assert threads.kept == 2


def test_a_step_that_ends_in_an_error_is_no_trial() -> None:
    team = SimpleNamespace(n_threads=8, at_once=8)
    threads = DecodeThreads(team)
    for _ in range(60):
        with pytest.raises(ValueError, match="broken"), threads:
            raise ValueError("broken")
    assert (threads.n, threads.found, team.at_once) == (8, False, 8)
