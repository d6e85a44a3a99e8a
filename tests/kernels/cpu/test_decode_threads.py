"""The number of threads that decodes fastest: the trials, on times that are made up."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import pytest

from edgellm.kernels.cpu.run.decode_threads import DecodeThreads


class Trials:
    """A team of ``most`` threads whose steps take ``seconds(n, number of the call)``."""

    def __init__(self, most: int, seconds: Callable[[int, int], float]) -> None:
        self.team = SimpleNamespace(n_threads=most, at_once=most)
        self.threads, self.used = DecodeThreads(self.team), list[int]()
        while not self.threads.found:
            self.used.append(self.threads.n)
            self.threads.took(seconds(self.threads.n, len(self.used)))
            assert len(self.used) <= 36, "trials end"


@pytest.mark.parametrize(
    ("most", "seconds", "best"),
    [
        (1, lambda n, i: 1.0, 1),
        (2, lambda n, i: 1.0 * n, 2),  # too few to try
        (8, lambda n, i: 8.0 / n, 8),  # more are always faster
        (16, lambda n, i: 1 / min(n, 8) + 0.004 * n, 8),  # memory is full with eight
        (16, lambda n, i: 1.0, 16),  # no difference: all stay
        (12, lambda n, i: 1.0 + (n > 3), 3),  # the others share what one core has
        (8, lambda n, i: (8.0 / n) * (1 + 3 * (i % 3 == 0)), 8),  # every third call disturbed
        (8, lambda n, i: 8.0 / n + 50 * (i < 3), 8),  # the first calls fetch the file
    ],
)
def test_the_fastest_number_of_threads_is_found_and_kept(
    most: int, seconds: Callable[[int, int], float], best: int
) -> None:
    threads = Trials(most, seconds).threads
    with threads:
        assert threads.n == best
    assert threads.n == best


def test_trials_end_where_fewer_threads_are_much_slower() -> None:
    assert set(Trials(8, lambda n, i: 8.0 / n).used) == {8, 6}


def test_a_team_has_so_many_threads_within_its_decode_steps_and_all_of_them_elsewhere() -> None:
    team = SimpleNamespace(n_threads=8, at_once=8)
    threads, used = DecodeThreads(team), set[int]()
    for _ in range(60):
        with threads as trial:
            used.add(team.at_once)
            trial.n_steps = 4
        assert team.at_once == 8
    assert threads.found
    assert used <= {8, 6, 4, 3, 2, 1}


def test_a_step_that_ends_in_an_error_is_no_trial() -> None:
    team = SimpleNamespace(n_threads=8, at_once=8)
    threads = DecodeThreads(team)
    for _ in range(60):
        with pytest.raises(ValueError, match="broken"), threads:
            raise ValueError("broken")
    assert (threads.n, threads.found, team.at_once) == (8, False, 8)
