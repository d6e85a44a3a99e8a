"""GPTQ on the grids of GGUF types: round column by column, and let the columns that follow make up for the error.

For inputs X with H = X^T X, rounding column j of W by e_j costs least when the columns after it move by
-e_j U[j, j+1:] / U[j, j], U the upper Cholesky factor of H^-1 (Frantar et al., https://arxiv.org/abs/2210.17323).
Columns that read large inputs go first, while many are left to make up for them: block by block, since scales and
offsets of a block are fixed by the type's own search over its weights as they stand when its first column is reached,
each weighed by what its rounding will cost, 1 / U[j, j]^2. At the end every weight is looked at again, a few times, and
takes the level that costs least beside all the others as they are. A file made so has every bit of the type's layout,
and any reader of GGUF reads it.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from edgellm.quantize.grid import Grid

Encode = Callable[[str, np.ndarray, "np.ndarray | None"], np.ndarray]
"""(type name, rows float32 (n, n_in), importance float32 (n_in,)) -> uint8 (n, row_nbytes): a type's own quantizer."""

DAMPING = 0.01  # of the mean diagonal, added to it: few rows leave H singular
STRIDE = 32  # columns whose errors reach the rest of the matrix together
SWEEPS = 3  # over all weights at the end
ROWS = 2048  # of a matrix at a time


def damped(hessian: np.ndarray, damping: float = DAMPING) -> np.ndarray:
    """H + damping * mean diagonal * I, float64. Inputs that are always 0 get the mean: they are rounded as they are."""
    h = hessian.astype(np.float64)
    diagonal = np.einsum("ii->i", h)
    mean = float(diagonal.mean()) or 1.0
    diagonal[diagonal <= 0] = mean
    diagonal += damping * mean
    return h


def cholesky_of_inverse(hessian: np.ndarray, damping: float = DAMPING) -> np.ndarray:
    """Upper triangular U with U^T U = damped(H)^-1, float32 (n, n); damped further where that is singular."""
    for _ in range(8):
        try:
            # H^-1 = U^T U: factor H from its last row on, J H J = L L^T, so that U = J L^-1 J
            lower = np.linalg.cholesky(damped(hessian, damping)[::-1, ::-1])
            return np.ascontiguousarray(np.linalg.inv(lower)[::-1, ::-1], np.float32)
        except np.linalg.LinAlgError:
            damping *= 10
    raise np.linalg.LinAlgError("the Hessian is not positive definite")


def rounding_order(diagonal: np.ndarray, size: int) -> np.ndarray:
    """Columns with the largest inputs first: blocks of ``size`` by their mean, columns within each."""
    blocks = diagonal.reshape(-1, size)
    within = np.argsort(-blocks, axis=1, kind="stable")
    first = np.argsort(-blocks.mean(axis=1), kind="stable")
    return (first[:, None] * size + within[first]).reshape(-1)


class Curvature:
    """What matrices that read one buffer share: H of its inputs, and by size of block the order and the factor."""

    def __init__(self, hessian: np.ndarray, damping: float = DAMPING) -> None:
        self.hessian, self.damping = hessian, damping
        self.matrix = damped(hessian, damping).astype(np.float32)
        self._factors: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def factor(self, size: int) -> tuple[np.ndarray, np.ndarray]:
        """Columns in the order of rounding, and U for them in that order."""
        if size not in self._factors:
            order = rounding_order(np.diag(self.hessian), size)
            self._factors[size] = order, cholesky_of_inverse(self.hessian[np.ix_(order, order)], self.damping)
        return self._factors[size]


def compensate(
    weights: np.ndarray, curvature: Curvature, grid: Grid, encode: Encode, sweeps: int = SWEEPS
) -> np.ndarray:
    """uint8 (n_out, row_nbytes) of float32 weights (n_out, n_in)."""
    parts = [weights[start : start + ROWS] for start in range(0, len(weights), ROWS)]
    return np.concatenate([_compensate(part, curvature, grid, encode, sweeps) for part in parts])


def _compensate(weights: np.ndarray, curvature: Curvature, grid: Grid, encode: Encode, sweeps: int) -> np.ndarray:
    n_out, n_in = weights.shape
    size = grid.quant.block_size
    order, factor = curvature.factor(size)
    w = weights[:, order].astype(np.float32, copy=False)  # in the order of rounding; all else as stored
    importance = np.empty(n_in, np.float32)
    importance[order] = 1 / np.square(np.diag(factor))
    out = np.empty((n_out, n_in // size, grid.quant.block_nbytes), np.uint8)
    scale, offset = np.empty((n_out, n_in), np.float32), np.empty((n_out, n_in), np.float32)
    q = np.empty((n_out, n_in), np.uint8)
    for start in range(0, n_in, size):
        stop = start + size
        block = order[start] // size
        stored = slice(block * size, block * size + size)
        at_hand = np.empty((n_out, size), np.float32)
        at_hand[:, order[start:stop] - stored.start] = w[:, start:stop]
        out[:, block] = encode(grid.quant.name, at_hand, importance[stored])
        scale[:, stored], offset[:, stored] = grid.scales(np.ascontiguousarray(out[:, block]))
        errors = np.empty((n_out, size), np.float32)
        for first in range(start, stop, STRIDE):
            last = min(first + STRIDE, stop)
            columns, part = order[first:last], slice(first - start, last - start)
            q[:, columns], errors[:, part] = _round(
                w[:, first:last], factor[first:last, first:last], grid, scale[:, columns], offset[:, columns]
            )
            w[:, last:stop] -= errors[:, part] @ factor[first:last, last:stop]
        w[:, stop:] -= errors @ factor[start:stop, stop:]
    for _ in range(sweeps):
        _settle(weights, curvature.matrix, grid, scale, offset, q)
    grid.pack(out.reshape(-1, grid.quant.block_nbytes), q.reshape(-1, size))
    return out.reshape(n_out, -1)


def _settle(
    weights: np.ndarray, h: np.ndarray, grid: Grid, scale: np.ndarray, offset: np.ndarray, q: np.ndarray
) -> None:
    """Give each weight in turn the level that costs least beside the others; q is changed in place."""
    slope = (weights - (scale * grid.levels[q] + offset)) @ h  # of the error, by each weight
    for first in range(0, len(h), STRIDE):
        part = slice(first, first + STRIDE)
        inside = h[part, part]
        s, o = np.ascontiguousarray(scale[:, part].T), np.ascontiguousarray(offset[:, part].T)
        inverse = np.divide(1, s, out=np.zeros_like(s), where=s != 0)
        slopes, levels = np.ascontiguousarray(slope[:, part].T), q[:, part].T.copy()
        values = s * grid.levels[levels] + o
        moved = np.empty_like(values)
        for j in range(len(inside)):
            levels[j] = grid.nearest((values[j] + slopes[j] / inside[j, j] - o[j]) * inverse[j])
            moved[j] = s[j] * grid.levels[levels[j]] + o[j] - values[j]
            slopes -= inside[j, :, None] * moved[j]
        q[:, part] = levels.T
        slope -= moved.T @ h[part]


def _round(
    w: np.ndarray, factor: np.ndarray, grid: Grid, scale: np.ndarray, offset: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """q and errors / U[j, j] of some columns, (n_out, n) each; w is used up."""
    columns = np.ascontiguousarray(w.T)  # column by column in memory
    inverse = np.divide(1, scale, out=np.zeros_like(scale), where=scale != 0).T
    scale, offset = np.ascontiguousarray(scale.T), np.ascontiguousarray(offset.T)
    q = np.empty(columns.shape, np.uint8)
    errors = np.empty(columns.shape, np.float32)
    for j in range(len(columns)):
        q[j] = grid.nearest((columns[j] - offset[j]) * inverse[j])
        errors[j] = (columns[j] - scale[j] * grid.levels[q[j]] - offset[j]) / factor[j, j]
        columns[j + 1 :] -= factor[j, j + 1 :, None] * errors[j]
    return q.T, errors.T
