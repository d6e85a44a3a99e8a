"""The last link of the chain: choose one of the candidates. Each class keeps what it has to remember between steps."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from edgellm.sampling.candidates import Candidates
from edgellm.sampling.params import SamplingParams

BLOCK = 512
MIROSTAT_TOKENS = 100  # of the head of the distribution, to estimate its Zipf exponent


class Sampled(NamedTuple):
    """One chosen token. ``logprob`` and ``top`` (best first) are filled when the parameters ask for them.

    after   with ``sampler_trace``: each of them -> its log-probability after the samplers, or the sampler that cut it
    """

    token: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()
    after: dict[int, float | str] | None = None


def draw(weights: np.ndarray, rng: np.random.Generator) -> int:
    """A position with a probability in proportion to its weight; weights (n,) are not negative."""
    if len(weights) == 1:
        return 0
    if len(weights) <= 2 * BLOCK:
        return position_of(rng.random(), weights)
    # a running sum over a whole vocabulary takes milliseconds: find the block first, with the same random number
    n_blocks = len(weights) // BLOCK
    sums = weights[: n_blocks * BLOCK].reshape(n_blocks, BLOCK).sum(axis=1, dtype=np.float64)
    sums = np.append(sums, weights[n_blocks * BLOCK :].sum(dtype=np.float64))
    share = rng.random()
    block = position_of(share, sums)
    rest = (share * float(sums.sum()) - float(sums[:block].sum())) / float(sums[block])
    return block * BLOCK + position_of(min(max(rest, 0.0), 1.0), weights[block * BLOCK : (block + 1) * BLOCK])


def position_of(share: float, weights: np.ndarray) -> int:
    """The first position at which the running sum exceeds ``share`` (0 to 1) of the whole."""
    reached = np.cumsum(weights, dtype=np.float64)
    position = int(np.searchsorted(reached, share * reached[-1], side="right"))
    return position if position < len(weights) else int(np.flatnonzero(weights)[-1])


class Distribution:
    """Draw from the softmax of what is left."""

    def __init__(self, params: SamplingParams, n_vocab: int, rng: np.random.Generator) -> None:
        self.rng = rng

    def choose(self, candidates: Candidates) -> int:
        """Position of the chosen candidate."""
        return draw(candidates.weights(), self.rng)

    def accept(self, token: int) -> None:
        """Nothing to remember."""


class Mirostat:
    """Version 1: keep the surprise near tau by a top-k from an estimate of the Zipf exponent (Basu et al. 2020)."""

    def __init__(self, params: SamplingParams, n_vocab: int, rng: np.random.Generator) -> None:
        self.tau = params.mirostat_tau
        self.eta = params.mirostat_eta
        self.mu = 2 * self.tau
        self.n_vocab = n_vocab
        self.rng = rng

    def cut(self, candidates: Candidates) -> None:
        """Keep the k best."""
        total = float(candidates.weights().sum())
        head = candidates.largest(MIROSTAT_TOKENS)
        top = np.exp(candidates.logits[head].astype(np.float64) - candidates.max()) / total
        top = top[top > 0]
        k = 1
        if len(top) > 1:
            i = np.arange(len(top) - 1)
            t = np.log((i + 2) / (i + 1))
            s_hat = float(np.sum(t * np.log(top[:-1] / top[1:])) / np.sum(t * t))
            k = self.k_of(s_hat)
        candidates.keep(candidates.largest(max(1, min(k, len(candidates)))), is_sorted=True)

    def k_of(self, s_hat: float) -> int:
        """The k whose expected surprise is mu, for a Zipf exponent ``s_hat``."""
        epsilon = s_hat - 1
        with np.errstate(all="ignore"):
            base = np.float64(epsilon) * np.float64(2) ** self.mu / (1 - np.float64(self.n_vocab) ** -epsilon)
            k = base ** (1 / np.float64(s_hat)) if s_hat else np.float64(self.n_vocab)
        return int(min(k, self.n_vocab)) if np.isfinite(k) else self.n_vocab

    def choose(self, candidates: Candidates) -> int:
        """Cut, draw, and move mu towards tau by the surprise of what was drawn."""
        self.cut(candidates)
        probs = candidates.probs()
        position = draw(probs, self.rng)
        self.mu -= self.eta * (-math.log2(float(probs[position])) - self.tau)
        return position

    def accept(self, token: int) -> None:
        """mu moves when a token is chosen."""


class MirostatV2(Mirostat):
    """Version 2: cut the tokens whose surprise is over mu."""

    def cut(self, candidates: Candidates) -> None:
        """Keep at least the best one."""
        weights = candidates.weights()
        index = np.flatnonzero(weights >= weights.sum() * 2.0**-self.mu)  # surprise <= mu, without a logarithm
        candidates.keep(index if len(index) else candidates.largest(1))


class AdaptiveP:
    """Prefer tokens whose probability is near a target that makes up for the probabilities of the last choices."""

    WIDTH, PEAK, SHARPNESS = 0.3, 5.0, 10.0

    def __init__(self, params: SamplingParams, n_vocab: int, rng: np.random.Generator) -> None:
        self.target = params.adaptive_target
        self.decay = params.adaptive_decay
        self.rng = rng
        self.weighted_sum = self.target / (1 - self.decay)
        self.total_weight = 1 / (1 - self.decay)
        self.pending: tuple[int, float] | None = None

    def choose(self, candidates: Candidates) -> int:
        """Draw from the reshaped distribution."""
        if self.target < 0:
            return draw(candidates.weights(), self.rng)
        probs = candidates.probs().astype(np.float64)
        target = min(max(2 * self.target - self.weighted_sum / self.total_weight, 0.0), 1.0)
        distance = np.abs(probs - target) / self.WIDTH
        logits = self.PEAK - self.SHARPNESS * distance * distance / (1 + distance)
        candidates.logits = np.where(np.isneginf(candidates.logits), -np.inf, logits)
        candidates.sorted = False
        position = draw(candidates.weights(), self.rng)
        self.pending = (candidates.token(position), float(probs[position]))
        return position

    def accept(self, token: int) -> None:
        """Take the probability that the token had before the reshaping into the average."""
        if self.pending is not None and self.pending[0] == token:
            self.weighted_sum = self.pending[1] + self.decay * self.weighted_sum
            self.total_weight = 1 + self.decay * self.total_weight
        self.pending = None
