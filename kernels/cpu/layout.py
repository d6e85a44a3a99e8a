"""The two records that every CPU kernel reads: a row of the op table, and the step. All fields are int64.

    op row (16)   0 kernel address | 1..14 arguments of the kernel | 15 work counter, zero when a step begins
    step          the fields below; addresses point to arrays that live as long as the step

A float argument is stored as the bits of a float64. Buffers are rows of float32, each row padded to 64 bytes, so a
vector may run past the width but never past the row.
"""

OP_FIELDS = 16
OP_NBYTES = OP_FIELDS * 8
COUNTER = 15 * 8

# byte offsets in the step record
N_TOKENS = 0
N_OUTPUTS = 8
TOKENS = 16  # int32 token ids
POSITIONS = 24  # int32
SEQUENCES = 32  # int32, row of the block tables
OUTPUT_ROWS = 40  # int32, the tokens that want logits
TABLES = 48  # int64 pairs per window: address of the int32 (n_sequences, max_blocks) table, and its row length
ROPES = 56  # int64 pairs per rope: addresses of cos and sin, float32 (n_tokens, n_dims / 2)
SPANS = 64  # int32 triples per attention tile: first token, tokens, sequence
N_SPANS = 72
SCRATCH = 80  # scratch of thread 0
SCRATCH_NBYTES = 88  # of one thread
PARTIALS = 96  # attention over a long context, split: see attention.py
STEP_FIELDS = 16

ROW_ALIGN = 16  # floats


def padded(width: int) -> int:
    """Floats from one row of a buffer to the next."""
    return -(-width // ROW_ALIGN) * ROW_ALIGN
