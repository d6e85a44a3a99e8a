"""What every encoder is given and where it works: one record of int64, and a scratch area of its own.

The record: address of float32 rows, number of rows, weights in a row, address of the blocks to write, address of the
importance of each column (float32), scratch. Rows and blocks are contiguous. A kernel is called by several threads at
once, each with a record and scratch of its own.
"""

from __future__ import annotations

X, N_ROWS, N_IN, OUT, IMPORTANCE, SCRATCH = (8 * i for i in range(6))

# scratch: panels of 32 x 8 float32, then smaller ones
PANEL_X, PANEL_W, PANEL_LEVELS = 0, 1024, 2048
PANEL_SUMS = 3072  # 8 x 8: sums_of_squares works here
SQUARES = 3328  # 8 float32: a sum of squares for each lane
SCRATCH_NBYTES = 8448  # the levels of eight super-blocks end here (super_blocks.py)
