"""The two records that every CPU kernel reads: a row of the op table, and the step. All fields are int64.

    op row (16)   0 kernel address | 1..13 arguments of the kernel | 14 flags | 15 work counter, zero when a step begins
    step          the fields below; addresses point to arrays that live as long as the step

A float argument is stored as the bits of a float64. Buffers are rows of float32, each row padded to 64 bytes, so a
vector may run past the width but never past the row.
"""

OP_FIELDS = 16
OP_NBYTES = OP_FIELDS * 8
FLAGS = 14 * 8
COUNTER = 15 * 8

# flags of an op row
ALONE = 1  # with one token, thread 0 does this op alone: sharing it would cost more than it takes
MEET = 2  # the threads meet before this op
MEET_ALONE = 4  # the threads meet before this op when the step has one token

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


# ---- a row of quantized activations: int16 values, then for every group of 32 a float32 scale, scale * sum, int32 sum


def activation_row_nbytes(n_in: int) -> int:
    """Bytes of one quantized row, padded to 64."""
    return -(-(n_in * 2 + n_in // 32 * 12) // 64) * 64


# ---- a thread's scratch while it multiplies (quantized_matmul.py), byte offsets

PANEL_ROWS = 16
PANEL_GROUPS = 24  # at most so many groups of 32 columns in a panel: 24 KiB of packed weights in an L1 cache of 32
GROUP_NBYTES = 1024  # 16 pairs x 16 rows x 2 int16
SCALES = 0  # what decode_scales writes: at most 2 x 8 groups x 8 rows
PANEL = 512
PANEL_SCALES = PANEL + PANEL_GROUPS * GROUP_NBYTES
PANEL_MINIMA = PANEL_SCALES + PANEL_GROUPS * PANEL_ROWS * 4
EDGE = PANEL_MINIMA + PANEL_GROUPS * PANEL_ROWS * 4  # (n_tokens, 16) float32 sums of the last, incomplete panel


def matmul_scratch_nbytes(max_tokens: int) -> int:
    """Scratch of one thread for a product with up to ``max_tokens`` tokens."""
    return EDGE + max_tokens * PANEL_ROWS * 4


# ---- attention: tiles, cuts, and a row's state (attention.py)

TILE_ROWS = 32  # tokens times the query heads that share a head of the cache
CUT_BLOCKS = 8  # blocks of 32 positions


def tile_tokens(group: int) -> int:
    """Tokens of an attention tile, ``group`` query heads to a head of the cache."""
    return max(1, TILE_ROWS // group)


def state_floats(head_dim: int) -> int:
    """Floats of one row's state: m, l, 14 unused, then the weighted sum of values, padded to 16."""
    return 16 + padded(head_dim)


def attention_scratch_nbytes(group: int, tokens: int, head_dim: int) -> int:
    """Scratch of one thread: the softmax weights of four rows, and two states for each row of a tile."""
    rows = -(-tokens * group // 4) * 4
    return 4 * 32 * 4 + 2 * rows * state_floats(head_dim) * 4
