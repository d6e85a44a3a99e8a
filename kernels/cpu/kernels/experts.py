"""A mixture of experts: which experts a token is sent to, products with the rows of those experts, the weighted sum.

A pair is a token and one of its experts. ``group_by_expert`` puts the pairs of a step in the order of their experts, so
that an expert's weights are read once for all its pairs; quantized activations are made in that order. A group of one
or a few pairs, as in decoding, is multiplied straight from the mapped file, a larger one through panels of 16 rows. The
cores are those of any other product, so a token has the same bits in a group of any size.
"""

from __future__ import annotations

from typing import Any

from edgellm.kernels.cpu.kernels import float_matmul, quantized_matmul
from edgellm.kernels.cpu.lib import layout as at
from edgellm.kernels.cpu.lib import simd as v
from edgellm.kernels.cpu.lib.vector_math import exp_f32x16, sigmoid_f32x16
from edgellm.kernels.cpu.weights import FLOAT

# ---- which experts ---------------------------------------------------------------------------------------------------


@v.forceinline
def _order_of(bits):
    """A whole number in the order of the float32 with these bits; NaN has a place too."""
    if bits < 0:
        return -(bits & 0x7FFFFFFF)
    return bits


@v.forceinline
def _next_best(logits, n, key, expert):
    """The best of n experts that comes after ``expert``, whose key is given: a smaller logit, or a later equal one."""
    best, best_key = 0, -(1 << 40)
    for i in range(n):
        other = _order_of(v.load_i32(logits + i * 4))
        if other > best_key and (other < key or (other == key and i > expert)):
            best, best_key = i, other
    return best, best_key


_lane_numbers = v.make_constants(v.i32x16, [*range(16)])


@v.forceinline
def _sum_of_all(logits, n, largest):
    """The sum of e^(logit - largest) over n experts."""
    total, end = v.zero_f32x16(), v.splat_f32x16(v.f32_of(float(n)))
    for i in range(0, n, 16):
        index = v.to_f32x16(_lane_numbers()) + v.splat_f32x16(v.f32_of(float(i)))
        power = exp_f32x16(v.load_f32x16(logits + i * 4) - largest)
        total = total + v.where_less(index, end, power, v.zero_f32x16())
    return v.sum_f32x16(total)


@v.forceinline
def _largest_of_all(logits, n):
    """The largest of n logits."""
    largest = v.load_f32(logits)
    for i in range(1, n):
        largest = max(largest, v.load_f32(logits + i * 4))
    return v.splat_f32x16(largest)


@v.forceinline
def _score_all(args, logits, scores):
    """What experts are chosen by, where that is not their logits: scores, plus the bias."""
    n = args.n_expert
    largest = _largest_of_all(logits, n)
    total = v.splat_f32x16(_sum_of_all(logits, n, largest))
    for i in range(0, n, 16):
        x = v.load_f32x16(logits + i * 4)
        score = exp_f32x16(x - largest) / total
        if args.sigmoid != 0:
            score = sigmoid_f32x16(x)
        if args.bias != 0:
            score = score + v.load_f32x16(args.bias + i * 4)
        v.store_f32x16(scores + i * 4, score)


@v.forceinline
def _leave_out_groups(args, scores):
    """Of all groups but those whose two best scores sum highest (or whose best is), of equals the first, scores are
    below all others."""
    size, sums = args.n_expert // args.n_groups, scores + args.n_expert * 4
    for group in range(args.n_groups):
        first = second = v.f32_of(-1e30)
        for i in range(group * size, group * size + size):
            score = v.load_f32(scores + i * 4)
            second = max(second, min(first, score))
            first = max(first, score)
        total = first
        if size > 1 and args.best > 1:
            total = first + second
        v.store_f32(sums + group * 4, total)
    for group in range(args.n_groups):
        own, before = v.load_f32(sums + group * 4), 0
        for other in range(args.n_groups):
            total = v.load_f32(sums + other * 4)
            if total > own or (total == own and other < group):
                before += 1
        if before >= args.groups_used:
            for i in range(group * size, group * size + size):
                v.store_f32(scores + i * 4, v.f32_of(-1e38))


@v.forceinline
def _weights(args, logits, probs):
    """The scores of the chosen experts whose logits stand there, of which the first is the largest if they are chosen
    by them; what they are to be divided by."""
    total = v.f32_of(0.0)
    if args.sigmoid != 0:
        for i in range(0, args.n_used, 16):
            v.store_f32x16(probs + i * 4, sigmoid_f32x16(v.load_f32x16(probs + i * 4)))
        total = v.f32_of(1e-20)
    else:
        largest = v.splat_f32x16(v.load_f32(probs))
        if args.by_logits == 0:
            largest = _largest_of_all(logits, args.n_expert)
        for i in range(0, args.n_used, 16):
            v.store_f32x16(probs + i * 4, exp_f32x16(v.load_f32x16(probs + i * 4) - largest))
        if args.over_all != 0:
            return _sum_of_all(logits, args.n_expert, largest)
    if args.over_all != 0:
        return v.f32_of(1.0)
    for slot in range(args.n_used):
        total = total + v.load_f32(probs + slot * 4)
    return total


def route(op, step, thread, n_threads):
    """ids = the experts with the largest scores, probs = their weights: see ops/experts.py."""
    args = v.arguments(op, at.ROUTE)
    scratch = v.load_i64(step + at.SCRATCH) + thread * v.load_i64(step + at.SCRATCH_NBYTES)
    factor = v.f32_of(v.f64_from_bits(args.factor))
    for t in range(thread, v.load_i64(step + args.row_kind), n_threads):
        logits, ids, probs = args.logits + t * args.logits_row, args.ids + t * args.ids_row, args.probs
        probs += t * args.probs_row
        scores = logits
        if args.by_logits == 0:
            scores = scratch
            _score_all(args, logits, scores)
            if args.n_groups > 1:
                _leave_out_groups(args, scores)
        expert, key = -1, 1 << 40
        for slot in range(args.n_used):
            expert, key = _next_best(scores, args.n_expert, key, expert)
            v.store_i32(ids + slot * 4, expert)
            v.store_f32(probs + slot * 4, v.load_f32(logits + expert * 4))
        total = _weights(args, logits, probs)
        for slot in range(args.n_used):
            prob = v.load_f32(probs + slot * 4) / total * factor
            if args.scales != 0:
                prob = prob * v.load_f32(args.scales + v.load_i32(ids + slot * 4) * 4)
            v.store_f32(probs + slot * 4, prob)


def group_by_expert(op, step, thread, n_threads):
    """The pairs in the order of their experts, those of one in the order of tokens, and where each group is."""
    args = v.arguments(op, at.GROUP_BY_EXPERT)
    if thread != 0:
        return
    n, groups, pairs = v.load_i64(step + args.row_kind), args.groups + at.GROUPS, args.pairs
    for expert in range(args.n_expert):
        v.store_i32(groups + expert * at.EXPERTS_GROUP_NBYTES + at.GROUP_NEXT, 0)
    for t in range(n):
        for slot in range(args.n_used):
            seen = groups + v.load_i32(args.ids + t * args.ids_row + slot * 4) * at.EXPERTS_GROUP_NBYTES + at.GROUP_NEXT
            v.store_i32(seen, v.load_i32(seen) + 1)
    first, group = 0, groups
    for expert in range(args.n_expert):
        following = groups + expert * at.EXPERTS_GROUP_NBYTES + at.GROUP_NEXT
        size = v.load_i32(following)
        v.store_i32(following, first)
        if size > 0:
            v.store_i32(group + at.GROUP_EXPERT, expert)
            v.store_i32(group + at.GROUP_FIRST, first)
            v.store_i32(group + at.GROUP_SIZE, size)
            group += at.EXPERTS_GROUP_NBYTES
        first += size
    v.store_i32(args.groups, (group - groups) // at.EXPERTS_GROUP_NBYTES)
    for t in range(n):
        for slot in range(args.n_used):
            expert = v.load_i32(args.ids + t * args.ids_row + slot * 4)
            following = groups + expert * at.EXPERTS_GROUP_NBYTES + at.GROUP_NEXT
            place = v.load_i32(following)
            v.store_i32(pairs + place * 4, t * args.n_used + slot)
            v.store_i32(following, place + 1)


# ---- products --------------------------------------------------------------------------------------------------------


@v.forceinline
def _out_of_pair(args, pair):
    """Where the product of a pair goes."""
    return args.out + pair // args.n_used * args.out_row + pair % args.n_used * args.n_out * 4


@v.forceinline
def _unit(args, unit):
    """Of a unit of work, a chunk of an expert's rows: the group, where row 0 of the weight would be if all its rows lay
    as this expert's do, the expert's first row, the chunk's."""
    chunks = (args.n_out + at.EXPERT_ROWS - 1) // at.EXPERT_ROWS
    group = args.groups + at.GROUPS + unit // chunks * at.EXPERTS_GROUP_NBYTES
    expert = v.load_i32(group + at.GROUP_EXPERT)
    base = expert * args.n_out
    return group, v.load_i64(args.experts + expert * 8), base, base + unit % chunks * at.EXPERT_ROWS


@v.forceinline
def _n_units(args):
    return v.load_i32(args.groups) * ((args.n_out + at.EXPERT_ROWS - 1) // at.EXPERT_ROWS)


def make_expert_matmul(quant: str, form: str | None = None) -> Any:
    """The kernel out[slot] = x @ weight[ids[slot]].T; a unit of work is some rows of an expert times all its pairs."""
    times_pairs = _make_float(quant) if quant in FLOAT else _make_quantized(quant, form)

    def expert_matmul(op, step, thread, n_threads):
        args = v.arguments(op, at.EXPERT_MATMUL)
        scratch = v.load_i64(step + at.SCRATCH) + thread * v.load_i64(step + at.SCRATCH_NBYTES)
        n_units = _n_units(args)
        unit = v.atomic_add(op + at.COUNTER, 1)
        while unit < n_units:
            group, w, base, start = _unit(args, unit)
            stop, first = min(start + at.EXPERT_ROWS, base + args.n_out), v.load_i32(group + at.GROUP_FIRST)
            _, next_w, _, following = _unit(args, min(v.atomic_load(op + at.COUNTER), n_units - 1))
            behind = next_w + following * args.w_row
            times_pairs(args, w, first, v.load_i32(group + at.GROUP_SIZE), base, start, stop, behind, scratch)
            unit = v.atomic_add(op + at.COUNTER, 1)

    return expert_matmul


def _make_float(quant: str) -> Any:
    times = float_matmul.make_times(quant)

    @v.forceinline
    def times_pairs(args, w, first, n, base, start, stop, behind, scratch):
        for i in range(first, first + n):
            pair = v.load_i32(args.pairs + i * 4)
            x = args.x + pair // args.n_used * args.x_row + pair % args.n_used * args.x_slot
            out = _out_of_pair(args, pair) - base * 4
            times(x, 0, 1, w, args.w_row, args.n_in, start, stop, out, 0, args.bias)

    return times_pairs


@v.forceinline
def _deal_out(args, first, n, row, n_rows, aside, aside_row):
    """Some rows of a group's pairs, summed aside, go where each pair's product is."""
    whole = n_rows // 16 * 16
    for i in range(n):
        out = _out_of_pair(args, v.load_i32(args.pairs + (first + i) * 4)) + row * 4
        for j in range(0, whole * 4, 64):
            v.store_f32x16(out + j, v.load_f32x16(aside + i * aside_row + j))
        for j in range(whole * 4, n_rows * 4, 4):
            v.store_f32(out + j, v.load_f32(aside + i * aside_row + j))


def _make_quantized(quant: str, form: str | None) -> Any:
    has_tiles = form == "amx"
    cores = quantized_matmul.make_cores(quant, form, has_tiles)
    few, prepare, eight_rows, panels = cores.few, cores.prepare, cores.eight_rows, cores.panels

    @v.forceinline
    def few_pairs(args, x, w, first, n, base, start, stop, behind, scratch):
        """A chunk of rows times up to ``few`` pairs of a group, eight rows at a time."""
        n_groups, w_row, x_row = args.n_in // 32, args.w_row, args.x_row
        prepared_row = prepare(x, x_row, n, n_groups, scratch + at.RECORDS)
        if prepared_row != 0:
            x, x_row = scratch + at.RECORDS, prepared_row
        ahead_rows = 8 + (at.AHEAD + w_row * 4) // (w_row * 8) * 8
        spread = quantized_matmul.spread_of(stop - start)
        for at_row in range(start, stop, 8):
            row = quantized_matmul.row_of(at_row, start, base + args.n_out - 8, spread)
            ahead = w + (at_row + ahead_rows) * w_row
            if at_row + ahead_rows >= stop:
                ahead = behind + (at_row + ahead_rows - stop) * w_row
            if at_row + 8 >= stop:
                quantized_matmul.fetch_beginnings(behind, w_row, at.EXPERT_ROWS)
            eight_rows(x, x_row, n, w + row * w_row, w_row * spread, n_groups, ahead, scratch)
            bias = args.bias
            if bias != 0:
                bias += row * 4
            for i in range(n):
                out = _out_of_pair(args, v.load_i32(args.pairs + (first + i) * 4)) + (row - base) * 4
                quantized_matmul.store_eight(scratch + at.SUMS + i * 32, out, bias, spread)

    @v.forceinline
    def many_pairs(args, x, w, first, n, base, start, stop, behind, scratch):
        """A chunk of rows times the pairs of a group: 16 rows at once or by tiles all, summed aside, then dealt out."""
        end, aside, size = base + args.n_out, scratch + at.EDGE, at.PANEL_ROWS
        if has_tiles and n >= at.TILES_FROM:
            aside, size = aside + n * at.PANEL_ROWS * 4, at.EXPERT_ROWS
        for row in range(start, stop, size):
            n_rows, n_panels = min(size, end - row), min(size, end - row + at.PANEL_ROWS - 1) // at.PANEL_ROWS
            out, out_row, bias = aside - row * 4, size * 4, args.bias
            ahead = behind
            if row + size < stop:
                ahead = w + (row + size) * args.w_row
            panels(
                x, args.x_row, n, w, args.w_row, args.n_in // 32, row, n_panels, end, out, out_row, bias, scratch, ahead
            )  # fmt: skip
            _deal_out(args, first, n, row - base, n_rows, aside, out_row)

    @v.forceinline
    def times_pairs(args, w, first, n, base, start, stop, behind, scratch):
        """``behind`` is what will be read after these rows."""
        x = args.x + first * args.x_row
        if n > few:
            many_pairs(args, x, w, first, n, base, start, stop, behind, scratch)
        else:
            few_pairs(args, x, w, first, n, base, start, stop, behind, scratch)

    return times_pairs


# ---- the sum ---------------------------------------------------------------------------------------------------------


def expert_sum(op, step, thread, n_threads):
    """out = the sum over slots of probs[slot] * x[slot]."""
    args = v.arguments(op, at.EXPERT_SUM)
    n, width, lanes = v.load_i64(step + args.row_kind), args.width, (args.width + 15) // 16
    for item in range(thread, n * lanes, n_threads):
        row, i = item // lanes, item % lanes * 16
        x, probs, out = (
            args.x + row * args.x_row,
            args.probs + row * args.probs_row,
            args.out + row * args.out_row,
        )
        if i + 16 <= width:
            acc = v.zero_f32x16()
            for slot in range(args.n_used):
                factor = v.splat_f32x16(v.load_f32(probs + slot * 4))
                acc = v.fma_f32x16(factor, v.load_f32x16(x + (slot * width + i) * 4), acc)
            v.store_f32x16(out + i * 4, acc)
        else:
            for column in range(i, width):
                total = v.f32_of(0.0)
                for slot in range(args.n_used):
                    factor = v.load_f32(probs + slot * 4)
                    total = v.fma_f32(factor, v.load_f32(x + (slot * width + column) * 4), total)
                v.store_f32(out + column * 4, total)
