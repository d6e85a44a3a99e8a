"""Products with 16 tokens and more on AMX tiles, to the same bits as everywhere else.

Only the integer sums are made differently. Activations are int16 of at most 15 bits, x = 128 xh + xl; the integer
weights of a panel fit int8, or are w = 128 wh + wl. Every part fits int8, and the sums of their products, exact in
int32, give the sum that the other paths make:

    sum w x  =  (sum w xh << 7) + sum w xl                                                       one plane of weights
             =  (sum wh xh << 14) + (sum (wh xl + wl xh) << 7) + sum wl xl                       two

so a token's numbers do not depend on whether it was in a batch of 15 or 16. (bf16 tiles over whole rows need no sums
per group, but three products of half the rate, and would give a token other bits in a prompt than alone.)

Counted for 16 tokens x 16 rows, in cycles of the busiest unit of a Sapphire Rapids core (a product 16, a tile load 8 at
two rows a cycle, a tile store 16, two 512-bit operations a cycle). Tiles and floats take turns, so both count; on
VNNI, multiply-adds of int16 are bound by their loads, 160 for a group of 32:

    group of 32, one plane     2 products 32 | 3 loads 20 | 2 stores 32       + sums to float32 40    VNNI 184
    256 weights, two planes    16 products 256 | 16 loads 128 | 3 stores 48   + 60, with minima 300   VNNI 1340, 1580

    panel of 16 rows      its int16 pairs become bytes, four columns x 16 rows to a tile row
    activations           ``quantize`` has split its rows in place: 64 bytes of int16 are 32 xh and 32 xl
"""

from __future__ import annotations

from typing import Any

from numba import types

from edgellm.kernels.cpu.lib import simd as v
from edgellm.kernels.cpu.lib.layout import GROUP_NBYTES, PANEL, TILE_CONFIG, TILE_RUNS, TILE_SUMS, TILE_TOKENS, TILES

_i64, _none = types.int64, types.none

has_tiles = v.declared("has_tiles", _i64)
"""1 in the AMX form, else a constant 0."""
_tile_config, _tile_release = v.declared("tile_config", _none, _i64), v.declared("tile_release", _none)
_zero = {1: v.declared("tile_zero2", _none), 2: v.declared("tile_zero3", _none)}
_step = {n: v.declared(f"tile_step{n}", _none, _i64, _i64, _i64, _i64) for n in (1, 2)}
_store = {1: v.declared("tile_store2", _none, _i64), 2: v.declared("tile_store3", _none, _i64)}

i8x32 = v.Vec(types.int8, 32)
_narrow = v.make_convert(v.i16x32, i8x32, "trunc")
_as_words = v.make_convert(i8x32, v.i16x16, "bitcast")
_between = v.make_shuffle(v.i16x16, [lane for i in range(16) for lane in (i, 16 + i)])
_store_bytes, _store_words = v.make_store(i8x32), v.make_store(v.i16x32)
_low7, _seven = v.make_const(v.i16x32, 127), v.make_const(v.i16x32, 7)
_seven_wide = v.make_const(v.i32x16, 7)


# ---- activations ----------------------------------------------------------------------------------------------------


@v.forceinline
def split_activations(row, first, stop, n_groups):
    """The int16 groups [first, stop) of a row, first even, become bytes: of each two groups 32 xh, 32 xh, 32 xl, 32 xl.

    A last group without another becomes 32 xh, 32 xl.
    """
    for g in range(first, stop, 2):
        at = row + g * 64
        a = v.load_i16x32(at)
        if g + 1 < n_groups:
            b = v.load_i16x32(at + 64)
            _store_bytes(at, _narrow(a >> _seven()))
            _store_bytes(at + 32, _narrow(b >> _seven()))
            _store_bytes(at + 64, _narrow(a & _low7()))
            _store_bytes(at + 96, _narrow(b & _low7()))
        else:
            _store_bytes(at, _narrow(a >> _seven()))
            _store_bytes(at + 32, _narrow(a & _low7()))


# ---- weights --------------------------------------------------------------------------------------------------------


def _make_split_panel(n_planes: int, pairs_of_groups: bool) -> Any:
    """split_panel(panel, n_groups, tiles): int16 (group, pair, row, 2) to tiles of bytes, the low plane first."""

    @v.forceinline
    def split_panel(panel, n_groups, tiles):
        for g in range(n_groups):
            out = tiles + g * n_planes * 1024
            if pairs_of_groups:
                out = tiles + (g >> 1) * n_planes * 1024 + (g & 1) * 512
            for r in range(8):
                p = panel + g * GROUP_NBYTES + r * 128
                a, b = v.load_i16x32(p), v.load_i16x32(p + 64)
                if n_planes == 1:
                    _store_words(out + r * 64, _between(_as_words(_narrow(a)), _as_words(_narrow(b))))
                else:
                    low_a, low_b = _as_words(_narrow(a & _low7())), _as_words(_narrow(b & _low7()))
                    high_a, high_b = _as_words(_narrow(a >> _seven())), _as_words(_narrow(b >> _seven()))
                    _store_words(out + r * 64, _between(low_a, low_b))
                    _store_words(out + 1024 + r * 64, _between(high_a, high_b))

    return split_panel


# ---- the product ----------------------------------------------------------------------------------------------------

_FULL, _WIDTHS_32, _ROWS_32, _ROWS_64 = 0x0040004000400040, 0x0040004000200020, 0x0808101010101010, 0x1010101010101010


def _make_configure(pairs_of_groups: bool) -> Any:
    """configure(at): write a tile configuration at an address and load it. Tiles 4 to 7 are half as deep for K = 32."""
    widths, rows = (_FULL, _ROWS_64) if pairs_of_groups else (_WIDTHS_32, _ROWS_32)

    @v.forceinline
    def configure(at):
        v.store_i64(at, 1)  # the palette
        v.store_i64(at + 8, 0)
        v.store_i64(at + 16, _FULL)  # bytes of a row, tiles 0 to 3
        v.store_i64(at + 24, widths)
        v.store_i64(at + 32, 0)
        v.store_i64(at + 40, 0)
        v.store_i64(at + 48, rows)
        v.store_i64(at + 56, 0)
        _tile_config(at)

    return configure


def _make_total(n_planes: int) -> Any:
    """total(sums): 16 int32 of a token from its two or three partial sums, tiles apart."""

    @v.forceinline
    def total(sums):
        result = (v.load_i32x16(sums) << _seven_wide()) + v.load_i32x16(sums + 1024)
        if n_planes == 2:
            result = (result << _seven_wide()) + v.load_i32x16(sums + 2048)
        return result

    return total


def make_tile_times(finish: Any, n_planes: int, run: int) -> Any:
    """The product of a packed panel with many tokens: 16 rows, the groups of one panel, all tokens.

    finish     (acc, total, scratch, r, scale_at, per_group) -> acc, the arithmetic in float32 of the panel's run r
    n_planes   1 if the panel's integers fit int8, else 2
    run        groups that share a scale and are summed in int32: 1, or an even number
    """
    pairs_of_groups = run > 1
    split_panel, configure = _make_split_panel(n_planes, pairs_of_groups), _make_configure(pairs_of_groups)
    total = _make_total(n_planes)
    zero, step, store = _zero[n_planes], _step[n_planes], _store[n_planes]
    sums_nbytes, run_nbytes = (n_planes + 1) * 1024, max(1, run // 2) * n_planes * 1024

    @v.forceinline
    def run_sums(x, x_row, group, n_groups, tiles, out):
        """The tile instructions of one run of 16 tokens."""
        zero()
        if pairs_of_groups:
            for k in range(run // 2):
                step(x + (group + 2 * k) * 64, 64, x_row, tiles + k * n_planes * 1024)
        else:
            low = 64
            if group + 1 == n_groups and (group & 1) == 0:
                low = 32
            step(x + (group >> 1) * 128 + (group & 1) * 32, low, x_row, tiles)
        store(out)

    @v.forceinline
    def tile_times(scratch, here, x, x_row, n, first_group, n_groups, c, c_row):
        """c[t] (16 floats) goes on from before, or begins if first_group is 0; the panel has ``here`` groups."""
        sums, n_runs = scratch + TILE_SUMS, here // run
        configure(scratch + TILE_CONFIG)
        split_panel(scratch + PANEL, here, scratch + TILES)
        for block in range(0, n, TILE_TOKENS):
            t0 = min(block, n - TILE_TOKENS)  # the last block repeats tokens, whose sums are passed over
            for r0 in range(0, n_runs, TILE_RUNS):
                r1 = min(r0 + TILE_RUNS, n_runs)
                for r in range(r0, r1):
                    tiles, out = scratch + TILES + r * run_nbytes, sums + (r - r0) * sums_nbytes
                    run_sums(x + t0 * x_row, x_row, first_group + r * run, n_groups, tiles, out)
                for t in range(block - t0, TILE_TOKENS):
                    at = c + (t0 + t) * c_row
                    acc = v.zero_f32x16()
                    if first_group + r0 > 0:
                        acc = v.load_f32x16(at)
                    scale_at = x + (t0 + t) * x_row + n_groups * 64 + first_group * 4
                    for r in range(r0, r1):
                        value = total(sums + (r - r0) * sums_nbytes + t * 64)
                        acc = finish(acc, value, scratch, r, scale_at + r * run * 4, n_groups * 4)
                    v.store_f32x16(at, acc)
        _tile_release()

    return tile_times


@v.forceinline
def no_tiles(scratch, here, x, x_row, n, first_group, n_groups, c, c_row):
    """Takes the place of ``tile_times`` where there are none, so that numba has nothing to compile."""
