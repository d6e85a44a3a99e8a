"""The tokens that are still in play at one step, and how to find the largest of a quarter of a million logits fast."""

from __future__ import annotations

import numpy as np

FLOOR = -np.inf
SMALL = 8192  # up to here partition the logits themselves


class Candidates:
    """Token ids with their logits. Samplers replace both; ``sorted`` says: by falling logit, ties by rising id.

    ids      (n,) int64, or None for the whole vocabulary in order
    logits   (n,) float32 for the whole vocabulary (the model's buffer or a copy, never written to here), else float64
    """

    __slots__ = ("ids", "logits", "sorted")

    def __init__(self, logits: np.ndarray, ids: np.ndarray | None = None, is_sorted: bool = False) -> None:
        self.ids = ids
        self.logits = logits
        self.sorted = is_sorted

    def __len__(self) -> int:
        return len(self.logits)

    def keep(self, index: np.ndarray | slice, is_sorted: bool | None = None) -> None:
        """Keep the candidates at ``index``, in its order."""
        if self.ids is None:
            self.ids = np.arange(len(self.logits))[index] if isinstance(index, slice) else index
            self.logits = self.logits[index].astype(np.float64)
        else:
            self.ids = self.ids[index]
            self.logits = self.logits[index]
        self.sorted = self.sorted if is_sorted is None else is_sorted

    def token(self, position: int) -> int:
        """The id of one candidate."""
        return position if self.ids is None else int(self.ids[position])

    def largest(self, k: int) -> np.ndarray:
        """Positions of the ``k`` largest, by falling logit, ties by rising id; changes nothing."""
        if self.sorted:
            return np.arange(min(k, len(self)))
        index = largest_positions(self.logits, k)
        ids = index if self.ids is None else self.ids[index]
        return index[np.lexsort((ids, -self.logits[index]))]

    def sort(self) -> None:
        """Bring the candidates into falling order."""
        if not self.sorted:
            self.keep(self.largest(len(self)), is_sorted=True)

    def max(self) -> float:
        """The largest logit."""
        return float(self.logits[0] if self.sorted else self.logits.max())

    def weights(self) -> np.ndarray:
        """exp(logit - max), in the order of the candidates: probabilities before they are divided by their sum."""
        return np.exp(self.logits - self.logits.dtype.type(self.max()))

    def probs(self) -> np.ndarray:
        """The softmax of the logits."""
        weights = self.weights()
        weights /= weights.sum()
        return weights


def group_maxima(logits: np.ndarray, n_groups: int) -> tuple[np.ndarray, np.ndarray]:
    """``logits`` as (rows, n_groups) without its tail, and the maximum of each column; a NaN stays a NaN."""
    rows = len(logits) // n_groups
    body = logits[: rows * n_groups].reshape(rows, n_groups)
    return body, body.max(axis=0)


def largest_positions(logits: np.ndarray, k: int) -> np.ndarray:
    """Positions of the ``k`` largest values, in no order; of equals the lowest positions.

    For a vocabulary: the k-th largest of the column maxima is a lower bound of the k-th largest logit, so only the
    columns that reach it are looked at (262,144 logits, k = 40: one pass for the maxima, then 40 columns).
    """
    n = len(logits)
    if k >= n:
        return np.arange(n)
    n_groups = 2048 if k <= 256 else SMALL
    if n < 4 * n_groups or 2 * k > n_groups:
        return exactly(logits, np.flatnonzero(logits >= np.partition(logits, n - k)[n - k]), k)
    body, maxima = group_maxima(logits, n_groups)
    tail = logits[body.size :]
    bounds = np.concatenate((maxima, tail))
    bound = np.partition(bounds, len(bounds) - k)[len(bounds) - k]
    columns = np.flatnonzero(maxima >= bound)
    row, column = np.nonzero(body[:, columns] >= bound)
    found = np.concatenate((row * n_groups + columns[column], body.size + np.flatnonzero(tail >= bound)))
    values = logits[found]
    if len(found) > k:
        found = np.sort(found[values >= np.partition(values, len(values) - k)[len(values) - k]])
    return exactly(logits, found, k)


def exactly(logits: np.ndarray, found: np.ndarray, k: int) -> np.ndarray:
    """``found`` (rising positions, at least ``k``) cut to ``k``: the highest positions of the least value go."""
    if len(found) <= k:
        return found
    values = logits[found]
    least = values.min()
    above = found[values > least]
    return np.concatenate((above, found[values == least][: k - len(above)]))
