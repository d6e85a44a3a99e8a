"""Many tokens on AVX-512 VNNI: 16 rows are packed by transposition (transposed_rows.py), and go with 8 tokens at once.

A vector of the panel holds four columns, as int16, of eight rows: those at even places, or those at odd ones. A row's
sum stands in two lanes of its own, and a load of 8 bytes brings activations for two vectors, so 16 sums of 16 rows and
8 tokens go on with two loads of weights and 8 of activations: multiply-adds bind, not loads, and there are more
chains of them than a multiply-add takes cycles. Where the lanes of both vectors are added, rows are in order again.

    group of 32 columns   eight times 128 bytes: 4 columns of even rows, of odd rows; columns as in the activations
"""

from __future__ import annotations

from typing import Any

from numba import types

from edgellm.kernels.cpu.kernels.panel import groups_of_part, store_rest
from edgellm.kernels.cpu.kernels.transposed_rows import splat_eight_bytes
from edgellm.kernels.cpu.lib import layout as at
from edgellm.kernels.cpu.lib import simd as v

GROUPS = 16
"""At most so many groups of 32 columns in a panel: 16 KiB, beside 8 of the activations of 8 tokens, in an L1 of 32."""

FAR_NBYTES = 3 << 18
"""Activations of more bytes than this do not stay in a second level of 1 MiB."""

FEW = 6
"""Up to so many tokens are multiplied without a panel, whose packing costs as much as 4 to 8 tokens."""

_words = v.Vec(types.uint16, 32)
_as_words, _as_signed = v.make_convert(v.u64x8, _words, "bitcast"), v.make_convert(_words, v.i16x32, "bitcast")
_as_rows = v.make_convert(v.i32x16, v.u64x8, "bitcast")
_as_numbers = v.make_convert(v.u64x8, v.i32x16, "bitcast")
_low_byte, _eight_bits = v.make_const(_words, 255), v.make_const(_words, 8)
_low_half, _sixteen_bits = v.make_const(v.i32x16, 0xFFFF), v.make_const(v.i32x16, 16)
_first_lanes, _last_lanes = v.make_const(v.u64x8, 0xFFFFFFFF), v.make_const(v.u64x8, 0xFFFFFFFF << 32)
_thirty_two = v.make_const(v.u64x8, 32)
_twice = v.make_shuffle(v.f32x8, [lane // 2 for lane in range(16)])
_float_bits = v.make_convert(v.f32x16, v.i32x16, "bitcast")
_store = v.make_store(v.i16x32)


# ---- the panel -------------------------------------------------------------------------------------------------------


def _make_scaled(centre: int) -> Any:
    """scaled(z, scale): 8 columns of eight rows, bytes above a centre, as int16 times those of ``scale``: even, odd."""
    less = v.make_const(v.i16x32, centre)

    @v.forceinline
    def scaled(z, scale):
        words = _as_words(z)
        even, odd = _as_signed(words & _low_byte()), _as_signed(words >> _eight_bits())
        if centre != 0:
            even, odd = even - less(), odd - less()
        return even * scale, odd * scale

    return scaled


def make_store_words(centre: int) -> Any:
    """store(place, half, z, scale): they go to the panel, of half 1 to every second place."""
    scaled = _make_scaled(centre)

    @v.forceinline
    def store(place, half, z, scale):
        even, odd = scaled(z, scale)
        _store(place + half * 64, even)
        _store(place + half * 64 + 512, odd)

    return store


@v.forceinline
def scale_words(scale):
    """Numbers in the two lanes of every row as four int16."""
    return v.i32x16_as_i16x32((scale << _sixteen_bits()) | (scale & _low_half()))


@v.forceinline
def store_numbers(out, value, half):
    """Numbers of eight rows, in their two lanes, go to every second of 16, those of half 0 first."""
    if half != 0:
        value = _as_numbers((_as_rows(v.load_i32x16(out)) & _first_lanes()) | (_as_rows(value) & _last_lanes()))
    v.store_i32x16(out, value)


@v.forceinline
def store_floats(out, value, half):
    """The same for float32."""
    store_numbers(out, _float_bits(_twice(value, value)), half)


@v.forceinline
def store_bytes(out, value, half):
    """Eight bytes of eight rows: the first four of each go to every second of 16 lanes, the last four behind them."""
    store_numbers(out, _as_numbers((value & _first_lanes()) | (value << _thirty_two())), half)
    store_numbers(out + 64, _as_numbers((value >> _thirty_two()) | (value & _last_lanes())), half)


# ---- tiles of bytes in place of words (amx_matmul.py) ----------------------------------------------------------------

_as_signed_words, _as_columns = v.make_convert(v.i16x32, _words, "bitcast"), v.make_convert(_words, v.u64x8, "bitcast")
_low7, _seven_bits = v.make_const(v.i16x32, 127), v.make_const(v.i16x32, 7)


@v.forceinline
def _join_bytes(even, odd):
    """The lowest bytes of even and odd columns, in the order of the columns."""
    even, odd = _as_signed_words(even), _as_signed_words(odd)
    return _as_columns((even & _low_byte()) | (odd << _eight_bits()))


def make_store_planes(centre: int, high_at: int) -> Any:
    """store(place, half, z, scale): as ``make_store_words``, but the products go to tiles: 7 low bits, and the rest."""
    scaled = _make_scaled(centre)

    @v.forceinline
    def store(place, half, z, scale):
        even, odd = scaled(z, scale)
        store_bytes(place, _join_bytes(even & _low7(), odd & _low7()), half)
        store_bytes(place + high_at, _join_bytes(even >> _seven_bits(), odd >> _seven_bits()), half)

    return store


# ---- times tokens: what does it for n is made of what does it for n / 2 ----------------------------------------------


@v.forceinline
def _zeros_one():
    return v.zero_i32x16(), v.zero_i32x16()


@v.forceinline
def _times_one(sums, even, odd, x, x_row):
    columns = v.i32x16_as_i16x32(_as_numbers(splat_eight_bytes(x)))
    return v.madd_i16(sums[0], even, columns), v.madd_i16(sums[1], odd, columns)


@v.forceinline
def _of_rows(even, odd):
    """The two lanes of every row added, in the order of the rows."""
    a, b = _as_rows(even), _as_rows(odd)
    first = (a & _first_lanes()) | (b << _thirty_two())
    return _as_numbers(first) + _as_numbers((a >> _thirty_two()) | (b & _last_lanes()))


def _make_zeros(n: int) -> Any:
    if n == 1:
        return _zeros_one
    half = _make_zeros(n // 2)

    @v.forceinline
    def zeros():
        return half() + half()

    return zeros


def _make_times(n: int) -> Any:
    """times(sums, even, odd, x, x_row): the sums of n tokens, two vectors each, go on with four columns."""
    if n == 1:
        return _times_one
    half = _make_times(n // 2)

    @v.forceinline
    def times(sums, even, odd, x, x_row):
        return half(sums[:n], even, odd, x, x_row) + half(sums[n:], even, odd, x + n // 2 * x_row, x_row)

    return times


def _make_finish(n: int, finish: Any) -> Any:
    """finish(sums, scratch, block, scale_at, x_row, per_group, out): the float32 sums of n tokens go on."""
    if n == 1:

        @v.forceinline
        def finish_one(sums, scratch, block, scale_at, x_row, per_group, out):
            total = _of_rows(sums[0], sums[1])
            v.store_f32x16(out, finish(v.load_f32x16(out), total, scratch, block, scale_at, per_group))

        return finish_one
    half = _make_finish(n // 2, finish)

    @v.forceinline
    def finish_all(sums, scratch, block, scale_at, x_row, per_group, out):
        half(sums[:n], scratch, block, scale_at, x_row, per_group, out)
        half(sums[n:], scratch, block, scale_at + n // 2 * x_row, x_row, per_group, out + n * 32)

    return finish_all


def _make_tile(n: int, run: int, block_nbytes: int, finish: Any, is_far: bool) -> Any:
    """tile(...): a panel times n tokens; c[t] (16 floats) goes on from before, if this is not the first.

    As many bytes as the panel was packed from are fetched from ``ahead`` on, if that is not 0. Where activations are
    far, those of the next tile are fetched from ``following`` on, their scales, and the sums that it goes on from.
    """
    nbytes = at.PANEL_ROWS * block_nbytes // run
    zeros, times, finish_all = _make_zeros(n), _make_times(n), _make_finish(n, finish)

    @v.forceinline
    def tile(scratch, n_groups, x, x_row, scale_at, per_group, c, c_row, first, ahead, following):
        sums, panel = scratch + at.LANES, scratch + at.PANEL
        for t in range(n):
            before = v.zero_f32x16()
            if not first:
                before = v.load_f32x16(c + t * c_row)
            v.store_f32x16(sums + t * 64, before)
        if is_far:
            for t in range(n):
                scales = following + t * x_row + scale_at - x
                v.fetch(scales)
                v.fetch(scales + per_group)
                v.fetch(c + (n + t) * c_row)
        for block in range(n_groups // run):
            totals = zeros()
            for _ in range(run):
                if ahead != 0:  # a few lines at a time: while they are packed so many would wait for memory
                    for line in range(0, nbytes, 64):
                        v.fetch_later(ahead + line)
                    ahead += nbytes
                for k in range(8):
                    if is_far:  # one by one, too
                        v.fetch(following + k % n * x_row)
                    even, odd = v.load_i16x32(panel + k * 128), v.load_i16x32(panel + k * 128 + 64)
                    totals = times(totals, even, odd, x + k * 8, x_row)
                panel += at.GROUP_NBYTES
                x += 64
                following += 64
            finish_all(totals, scratch, block, scale_at, x_row, per_group, sums)
            scale_at += run * 4
        for t in range(n):
            v.store_f32x16(c + t * c_row, v.load_f32x16(sums + t * 64))

    return tile


def make_multiply(run: int, block_nbytes: int, pack: Any, finish: Any, may_be_far: bool = True) -> Any:
    """multiply: 16 rows times n >= 4 tokens; ``run`` groups of 32 columns are a block of so many bytes.

    pack(p, stride, n_groups, half, scratch)   eight rows from p become those of the panel at even or at odd places
    may_be_far                                 there may be so many tokens that their activations are far
    """
    eight, eight_far, four = (
        _make_tile(n, run, block_nbytes, finish, is_far) for n, is_far in ((8, False), (8, True), (4, False))
    )

    @v.forceinline
    def tokens(x, x_row, n, n_groups, here, c, c_row, scratch, g, ahead, last):
        """A panel times n tokens; what the last four add to an incomplete tile goes to ``last``."""
        x, scale_at, per_group, t = x + g * 64, x + n_groups * 64 + g * 4, n_groups * 4, 0
        while t + 8 <= n:
            x_t, scale_t, c_t = x + t * x_row, scale_at + t * x_row, c + t * c_row
            if may_be_far and n * x_row > FAR_NBYTES:
                following = x + (t + 8) % n * x_row
                eight_far(scratch, here, x_t, x_row, scale_t, per_group, c_t, c_row, g == 0, ahead, following)
            else:
                eight(scratch, here, x_t, x_row, scale_t, per_group, c_t, c_row, g == 0, ahead, 0)
            t, ahead = t + 8, 0
        while t < n:  # the last four once more with some before them, summed aside
            c_t, c_t_row = c + t * c_row, c_row
            if t + 4 > n:
                t, c_t, c_t_row = n - 4, last, 64
            x_t, scale_t = x + t * x_row, scale_at + t * x_row
            four(scratch, here, x_t, x_row, scale_t, per_group, c_t, c_t_row, g == 0, ahead, 0)
            t, ahead = t + 4, 0

    @v.forceinline
    def multiply(x, x_row, n, n_panels, w, w_row, n_groups, c, c_row, scratch, ahead):
        """n_panels times 16 rows from w times n tokens; c is (n, rows) with rows c_row bytes apart.

        What lies from ``ahead`` on comes next. Panels of the same columns follow one another: from the second on far
        activations come from the second level.
        """
        width, aside = groups_of_part(n_groups, GROUPS, run), scratch + at.CENTRES
        for g in range(0, n_groups, width):
            here, first_block = min(width, n_groups - g), g // run * block_nbytes
            for panel in range(n_panels):
                row = panel * at.PANEL_ROWS
                for half in range(2):
                    pack(w + (row + half) * w_row + first_block, 2 * w_row, here, half, scratch)
                next_panel = ahead + row * w_row + first_block * at.PANEL_ROWS
                tokens(x, x_row, n, n_groups, here, c + row * 4, c_row, scratch, g, next_panel, aside + row * 16)
        store_rest(aside, 4, n, n_panels, c, c_row)

    return multiply
