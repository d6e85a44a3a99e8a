"""The native loop that walks the op table, and the barrier that keeps a team of threads in step.

Every thread of the team calls every kernel; a kernel deals its work by thread number or by the op's work counter.
All meet at a spinning barrier (about 0.3 us for two threads) before an op that needs what another has made, as the
op's flags say; with one token, small ops are left to thread 0. Between two steps a worker spins for a
while, since the next token usually follows at once, and then goes back to Python to sleep. So do workers that jobs of
fewer threads leave out.

``team_decode`` goes from token to token by itself: the threads draw from the logits, a row each, and what was drawn is
the next step's tokens. All else that a step says stays as it is, so Python ends such a run where it would not.

The team's record (int64, one cache line each, so that spinning threads do not disturb each other):

    arrivals | phase | generation | n_threads | job (ops, first, last, step, draws, threads) | yield function
    | a line a worker

Written in numba like the kernels, but the last four functions are kernels only by their signature: ``op`` is the team's
record, and the other arguments are named in each.
"""

from __future__ import annotations

from edgellm.kernels.cpu.lib import layout
from edgellm.kernels.cpu.lib import simd as v
from edgellm.kernels.cpu.lib import team_layout as at
from edgellm.kernels.cpu.lib.draw_layout import ROW, ROW_NBYTES, TOKEN

SPINS_BEFORE_YIELD = 3_000  # about 0.1 ms: when a core is taken by others, let them finish
SPINS_BEFORE_PARKING = 60_000  # about 3 ms without a new step


@v.forceinline
def _spin(team, spins):
    v.pause()
    if spins > SPINS_BEFORE_YIELD and spins % 64 == 0 and v.load_i64(team + at.YIELD) != 0:
        v.call_yield(v.load_i64(team + at.YIELD))


@v.forceinline
def _barrier(team, n_threads):
    if n_threads > 1:
        phase = v.atomic_load(team + at.PHASE)
        if v.atomic_add(team + at.ARRIVALS, 1) == n_threads - 1:
            v.atomic_exchange(team + at.ARRIVALS, 0)
            v.atomic_exchange(team + at.PHASE, phase + 1)
        else:
            spins = 0
            while v.atomic_load(team + at.PHASE) == phase:
                spins += 1
                _spin(team, spins)


@v.forceinline
def _walk(team, thread):
    ops, step = v.load_i64(team + at.JOB_OPS), v.load_i64(team + at.JOB_STEP)
    n_threads = v.load_i64(team + at.JOB_THREADS)
    one_token = v.load_i64(step + layout.N_TOKENS) == 1
    meet = layout.MEET
    if one_token:
        meet = layout.MEET_ALONE
    for i in range(v.load_i64(team + at.JOB_FIRST), v.load_i64(team + at.JOB_LAST)):
        op = ops + i * layout.OP_NBYTES
        flags = v.load_i64(op + layout.FLAGS)
        if flags & meet:
            _barrier(team, n_threads)
        if one_token and flags & layout.ALONE:
            if thread == 0:
                v.call_kernel(v.load_i64(op), op, step, 0, 1)
        else:
            v.call_kernel(v.load_i64(op), op, step, thread, n_threads)
    decode = v.load_i64(team + at.JOB_DRAWS)
    if decode != 0:
        _barrier(team, n_threads)
        for row in range(thread, v.load_i64(decode + at.N_ROWS), n_threads):
            record = v.load_i64(v.load_i64(decode + at.RECORDS) + row * 8)
            v.call_kernel(v.load_i64(decode + at.TOP_K), record, 0, 0, 1)
    _barrier(team, n_threads)


@v.forceinline
def _publish(team, parked):
    """The number of workers that Python must wake."""
    n, n_threads = 0, v.load_i64(team + at.JOB_THREADS)
    number = v.load_i64(team + at.GENERATION) // at.OF_JOB + 1
    v.atomic_exchange(team + at.GENERATION, number * at.OF_JOB + n_threads)
    for worker in range(1, v.load_i64(team + at.N_THREADS)):
        state = 0
        if worker < n_threads:
            state = v.atomic_exchange(team + at.WORKERS + worker * at.LINE, at.RUNNING)
        v.store_i64(parked + worker * 8, state)
        n += state
    return n


@v.forceinline
def _drawn(decode, row):
    """The token that was drawn last for a row, -1 where a logit was not finite."""
    record = v.load_i64(v.load_i64(decode + at.RECORDS) + row * 8)
    return v.load_i64(v.load_i64(record + ROW) - ROW_NBYTES + TOKEN)


@v.forceinline
def _go_on(team, decode):
    """Make the step record and the op table ready for the tokens that follow."""
    step, ops = v.load_i64(team + at.JOB_STEP), v.load_i64(team + at.JOB_OPS)
    tokens, positions = v.load_i64(step + layout.TOKENS), v.load_i64(step + layout.POSITIONS)
    for row in range(v.load_i64(decode + at.N_ROWS)):
        v.store_i32(tokens + row * 4, v.i32_of(_drawn(decode, row)))
        v.store_i32(positions + row * 4, v.i32_of(v.load_i32(positions + row * 4) + 1))
    angles, nbytes = v.load_i64(step + layout.ROPES), v.load_i64(decode + at.ANGLES)
    for i in range(v.load_i64(decode + at.N_ROPES)):
        for pair in (angles + i * 16, angles + i * 16 + 8):
            v.store_i64(pair, v.load_i64(pair) + v.load_i64(nbytes + i * 8))
    for i in range(v.load_i64(team + at.JOB_FIRST), v.load_i64(team + at.JOB_LAST)):
        v.store_i64(ops + i * layout.OP_NBYTES + layout.COUNTER, 0)


@v.forceinline
def _ends(decode, row):
    """Whether nothing or one of the ids that end it was drawn for a row."""
    token, stops = _drawn(decode, row), v.load_i64(decode + at.STOPS) + row * 16
    found = token < 0
    for i in range(v.load_i64(stops + 8)):
        found = found or v.load_i64(v.load_i64(stops) + i * 8) == token
    return found


def team_publish(team, parked, _unused, _unused2):
    """Announce the job in the record. ``parked`` gets, per worker, 1 if Python must wake it."""
    _publish(team, parked)


def team_lead(team, _unused, _unused2, _unused3):
    """Thread 0's part of the published job; returns when all threads are done."""
    _walk(team, 0)


def team_decode(team, decode, _unused, _unused2):
    """Thread 0's part of the published job, a decode step, and of those that follow; see the record in team_layout."""
    done = v.load_i64(decode + at.N_DONE)
    v.store_i64(decode + at.WAKE, 0)
    more = True
    while more:
        _walk(team, 0)
        done += 1
        more = done < v.load_i64(decode + at.N_STEPS) and v.atomic_load(decode + at.WAITED_FOR) == 0
        for row in range(v.load_i64(decode + at.N_ROWS)):
            more = more and not _ends(decode, row)
        if more:
            _go_on(team, decode)
            if _publish(team, v.load_i64(decode + at.PARKED_OF)) > 0:
                v.store_i64(decode + at.WAKE, 1)
                more = False
    v.store_i64(decode + at.N_DONE, done)


def team_work(team, thread, generation, last_generation):
    """A worker: do the jobs after ``generation`` until none comes for a while; the last one seen is stored."""
    state = team + at.WORKERS + thread * at.LINE
    stay, spins = True, 0
    while stay:
        latest = v.atomic_load(team + at.GENERATION)
        if latest != generation:
            generation = latest  # jobs that left this worker out may have come and gone
            if thread < latest % at.OF_JOB:
                _walk(team, thread)
                spins = 0
        elif spins < SPINS_BEFORE_PARKING:
            spins += 1
            v.pause()
        else:
            v.atomic_exchange(state, at.PARKED)
            latest = v.atomic_load(team + at.GENERATION)
            # a job came just now: whoever takes the mark back decides who wakes us
            came = latest != generation and thread < latest % at.OF_JOB
            stay = came and v.atomic_exchange(state, at.RUNNING) == at.PARKED
    v.store_i64(last_generation, generation)
