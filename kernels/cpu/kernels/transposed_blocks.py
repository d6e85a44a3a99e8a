"""A few tokens, and panels, of the types of 32 weights on AVX-512 VNNI (transposed_rows.py).

A token's record is its quantized row (layout.py) with the 32 int16 of every group as hi[32] | lo[32]. Weights are read
unsigned; what that adds to the sum over a block is taken away by the sum of its activations.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from numba import types

from edgellm.formats import levels
from edgellm.kernels.cpu.kernels import amx_matmul, block_matmul, transposed_panel
from edgellm.kernels.cpu.kernels import transposed_rows as rows
from edgellm.kernels.cpu.kernels.transposed_rows import bytes_of, columns_of_16, columns_of_32
from edgellm.kernels.cpu.lib import simd as v
from edgellm.kernels.cpu.lib.layout import GROUP_NBYTES, PANEL, PANEL_MINIMA, PANEL_SCALES, SUMS
from edgellm.kernels.cpu.weights.blocks import power_of_two

LO = 32

# ---- scales: factors(header) gives d and the minimum of eight rows, whose first eight bytes are the header -----------

_sixteen_bits, _first_byte, _four = (v.make_const(v.u64x8, n) for n in (16, 255, 4))
_u16x8 = v.Vec(types.uint16, 8)
_to_u16, _to_u32 = v.make_convert(v.u64x8, _u16x8, "trunc"), v.make_convert(v.u64x8, v.u32x8, "trunc")


@v.forceinline
def _half(header):
    return v.half_f32x8(_to_u16(header)), v.zero_f32x8()


@v.forceinline
def _two_halves(header):
    return v.half_f32x8(_to_u16(header)), v.half_f32x8(_to_u16(header >> _sixteen_bits()))


@v.forceinline
def _exponent(header):
    return power_of_two(_to_u32(header & _first_byte())), v.zero_f32x8()


# ---- weights: read(p, stride, header) gives them, 8 of each row in each of four vectors ------------------------------

_low4, _top_bit = bytes_of(0x0F), bytes_of(0x80)


def _make_nibbles(quants: int) -> Any:
    @v.forceinline
    def read(p, stride, header):
        a, b = columns_of_16(p + quants, stride)
        low = _low4()
        return a & low, b & low, (a >> _four()) & low, (b >> _four()) & low

    return read


def _make_five_bits(quants: int) -> Any:
    """Nibbles, and the fifth bits in the four bytes before them."""
    nibbles = _make_nibbles(quants)
    fifth0, fifth1, fifth2, fifth3 = (rows.make_sixteen_where(quants - 4 + k) for k in range(4))

    @v.forceinline
    def read(p, stride, header):
        a, b, c, d = nibbles(p, stride, header)
        return a | fifth0(header), b | fifth1(header), c | fifth2(header), d | fifth3(header)

    return read


def _make_levels(quants: int, of_nibbles: tuple[int, ...]) -> Any:
    nibbles = _make_nibbles(quants)
    table = v.make_constants(v.u8x64, [n + _CENTRE for n in of_nibbles] * 4)

    @v.forceinline
    def read(p, stride, header):
        a, b, c, d = nibbles(p, stride, header)
        t = table()
        return rows.levels_of(t, a), rows.levels_of(t, b), rows.levels_of(t, c), rows.levels_of(t, d)

    return read


@v.forceinline
def _signed_bytes(p, stride, header):
    a, b, c, d = columns_of_32(p + 2, stride)
    top = _top_bit()
    return a ^ top, b ^ top, c ^ top, d ^ top


class Transposed(NamedTuple):
    """How a type's blocks are read; ``centre`` was added to its weights."""

    factors: Any
    read: Any
    centre: int = 0


_CENTRE = 128
"""Makes signed bytes unsigned."""

TYPES = {  # the layouts are drawn in formats/block_quants.py and formats/small_quants.py
    "Q4_0": Transposed(_half, _make_nibbles(2), 8),
    "Q4_1": Transposed(_two_halves, _make_nibbles(4)),
    "Q5_0": Transposed(_half, _make_five_bits(6), 16),
    "Q5_1": Transposed(_two_halves, _make_five_bits(8)),
    "Q8_0": Transposed(_half, _signed_bytes, _CENTRE),
    "IQ4_NL": Transposed(_half, _make_levels(2, levels.IQ4), _CENTRE),
    "MXFP4": Transposed(_exponent, _make_levels(1, levels.E2M1_DOUBLED), _CENTRE),
}


# ---- activations, and the path itself --------------------------------------------------------------------------------

_pair = v.Vec(types.uint64, 2)
_load_pair, _store_pair = v.make_load(_pair), v.make_store(_pair)


@v.forceinline
def prepare(x, x_row, n, n_groups, records):
    """The activations of n tokens as records; returns the bytes from one token's to the next's."""
    row = n_groups * 80
    for t in range(n):
        source, record = x + t * x_row, records + t * row
        for g in range(n_groups):
            rows.store_split(source + g * 64, record + g * 64, record + g * 64 + LO)
        source, record = source + n_groups * 64, record + n_groups * 64
        for at in range(0, n_groups * 16, 16):
            _store_pair(record + at, _load_pair(source + at))
    return row


class Reads(NamedTuple):
    """How a type is multiplied: in steps, of which the first is a block ahead.

    begin(p, stride) -> weights as they come, scales, minima     of eight rows
    ready(weights) -> as ``dot`` wants them                      once for all tokens
    dot(weights, x) -> i32x8                                     with the record of a group at x
    """

    begin: Any
    ready: Any
    dot: Any
    centre: int


def make_run(reads: Reads, weights: Any, n: int) -> Any:
    """run(p, stride, n_groups, x, x_row, sums, ahead): eight whole rows times n = 1, 2 or 4 tokens, to sums.

    A block is a long chain of short instructions. So the next one is begun before this one is multiplied: the CPU's
    window holds hardly two of them, and one chain alone leaves it waiting.
    """
    begin, ready, dot, centre = reads
    block_nbytes, has_min = weights.block_nbytes, weights.has_min
    fetch = rows.make_fetch(block_nbytes, 0, 1)

    @v.forceinline
    def one(acc, z, d, minimum, x, scale_at, per_group):
        total = dot(z, x)
        if centre != 0:
            total = total - v.splat_i32x8(v.load_i32(scale_at + 2 * per_group) * types.int32(centre))
        acc = v.fma_f32x8(v.to_f32x8(total), d * v.splat_f32x8(v.load_f32(scale_at)), acc)
        if has_min:
            acc = v.fma_f32x8(minimum, v.splat_f32x8(block_matmul.sum_of_group(scale_at, per_group)), acc)
        return acc

    @v.forceinline
    def all_tokens(sums, begun, d, minimum, x, x_row, scale_at, per_group):
        z, (acc0, acc1, acc2, acc3) = ready(begun), sums
        acc0 = one(acc0, z, d, minimum, x, scale_at, per_group)
        if n > 1:
            acc1 = one(acc1, z, d, minimum, x + x_row, scale_at + x_row, per_group)
        if n > 2:
            acc2 = one(acc2, z, d, minimum, x + 2 * x_row, scale_at + 2 * x_row, per_group)
            acc3 = one(acc3, z, d, minimum, x + 3 * x_row, scale_at + 3 * x_row, per_group)
        return acc0, acc1, acc2, acc3

    @v.forceinline
    def run(p, stride, n_groups, x, x_row, sums, ahead):
        per_group, scale_at = n_groups * 4, x + n_groups * 64
        acc = (v.zero_f32x8(), v.zero_f32x8(), v.zero_f32x8(), v.zero_f32x8())
        z, d, minimum = begin(p, stride)
        for _ in range(n_groups - 1):
            fetch(ahead, p, stride)
            p += block_nbytes
            next_z, next_d, next_minimum = begin(p, stride)
            acc = all_tokens(acc, z, d, minimum, x, x_row, scale_at, per_group)
            z, d, minimum = next_z, next_d, next_minimum
            ahead += block_nbytes * 8
            x += 64
            scale_at += 4
        fetch(ahead, p, stride)
        acc = all_tokens(acc, z, d, minimum, x, x_row, scale_at, per_group)
        v.store_f32x8(sums, acc[0])
        if n > 1:
            v.store_f32x8(sums + 32, acc[1])
        if n > 2:
            v.store_f32x8(sums + 64, acc[2])
            v.store_f32x8(sums + 96, acc[3])

    return run


def make_times_few(reads: Reads, weights: Any) -> Any:
    """few_tokens(p, stride, n_groups, x, x_row, n, scratch, ahead): as in block_matmul.py, but x are records."""
    run_one, run_two, run_four = (make_run(reads, weights, n) for n in (1, 2, 4))

    @v.forceinline
    def few_tokens(p, stride, n_groups, x, x_row, n, scratch, ahead):
        t = 0
        while t < n:
            here, sums = n - t, scratch + SUMS + t * 32
            if here >= 4:
                run_four(p, stride, n_groups, x + t * x_row, x_row, sums, ahead)
                t += 4
            elif here >= 2:
                run_two(p, stride, n_groups, x + t * x_row, x_row, sums, ahead)
                t += 2
            else:
                run_one(p, stride, n_groups, x + t * x_row, x_row, sums, ahead)
                t += 1

    return few_tokens


@v.forceinline
def as_they_are(z):
    """Weights that need nothing more."""
    return z


@v.forceinline
def _dot(z, x):
    return rows.of_rows(rows.dot_32_apart(z, x, LO))


def make_few_tokens(quant: str, weights: Any) -> Any:
    """The same for a type, by its row of the table."""
    factors, read, centre = TYPES[quant]

    @v.forceinline
    def begin(p, stride):
        header = rows.first_eight_bytes(p, stride)
        d, minimum = factors(header)
        return read(p, stride, header), d, minimum

    return make_times_few(Reads(begin, as_they_are, _dot, centre), weights)


make_finish = block_matmul.make_finish
"""The float32 sums of a panel's rows go on."""


def _make_store_words(centre: int) -> Any:
    """store(place, half, z): a group of 32 for a panel of transposed_panel.py."""
    store_words, one = transposed_panel.make_store_words(centre), v.make_const(v.i16x32, 1)

    @v.forceinline
    def store(place, half, z):
        for m in range(4):
            store_words(place + m * 128, half, z[m], one())

    return store


def _make_store_bytes(centre: int) -> Any:
    """The same for a tile of amx_matmul.py."""
    less = rows.make_less(centre)

    @v.forceinline
    def store(place, half, z):
        for m in range(4):
            transposed_panel.store_bytes(place + m * 128, less(z[m]), half)

    return store


def make_pack(quant: str, weights: Any, for_tiles: bool = False) -> Any:
    """pack(p, stride, n_groups, half, scratch): eight rows for a panel of transposed_panel.py, or of amx_matmul.py."""
    factors, read, centre = TYPES[quant]
    block_nbytes, has_min = weights.block_nbytes, weights.has_min
    store = _make_store_bytes(centre) if for_tiles else _make_store_words(centre)
    group_nbytes = amx_matmul.GROUP_NBYTES if for_tiles else GROUP_NBYTES

    @v.forceinline
    def pack(p, stride, n_groups, half, scratch):
        place, scales, minima = scratch + PANEL, scratch + PANEL_SCALES, scratch + PANEL_MINIMA
        for _ in range(n_groups):
            header = rows.first_eight_bytes(p, stride)
            d, minimum = factors(header)
            store(place, half, read(p, stride, header))
            transposed_panel.store_floats(scales, d, half)
            if has_min:
                transposed_panel.store_floats(minima, minimum, half)
            p += block_nbytes
            place += group_nbytes
            scales += 64
            minima += 64

    return pack
