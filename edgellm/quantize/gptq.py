"""GPTQ on the grids of GGUF types: round column by column, and let the columns that follow make up for the error.

For inputs X with H = X^T X, rounding column j of W by e_j costs least when the columns after it move by
-e_j U[j, j+1:] / U[j, j], U the upper Cholesky factor of H^-1 (Frantar et al., https://arxiv.org/abs/2210.17323).
Scales and offsets of a block are fixed by the type's own search over the weights as they stand when its first column
is reached, each column weighed by what its rounding will cost, 1 / U[j, j]^2; then its columns are rounded in order. A
file made so has every bit of the type's layout, and any reader of GGUF reads it.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from edgellm.quantize.grid import Grid

Encode = Callable[[str, np.ndarray, "np.ndarray | None"], np.ndarray]
"""(type name, rows float32 (n, n_in), importance float32 (n_in,)) -> uint8 (n, row_nbytes): a type's own quantizer."""

DAMPING = 0.01  # of the mean diagonal, added to it: few rows leave H singular
STRIDE = 32  # columns whose errors reach the rest of the matrix together


def cholesky_of_inverse(hessian: np.ndarray, damping: float = DAMPING) -> np.ndarray:
    """Upper triangular U with U^T U = (H + damping * mean diagonal * I)^-1, float32 (n, n).

    Inputs that never differ from 0 get the mean diagonal: their columns are rounded as they are.
    """
    h = hessian.astype(np.float64)
    diagonal = np.einsum("ii->i", h)
    mean = float(diagonal.mean()) or 1.0
    diagonal[diagonal <= 0] = mean
    for _ in range(8):
        diagonal += damping * mean
        try:
            # H^-1 = U^T U: factor H from its last row on, J H J = L L^T, so that U = J L^-1 J
            lower = np.linalg.cholesky(h[::-1, ::-1])
            return np.ascontiguousarray(np.linalg.inv(lower)[::-1, ::-1], np.float32)
        except np.linalg.LinAlgError:
            damping *= 10
    raise np.linalg.LinAlgError("the Hessian is not positive definite")


def compensate(weights: np.ndarray, factor: np.ndarray, grid: Grid, encode: Encode) -> np.ndarray:
    """uint8 (n_out, row_nbytes) of float32 weights (n_out, n_in); ``factor`` is U of the inputs."""
    w = weights.astype(np.float32, copy=True)
    n_out, n_in = w.shape
    size, nbytes = grid.quant.block_size, grid.quant.block_nbytes
    importance = (1 / np.square(np.diag(factor))).astype(np.float32)
    out = np.empty((n_out, n_in // size, nbytes), np.uint8)
    for block, start in enumerate(range(0, n_in, size)):
        stop = start + size
        blocks = encode(grid.quant.name, np.ascontiguousarray(w[:, start:stop]), importance[start:stop])
        scale, offset = grid.scales(blocks)
        q = np.empty((n_out, size), np.uint8)
        errors = np.empty((n_out, size), np.float32)
        for first in range(start, stop, STRIDE):
            last = min(first + STRIDE, stop)
            part = slice(first - start, last - start)
            q[:, part], errors[:, part] = _round(
                w[:, first:last], factor[first:last, first:last], grid, scale[:, part], offset[:, part]
            )
            w[:, last:stop] -= errors[:, part] @ factor[first:last, last:stop]
        w[:, stop:] -= errors @ factor[start:stop, stop:]
        blocks = np.ascontiguousarray(blocks)
        grid.pack(blocks, q)
        out[:, block] = blocks
    return out.reshape(n_out, -1)


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
