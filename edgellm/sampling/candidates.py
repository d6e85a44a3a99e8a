"""The tokens that are still in play at one step, and how to find the largest of a quarter of a million logits fast."""

from __future__ import annotations

import threading
from collections.abc import Iterable

import numpy as np

from edgellm.kernels.draw import Draw, TopLogits

HEAD = 256  # this many of the best are looked at first
N_BINS = 1024
SMALL = 8192  # up to here partition the logits themselves
LOOKED_AT = 40  # this many of the best are found at least: as many as top_k keeps by default


class Scratch(threading.local):
    """Arrays of a vocabulary's size, one of each name and thread, made once: new ones cost more than what fills them.

    Page faults of fresh memory made top_p over 262,144 logits three times slower. Valid until the name is asked again.
    """

    def __init__(self) -> None:
        self.arrays: dict[str, np.ndarray] = {}

    def take(self, name: str, n: int, dtype: type) -> np.ndarray:
        """An array of ``n`` with anything in it."""
        found = self.arrays.get(name)
        if found is None or len(found) < n:
            found = self.arrays[name] = np.empty(n, dtype)
        return found[:n]


SCRATCH = Scratch()


class Candidates:
    """Token ids with their logits. Samplers replace both; ``sorted`` says: by falling logit, ties by rising id.

    ids      (n,) int64, or None for the whole vocabulary in order
    logits   (n,) float32 for the whole vocabulary (the model's buffer or a copy, never written to here), else float64
    draw     what an executor does for them, None: numpy
    """

    __slots__ = ("_draw", "_looked", "ids", "logits", "sorted")

    def __init__(
        self, logits: np.ndarray, ids: np.ndarray | None = None, is_sorted: bool = False, draw: Draw | None = None
    ) -> None:
        self.ids = ids
        self.logits = logits
        self.sorted = is_sorted
        self._draw = draw
        self._looked: tuple[np.ndarray, TopLogits | None] | None = None

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
        if self.ids is None and self._draw is not None and k <= self._draw.max_k:
            if self.head is None or len(self.head.positions) < min(k, len(self)):
                self.look(k)
            if self.head is not None:
                return self.head.positions[:k]
        index = largest_positions(self.logits, k)
        ids = index if self.ids is None else self.ids[index]
        return index[np.lexsort((ids, -self.logits[index]))]

    def look(self, k: int, with_sum: bool = False) -> None:
        """Let the executor find the first of a whole vocabulary; with the sum, ``log_sum`` costs nothing later."""
        if self._draw is not None:
            k = min(max(k, LOOKED_AT), len(self))
            self._looked = self.logits, self._draw.top_k(self.logits, k, with_sum)

    @property
    def head(self) -> TopLogits | None:
        """What ``look`` has found of these very logits."""
        return self._looked[1] if self.ids is None and self._looked and self._looked[0] is self.logits else None

    def sort(self) -> None:
        """Bring the candidates into falling order."""
        if not self.sorted:
            self.keep(self.largest(len(self)), is_sorted=True)

    def max(self) -> float:
        """The largest logit."""
        return float(self.logits[0] if self.sorted else self.logits.max())

    def weights(self) -> np.ndarray:
        """exp(logit - max): probabilities before they are divided by their sum. Of a whole vocabulary: in scratch."""
        logits = self.logits
        out = SCRATCH.take("weights", len(logits), np.float32) if logits.dtype == np.float32 else np.empty_like(logits)
        np.subtract(logits, logits.dtype.type(self.max()), out=out)
        return np.exp(out, out=out)

    def log_sum(self) -> float:
        """log of the sum of exp(logit): a logit less this is a log-probability."""
        if (head := self.head) is not None and head.log_sum is not None:
            return head.log_sum
        return self.max() + float(np.log(self.weights().sum(dtype=np.float64)))

    def logprobs(self, tokens: Iterable[int]) -> dict[int, float]:
        """Those of ``tokens`` that are candidates, with their log-probabilities among all candidates."""
        log_sum = self.log_sum()
        if self.ids is None:
            return {token: float(self.logits[token]) - log_sum for token in tokens}
        wanted = set(tokens)
        found = np.arange(len(self)) if len(self) <= HEAD else np.flatnonzero(np.isin(self.ids, list(wanted)))
        pairs = zip(self.ids[found].tolist(), self.logits[found].tolist(), strict=True)
        return {token: logit - log_sum for token, logit in pairs if token in wanted}

    def probs(self) -> np.ndarray:
        """The softmax of the logits."""
        weights = self.weights()
        return weights / weights.sum()


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


def head_reaching(scored: Candidates, weights: np.ndarray, target: float, at_least: int) -> tuple[np.ndarray, bool]:
    """Positions of the best-scored candidates whose weights add up to ``target``, and whether they are in order.

    scored    candidates whose logits are the scores; of equal scores the lower id counts as better
    weights   (n,) what each adds
    Mostly the first 256 will do. A flat distribution is cut into bins by score, and only the bin at the edge is sorted.
    """
    n = len(scored)
    k = n if scored.sorted else min(n, max(HEAD, at_least))
    index = scored.largest(k)
    reached = np.cumsum(weights[index], dtype=np.float64)
    count = max(int(np.searchsorted(reached, target)) + 1, at_least)
    if count <= k or k == n:
        return index[:count], True
    better: list[np.ndarray] = []
    scores, added, edge = scored.logits, weights, None  # None: all of them, not gathered
    while edge is None or len(edge) > HEAD:  # each round leaves the bin in which the sum is reached
        best, worst = scores.max(), scores.min()
        if np.isneginf(worst):
            inside = np.flatnonzero(scores > worst)
        elif best > worst:
            bins, exact = SCRATCH.take("bins", len(scores), np.intp), SCRATCH.take("exact", len(scores), np.float64)
            np.subtract(best, scores, out=exact)
            np.multiply(exact, (N_BINS - 1) / (float(best) - float(worst)), out=exact)
            np.copyto(bins, np.minimum(exact, N_BINS - 1, out=exact), casting="unsafe")
            np.copyto(exact, added)
            sums = np.cumsum(np.bincount(bins, exact, N_BINS))
            at = min(int(np.searchsorted(sums, target)), N_BINS - 1)
            target -= float(sums[at - 1]) if at else 0.0
            above, inside = np.flatnonzero(bins < at), np.flatnonzero(bins == at)
            better.append(above if edge is None else edge[above])
        else:
            edge = np.arange(n) if edge is None else edge
            break
        edge = inside if edge is None else edge[inside]
        scores, added = scores[inside], added[inside]
    edge = edge[Candidates(scored.logits[edge], edge if scored.ids is None else scored.ids[edge]).largest(len(edge))]
    count = int(np.searchsorted(np.cumsum(weights[edge], dtype=np.float64), target)) + 1
    return np.concatenate((*better, edge[:count])), False


def exactly(logits: np.ndarray, found: np.ndarray, k: int) -> np.ndarray:
    """``found`` (rising positions, at least ``k``) cut to ``k``: the highest positions of the least value go."""
    if len(found) <= k:
        return found
    values = logits[found]
    least = values.min()
    above = found[values > least]
    return np.concatenate((above, found[values == least][: k - len(above)]))
