"""Products with 24 tokens and more on AMX tiles, to the same bits as everywhere else.

Only the integer sums are made differently. Activations are int16 of at most 15 bits, x = 128 xh + xl; the integer
weights of a panel fit int8, or are w = 128 wh + wl. Every part fits int8, and the sums of their products, exact in
int32, give the sum that the other paths make:

    sum w x  =  (sum w xh << 7) + sum w xl                                                       one plane of weights
             =  (sum wh xh << 14) + (sum (wh xl + wl xh) << 7) + sum wl xl                       two

so a token's numbers do not depend on whether it was in a batch of 23 or 24. (bf16 tiles over whole rows need no sums
per group, but three products of half the rate, and would give a token other bits in a prompt than alone.)

A product takes 16 cycles, a tile load 8, a tile store 16, and the CPU looks 512 instructions ahead: it does them side
by side, and the arithmetic in float32 too, if that of the run before stands between them. For 16 tokens x 16 rows:

    group of 32, one plane     2 products, 3 loads, 2 stores        floats of two runs ago, sums in registers
    256 weights, two planes    16 products, 16 loads, 3 stores      floats of the run before, a quarter after each four

    panel of 16 rows      bytes; a tile row has four columns of every row; of two planes the low one, then the high one
    activations           ``quantize`` has split its rows in place: 64 bytes of int16 are 32 xh and 32 xl
"""

from __future__ import annotations

from typing import Any

from numba import types

from edgellm.kernels.cpu.kernels.panel import groups_of_part, store_rest
from edgellm.kernels.cpu.lib import layout as at
from edgellm.kernels.cpu.lib import simd as v
from edgellm.kernels.cpu.lib.layout import TILE_TOKENS

_i64, _none = types.int64, types.none

has_tiles = v.declared("has_tiles", _i64)
"""1 in the AMX form, else a constant 0."""
_tile_config, _tile_release = v.declared("tile_config", _none, _i64), v.declared("tile_release", _none)
_run_a, _run_b = (v.declared(f"tile_run_{which}", _none, _i64, _i64, _i64, _i64) for which in "ab")
_store_a, _store_b = (v.declared(f"tile_store_{which}", _none, _i64) for which in "ab")
_zero, _step = v.declared("tile_zero", _none), v.declared("tile_step", _none, _i64, _i64, _i64, _i64)
_store = v.declared("tile_store", _none, _i64)

_byte, _low7, _seven, _eight = (v.make_const(v.i16x16, n) for n in (255, 127, 7, 8))
_seven_bits = v.make_const(v.i32x16, 7)

GROUPS = 16
"""At most so many groups of 32 columns in a panel of one plane."""

SIDE_BY_SIDE = 2
"""Panels that are multiplied with 16 tokens before the next 16 come: they stay in the first level, 32 KiB at most."""

TILE_NBYTES = 1024
GROUP_NBYTES = TILE_NBYTES // 2
"""Bytes of a group of 32 columns of 16 rows, in a plane."""


# ---- activations ----------------------------------------------------------------------------------------------------


@v.forceinline
def _store_halves(even, odd, high, low):
    """16 even and 16 odd columns as bytes, in their own order: xh, xl."""
    v.store_i16x16(high, ((even >> _seven()) & _byte()) | ((odd >> _seven()) << _eight()))
    v.store_i16x16(low, (even & _low7()) | ((odd & _low7()) << _eight()))


@v.forceinline
def split_activations(row, first, stop, n_groups):
    """The int16 groups [first, stop) of a row, first even, become bytes: of each two groups 32 xh, 32 xh, 32 xl, 32 xl.

    A last group without another becomes 32 xh, 32 xl.
    """
    for g in range(first, stop, 2):
        x = row + g * 64
        even, odd = v.load_i16x16(x), v.load_i16x16(x + 32)
        if g + 1 < n_groups:
            next_even, next_odd = v.load_i16x16(x + 64), v.load_i16x16(x + 96)
            _store_halves(even, odd, x, x + 64)
            _store_halves(next_even, next_odd, x + 32, x + 96)
        else:
            _store_halves(even, odd, x, x + 32)


# ---- the shapes of tiles ---------------------------------------------------------------------------------------------

_FULL, _WIDTHS_32, _ROWS_32, _ROWS_64 = 0x0040004000400040, 0x0040004000200020, 0x0808101010101010, 0x1010101010101010


def _make_configure(is_deep: bool) -> Any:
    """configure(at): write a tile configuration at an address and load it. Tiles 4 to 7 are half as deep for K = 32."""
    widths, rows = (_FULL, _ROWS_64) if is_deep else (_WIDTHS_32, _ROWS_32)

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


# ---- blocks of 16 tokens ---------------------------------------------------------------------------------------------


@v.forceinline
def _sixteen_tokens(t, n, x, x_row, c, c_row, aside):
    """Those from t on: where activations are, and sums, bytes from one's sums to the next one's, and between panels.

    Where fewer are left they are the last 16, once more, summed aside.
    """
    if t + TILE_TOKENS > n:
        return x + (n - TILE_TOKENS) * x_row, aside, 64, TILE_NBYTES
    return x + t * x_row, c + t * c_row, c_row, at.PANEL_ROWS * 4


@v.forceinline
def _begin(first_group, c, c_row):
    """With the first columns sums begin at zero."""
    if first_group == 0:
        for t in range(TILE_TOKENS):
            v.store_f32x16(c + t * c_row, v.zero_f32x16())


# ---- groups of 32, one plane -----------------------------------------------------------------------------------------


@v.forceinline
def _load_one(c, c_row):
    return (v.load_f32x16(c),)


@v.forceinline
def _store_one(acc, c, c_row):
    v.store_f32x16(c, acc[0])


def _make_load(n: int) -> Any:
    """load(c, c_row): n vectors."""
    if n == 1:
        return _load_one
    half, k = _make_load(n // 2), n // 2

    @v.forceinline
    def load(c, c_row):
        return half(c, c_row) + half(c + k * c_row, c_row)

    return load


def _make_store(n: int) -> Any:
    """store(acc, c, c_row): n vectors."""
    if n == 1:
        return _store_one
    half, k = _make_store(n // 2), n // 2

    @v.forceinline
    def store(acc, c, c_row):
        half(acc[:k], c, c_row)
        half(acc[k:], c + k * c_row, c_row)

    return store


def _make_floats(n: int, finish: Any) -> Any:
    """floats(acc, sums, place, block, scale_at, x_row, per_group): the float32 sums of n tokens go on with a run."""
    if n == 1:

        @v.forceinline
        def one(acc, sums, place, block, scale_at, x_row, per_group):
            total = (v.load_i32x16(sums) << _seven_bits()) + v.load_i32x16(sums + TILE_NBYTES)
            return (finish(acc[0], total, place, block, scale_at, per_group),)

        return one
    half, k = _make_floats(n // 2, finish), n // 2

    @v.forceinline
    def floats(acc, sums, place, block, scale_at, x_row, per_group):
        first = half(acc[:k], sums, place, block, scale_at, x_row, per_group)
        return first + half(acc[k:], sums + k * 64, place, block, scale_at + k * x_row, x_row, per_group)

    return floats


@v.intrinsic
def _anew(typing_context, address):
    """The same address, found anew: LLVM would keep what is at fixed places behind it, each in a pointer of its own."""

    def codegen(context, builder, sig, args):
        i64 = args[0].type
        return builder.asm(v.ir.FunctionType(i64, [i64]), "", "=r,0", [args[0]], True)

    return _i64(_i64), codegen


def _make_groups(finish: Any) -> Any:
    """sixteen(...): 16 tokens from x on times a panel of ``here`` groups, group by group; c goes on, or begins."""
    load, store = _make_load(TILE_TOKENS), _make_store(TILE_TOKENS)
    floats_at = _make_floats(TILE_TOKENS, finish)

    @v.forceinline
    def floats(acc, sums, place, block, scale_at, x_row, per_group):
        return floats_at(acc, _anew(sums), place, block, _anew(scale_at), _anew(x_row), per_group)

    @v.forceinline
    def low_bytes(group, n_groups):
        """How far they are behind the high ones."""
        return 32 if group + 1 == n_groups and (group & 1) == 0 else 64

    @v.forceinline
    def x_of(x, group):
        return x + (group >> 1) * 128 + (group & 1) * 32

    @v.forceinline
    def sixteen(place, here, x, x_row, first_group, n_groups, sums, c, c_row):
        scale_at, per_group = x + n_groups * 64 + first_group * 4, n_groups * 4
        w, other = place + at.PANEL, sums + 2 * TILE_NBYTES
        _begin(first_group, c, c_row)
        acc = load(c, c_row)
        for r in range(0, here, 2):
            group = first_group + r
            _run_a(x_of(x, group), low_bytes(group, n_groups), x_row, w + r * GROUP_NBYTES)
            if r > 0:
                _store_b(other)
                acc = floats(acc, sums, place, r - 2, scale_at + r * 4 - 8, x_row, per_group)
            if r + 1 < here:
                _run_b(x_of(x, group + 1), low_bytes(group + 1, n_groups), x_row, w + (r + 1) * GROUP_NBYTES)
                _store_a(sums)
                if r > 0:
                    acc = floats(acc, other, place, r - 1, scale_at + r * 4 - 4, x_row, per_group)
        last = here - 1
        if here % 2 == 1:
            _store_a(sums)
            if here > 1:
                acc = floats(acc, other, place, last - 1, scale_at + last * 4 - 4, x_row, per_group)
            acc = floats(acc, sums, place, last, scale_at + last * 4, x_row, per_group)
        else:
            _store_b(other)
            acc = floats(acc, sums, place, last - 1, scale_at + last * 4 - 4, x_row, per_group)
            acc = floats(acc, other, place, last, scale_at + last * 4, x_row, per_group)
        store(acc, c, c_row)

    return sixteen


def _make_groups_part(finish: Any, fetch: Any) -> Any:
    """part(...): see ``make_multiply``."""
    sixteen = _make_groups(finish)

    @v.forceinline
    def part(scratch, places, n_panels, here, x, x_row, n, first_group, n_groups, c, c_row, aside, ahead, ahead_row):
        sums = scratch + at.TILE_SUMS
        for t in range(0, n, TILE_TOKENS):
            x_t, c_t, c_t_row, c_panel = _sixteen_tokens(t, n, x, x_row, c, c_row, aside)
            for panel in range(n_panels):
                fetch(ahead + panel * ahead_row, t, n, here)
                place = places + panel * at.TILE_PANEL_NBYTES
                sixteen(place, here, x_t, x_row, first_group, n_groups, sums, c_t + panel * c_panel, c_t_row)

    return part


# ---- super-blocks, two planes ----------------------------------------------------------------------------------------

BLOCK_GROUPS = 8
LOW_NBYTES = BLOCK_GROUPS * GROUP_NBYTES
"""Of the low plane of 256 columns; the high one is behind it."""


def _make_superblocks_part(finish: Any, fetch: Any) -> Any:
    """part(...): see ``make_multiply``. The floats of a super-block stand between the products of the next one."""

    @v.forceinline
    def quarter(k, sums, place, block, scale_at, x_row, per_group, c, c_row):
        """The float32 sums of four tokens go on."""
        for t in range(4 * k, 4 * k + 4):
            high, middle = v.load_i32x16(sums + t * 64), v.load_i32x16(sums + TILE_NBYTES + t * 64)
            total = (high << _seven_bits()) + middle
            total = (total << _seven_bits()) + v.load_i32x16(sums + 2 * TILE_NBYTES + t * 64)
            acc = finish(v.load_f32x16(c + t * c_row), total, place, block, scale_at + t * x_row, per_group)
            v.store_f32x16(c + t * c_row, acc)

    @v.forceinline
    def part(scratch, places, n_panels, here, x, x_row, n, first_group, n_groups, c, c_row, aside, ahead, ahead_row):
        per_group, scales = n_groups * 4, n_groups * 64 + first_group * 4
        sums, sums_before = scratch + at.TILE_SUMS, scratch + at.TILE_SUMS + 3 * TILE_NBYTES
        # before the first there is none: anything goes nowhere
        place_before, block_before, scale_before, c_before, c_row_before = scratch, 0, x, scratch + at.TILE_NOWHERE, 64
        for t in range(0, n, TILE_TOKENS):
            x_t, c_t, c_t_row, c_panel = _sixteen_tokens(t, n, x, x_row, c, c_row, aside)
            for panel in range(n_panels):
                fetch(ahead + panel * ahead_row, t, n, here)
                place, c_here = places + panel * at.TILE_PANEL_NBYTES, c_t + panel * c_panel
                _begin(first_group, c_here, c_t_row)
                for block in range(here // BLOCK_GROUPS):
                    x_b = x_t + (first_group + block * BLOCK_GROUPS) * 64
                    w = place + at.PANEL + block * 2 * LOW_NBYTES
                    _zero()
                    for k in range(4):
                        _step(x_b + k * 128, x_row, w + k * TILE_NBYTES, LOW_NBYTES)
                        quarter(
                            k, sums_before, place_before, block_before, scale_before, x_row, per_group, c_before,
                            c_row_before,
                        )  # fmt: skip
                    _store(sums)
                    sums, sums_before = sums_before, sums
                    place_before, block_before, c_before, c_row_before = place, block, c_here, c_t_row
                    scale_before = x_t + scales + block * BLOCK_GROUPS * 4
        for k in range(4):
            quarter(k, sums_before, place_before, block_before, scale_before, x_row, per_group, c_before, c_row_before)

    return part


# ---- the product -----------------------------------------------------------------------------------------------------


def make_multiply(run: int, block_nbytes: int, pack: Any, finish: Any) -> Any:
    """multiply: 16 rows times n >= 16 tokens; ``run`` groups of 32 columns are a block of so many bytes.

    pack(p, stride, n_groups, half, scratch)   eight rows from p become those of the panel at even or at odd places
    finish(acc, total, scratch, block, scale_at, per_group)   float32 sums of 16 rows go on over a block
    """
    width_at_most = GROUPS if run == 1 else BLOCK_GROUPS

    @v.forceinline
    def fetch(ahead, t, n, here):
        """The share that these tokens have in the bytes that a panel is packed from."""
        nbytes, n_blocks = at.PANEL_ROWS * here // run * block_nbytes, (n + TILE_TOKENS - 1) // TILE_TOKENS
        share = (nbytes // 64 + n_blocks) // n_blocks * 64
        first = t // TILE_TOKENS * share
        for line in range(first, min(first + share, nbytes), 64):
            v.fetch_later(ahead + line)

    part = _make_groups_part(finish, fetch) if run == 1 else _make_superblocks_part(finish, fetch)
    configure = _make_configure(run > 1)

    @v.forceinline
    def multiply(x, x_row, n, n_panels, w, w_row, n_groups, c, c_row, scratch, ahead):
        """n_panels times 16 rows from w times n tokens; c is (n, rows) with rows c_row bytes apart.

        What lies from ``ahead`` on comes next.
        """
        width, places = groups_of_part(n_groups, width_at_most, run), scratch + at.TILE_PLACES
        configure(scratch + at.TILE_CONFIG)
        for g in range(0, n_groups, width):
            here, first_block = min(width, n_groups - g), g // run * block_nbytes
            for panel in range(n_panels):
                rows, place = w + panel * at.PANEL_ROWS * w_row + first_block, places + panel * at.TILE_PANEL_NBYTES
                for half in range(2):
                    pack(rows + half * w_row, 2 * w_row, here, half, place)
            next_panel, next_row = ahead + first_block * at.PANEL_ROWS, at.PANEL_ROWS * w_row
            for first in range(0, n_panels, SIDE_BY_SIDE):
                here_panels, place = min(SIDE_BY_SIDE, n_panels - first), places + first * at.TILE_PANEL_NBYTES
                aside, ahead_g = scratch + at.TILE_ASIDE + first * TILE_NBYTES, next_panel + first * next_row
                part(
                    scratch, place, here_panels, here, x, x_row, n, g, n_groups, c + first * 64, c_row, aside, ahead_g,
                    next_row,
                )  # fmt: skip
        _tile_release()
        store_rest(scratch + at.TILE_ASIDE, TILE_TOKENS, n, n_panels, c, c_row)

    return multiply
