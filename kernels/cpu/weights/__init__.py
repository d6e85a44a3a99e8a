"""How the CPU kernels read quantized weights: a table of types in each of two families.

Types of 32 weights, a block one group with a float scale (``blocks.py``, multiplied by ``block_matmul.py``):

    has_min        whether a block has a minimum besides its scale
    offset         what ``sums`` leaves in its integers: it works with weight + offset
    unpack(block) -> i16x32          the integer weights of the block at an address, even ones first
    sums(p, stride, x) -> i32x8      for eight rows, ``stride`` bytes apart: the product with the activations at x
    factors(p, stride) -> two f32x8  the scales and the minima of the blocks of eight rows
    read(block) -> u8x32             weight + offset as bytes, in their own order

Types of 256 weights, a super-block of eight groups with integer sub-scales (``superblocks.py``, multiplied by
``superblock_matmul.py``):

    centre         subtracted from what ``group`` gives
    n_minima       in a block: 0, 8 or 16
    make_group(g)(block) -> i16x32   the integers of group g, even ones first, the centre still in them
    make_bytes(g)(block) -> u8x32    the same as bytes, in their own order
    decode(p, stride, scales, minima)  for the blocks of eight rows: writes the sub-scales of row r at scales +
    row_scales(r)                    row_scales(r) as make_scale reads them, and minima (superblock_matmul.py)
    make_scale(g)(scales) -> i32x8   the sub-scale of group g, in the lanes of the weights it belongs to
    factors(p, stride) -> two f32x8  d and -dmin of the blocks of eight rows
"""

BLOCKS = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "IQ4_NL", "MXFP4")
SUPERBLOCKS = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS")
QUANTIZED = (*BLOCKS, *SUPERBLOCKS)
"""GGUF type names."""

FLOAT = ("F32", "F16", "BF16")
"""Types multiplied in float32 (``float_matmul.py``). Any other type is dequantized to F32 when it is loaded."""
