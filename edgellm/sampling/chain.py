"""The samplers that shorten or reshape the candidates, one class each, in llama.cpp's sense.

A sampler has ``apply(candidates)`` and is left out of the chain when ``wanted`` says that its setting does nothing.
"""

from __future__ import annotations

import math
from typing import Protocol

import numpy as np

from edgellm.kernels.draw import Link
from edgellm.sampling.candidates import Candidates, head_reaching
from edgellm.sampling.params import SamplingParams

SMALLEST_TEMPERATURE = 1e-30  # below it a division leaves float32; the largest logit has all the probability


class ChainSampler(Protocol):
    """One link of the chain."""

    def apply(self, candidates: Candidates) -> None:
        """Drop candidates or change their logits; at least one stays."""


class TopK:
    """Keep the k largest logits."""

    def __init__(self, params: SamplingParams, rng: np.random.Generator) -> None:
        self.k = params.top_k

    @staticmethod
    def wanted(params: SamplingParams) -> bool:
        """Off at 0 and below."""
        return params.top_k > 0

    def apply(self, candidates: Candidates) -> None:
        """Sorted afterwards."""
        candidates.keep(candidates.largest(self.k), is_sorted=True)

    def link(self) -> Link:
        """For an executor."""
        return Link("top_k", self.k)


class TopP:
    """Keep the most probable tokens until their probabilities add up to p (Holtzman et al. 2019)."""

    def __init__(self, params: SamplingParams, rng: np.random.Generator) -> None:
        self.p = params.top_p
        self.min_keep = max(params.min_keep, 1)

    @staticmethod
    def wanted(params: SamplingParams) -> bool:
        """Off at 1."""
        return params.top_p < 1

    def apply(self, candidates: Candidates) -> None:
        """Sorts only as many candidates as the sum needs."""
        weights = candidates.weights()
        candidates.keep(*head_reaching(candidates, weights, self.p * float(weights.sum()), self.min_keep))

    def link(self) -> Link:
        """For an executor."""
        return Link("top_p", self.p, self.min_keep)


class MinP:
    """Keep tokens at least p times as probable as the best one."""

    def __init__(self, params: SamplingParams, rng: np.random.Generator) -> None:
        self.log_p = math.log(params.min_p) if params.min_p > 0 else -math.inf
        self.min_keep = max(params.min_keep, 1)

    @staticmethod
    def wanted(params: SamplingParams) -> bool:
        """Off at 0."""
        return params.min_p > 0

    def apply(self, candidates: Candidates) -> None:
        """A threshold on the logits; no probabilities needed."""
        index = np.flatnonzero(candidates.logits >= candidates.logits.dtype.type(candidates.max() + self.log_p))
        if len(index) >= self.min_keep:
            candidates.keep(index)
        else:
            candidates.keep(candidates.largest(self.min_keep), is_sorted=True)

    def link(self) -> Link:
        """For an executor."""
        return Link("min_p", self.log_p, self.min_keep)


class TypicalP:
    """Keep the tokens whose surprise is nearest to the entropy, until they add up to p (Meister et al. 2022)."""

    def __init__(self, params: SamplingParams, rng: np.random.Generator) -> None:
        self.p = params.typical_p
        self.min_keep = max(params.min_keep, 1)

    @staticmethod
    def wanted(params: SamplingParams) -> bool:
        """Off at 1."""
        return params.typical_p < 1

    def apply(self, candidates: Candidates) -> None:
        """In the order of typicality afterwards."""
        if not candidates.sorted and len(candidates) <= 1024:
            candidates.sort()
        probs = candidates.probs()
        surprise = -np.log(np.maximum(probs, np.finfo(probs.dtype).tiny))
        entropy = float(np.sum(probs * surprise, dtype=np.float64))
        typical = Candidates(-np.abs(surprise - entropy))
        index, _ = head_reaching(typical, probs, self.p, self.min_keep)
        candidates.keep(index, is_sorted=False)


class TopNSigma:
    """Keep logits within n standard deviations of the largest one."""

    def __init__(self, params: SamplingParams, rng: np.random.Generator) -> None:
        self.n = params.top_n_sigma

    @staticmethod
    def wanted(params: SamplingParams) -> bool:
        """Off at 0 and below."""
        return params.top_n_sigma > 0

    def apply(self, candidates: Candidates) -> None:
        """Banned tokens (-inf) do not count for the deviation."""
        if len(candidates) <= 1:
            return
        logits = candidates.logits
        low = float(logits.min())
        finite = logits if low > -math.inf else logits[logits > -math.inf]
        threshold = candidates.max() - self.n * float(np.std(finite, dtype=np.float64 if len(finite) < 4096 else None))
        candidates.keep(np.flatnonzero(logits >= logits.dtype.type(threshold)))


class XTC:
    """Exclude top choices: with a chance, drop all tokens above the threshold except the least probable of them."""

    def __init__(self, params: SamplingParams, rng: np.random.Generator) -> None:
        self.probability = params.xtc_probability
        self.threshold = params.xtc_threshold
        self.min_keep = params.min_keep
        self.rng = rng

    @staticmethod
    def wanted(params: SamplingParams) -> bool:
        """Off at probability 0, and above threshold 0.5, where two tokens cannot reach it."""
        return params.xtc_probability > 0 and params.xtc_threshold <= 0.5

    def apply(self, candidates: Candidates) -> None:
        """Draws one random number, unless there is no choice."""
        if len(candidates) < 2 or self.rng.random() > self.probability:
            return
        above = np.flatnonzero(candidates.probs() >= self.threshold)
        if len(above) < 2 or len(candidates) - (len(above) - 1) < self.min_keep:
            return
        order = np.lexsort((above if candidates.ids is None else candidates.ids[above], -candidates.logits[above]))
        kept = np.ones(len(candidates), bool)
        kept[above[order[:-1]]] = False
        candidates.keep(np.flatnonzero(kept))


class Temperature:
    """Divide the logits by a temperature; with a range, by one that follows the entropy (dynamic temperature)."""

    def __init__(self, params: SamplingParams, rng: np.random.Generator) -> None:
        self.temperature = params.temperature
        self.range = params.dynatemp_range if params.mirostat == 0 else 0.0
        self.exponent = params.dynatemp_exponent

    @staticmethod
    def wanted(params: SamplingParams) -> bool:
        """Off at 1 without a range."""
        return params.temperature != 1 or (params.dynatemp_range > 0 and params.mirostat == 0)

    def apply(self, candidates: Candidates) -> None:
        """At 0 only the largest logit stays."""
        temperature = self.temperature
        if self.range > 0:
            if len(candidates) <= 1:
                return
            temperature = self.by_entropy(candidates.probs())
        if temperature < SMALLEST_TEMPERATURE:
            candidates.keep(candidates.largest(1), is_sorted=True)
        else:
            candidates.logits = candidates.logits / candidates.logits.dtype.type(temperature)

    def link(self) -> Link:
        """For an executor, without a range."""
        return Link("temperature", self.temperature if self.temperature >= SMALLEST_TEMPERATURE else 0.0)

    def by_entropy(self, probs: np.ndarray) -> float:
        """From temperature - range at entropy 0 to temperature + range at the greatest possible entropy."""
        likely = probs[probs > 0].astype(np.float64)
        entropy = -float(np.sum(likely * np.log(likely)))
        share = max(entropy, 0.0) / math.log(len(probs))
        low, high = max(0.0, self.temperature - self.range), self.temperature + self.range
        return low + (high - low) * share**self.exponent
