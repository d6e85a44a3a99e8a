"""The native loop that walks the op table, and the barrier that keeps a team of threads in step.

Every thread of the team calls every kernel; a kernel deals its work by thread number or by the op's work counter.
All meet at a spinning barrier (about 0.3 us for two threads) before an op that needs what another has made, as the
op's flags say; with one token, small ops are left to thread 0. Between two steps a worker spins for a
while, since the next token usually follows at once, and then goes back to Python to sleep.

``team_decode`` goes from token to token by itself: it draws from the logits, and what was drawn is the next step's
token. All else that a step says stays as it is, so Python ends such a run where it would not.

The team's record (int64, one cache line each, so that spinning threads do not disturb each other):

    arrivals | phase | generation | n_threads | job (ops, first, last, step) | yield function | one line per worker

Written in numba like the kernels, but the last four functions are kernels only by their signature: ``op`` is the team's
record, and the other arguments are named in each.
"""

from __future__ import annotations

from edgellm.kernels.cpu.lib import team_layout as at
from edgellm.kernels.cpu.lib.layout import (
    ALONE,
    COUNTER,
    FLAGS,
    MEET,
    MEET_ALONE,
    N_TOKENS,
    OP_NBYTES,
    POSITIONS,
    ROPES,
    TOKENS,
)
from edgellm.kernels.cpu.lib.simd import (
    atomic_add,
    atomic_exchange,
    atomic_load,
    call_kernel,
    call_yield,
    forceinline,
    i32_of,
    load_i32,
    load_i64,
    pause,
    store_i32,
    store_i64,
)
from edgellm.kernels.cpu.lib.team_layout import (
    ARRIVALS,
    GENERATION,
    JOB_FIRST,
    JOB_LAST,
    JOB_OPS,
    JOB_STEP,
    LINE,
    N_THREADS,
    PARKED,
    PHASE,
    RUNNING,
    WORKERS,
    YIELD,
)
from edgellm.kernels.vocabulary_layout import ROW, TOKEN

SPINS_BEFORE_YIELD = 3_000  # about 0.1 ms: when a core is taken by others, let them finish
SPINS_BEFORE_PARKING = 60_000  # about 3 ms without a new step


@forceinline
def _spin(team, spins):
    pause()
    if spins > SPINS_BEFORE_YIELD and spins % 64 == 0 and load_i64(team + YIELD) != 0:
        call_yield(load_i64(team + YIELD))


@forceinline
def _barrier(team, n_threads):
    if n_threads > 1:
        phase = atomic_load(team + PHASE)
        if atomic_add(team + ARRIVALS, 1) == n_threads - 1:
            atomic_exchange(team + ARRIVALS, 0)
            atomic_exchange(team + PHASE, phase + 1)
        else:
            spins = 0
            while atomic_load(team + PHASE) == phase:
                spins += 1
                _spin(team, spins)


@forceinline
def _walk(team, thread):
    ops, step, n_threads = load_i64(team + JOB_OPS), load_i64(team + JOB_STEP), load_i64(team + N_THREADS)
    one_token = load_i64(step + N_TOKENS) == 1
    meet = MEET
    if one_token:
        meet = MEET_ALONE
    for i in range(load_i64(team + JOB_FIRST), load_i64(team + JOB_LAST)):
        op = ops + i * OP_NBYTES
        flags = load_i64(op + FLAGS)
        if flags & meet:
            _barrier(team, n_threads)
        if one_token and flags & ALONE:
            if thread == 0:
                call_kernel(load_i64(op), op, step, 0, 1)
        else:
            call_kernel(load_i64(op), op, step, thread, n_threads)
    _barrier(team, n_threads)


@forceinline
def _publish(team, parked):
    """The number of workers that Python must wake."""
    n = 0
    atomic_add(team + GENERATION, 1)
    for worker in range(1, load_i64(team + N_THREADS)):
        state = atomic_exchange(team + WORKERS + worker * LINE, RUNNING)
        store_i64(parked + worker * 8, state)
        n += state
    return n


@forceinline
def _go_on(team, decode, token):
    """Make the step record and the op table ready for the token that follows."""
    step, ops = load_i64(team + JOB_STEP), load_i64(team + JOB_OPS)
    store_i32(load_i64(step + TOKENS), i32_of(token))
    positions = load_i64(step + POSITIONS)
    store_i32(positions, i32_of(load_i32(positions) + 1))
    angles, nbytes = load_i64(step + ROPES), load_i64(decode + at.ANGLES)
    for i in range(load_i64(decode + at.N_ROPES)):
        for pair in (angles + i * 16, angles + i * 16 + 8):
            store_i64(pair, load_i64(pair) + load_i64(nbytes + i * 8))
    for i in range(load_i64(team + JOB_FIRST), load_i64(team + JOB_LAST)):
        store_i64(ops + i * OP_NBYTES + COUNTER, 0)


@forceinline
def _ends(decode, token):
    """Whether it is one of the ids that end a run."""
    stops, found = load_i64(decode + at.STOPS), False
    for i in range(load_i64(decode + at.N_STOPS)):
        found = found or load_i64(stops + i * 8) == token
    return found


def team_publish(team, parked, _unused, _unused2):
    """Announce the job in the record. ``parked`` gets, per worker, 1 if Python must wake it."""
    _publish(team, parked)


def team_lead(team, _unused, _unused2, _unused3):
    """Thread 0's part of the published job; returns when all threads are done."""
    _walk(team, 0)


def team_decode(team, decode, _unused, _unused2):
    """Thread 0's part of the published job, a decode step, and of those that follow; see the record in team_layout."""
    record, done = load_i64(decode + at.RECORD), load_i64(decode + at.N_DONE)
    store_i64(decode + at.WAKE, 0)
    more = True
    while more:
        _walk(team, 0)
        row = load_i64(record + ROW)
        call_kernel(load_i64(decode + at.VOCABULARY), record, 0, 0, 1)
        token = load_i64(row + TOKEN)
        if token >= 0:
            done += 1
        more = token >= 0 and done < load_i64(decode + at.N_STEPS) and not _ends(decode, token)
        if more:
            _go_on(team, decode, token)
            if _publish(team, load_i64(decode + at.PARKED_OF)) > 0:
                store_i64(decode + at.WAKE, 1)
                more = False
    store_i64(decode + at.N_DONE, done)


def team_work(team, thread, generation, last_generation):
    """A worker: do the jobs after ``generation`` until none comes for a while; the last one done is stored."""
    state = team + WORKERS + thread * LINE
    stay = True
    while stay:
        spins = 0
        while atomic_load(team + GENERATION) == generation and spins < SPINS_BEFORE_PARKING:
            spins += 1
            pause()
        if atomic_load(team + GENERATION) == generation:
            atomic_exchange(state, PARKED)
            if atomic_load(team + GENERATION) != generation:
                # a job came just now: whoever takes the mark back decides who wakes us
                stay = atomic_exchange(state, RUNNING) == PARKED
            else:
                stay = False
        if stay:
            generation += 1
            _walk(team, thread)
    store_i64(last_generation, generation)
