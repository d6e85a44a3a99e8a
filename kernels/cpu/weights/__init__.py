"""How the CPU kernels read quantized weights: one small file per type, with the same five facts and three functions.

    BLOCK_NBYTES   bytes of a block
    GROUPS         groups of 32 weights in a block: 1, or 8 for the 256-weight types
    HAS_MIN        whether a group has a minimum besides its scale
    SCALE_STEP     bytes from one group's scales to the next in what decode_scales writes; 0 if they share one
    OFFSET         what ``sums`` leaves in its integers: it works with weight + OFFSET
    unpack(block, s) -> i16x32       the integer weights of group s of the block at an address, even ones first
    sums(p, stride, s, x) -> i32x8   for eight rows, ``stride`` bytes apart: the product of group s with the
                                     activations at x, summed
    decode_scales(p, stride, out)    for the blocks of eight rows: GROUPS x f32x8 scales, then minima

A weight is ``scale * integer + minimum``, so one matmul serves every type (``quantized_matmul.py``).
"""

QUANTIZED = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K")
"""GGUF type names; the module of each is its name in lower case."""

FLOAT = ("F32", "F16", "BF16")
"""Types multiplied in float32 (``float_matmul.py``). Any other type is dequantized to F32 when it is loaded."""
