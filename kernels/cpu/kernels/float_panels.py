"""F32, F16 and BF16 weights times the tokens of whole texts, as encoders have them: many in a step.

Weights are turned when a model is loaded (run/panels.py): 64 rows lie side by side, column after column, so that a
register holds one column of 16 rows, and the tokens go through them six at once:

    out[t][row] = bias[row] + x[t][0] w[row][0] + x[t][1] w[row][1] + ...

Each number is one chain of multiply-adds, from the first column to the last, so a token has the same bits with any
others. Sums along a row (float_matmul.py) end in a tree for every number, an eighth of the time of 384 columns.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from edgellm.kernels.cpu.kernels.float_matmul import vector_loads
from edgellm.kernels.cpu.lib import layout as at
from edgellm.kernels.cpu.lib import simd as v

ROWS = at.TEXT_PANEL_ROWS
COLUMNS = 512  # of a panel that all tokens go through before the next ones: 128 KiB, in the second cache
TOKENS = 6
LEAST_TOKENS = 48  # that a thread takes, where those of a panel are dealt to several
ITEMS_PER_THREAD = 3

_join2, _join4 = v.make_shuffle(v.f32x4, list(range(8))), v.make_shuffle(v.f32x8, list(range(16)))
_LANES = (0, 4, 8, 12)
_low_pairs = v.make_shuffle(v.f32x16, [k + i for k in _LANES for i in (0, 16, 1, 17)])
_high_pairs = v.make_shuffle(v.f32x16, [k + i for k in _LANES for i in (2, 18, 3, 19)])
_first_halves = v.make_shuffle(v.f32x16, [k + i for k in _LANES for i in (0, 1, 16, 17)])
_last_halves = v.make_shuffle(v.f32x16, [k + i for k in _LANES for i in (2, 3, 18, 19)])


@v.forceinline
def _four_rows(p, step):
    """Four numbers of each of four rows, which are ``step`` bytes apart."""
    low = _join2(v.load_f32x4(p), v.load_f32x4(p + step))
    return _join4(low, _join2(v.load_f32x4(p + 2 * step), v.load_f32x4(p + 3 * step)))


@v.forceinline
def turn_16(p, step, out, line):
    """16 numbers of 16 rows that are ``step`` bytes apart: to 16 lines of a number of each row, ``line`` apart."""
    for i in range(4):
        q, c = p + i * 16, out + i * 4 * line
        a, b = _four_rows(q, 4 * step), _four_rows(q + step, 4 * step)
        d, e = _four_rows(q + 2 * step, 4 * step), _four_rows(q + 3 * step, 4 * step)
        low, high, low2, high2 = _low_pairs(a, b), _high_pairs(a, b), _low_pairs(d, e), _high_pairs(d, e)
        v.store_f32x16(c, _first_halves(low, low2))
        v.store_f32x16(c + line, _last_halves(low, low2))
        v.store_f32x16(c + 2 * line, _first_halves(high, high2))
        v.store_f32x16(c + 3 * line, _last_halves(high, high2))


class Tiles(NamedTuple):
    """Products of some rows of a panel, n columns ``line`` bytes apart, with six tokens: ``x`` and ``out`` are the
    addresses of theirs.

    one(x, panel, line, n, bias, out, begins)     16 rows; sums begin with the bias, or go on where not ``begins``
    two(x, panel, line, n, out)                   32 rows, from nothing
    four(x, panel, line, n, bias, out, begins)    64 rows: 24 registers of sums
    """

    one: Any
    two: Any
    four: Any


def make_tiles(quant: str) -> Tiles:
    """Those of a type of weights."""
    vector_at = vector_loads(quant)[0]
    return Tiles(_make_one(vector_at), _make_two(vector_at), _make_four(vector_at))


def _make_one(vector_at: Any) -> Any:
    @v.forceinline
    def one(x, panel, line, n, bias, out, begins):
        x0, x1, x2, x3, x4, x5 = x
        o0, o1, o2, o3, o4, o5 = out
        a = b = c = d = e = f = v.zero_f32x16()
        if begins:
            if bias != 0:
                a = b = c = d = e = f = v.load_f32x16(bias)
        else:
            a, b, c = v.load_f32x16(o0), v.load_f32x16(o1), v.load_f32x16(o2)
            d, e, f = v.load_f32x16(o3), v.load_f32x16(o4), v.load_f32x16(o5)
        for i in range(0, n * 4, 4):
            w = vector_at(panel, 0)
            a = v.fma_f32x16(v.splat_f32x16(v.load_f32(x0 + i)), w, a)
            b = v.fma_f32x16(v.splat_f32x16(v.load_f32(x1 + i)), w, b)
            c = v.fma_f32x16(v.splat_f32x16(v.load_f32(x2 + i)), w, c)
            d = v.fma_f32x16(v.splat_f32x16(v.load_f32(x3 + i)), w, d)
            e = v.fma_f32x16(v.splat_f32x16(v.load_f32(x4 + i)), w, e)
            f = v.fma_f32x16(v.splat_f32x16(v.load_f32(x5 + i)), w, f)
            panel += line
        v.store_f32x16(o0, a)
        v.store_f32x16(o1, b)
        v.store_f32x16(o2, c)
        v.store_f32x16(o3, d)
        v.store_f32x16(o4, e)
        v.store_f32x16(o5, f)

    return one


def _make_two(vector_at: Any) -> Any:
    @v.forceinline
    def two(x, panel, line, n, out):
        x0, x1, x2, x3, x4, x5 = x
        o0, o1, o2, o3, o4, o5 = out
        a = b = c = d = e = f = v.zero_f32x16()
        g = h = i = j = k = m = v.zero_f32x16()
        for column in range(0, n * 4, 4):
            w, w2 = vector_at(panel, 0), vector_at(panel, 16)
            a, g = _add_two(x0 + column, w, w2, a, g)
            b, h = _add_two(x1 + column, w, w2, b, h)
            c, i = _add_two(x2 + column, w, w2, c, i)
            d, j = _add_two(x3 + column, w, w2, d, j)
            e, k = _add_two(x4 + column, w, w2, e, k)
            f, m = _add_two(x5 + column, w, w2, f, m)
            panel += line
        _end_two(o0, a, g)
        _end_two(o1, b, h)
        _end_two(o2, c, i)
        _end_two(o3, d, j)
        _end_two(o4, e, k)
        _end_two(o5, f, m)

    return two


def _make_four(vector_at: Any) -> Any:
    @v.forceinline
    def four(x, panel, line, n, bias, out, begins):
        x0, x1, x2, x3, x4, x5 = x
        o0, o1, o2, o3, o4, o5 = out
        a0, a1, a2, a3 = _begin(bias, o0, begins)
        b0, b1, b2, b3 = _begin(bias, o1, begins)
        c0, c1, c2, c3 = _begin(bias, o2, begins)
        d0, d1, d2, d3 = _begin(bias, o3, begins)
        e0, e1, e2, e3 = _begin(bias, o4, begins)
        f0, f1, f2, f3 = _begin(bias, o5, begins)
        for i in range(0, n * 4, 4):
            w0, w1, w2, w3 = vector_at(panel, 0), vector_at(panel, 16), vector_at(panel, 32), vector_at(panel, 48)
            a0, a1, a2, a3 = _add(x0 + i, w0, w1, w2, w3, a0, a1, a2, a3)
            b0, b1, b2, b3 = _add(x1 + i, w0, w1, w2, w3, b0, b1, b2, b3)
            c0, c1, c2, c3 = _add(x2 + i, w0, w1, w2, w3, c0, c1, c2, c3)
            d0, d1, d2, d3 = _add(x3 + i, w0, w1, w2, w3, d0, d1, d2, d3)
            e0, e1, e2, e3 = _add(x4 + i, w0, w1, w2, w3, e0, e1, e2, e3)
            f0, f1, f2, f3 = _add(x5 + i, w0, w1, w2, w3, f0, f1, f2, f3)
            panel += line
        _end(o0, a0, a1, a2, a3)
        _end(o1, b0, b1, b2, b3)
        _end(o2, c0, c1, c2, c3)
        _end(o3, d0, d1, d2, d3)
        _end(o4, e0, e1, e2, e3)
        _end(o5, f0, f1, f2, f3)

    return four


@v.forceinline
def _add_two(x, w, w2, a, b):
    s = v.splat_f32x16(v.load_f32(x))
    return v.fma_f32x16(s, w, a), v.fma_f32x16(s, w2, b)


@v.forceinline
def _end_two(out, a, b):
    v.store_f32x16(out, a)
    v.store_f32x16(out + 64, b)


@v.forceinline
def _begin(bias, out, begins):
    """What four vectors of a token's sums start from."""
    a = b = c = d = v.zero_f32x16()
    if begins:
        if bias != 0:
            a, b = v.load_f32x16(bias), v.load_f32x16(bias + 64)
            c, d = v.load_f32x16(bias + 128), v.load_f32x16(bias + 192)
    else:
        a, b, c, d = v.load_f32x16(out), v.load_f32x16(out + 64), v.load_f32x16(out + 128), v.load_f32x16(out + 192)
    return a, b, c, d


@v.forceinline
def _end(out, a, b, c, d):
    v.store_f32x16(out, a)
    v.store_f32x16(out + 64, b)
    v.store_f32x16(out + 128, c)
    v.store_f32x16(out + 192, d)


@v.forceinline
def _add(x, w0, w1, w2, w3, a, b, c, d):
    s = v.splat_f32x16(v.load_f32(x))
    return v.fma_f32x16(s, w0, a), v.fma_f32x16(s, w1, b), v.fma_f32x16(s, w2, c), v.fma_f32x16(s, w3, d)


@v.forceinline
def moved(addresses, nbytes):
    """Six addresses, each so many bytes further on."""
    a, b, c, d, e, f = addresses
    return a + nbytes, b + nbytes, c + nbytes, d + nbytes, e + nbytes, f + nbytes


@v.forceinline
def rows_of_six(p, stride, t, last):
    """Addresses of six tokens' rows; those behind the last are the last."""
    return (
        p + min(t, last) * stride, p + min(t + 1, last) * stride, p + min(t + 2, last) * stride,
        p + min(t + 3, last) * stride, p + min(t + 4, last) * stride, p + min(t + 5, last) * stride,
    )  # fmt: skip


def make_panel_matmul(quant: str, form: str | None = None) -> Any:
    """The kernel out = x @ weight.T (+ bias) for F32, F16 or BF16; a unit of work is a panel of rows times tokens."""
    tiles, nbytes = make_tiles(quant), vector_loads(quant)[1]
    one, four, is_wide = tiles.one, tiles.four, form in ("amx", "avx512_vnni")
    line = ROWS * nbytes

    def matmul(op, step, thread, n_threads):
        a = v.arguments(op, at.MATMUL)
        n, n_panels, n_cuts = v.load_i64(step + a.row_kind), (a.n_out + ROWS - 1) // ROWS, 1
        if n_panels < ITEMS_PER_THREAD * n_threads:
            n_cuts = max(1, min(ITEMS_PER_THREAD * n_threads // n_panels, n // LEAST_TOKENS))
        size = ((n + n_cuts - 1) // n_cuts + TOKENS - 1) // TOKENS * TOKENS
        item = v.atomic_add(op + at.COUNTER, 1)
        while item < n_panels * n_cuts:
            row, begin = item % n_panels * ROWS, item // n_panels * size
            end, n_rows = min(n, begin + size), min(ROWS, a.n_out - row)
            for first in range(0, a.n_in, COLUMNS):
                panel, n_columns = a.w + (row * a.n_in + first * ROWS) * nbytes, min(COLUMNS, a.n_in - first)
                for t in range(begin, end, TOKENS):
                    x = rows_of_six(a.x + first * 4, a.x_row, t, end - 1)
                    out, bias = rows_of_six(a.out + row * 4, a.out_row, t, end - 1), (a.bias + row * 4) * (a.bias != 0)
                    if is_wide and n_rows == ROWS:
                        four(x, panel, line, n_columns, bias, out, first == 0)
                    else:
                        for r in range(0, n_rows, 16):
                            bias_r = (bias + r * 4) * (bias != 0)
                            one(x, panel + r * nbytes, line, n_columns, bias_r, moved(out, r * 4), first == 0)
            item = v.atomic_add(op + at.COUNTER, 1)

    return matmul
