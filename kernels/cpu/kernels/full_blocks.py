"""Once a block is full: packed keys and values, bounds of keys; and the choice among blocks by their bounds.

See kernels/ops/full_blocks.py for what they make, kernels/cache_types.py and kernels/kv.py for how it lies.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import types

from edgellm.formats.levels import (
    IQ4,
    KIVI2_FAR_STEP,
    KIVI2_KEYS,
    KIVI2_KNEE,
    KIVI2_REACH,
    KIVI2_VALUES,
    PackedLevels,
)
from edgellm.kernels.cpu.kernels.attention import halves_at
from edgellm.kernels.cpu.kernels.elementwise import half_bits
from edgellm.kernels.cpu.lib import layout as at
from edgellm.kernels.cpu.lib import simd as v

_store_u8, _store_u32 = v.make_store(types.uint8), v.make_store(types.uint32)
_splat_u16x16 = v.make_splat(v.u16x16)
_INF = float("inf")
_KNEE, _PER_FAR_STEP, _MORE = float(KIVI2_KNEE), 1 / KIVI2_FAR_STEP, float(KIVI2_FAR_STEP - 1)
_LEVELS = tuple(float(level) for level in IQ4)


@v.forceinline
def _block_at(step, table, token):
    """Index of the block of a token's position in the pool."""
    pair = v.load_i64(step + at.TABLES) + table * 16
    blocks = v.load_i64(pair) + v.load_i32(v.load_i64(step + at.SEQUENCES) + token * 4) * v.load_i64(pair + 8) * 4
    return np.int64(v.load_i32(blocks + v.load_i32(v.load_i64(step + at.POSITIONS) + token * 4) // 32 * 4))


@v.forceinline
def _fills(step, token):
    return v.load_i32(v.load_i64(step + at.POSITIONS) + token * 4) % 32 == 31


# ---- 2 and 3 bits a number -------------------------------------------------------------------------------------------


@v.forceinline
def _ends(x):
    """The least and the largest of 32 float32 at x; 0, or NaN where one is not finite."""
    low = high = v.load_f32(x)
    total = v.f32_of(0.0)
    for i in range(0, 128, 4):
        value = v.load_f32(x + i)
        total += abs(value)
        if value < low:
            low = value
        if value > high:
            high = value
    return low, high, total * v.f32_of(0.0)


@v.forceinline
def _scale_byte(wide):
    byte = np.int64(half_bits(wide)) + 64 >> 7
    if wide > v.f32_of(0.0):
        byte = max(byte, 1)
    return byte & 255


@v.forceinline
def _scale_of(byte):
    return v.first_lane(v.half_f32x16(_splat_u16x16(np.uint16(byte << 7))))


@v.forceinline
def _near(steps):
    """What of a minimum is up to the knee."""
    return max(min(steps, v.f32_of(_KNEE)), v.f32_of(-_KNEE))


def _make_code(of: PackedLevels) -> Any:
    highest = of.highest

    @v.forceinline
    def code_of(value, least, factor):
        return max(min(int((value - least) * factor + v.f32_of(0.5)), highest), 0)

    return code_of


def _make_levels(of: PackedLevels, which: int) -> Any:
    """levels(...) that lie in so large a part of the way between the ends."""
    code_of, highest, per_scale = _make_code(of), of.highest, float(of.per_scale)
    part, centre = of.within[which]

    @v.forceinline
    def levels(x, low, high):
        """The squared error of x, the least, the reciprocal of the scale, and the bytes of scale and minimum."""
        middle = (low + high) * v.f32_of(0.5)
        wide = (high - low) * (v.f32_of(part) / v.f32_of(float(highest)))
        far = abs(middle) * v.f32_of(per_scale / KIVI2_REACH)
        at_middle = v.f32_of(highest / 2)
        if far > wide:
            wide, at_middle = far, v.f32_of(centre)
        byte = _scale_byte(wide)
        scale = _scale_of(byte)
        factor = v.f32_of(1.0) / scale if scale != v.f32_of(0.0) else v.f32_of(0.0)
        least = (middle * factor - at_middle) * v.f32_of(per_scale)
        near = _near(least)
        minimum = max(min(int(near + (least - near) * v.f32_of(_PER_FAR_STEP) + v.f32_of(128.5)), 255), 0)
        steps = np.float32(minimum - 128)
        least = (steps + (steps - _near(steps)) * v.f32_of(_MORE)) * (scale * v.f32_of(1 / per_scale))
        error = v.f32_of(0.0)
        for i in range(0, 128, 4):
            value = v.load_f32(x + i)
            apart = value - (np.float32(code_of(value, least, factor)) * scale + least)
            error += apart * apart
        return error, least, factor, byte, minimum

    return levels


@v.forceinline
def _put_bits(place, mask, code):
    _store_u8(place, np.uint8((v.load_u8(place) & (255 ^ mask)) | code))


@v.forceinline
def _put_two(out, lanes, dot, lane, code):
    shift = dot % 8 // 2 * 2
    _put_bits(out + (dot // 8 * lanes + lane) * 2 + dot % 2, 3 << shift, code << shift)


@v.forceinline
def _put_three(out, lanes, dot, lane, code):
    half, shift, place = dot % 16 // 8, dot % 8 // 2 * 3, out + (dot // 16 * 3 * lanes + lane) * 2 + dot % 2
    _put_bits(place + half * lanes * 2, 7 << shift & 255, code << shift & 255)
    _put_bits(place + lanes * 4, 7 << shift >> 8 << half * 4, code << shift >> 8 << half * 4)


def _make_pack(of: PackedLevels) -> Any:
    code_of, whole, within = _make_code(of), _make_levels(of, 0), _make_levels(of, 1)
    put, bits = {2: _put_two, 3: _put_three}[of.bits], of.bits

    @v.forceinline
    def pack(x, out, dots, lanes, scratch):
        """``dots`` rows of ``lanes`` float16 at x, in groups of 32 lanes."""
        scales = out + dots * lanes * bits // 8
        minima = scales + dots * lanes // 32
        for item in range(dots * lanes // 32):
            dot, g = item // (lanes // 32), item % (lanes // 32)
            v.store_f32x16(scratch, halves_at(x + item * 64))
            v.store_f32x16(scratch + 64, halves_at(x + item * 64 + 32))
            low, high, lost = _ends(scratch)
            error, least, factor, scale, minimum = whole(scratch, low, high)
            less, least_within, factor_within, scale_within, minimum_within = within(scratch, low, high)
            if less < error:
                least, factor, scale, minimum = least_within, factor_within, scale_within, minimum_within
            if lost != lost:
                scale = 255  # what is not finite has to stay visible
            for i in range(32):
                put(out, lanes, dot, g * 32 + i, code_of(v.load_f32(scratch + i * 4), least, factor))
            _store_u8(scales + g * dots + dot, np.uint8(scale))
            _store_u8(minima + g * dots + dot, np.uint8(minimum))

    return pack


_pack_keys, _pack_values = _make_pack(KIVI2_KEYS), _make_pack(KIVI2_VALUES)
_KEYS_NBYTES, _VALUES_NBYTES = KIVI2_KEYS.nbytes, KIVI2_VALUES.nbytes  # of a dimension


def pack_kv(op, step, thread, n_threads):
    """The blocks that the batch fills, from 16 bits to 3 and 2."""
    args = v.arguments(op, at.PACK_KV)
    heads, dim_k, dim_v = args.heads, args.dim_k, args.dim_v
    scratch = v.load_i64(step + at.SCRATCH) + thread * v.load_i64(step + at.SCRATCH_NBYTES)
    for item in range(thread, v.load_i64(step + at.N_TOKENS) * heads, n_threads):
        token, head = item // heads, item % heads
        if _fills(step, token):
            source = _block_at(step, args.newest_table, token) * heads + head
            target = _block_at(step, args.table, token) * heads + head
            _pack_keys(
                args.newest_k + source * dim_k * 64, args.k_pool + target * dim_k * _KEYS_NBYTES, dim_k, 32, scratch
            )
            _pack_values(
                args.newest_v + source * dim_v * 64, args.v_pool + target * dim_v * _VALUES_NBYTES, 32, dim_v, scratch
            )


# ---- bounds ----------------------------------------------------------------------------------------------------------


def _make_number(name: str) -> Any:
    """number(keys, dim, d, slot): a key's number, of any type but float16."""
    n_bits = {"q8": 8, "q5": 5}.get(name[:2], 4)
    centre = {"q4_0": 8, "q5_0": 16}.get(name, 0)
    has_minimum, by_table = name.endswith("_1"), name == "iq4_nl"

    @v.forceinline
    def of_float32(keys, dim, d, slot):
        return v.load_f32(keys + (d * 32 + slot) * 4)

    @v.forceinline
    def of_bfloat16(keys, dim, d, slot):
        return v.f32_from_bits(np.int64(v.load_u16(keys + (d * 32 + slot) * 2)) << 16)

    @v.forceinline
    def of_codes(keys, dim, d, slot):
        scales = keys + dim * n_bits * 4 + (d // 32 * 32 + slot) * 2
        scale = v.first_lane(v.half_f32x16(v.load_u16x16(scales)))
        if n_bits == 8:
            code = np.int64(v.load_u8(keys + (d // 2 * 32 + slot) * 2 + d % 2))
            code -= 256 * (code > 127)
        else:
            code = np.int64(v.load_u8(keys + (d // 4 * 32 + slot) * 2 + d % 2)) >> d % 4 // 2 * 4 & 15
            if n_bits == 5:
                word = v.load_u32(keys + dim * 16 + ((d // 4 * 2 + slot // 16) * 2 + d % 4 // 2) * 4)
                code += (np.int64(word) >> slot % 16 * 2 + d % 2 & 1) << 4
        level = v.f32_of(_LEVELS[code & 15]) if by_table else np.float32(code - centre)
        number = level * scale
        if has_minimum:
            number += v.first_lane(v.half_f32x16(v.load_u16x16(scales + dim * 2)))
        return number

    return {"f32": of_float32, "bf16": of_bfloat16}.get(name, of_codes)


@v.forceinline
def _bounds_of_halves(keys, dim, d):
    first, second = halves_at(keys + d * 64), halves_at(keys + d * 64 + 32)
    least = v.maximum_f32x16(v.zero_f32x16() - v.min_f32x16(first, second))
    total = v.sum_f32x16(v.abs_f32x16(first) + v.abs_f32x16(second))
    return v.f32_of(0.0) - least, v.maximum_f32x16(v.max_f32x16(first, second)), total


def _make_bounds_of(name: str) -> Any:
    """The least and the largest of 32 numbers, and the sum of their magnitudes."""
    number = _make_number(name)

    @v.forceinline
    def bounds_of(keys, dim, d):
        low = high = number(keys, dim, d, 0)
        total = abs(low)
        for slot in range(1, 32):
            value = number(keys, dim, d, slot)
            total += abs(value)
            if value < low:
                low = value
            if value > high:
                high = value
        return low, high, total

    return bounds_of


def make_bound_keys(name: str) -> Any:
    """The kernel of bounds of keys of a type."""
    bounds_of = _bounds_of_halves if name == "f16" else _make_bounds_of(name)

    def bound_keys(op, step, thread, n_threads):
        """The least and the largest number of each dimension of the keys in the blocks that the batch fills."""
        args = v.arguments(op, at.BOUND_KEYS)
        heads, dim, row = args.heads, args.dim, (args.dim + 15) // 16 * 32
        for item in range(thread, v.load_i64(step + at.N_TOKENS) * heads, n_threads):
            token, head = item // heads, item % heads
            if _fills(step, token):
                keys = args.keys + (_block_at(step, args.keys_table, token) * heads + head) * args.keys_head
                out = args.bounds + (_block_at(step, args.table, token) * heads + head) * row * 2
                for d in range(dim):
                    low, high, total = bounds_of(keys, dim, d)
                    lost = total * v.f32_of(0.0)
                    v.store_u16(out + d * 2, half_bits(low + lost))
                    v.store_u16(out + row + d * 2, half_bits(high + lost))

    return bound_keys


# ---- the choice ------------------------------------------------------------------------------------------------------


@v.forceinline
def _split_query(q, dim, positive, negative):
    """What of a query is positive and what negative, zero behind its end."""
    for i in range(dim):
        x = v.load_f32(q + i * 4)
        v.store_f32(positive + i * 4, max(x, v.f32_of(0.0)))
        v.store_f32(negative + i * 4, min(x, v.f32_of(0.0)))
    for i in range(dim, (dim + 15) // 16 * 16):
        v.store_f32(positive + i * 4, v.f32_of(0.0))
        v.store_f32(negative + i * 4, v.f32_of(0.0))


@v.forceinline
def _most(bounds, row, queries, group):
    """What a query makes of a block's keys at most, the largest of those that share a head, as a number that sorts.

    row   bytes of one bound; of each query there are two rows of twice that
    """
    most = v.f32_of(-_INF)
    for r in range(group):
        positive, total = queries + r * row * 4, v.zero_f32x16()
        for i in range(0, row, 32):
            total = v.fma_f32x16(v.load_f32x16(positive + i * 2), halves_at(bounds + row + i), total)
            total = v.fma_f32x16(v.load_f32x16(positive + row * 2 + i * 2), halves_at(bounds + i), total)
        one = v.sum_f32x16(total)
        if one != one:  # a key that is no number has to be read
            one = v.f32_of(_INF)
        most = max(most, one)
    return most


@v.forceinline
def _sortable(number, place):
    """Store float32 as uint32 of the same order."""
    v.store_f32(place, number)
    bits = np.int64(v.load_u32(place))
    if bits >= 2147483648:
        bits = 4294967295 - bits
    else:
        bits += 2147483648
    _store_u32(place, np.uint32(bits))


@v.forceinline
def _at_least(numbers, n, least):
    count = 0
    for i in range(n):
        count += np.int64(v.load_u32(numbers + i * 4)) >= least
    return count


@v.forceinline
def _emit_largest(numbers, n, n_wanted, out):
    """The places of the largest, rising; of equal ones the first."""
    least = 0
    for bit in range(31, -1, -1):
        if _at_least(numbers, n, least + (1 << bit)) >= n_wanted:
            least += 1 << bit
    n_equal = n_wanted - _at_least(numbers, n, least + 1)
    for i in range(n):
        number = np.int64(v.load_u32(numbers + i * 4))
        if number > least or (number == least and n_equal > 0):
            n_equal -= number == least
            v.store_i32(out, np.int32(i))
            out += 4


def choose_blocks(op, step, thread, n_threads):
    """The blocks that each token reads for each head of the cache."""
    args = v.arguments(op, at.CHOOSE_BLOCKS)
    heads, dim, n = args.heads, args.dim, args.n_chosen
    group, row = args.n_heads // heads, (dim + 15) // 16 * 32
    queries = v.load_i64(step + at.SCRATCH) + thread * v.load_i64(step + at.SCRATCH_NBYTES)
    numbers = queries + group * row * 4
    pair = v.load_i64(step + at.TABLES) + args.table * 16
    for item in range(thread, v.load_i64(step + at.N_TOKENS) * heads, n_threads):
        token, head = item // heads, item % heads
        out = args.out + token * args.out_row + head * n * 4
        own = v.load_i32(v.load_i64(step + at.POSITIONS) + token * 4) // 32
        end = v.load_i32(v.load_i64(step + at.SEES) + token * 4) // 32 + 1
        if own < n:
            for i in range(n):
                v.store_i32(out + i * 4, np.int32(i))
        else:
            sequence = v.load_i32(v.load_i64(step + at.SEQUENCES) + token * 4)
            blocks = v.load_i64(pair) + sequence * v.load_i64(pair + 8) * 4
            q = args.q + token * args.q_row + head * group * dim * 4
            for r in range(group):
                _split_query(q + r * dim * 4, dim, queries + r * row * 4, queries + r * row * 4 + row * 2)
            n_full, n_far = min(own, at.MAX_CHOICES), max(0, n - (end - own))
            for b in range(n_full):
                bounds = args.bounds + (np.int64(v.load_i32(blocks + b * 4)) * heads + head) * row * 2
                _sortable(_most(bounds, row, queries, group), numbers + b * 4)
            if n_far > 0:
                _emit_largest(numbers, n_full, n_far, out)
            for i in range(n - n_far):
                v.store_i32(out + (n_far + i) * 4, np.int32(end - (n - n_far) + i))
