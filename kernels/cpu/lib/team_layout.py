"""Byte offsets of the fields of a thread team's record; what they mean is drawn in team.py."""

LINE = 64
ARRIVALS, PHASE, GENERATION, N_THREADS, JOB, YIELD, WORKERS = (LINE * i for i in range(7))
JOB_OPS, JOB_FIRST, JOB_LAST, JOB_STEP = (JOB + 8 * i for i in range(4))

RUNNING, PARKED = 0, 1

# ---- the record of a run of decode steps, int64: addresses of the array that team_publish fills, of the top-k
#      kernel and its record; steps at most, and done; token ids that end it; bytes from one position's angles to the
#      next's, for each rope; 1 when workers of the step that was published must be woken first
DECODE_FIELDS = 10
PARKED_OF, TOP_K, RECORD, N_STEPS, N_DONE, STOPS, N_STOPS, ANGLES, N_ROPES, WAKE = (8 * i for i in range(DECODE_FIELDS))
