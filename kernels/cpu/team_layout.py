"""Byte offsets of the fields of a thread team's record; what they mean is drawn in team.py."""

LINE = 64
ARRIVALS, PHASE, GENERATION, N_THREADS, JOB, YIELD, WORKERS = (LINE * i for i in range(7))
JOB_OPS, JOB_FIRST, JOB_LAST, JOB_STEP = (JOB + 8 * i for i in range(4))

RUNNING, PARKED = 0, 1
