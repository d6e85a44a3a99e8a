"""The two records that every CPU kernel reads: a row of the op table, and the step. All fields are int64.

    op row (32)   kernel address | flags | work counter, zero when a step begins | arguments of the kernel, by name
    step          the fields below; addresses point to arrays that live as long as the step

A float argument is stored as the bits of a float64. Buffers are rows of float32, each row padded to 64 bytes or more,
so a vector may run past the width but never past the row.
"""

from collections import namedtuple

OP_FIELDS = 32
OP_NBYTES = OP_FIELDS * 8
KERNEL, FLAGS, COUNTER, ARGUMENTS = 0, 8, 16, 24  # byte offsets

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
PARTS = 64  # int64 pairs per shape of attention: address of its parts (below), and how many
PARTS_DONE = 72  # int64 counters of the parts that are done, zero between two ops
SCRATCH = 80  # scratch of thread 0; in the AMX form that of tiles is before it (below)
SCRATCH_NBYTES = 88  # of one thread
PARTIALS = 96  # states of the cuts of divided tiles: (token, cut) x (head, row), see attention.py
PARTIAL_NBYTES = 104  # of one (token, cut)
SEES = 112  # int32, the last position that a token attends to: POSITIONS, or
OWN_SEES = 120
TYPES = 128  # int32, which text of a pair a token is of; like the next two for encoders alone
TEXT_TILES = 136  # tiles of a text's tokens (below)
N_TEXT_TILES = 144
ADAPTERS = 152  # float32, the scale of each adapter for a token, 0 where it has it not; and bytes of a token
ADAPTERS_ROW = 160
N_LOGGED = 168  # tokens, where the step is logged (kernels/row_log.py), else 0
STEP_FIELDS = 22

ROW_ALIGN = 16  # floats

ALONE_WIDTH = 8192
"""Rows of up to so many values are left to one thread: a few microseconds, about what a meeting costs."""


def padded(width: int) -> int:
    """Floats of a row, with those behind it that a vector may touch."""
    return -(-width // ROW_ALIGN) * ROW_ALIGN


def buffer_row(width: int) -> int:
    """Floats from one row of a buffer to the next: an odd number of cache lines, or the rows of many tokens would share
    a few sets."""
    return (padded(width) // ROW_ALIGN | 1) * ROW_ALIGN


# ---- the arguments of each kind of kernel: addresses, bytes from one row to the next (_row), numbers
#      lowering.py fills in one of these by name, a kernel reads it with ``simd.arguments``; row_kind is where the step
#      says how many rows there are

ACTIVATE = namedtuple("ACTIVATE", "x x_row out out_row width row_kind")
ADD = namedtuple("ADD", "x x_row y y_row out out_row width row_kind scale")
ADAPTER_DOWN = namedtuple(
    "ADAPTER_DOWN", "x x_row x_slot ids ids_row out out_row out_slot n_used n_in chunks n_chunks row_kind"
)
"""``ids`` is 0 where there are no experts; ``chunks`` has a record (below) for every 16 rows."""
ADAPTER_UP = namedtuple(
    "ADAPTER_UP", "h h_row h_slot ids ids_row out out_row out_slot n_used n_out parts n_parts row_kind"
)
ADD_DIRECTION = namedtuple("ADD_DIRECTION", "x x_row width parts n_parts row_kind")
ADD_ROWS = namedtuple("ADD_ROWS", "x x_row w w_row out out_row width numbers")
"""``numbers`` is where the step has the number of a token's row."""
ADD_TO_STREAMS = namedtuple(
    "ADD_TO_STREAMS", "x x_row y y_row out out_row coefs coefs_row width streams first row_kind"
)
"""``coefs`` may be 0."""
ATTENTION = namedtuple(
    "ATTENTION",
    "q q_row out out_row k_pool v_pool k_head v_head n_heads n_kv_heads dim_k dim_v window shape scale softcap sinks "
    "score weigh chosen chosen_row n_chosen newest_k newest_v newest_table run_blocks",
)
"""``k_head`` and ``v_head`` are bytes of a head in a block; ``sinks`` may be 0; ``score`` and ``weigh`` are the kernels
that read keys and values, 0 where they are float16; ``chosen`` has the blocks that tokens chose, ``newest_k`` and
``newest_v`` those of the newest run, which is of ``run_blocks``, and a text's first; 0 where there are none."""
PACK_KV = namedtuple("PACK_KV", "newest_k newest_v newest_table k_pool v_pool table heads dim_k dim_v")
BOUND_KEYS = namedtuple("BOUND_KEYS", "keys keys_head keys_table bounds table heads dim")
CHOOSE_BLOCKS = namedtuple("CHOOSE_BLOCKS", "q q_row out out_row bounds table heads n_heads dim n_chosen")
EMBED = namedtuple("EMBED", "w w_row width out out_row scale")
EXPERT_MATMUL = namedtuple(
    "EXPERT_MATMUL", "x x_row experts w_row n_out n_in out out_row groups pairs n_used x_slot bias"
)
"""x of float weights has slots ``x_slot`` bytes apart, 0 where a token has one; of others, a row for each pair.
``experts`` has for each expert, int64, where its weights are less ``n_out`` rows for each one before it: their rows are
counted through. ``bias`` is that of all experts, or 0."""
EXPERT_SUM = namedtuple("EXPERT_SUM", "x x_row probs probs_row out out_row width n_used row_kind")
GROUP_BY_EXPERT = namedtuple("GROUP_BY_EXPERT", "ids ids_row groups pairs n_expert n_used row_kind")
GATED_UNIT = namedtuple("GATED_UNIT", "gate gate_row up up_row out out_row width row_kind")
GAUSSIAN_TOP_K = namedtuple("GAUSSIAN_TOP_K", "x x_row out out_row width factor row_kind")
HADAMARD = namedtuple("HADAMARD", "x x_row groups size scale row_kind")
MATCH_MAGNITUDE = namedtuple("MATCH_MAGNITUDE", "x x_row of of_row out out_row width streams row_kind")
MATMUL = namedtuple("MATMUL", "x x_row w w_row n_out n_in out out_row bias row_kind following")
"""``bias`` may be 0; ``following`` is the row of the next product with quantized weights, or 0."""
MIX_STREAMS = namedtuple("MIX_STREAMS", "x x_row coefs coefs_row out out_row width streams row_kind")
QUANTIZE = namedtuple("QUANTIZE", "x x_row out out_row n_groups run row_kind pairs groups slots x_slot")
"""``pairs`` is 0, or has for each of the rows times ``slots`` that are made where its input is: row * slots + slot;
``groups`` are those of their experts."""
LAYER_NORM = namedtuple("LAYER_NORM", "x x_row w bias out out_row width eps row_kind")
"""``bias`` may be 0."""
RMS_NORM = namedtuple("RMS_NORM", "x x_row w out out_row width heads eps row_kind")
ROPE = namedtuple("ROPE", "x x_row heads head_dim half index adjacent")
ROUTE = namedtuple(
    "ROUTE",
    "logits logits_row ids ids_row probs probs_row n_expert n_used row_kind over_all scales by_logits sigmoid bias "
    "factor n_groups groups_used best",
)
"""``scales`` and ``bias`` may be 0."""
SELECT_OUTPUTS = namedtuple("SELECT_OUTPUTS", "x x_row out out_row width")
SELF_ATTENTION = namedtuple(
    "SELF_ATTENTION", "q q_row k k_row v v_row out out_row n_heads n_kv_heads head_dim scale reach slopes"
)
SCALE = namedtuple("SCALE", "x x_row out out_row width row_kind factor")
SCALE_COLUMNS = namedtuple("SCALE_COLUMNS", "x x_row w out out_row width row_kind")
SPLIT_HEADS = namedtuple("SPLIT_HEADS", "x x_row first first_row second second_row heads first_dim second_dim row_kind")
JOIN_HEADS = namedtuple(
    "JOIN_HEADS", "first first_row second second_row out out_row heads first_dim second_dim row_kind"
)
GATE = namedtuple("GATE", "x x_row gate gate_row out out_row width span row_kind")
"""A value of ``gate`` is for ``span`` neighbours."""
CAP = namedtuple("CAP", "x x_row out out_row width row_kind cap")
SHORT_CONV = namedtuple("SHORT_CONV", "x x_row w w_row bias out out_row width n_taps states table")
DELTA_GATES = namedtuple(
    "DELTA_GATES", "alpha alpha_row beta beta_row a dt_bias decay decay_row rate rate_row heads row_kind"
)
DELTA_RULE = namedtuple(
    "DELTA_RULE",
    "qkv qkv_row decay decay_row rate rate_row out out_row n_k_heads n_v_heads head_dim tiled eps states table",
)
SSM_GATES = namedtuple("SSM_GATES", "dt dt_row a dt_bias decay decay_row rate rate_row heads row_kind")
SSM_SCAN = namedtuple(
    "SSM_SCAN",
    "xbc xbc_row decay decay_row rate rate_row d out out_row n_heads n_groups head_dim n_state states table",
)
GATED_NORM = namedtuple("GATED_NORM", "x x_row gate gate_row w out out_row width groups eps row_kind")
TURNED_HEADS = namedtuple("TURNED_HEADS", "x x_row w w_row first each n_heads n_in n_out out out_row row_kind unpack")
"""Of a head's ``each`` rows, those from ``first`` on; ``unpack`` is the kernel that looks rows up."""
STORE_KV = namedtuple("STORE_KV", "k k_row v v_row k_pool v_pool heads dim_k dim_v table")
STORE_TYPED = namedtuple("STORE_TYPED", "x x_row pool head_nbytes heads dim table values")
"""Keys, or where ``values`` is 1 values."""


# ---- a row of quantized activations: int16 values, then four arrays with a number for every group of 32:
#      float32 scale, digits, int32 sum, int32 sum of its first 16 values. Digits are there where eight groups share a
#      scale: for each eight their sums as signed bytes, 8 lowest, 8 next, 8 highest


def activation_row_nbytes(n_in: int) -> int:
    """Bytes of one quantized row: an odd number of cache lines, or the rows of many tokens would share a few sets."""
    return (-(-(n_in * 2 + n_in // 32 * 16) // 64) | 1) * 64


# ---- the pairs of a token and one of its experts, by expert: int32 numbers of pairs in that order, and how many groups
#      there are, padded to GROUPS bytes, then the groups; byte offsets in one, of int32

GROUPS = 16
GROUP_EXPERT, GROUP_FIRST, GROUP_SIZE = 0, 4, 8
GROUP_NEXT = 12  # of the expert with the number of the group: where its next pair goes, while they are ordered
EXPERTS_GROUP_NBYTES = 16


# ---- a part of an adapter's op, byte offsets in its record, of int64 (kernels/adapters.py)

ADAPTER = 0  # which one it is of
ADAPTER_WEIGHTS = 8
ADAPTER_EXPERT = 16  # bytes of the matrix of one expert
ADAPTER_FIRST = 24  # bytes in a row, or slot, of h
ADAPTER_RANK = 32
ADAPTER_FACTOR = 40  # float64
ADAPTER_NBYTES = 48
STRIP = 64  # rows of B that are packed together


# ---- a thread's scratch while it multiplies, byte offsets

PANEL_ROWS = 16
PANEL_GROUPS = 24  # at most so many groups of 32 columns in a panel: 24 KiB of packed weights in an L1 cache of 32
GROUP_NBYTES = 1024  # 16 pairs x 16 rows x 2 int16
AHEAD = (
    8192  # weights are fetched about so many bytes before the eight rows that follow: none costs 15 %, 16 KiB gain 0
)
MAX_FEW = 8  # at most so many tokens are multiplied without a panel
SCALES = 0  # of eight rows: 16 int32 of a super-block
LANES = 512  # (4 tokens, 8 rows, 8) int32 to be summed; of a panel (8 tokens, 16 rows) float32
MINIMA = LANES + 1024  # (8 rows, 2, 8) int32
CENTRES = MINIMA + 512  # (4 tokens, 2, 8) int32; of panels (4 panels, 4 tokens, 16 rows) float32
SUMS = CENTRES + 1024  # (MAX_FEW, 8 rows) float32
UNPACKED = SUMS + MAX_FEW * 32  # (8 rows, 256) int16
PANEL = UNPACKED + 8 * 512
PANEL_SCALES = PANEL + PANEL_GROUPS * GROUP_NBYTES
PANEL_MINIMA = PANEL_SCALES + PANEL_GROUPS * PANEL_ROWS * 4
EDGE = PANEL_MINIMA + PANEL_GROUPS * PANEL_ROWS * 8  # (n_tokens, 16) float32 sums of the last, incomplete panel
RECORDS = UNPACKED  # in place of a panel: a few tokens' activations for transposed_rows.py
RECORD_NBYTES = 640  # of 256 activations
TILE_TOKENS = 16  # tokens of a tile of AMX (amx_matmul.py); what the AMX form alone has stands before the scratch
TILES_FROM = 24  # so many tokens, or pairs of an expert, and more go by tiles: fewer are faster by panels
TILE_PANELS = 16  # at most, each with its scales and minima, as others have one
TILE_PANEL_NBYTES = EDGE - PANEL
TILES_NBYTES = -(-(64 + 7 * 1024 + TILE_PANELS * (TILE_PANEL_NBYTES + 1024)) // 4096) * 4096
TILE_CONFIG = -TILES_NBYTES
TILE_NOWHERE = TILE_CONFIG + 64  # 16 tokens, 16 rows
TILE_SUMS = TILE_NOWHERE + 1024  # int32 tiles, 16 tokens x 16 rows: of two runs, two or three each
TILE_ASIDE = TILE_SUMS + 2 * 3 * 1024  # (TILE_PANELS, 16 tokens, 16 rows) float32
TILE_PLACES = TILE_ASIDE + TILE_PANELS * 1024 - PANEL  # the first panel, as a scratch in which it is packed


def tiles_nbytes(form: str) -> int:
    """Scratch of one thread for tiles, before the address that its kernels are told."""
    return TILES_NBYTES if form == "amx" else 0


EXPERT_ROWS = 128  # that a thread takes of an expert at a time, for all pairs of its group


def expert_scratch_nbytes(max_tokens: int, form: str) -> int:
    """Scratch of one thread for products with experts: tiles sum all rows of a part aside, behind those of an edge."""
    return EDGE + max_tokens * (PANEL_ROWS + EXPERT_ROWS) * 4 if form == "amx" else 0


def matmul_scratch_nbytes(max_tokens: int, n_in: int) -> int:
    """Scratch of one thread for products with up to ``max_tokens`` tokens and ``n_in`` columns, but for tiles."""
    return max(EDGE + max_tokens * PANEL_ROWS * 4, RECORDS + MAX_FEW * -(-n_in // 256) * RECORD_NBYTES)


def turned_record_nbytes(n_in: int) -> int:
    """Scratch of one thread for what tells the kernel that looks rows up of so many; as turned_heads.py has it."""
    return (OP_NBYTES + STEP_FIELDS * 8 + n_in * 4 + 63) // 64 * 64


# ---- products of whole texts (float_panels.py, run/panels.py)

TEXT_PANEL_ROWS = 64  # that lie side by side


# ---- attention: tiles, their parts, and a row's state (attention.py, attention_work.py)

TILE_ROWS = 32  # tokens times the query heads that share a head of the cache
CUT_BLOCKS = 8  # blocks of 32 positions, at most

# byte offsets in a part, int32: first token of its tile, then
PART_TOKENS = 4  # of the tile
PART_SEQUENCE = 8
PART_CUT = 12  # first cut of the part
PART_CUTS = 16  # cuts of the part
PART_HEAD = 20  # first head of the cache
PART_HEADS = 24
PART_OF = 28  # parts of the tile with these heads
PART_TILE_CUT = 32  # first cut of the tile
PART_TILE_CUTS = 36  # cuts of the tile
PART_PARTIAL = 40  # of the tile's states in PARTIALS, in (token, cut)
PART_DONE = 44  # of these heads' counter in PARTS_DONE
PART_TABLE = 48  # of its window
PART_CHOSEN = 52  # 1 where its blocks are those chosen for its token and head: they are counted as if they were all
PART_NBYTES = 56


DELTA_HEAD_DIM = 256  # at most: 16 columns of a delta rule's state are kept in a thread's scratch, 16 KiB
SSM_STATE = 512  # at most, likewise: 32 KiB


def tile_tokens(group: int) -> int:
    """Tokens of an attention tile, ``group`` query heads to a head of the cache."""
    return max(1, TILE_ROWS // group)


def cut_blocks(window: int) -> int:
    """Blocks of a cut. A window has few: finer cuts can be shared out."""
    return CUT_BLOCKS // 2 if window else CUT_BLOCKS


def attention_state_nbytes(head_dim: int) -> int:
    """Bytes of one row's state: m, l, 14 unused, then the weighted sum of values, padded to 16."""
    return 64 + padded(head_dim) * 4


def attention_scratch_nbytes(rows: int, head_dim: int) -> int:
    """Scratch of one thread: the weights of a cut and two states for each row."""
    return rows * (CUT_BLOCKS * 32 * 4 + 2 * attention_state_nbytes(head_dim))


# ---- what attention tells the kernels that read keys and values of a type (typed_attention.py), byte offsets, and what
#      they work with behind it

TYPED_PART, TYPED_FIRST, TYPED_LAST, TYPED_WEIGHTS = 0, 8, 16, 24  # the part, blocks of the cut, scores or weights
TYPED_SEES, TYPED_STATES = 32, 40  # the last position that the part's tile sees; the rows' states
TYPED_THEN, TYPED_THEN_FIRST, TYPED_THEN_LAST = 48, 56, 64  # what comes next
TYPED_NBYTES = 128


def query_nbytes(dim: int) -> int:
    """Bytes of a query in int16: its scale, padded to 64, int16 numbers, a float32 sum of each 32."""
    return 64 + dim * 2 + (dim // 32 * 4 + 63) // 64 * 64


TYPED_ROWS = 4  # at once, at most
TYPED_WEIGHT_ROW = 256  # bytes of a row's weights in a block: 32 float32, 32 int16, the largest


def relative_nbytes(dim: int) -> int:
    """Bytes of the scales in a block: of each 32 dimensions 32 scales, 32 minima, padded to 64 the largest scale."""
    return dim // 32 * (128 + 128 + 64)


def typed_scratch_nbytes(rows: int, dim_k: int, dim_v: int) -> int:
    """Scratch of one thread beside that of attention."""
    weigh = TYPED_ROWS * (TYPED_WEIGHT_ROW + relative_nbytes(dim_v))
    return TYPED_NBYTES + max(rows * query_nbytes(dim_k), weigh)


# ---- what is chosen among, and packed

MAX_CHOICES = 1 << 14  # full blocks that are chosen among, at most: others are never read


def choose_scratch_nbytes(group: int, dim: int) -> int:
    """Scratch of one thread: queries, what is positive and what is negative of them, and a number for each block."""
    return 2 * group * padded(dim) * 4 + MAX_CHOICES * 4


def fold_nbytes(n: int) -> int:
    """Bytes of a row times the scales of a block: n float32, as many int16, their scale and their share of minima."""
    return n * 6 + 64


def packed_scratch_nbytes(dim: int) -> int:
    """Scratch of one thread: scales and minima of a block, and a few rows times the scales."""
    return TYPED_NBYTES + dim * 8 + TYPED_ROWS * fold_nbytes(max(dim, 32))


# ---- attention within a text (self_attention.py): a tile is int32 first token of its text, tokens of the text, first
#      token of the tile, tokens of the tile

TEXT_TILE_NBYTES = 16
TEXT_TILE = 192  # tokens of a tile: a multiple of SELF_ROWS, so that the same rows go together in any tiling
SELF_ROWS = 6  # rows at once: with 16 lanes of float32 each they fill 12 AVX2 registers
SELF_CUT = 512  # keys that are packed together
SELF_HEAD_DIM = 512  # at most
SELF_SUMS = 64 + SELF_HEAD_DIM * 4  # bytes of what a cut adds to a row: m, l, 14 unused, weighted sums


def self_attention_scratch_nbytes(head_dim: int, group: int) -> int:
    """Scratch of one thread: keys and values of a cut, six rows of scores and sums, the states of a tile's rows."""
    packed = SELF_CUT * (head_dim + padded(head_dim)) * 4
    return packed + SELF_ROWS * (SELF_CUT * 4 + SELF_SUMS) + TEXT_TILE * group * attention_state_nbytes(head_dim)


# ---- the orders in which the kernel ``stream`` reads, and the rows that it reads side by side

STREAM_ORDERS = STREAM_LINEAR, STREAM_SIDE_BY_SIDE, STREAM_APART = 0, 1, 2

STREAM_ROWS = 8
STREAM_ROW_NBYTES = 1152  # 2048 columns of Q4_K
