"""Error compensation on the grids of the tensor types, against the formula written out."""

from __future__ import annotations

import numpy as np
import pytest
import tiny_models

from edgellm.formats.quant_types import QUANT_TYPES
from edgellm.quantize import gptq
from edgellm.quantize.gptq import Curvature, cholesky_of_inverse, compensate, rounding_order
from edgellm.quantize.grid import GRIDS


def random_blocks(name: str, n: int, seed: int = 0) -> np.ndarray:
    rows = tiny_models.random_weight(np.random.default_rng(seed), (n, GRIDS[name].quant.block_size), name)
    return np.ascontiguousarray(rows)


@pytest.mark.parametrize("name", GRIDS)
def test_packed_levels_are_what_the_type_reads(name: str) -> None:
    grid = GRIDS[name]
    blocks = random_blocks(name, 20)
    rng = np.random.default_rng(1)
    q = rng.integers(0, len(grid.levels), (20, grid.quant.block_size)).astype(np.uint8)
    scale, offset = grid.scales(blocks)
    grid.pack(blocks, q)
    values = grid.quant.dequantize(blocks)
    assert np.allclose(values, scale * grid.levels[q] + offset, rtol=0, atol=1e-5 * np.abs(values).max())
    assert all((a == b).all() for a, b in zip(grid.scales(blocks), (scale, offset), strict=True)), "scales stay"
    use = np.abs(scale) > 1e-6
    nearest = grid.nearest(np.divide(values - offset, scale, where=use, out=np.zeros_like(values)))
    assert (nearest == q)[use].all()


def correlated(n: int, n_in: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (rng.standard_normal((n, n_in // 4)) @ rng.standard_normal((n_in // 4, n_in))).astype(np.float32) + (
        0.3 * rng.standard_normal((n, n_in))
    ).astype(np.float32)


def test_the_factor_is_that_of_the_damped_inverse() -> None:
    x = correlated(200, 64)
    h = x.T @ x
    u = cholesky_of_inverse(h, 0.01).astype(np.float64)
    damped = h + 0.01 * np.trace(h) / 64 * np.eye(64)
    assert np.allclose(u, np.triu(u)) and np.allclose(u.T @ u @ damped, np.eye(64), atol=1e-4)
    empty = cholesky_of_inverse(np.zeros((8, 8), np.float32))
    assert np.isfinite(empty).all(), "inputs that are always 0"


def encode_by_formula(name: str, rows: np.ndarray, importance: np.ndarray | None) -> np.ndarray:
    """A simple quantizer to round with: Q4_0 by the largest weight of each block."""
    assert name == "Q4_0"
    blocks = rows.reshape(-1, 32)
    at = np.abs(blocks).argmax(axis=1)
    out = np.zeros(len(blocks), QUANT_TYPES[name].layout)
    out["d"] = blocks[np.arange(len(blocks)), at] / -8
    d = out["d"].astype(np.float32)[:, None]
    q = np.clip(np.rint(np.divide(blocks, d, where=d != 0, out=np.zeros_like(blocks))) + 8, 0, 15).astype(np.uint8)
    data = out.view(np.uint8).reshape(len(blocks), -1)
    GRIDS[name].pack(data, q)
    return data.reshape(len(rows), -1)


def compensate_by_formula(w: np.ndarray, h: np.ndarray, damping: float) -> np.ndarray:
    """Rounding one column, then the best answer of all that follow (Frantar and Alistarh 2022, equations 3 and 4)."""
    n_in = w.shape[1]
    w, h = w.astype(np.float64), h.astype(np.float64)
    left = np.linalg.inv(h + damping * np.trace(h) / n_in * np.eye(n_in))
    out = np.zeros_like(w)
    for at, j in enumerate(rounding_order(np.diag(h), 32)):
        start = j // 32 * 32
        if at % 32 == 0:
            blocks = encode_by_formula("Q4_0", w[:, start : start + 32].astype(np.float32), None)
            scale, offset = GRIDS["Q4_0"].scales(blocks)
        d, low = scale[:, j - start], offset[:, j - start]
        out[:, j] = (np.clip(np.rint((w[:, j] - low) / d + 8), 0, 15) - 8) * d + low
        w -= np.outer((w[:, j] - out[:, j]) / left[j, j], left[j])
        left -= np.outer(left[:, j], left[j]) / left[j, j]
    return out


def test_compensation_is_the_formula_and_beats_rounding() -> None:
    rng = np.random.default_rng(3)
    x, w = correlated(400, 96), rng.standard_normal((24, 96)).astype(np.float32)
    h = x.T @ x
    read = QUANT_TYPES["Q4_0"].dequantize
    results = [read(compensate(w, Curvature(h), GRIDS["Q4_0"], encode_by_formula, sweeps)) for sweeps in (0, 1, 3)]
    wanted = compensate_by_formula(w, h, 0.01)
    # a value halfway between two levels may go either way: what counts is the error of the product
    errors = [float(np.square(x @ (v - w).T).sum()) for v in (wanted, *results)]
    assert errors[1] == pytest.approx(errors[0], rel=0.02)
    assert (np.abs(results[0] - wanted) < 1e-5).mean() > 0.95
    assert errors[1] > errors[2] > errors[3], "every sweep lowers the error"
    plain = read(encode_by_formula("Q4_0", w, None))
    assert errors[1] < 0.6 * float(np.square(x @ (plain - w).T).sum())


def test_columns_with_large_inputs_are_rounded_first_block_by_block() -> None:
    assert rounding_order(np.array([1.0, 2.0, 5.0, 0.0, 3.0, 4.0]), 2).tolist() == [5, 4, 2, 3, 1, 0]


def test_rows_are_rounded_alike_however_many_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    x, w = correlated(100, 64), np.random.default_rng(6).standard_normal((10, 64)).astype(np.float32)
    whole = compensate(w, Curvature(x.T @ x), GRIDS["Q4_0"], encode_by_formula)
    monkeypatch.setattr(gptq, "ROWS", 5)
    parts = compensate(w, Curvature(x.T @ x), GRIDS["Q4_0"], encode_by_formula)
    assert (whole != parts).mean() < 0.01, "apart from the order of sums"


def test_without_correlation_it_is_plain_rounding() -> None:
    w = np.random.default_rng(5).standard_normal((8, 64)).astype(np.float32)
    data = compensate(w, Curvature(np.eye(64, dtype=np.float32)), GRIDS["Q4_0"], encode_by_formula)
    assert (data == encode_by_formula("Q4_0", w, None)).all()
