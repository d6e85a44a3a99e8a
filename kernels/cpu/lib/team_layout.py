"""Byte offsets of the fields of a thread team's record; what they mean is drawn in team.py."""

LINE = 64
ARRIVALS, PHASE, GENERATION, N_THREADS, JOB, YIELD, WORKERS = (LINE * i for i in range(7))
JOB_OPS, JOB_FIRST, JOB_LAST, JOB_STEP, JOB_DRAWS, JOB_THREADS = (JOB + 8 * i for i in range(6))
OF_JOB = 1 << 16
"""GENERATION is this times the number of the job, plus how many threads do it: both change in one moment."""

RUNNING, PARKED = 0, 1

# ---- the record of a run of decode steps, int64: addresses of the array that team_publish fills, of the top-k kernel
#      and of the addresses of its records, one for each row of logits; rows; steps at most, and done; for each row the
#      address of the token ids that end it, and how many; bytes from one step's angles to the next's, for each rope; 1
#      when workers of the step that was published must be woken first; 1 when somebody waits for the end of the run
DECODE_FIELDS = 11
PARKED_OF, TOP_K, RECORDS, N_ROWS, N_STEPS, N_DONE, STOPS, ANGLES, N_ROPES, WAKE, WAITED_FOR = (
    8 * i for i in range(DECODE_FIELDS)
)
