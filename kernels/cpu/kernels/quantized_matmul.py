"""Quantized weights times quantized activations: a few tokens straight from the mapped file, many through a panel.

Activations are int16 (``quantize`` in elementwise.py). Integer sums are exact, so their order is free, and the float
ones have one fixed order, stated by each family of types (block_matmul.py: 32 weights to a scale, superblock_matmul.py:
256). A token therefore gets the same bits alone, in a prompt of any length, and on every instruction set with a fused
multiply-add.

    one token      8 rows at a time, read where they lie                                bound by memory
    a few tokens   8 rows at a time, unpacked once for 4 tokens                         bound by both
                   with AVX-512 VNNI transposed in registers (transposed_rows.py), on AVX2 some types (byte_columns.py)
                   on Intel's CPUs with AMX the eight are an eighth of a thread's part apart, each read on and on
    more           a panel of 16 rows is packed, and multiplied with 4 tokens at a time bound by multiply-adds
                   with AVX-512 VNNI packed by transposition, 8 tokens at a time (transposed_panel.py), on AVX2 some
                   types packed so (superblock_columns.py)
    16 and more    on a CPU with AMX up to 16 panels of bytes, with 16 tokens at a time (amx_matmul.py)
    any number     strips of four rows as bytes, on Arm with dot products (byte_strips.py)

What multiplies (``eight_rows`` here, ``panels`` in panel.py) is told where activations, weights and results lie;
a kernel only deals out the rows.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from edgellm.kernels.cpu.kernels import (
    amx_matmul,
    block_matmul,
    byte_columns,
    byte_strips,
    panel,
    superblock_columns,
    superblock_matmul,
    transposed_blocks,
    transposed_panel,
    transposed_superblocks,
)
from edgellm.kernels.cpu.kernels.transposed_rows import rows_apart
from edgellm.kernels.cpu.lib import layout as at
from edgellm.kernels.cpu.lib import simd as v
from edgellm.kernels.cpu.lib.neon import BYTE_PRODUCTS
from edgellm.kernels.cpu.weights import SUPERBLOCKS, blocks, superblocks

DOT_BYTES, BYTE_STRIPS = ("amx", "avx512_vnni"), tuple(BYTE_PRODUCTS)
"""Forms that multiply bytes: unsigned by signed ones, and signed ones."""
BYTE_COLUMNS = ("avx_vnni", "avx2")
"""Forms that multiply unsigned bytes by signed ones and add two in int16."""

CHUNK_ROWS = 256
"""A few tokens: a thread takes its share of the rows in parts of at most so many. Small parts cost dear: what one core
has fetched ahead then belongs to another (SmolLM2 on two cores, parts of 16, 64, 144 rows: 7.6, 5.7, 4.6 ms)."""

FIRST_NBYTES = 512
"""Of each of eight rows apart, fetched before a part begins."""

PANELS_AT_ONCE, TILE_PANELS_AT_LEAST = 4, 2
"""Of far activations those of some columns are read for so many panels of 16 rows: from the third level once, then
from the second. Tiles take up to at.TILE_PANELS, as their products are done before a third level answers."""


def family_of(quant: str) -> tuple[Any, Any]:
    """The module that multiplies a type's blocks, and how they are read."""
    if quant in SUPERBLOCKS:
        return superblock_matmul, superblocks.TYPES[quant]
    return block_matmul, blocks.TYPES[quant]


@v.forceinline
def _rows_of_part(n_out, n_threads):
    """Rows that a thread takes at a time."""
    share = (n_out + n_threads - 1) // n_threads
    parts = (share + CHUNK_ROWS - 1) // CHUNK_ROWS
    return ((share + parts - 1) // parts + 7) // 8 * 8


@v.forceinline
def _behind_part(op, thread, n_threads, n_rows):
    """Where the part begins that is free now, or this thread's in the next product; bytes of a row, and its rows."""
    args = v.arguments(op, at.MATMUL)
    part, w, w_row = (v.atomic_load(op + at.COUNTER) + n_threads) * n_rows, args.w, args.w_row
    if part >= args.n_out and args.following != 0:
        following = v.arguments(args.following, at.MATMUL)
        w, w_row, n_rows = following.w, following.w_row, _rows_of_part(following.n_out, n_threads)
        part = thread * n_rows
    return w + part * w_row, w_row, n_rows


@v.forceinline
def spread_of(n_rows):
    """How many rows apart those are that go together: neighbours, or an eighth of a part."""
    if rows_apart() != 0 and n_rows % 8 == 0:
        return n_rows // 8
    return 1


@v.forceinline
def row_of(at_row, part, last, spread):
    """The first of the eight rows that have their turn at ``at_row`` of a part. The last eight of all may overlap the
    ones before: same bits."""
    if spread > 1:
        return part + (at_row - part) // 8
    return min(at_row, last)


@v.forceinline
def fetch_beginnings(p, w_row, n_rows):
    """Where rows are apart, the beginnings of the first eight of a part: their CPU has to see a few lines of each."""
    if rows_apart() != 0:
        for row in range(8):
            for line in range(0, FIRST_NBYTES, 64):
                v.fetch_later(p + row * spread_of(n_rows) * w_row + line)


@v.forceinline
def _panels_at_once(op, x_nbytes, n_out, n_threads, by_tiles):
    """Panels that a thread takes next: several of many activations, fewer towards the end."""
    least, most = 1, 1
    if by_tiles:
        least, most = TILE_PANELS_AT_LEAST, at.TILE_PANELS
    elif x_nbytes > transposed_panel.FAR_NBYTES:
        most = PANELS_AT_ONCE
    if most == 1:
        return 1
    left = (n_out + at.PANEL_ROWS - 1) // at.PANEL_ROWS - v.atomic_load(op + at.COUNTER)
    return max(least, min(most, left // (2 * n_threads)))


@v.forceinline
def _as_they_are(x, x_row, n, n_groups, records):
    return 0


def make_eight_rows(times_few: Any, has_copy_for_one: bool = False) -> Any:
    """eight_rows: those from p on, ``stride`` bytes apart, times a few tokens, (n, 8) sums to scratch + SUMS.

    As many bytes as it reads are fetched from ``ahead`` on.
    """

    @v.forceinline
    def eight_rows(x, x_row, n, p, stride, n_groups, ahead, scratch):
        if has_copy_for_one and n == 1:
            times_few(p, stride, n_groups, x, x_row, 1, scratch, ahead)
        else:
            times_few(p, stride, n_groups, x, x_row, n, scratch, ahead)

    return eight_rows


@v.forceinline
def store_eight(sums, out, bias, spread):
    """The sums of eight rows ``spread`` apart go to the place of the first, plus their bias, if it is not 0."""
    if rows_apart() != 0:
        for row in range(0, 8 * spread * 4, spread * 4):
            total = v.load_f32(sums)
            if bias != 0:
                total = total + v.load_f32(bias + row)
            v.store_f32(out + row, total)
            sums += 4
    else:
        total = v.load_f32x8(sums)
        if bias != 0:
            total = total + v.load_f32x8(bias)
        v.store_f32x8(out, total)


@v.forceinline
def _store_sums(op, n, row, spread, scratch):
    """Where they go is read here, after the product, whose loops need all registers."""
    args = v.arguments(op, at.MATMUL)
    bias = args.bias
    if bias != 0:
        bias += row * 4
    for t in range(n):
        store_eight(scratch + at.SUMS + t * 32, args.out + t * args.out_row + row * 4, bias, spread)


def _make_few_tokens(eight_rows: Any, prepare: Any) -> Any:
    """The path for a few tokens: 8 rows at a time. A thread's first part is its own, the others go by the counter.

    So the weights that a thread needs first in the next product are known, and come while it ends this one.
    ``prepare`` writes the activations as ``eight_rows`` wants them, if not as they are.
    """

    @v.forceinline
    def few_tokens(op, args, n, thread, n_threads, scratch):
        x, x_row, w, w_row, n_groups, n_out = args.x, args.x_row, args.w, args.w_row, args.n_in // 32, args.n_out
        prepared_row = prepare(x, x_row, n, n_groups, scratch + at.RECORDS)
        if prepared_row != 0:
            x, x_row = scratch + at.RECORDS, prepared_row
        n_rows = _rows_of_part(n_out, n_threads)
        ahead_rows = 8 + (at.AHEAD + w_row * 4) // (w_row * 8) * 8
        part = thread * n_rows
        while part < n_out:
            end = min(part + n_rows, n_out)
            spread = spread_of(end - part)
            for at_row in range(part, end, 8):
                row = row_of(at_row, part, max(0, n_out - 8), spread)
                ahead = w + (at_row + ahead_rows) * w_row
                if at_row + ahead_rows >= end:
                    behind, behind_row, behind_rows = _behind_part(op, thread, n_threads, n_rows)
                    ahead = behind + (at_row + ahead_rows - end) * w_row
                    if at_row + 8 >= end:
                        fetch_beginnings(behind, behind_row, behind_rows)
                eight_rows(x, x_row, n, w + row * w_row, w_row * spread, n_groups, ahead, scratch)
                _store_sums(op, n, row, spread, scratch)
            part = (v.atomic_add(op + at.COUNTER, 1) + n_threads) * n_rows

    return few_tokens


class Cores(NamedTuple):
    """What multiplies the rows of a quantized type: up to ``few`` tokens with ``prepare`` and ``eight_rows``."""

    few: int
    prepare: Any
    eight_rows: Any
    panels: Any


def _make_strips(quant: str) -> Cores:
    """Those of the forms whose activations are split into bytes."""
    family, weights = family_of(quant)
    if quant in SUPERBLOCKS:
        store, n_scales = byte_strips.make_store_superblock(weights), weights.n_scales
    else:
        store, n_scales = byte_strips.make_store_block(weights), 0
    pack, finish = family.make_pack(weights, store), family.make_finish(weights, panel.FOUR_ROWS)
    strips = byte_strips.make_strips(family.GROUPS, weights, n_scales, pack, finish)
    return Cores(at.MAX_FEW, _as_they_are, make_eight_rows(strips.few_tokens), panel.make_panels(strips.multiply))


def _by_tiles(multiply: Any, multiply_tiles: Any) -> Any:
    """Many tokens go by tiles."""

    @v.forceinline
    def either(x, x_row, n, n_panels, w, w_row, n_groups, c, c_row, scratch, ahead):
        if n >= at.TILES_FROM:
            multiply_tiles(x, x_row, n, n_panels, w, w_row, n_groups, c, c_row, scratch, ahead)
        else:
            multiply(x, x_row, n, n_panels, w, w_row, n_groups, c, c_row, scratch, ahead)

    return either


def make_cores(quant: str, form: str | None, has_tiles: bool = False) -> Cores:
    """Those of a type; ``has_tiles`` for activations that were split for tiles."""
    if form in BYTE_STRIPS:
        return _make_strips(quant)
    family, weights = family_of(quant)
    few, prepare, has_copy_for_one = family.few(weights), _as_they_are, quant in SUPERBLOCKS
    if form in DOT_BYTES:
        transposed = transposed_superblocks if quant in SUPERBLOCKS else transposed_blocks
        few, prepare, times_few = at.MAX_FEW, transposed.prepare, transposed.make_few_tokens(quant, weights)
    elif form in BYTE_COLUMNS and quant in byte_columns.TYPES:
        prepare, times_few = transposed_blocks.prepare, byte_columns.make_few_tokens(quant, weights)
    else:
        times_few, has_copy_for_one = family.make_few_tokens(weights), True
        if form in BYTE_COLUMNS and quant not in SUPERBLOCKS:
            few = 3  # tokens one after the other: four are dearer than a panel (Q8_0 on a Zen 5: 1.33 times)
    if form in DOT_BYTES:
        pack, finish = transposed.make_pack(quant, weights), transposed.make_finish(weights)
        multiply = transposed_panel.make_multiply(family.GROUPS, weights.block_nbytes, pack, finish, not has_tiles)
        if has_tiles:
            pack = transposed.make_pack(quant, weights, for_tiles=True)
            by_tiles = amx_matmul.make_multiply(family.GROUPS, weights.block_nbytes, pack, finish)
            multiply = _by_tiles(multiply, by_tiles)
        return Cores(
            transposed_panel.FEW,
            prepare,
            make_eight_rows(times_few, has_copy_for_one),
            panel.make_panels(multiply),
        )
    finish = family.make_finish(weights)
    if form in BYTE_COLUMNS and quant in superblock_columns.BLOCKS:
        pack = superblock_columns.make_pack(quant, weights)
    else:
        pack = family.make_pack(weights, family.make_store_pairs(weights))
    multiply = panel.make_multiply(family.GROUPS, weights.block_nbytes, pack, finish)
    return Cores(few, prepare, make_eight_rows(times_few, has_copy_for_one), panel.make_panels(multiply))


def make_matmul(quant: str, form: str | None = None) -> Any:
    """The kernel out = x @ weight.T (+ bias) for a quantized type, with what a form has; None has what all have."""
    has_tiles = form == "amx"
    cores = make_cores(quant, form, has_tiles)
    few, panels = cores.few, cores.panels
    few_tokens = _make_few_tokens(cores.eight_rows, cores.prepare)

    @v.forceinline
    def many_tokens(op, args, n, n_threads, scratch):
        """Panels of 16 rows, taken from the op's work counter."""
        x, x_row, w, w_row, n_groups, n_out = args.x, args.x_row, args.w, args.w_row, args.n_in // 32, args.n_out
        by_tiles = has_tiles and n >= at.TILES_FROM
        n_panels = _panels_at_once(op, n * x_row, n_out, n_threads, by_tiles)
        row = v.atomic_add(op + at.COUNTER, n_panels) * at.PANEL_ROWS
        while row < n_out:
            bias, after = args.bias, row + n_threads * n_panels * at.PANEL_ROWS
            ahead = w + after * w_row
            if after >= n_out and args.following != 0:
                following = v.arguments(args.following, at.MATMUL)
                ahead = following.w + (after - n_out) * following.w_row
            panels(x, x_row, n, w, w_row, n_groups, row, n_panels, n_out, args.out, args.out_row, bias, scratch, ahead)
            n_panels = _panels_at_once(op, n * x_row, n_out, n_threads, by_tiles)
            row = v.atomic_add(op + at.COUNTER, n_panels) * at.PANEL_ROWS

    def matmul(op, step, thread, n_threads):
        args = v.arguments(op, at.MATMUL)
        n = v.load_i64(step + args.row_kind)
        scratch = v.load_i64(step + at.SCRATCH) + thread * v.load_i64(step + at.SCRATCH_NBYTES)
        if n > few:
            many_tokens(op, args, n, n_threads, scratch)
        elif n > 0:
            few_tokens(op, args, n, thread, n_threads, scratch)

    return matmul
