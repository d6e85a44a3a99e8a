"""The samplers that shorten or reshape the candidates, in llama.cpp's sense: a function and a row of a table each."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from edgellm.kernels.draw import Link
from edgellm.sampling.candidates import Candidates, head_reaching
from edgellm.sampling.params import SamplingParams

SMALLEST_TEMPERATURE = 1e-30  # below it a division leaves float32; the largest logit has all the probability


class ChainSampler(NamedTuple):
    """One link of the chain.

    apply    drops candidates or changes their logits; at least one stays
    wanted   whether the parameters ask for it: otherwise it does nothing and is left out
    link     the same for an executor, None where it has none
    """

    apply: Callable[[Candidates, SamplingParams, np.random.Generator], None]
    wanted: Callable[[SamplingParams], bool]
    link: Callable[[SamplingParams], Link] | None = None


def least_kept(params: SamplingParams) -> int:
    """How many candidates a sampler leaves at least."""
    return max(params.min_keep, 1)


def top_k(candidates: Candidates, params: SamplingParams, rng: np.random.Generator) -> None:
    """Keep the k largest logits, in order."""
    candidates.keep(candidates.largest(params.top_k), is_sorted=True)


def top_p(candidates: Candidates, params: SamplingParams, rng: np.random.Generator) -> None:
    """Keep the most probable tokens until their probabilities add up to p (Holtzman et al. 2019).

    Sorts only as many candidates as the sum needs.
    """
    weights = candidates.weights()
    candidates.keep(*head_reaching(candidates, weights, params.top_p * float(weights.sum()), least_kept(params)))


def min_p(candidates: Candidates, params: SamplingParams, rng: np.random.Generator) -> None:
    """Keep tokens at least p times as probable as the best one: a threshold on the logits, without probabilities."""
    least = candidates.max() + math.log(params.min_p)
    index = np.flatnonzero(candidates.logits >= candidates.logits.dtype.type(least))
    if len(index) >= least_kept(params):
        candidates.keep(index)
    else:
        candidates.keep(candidates.largest(least_kept(params)), is_sorted=True)


def typical_p(candidates: Candidates, params: SamplingParams, rng: np.random.Generator) -> None:
    """Keep the tokens whose surprise is nearest to the entropy, until they add up to p (Meister et al. 2022).

    In the order of typicality afterwards.
    """
    if not candidates.sorted and len(candidates) <= 1024:
        candidates.sort()
    probs = candidates.probs()
    surprise = -np.log(np.maximum(probs, np.finfo(probs.dtype).tiny))
    entropy = float(np.sum(probs * surprise, dtype=np.float64))
    typical = Candidates(-np.abs(surprise - entropy))
    index, _ = head_reaching(typical, probs, params.typical_p, least_kept(params))
    candidates.keep(index, is_sorted=False)


def top_n_sigma(candidates: Candidates, params: SamplingParams, rng: np.random.Generator) -> None:
    """Keep logits within n standard deviations of the largest one; banned tokens (-inf) do not count for them."""
    if len(candidates) <= 1:
        return
    logits = candidates.logits
    finite = logits if float(logits.min()) > -math.inf else logits[logits > -math.inf]
    deviation = float(np.std(finite, dtype=np.float64 if len(finite) < 4096 else None))
    threshold = candidates.max() - params.top_n_sigma * deviation
    candidates.keep(np.flatnonzero(logits >= logits.dtype.type(threshold)))


def xtc(candidates: Candidates, params: SamplingParams, rng: np.random.Generator) -> None:
    """Exclude top choices: with a chance, drop all tokens above the threshold except the least probable of them.

    Draws one random number, unless there is no choice.
    """
    if len(candidates) < 2 or rng.random() > params.xtc_probability:
        return
    above = np.flatnonzero(candidates.probs() >= params.xtc_threshold)
    if len(above) < 2 or len(candidates) - (len(above) - 1) < params.min_keep:
        return
    order = np.lexsort((above if candidates.ids is None else candidates.ids[above], -candidates.logits[above]))
    kept = np.ones(len(candidates), bool)
    kept[above[order[:-1]]] = False
    candidates.keep(np.flatnonzero(kept))


def temperature(candidates: Candidates, params: SamplingParams, rng: np.random.Generator) -> None:
    """Divide the logits by a temperature; with a range, by one that follows the entropy (dynamic temperature).

    At 0 only the largest logit stays.
    """
    divisor = params.temperature
    if has_range(params):
        if len(candidates) <= 1:
            return
        divisor = by_entropy(candidates.probs(), params)
    if divisor < SMALLEST_TEMPERATURE:
        candidates.keep(candidates.largest(1), is_sorted=True)
    else:
        candidates.logits = candidates.logits / candidates.logits.dtype.type(divisor)


def has_range(params: SamplingParams) -> bool:
    """Whether the temperature is dynamic; mirostat knows none."""
    return params.dynatemp_range > 0 and params.mirostat == 0


def temperature_link(params: SamplingParams) -> Link:
    """Of a temperature without a range."""
    return Link("temperature", params.temperature if params.temperature >= SMALLEST_TEMPERATURE else 0.0)


def by_entropy(probs: np.ndarray, params: SamplingParams) -> float:
    """From temperature - range at entropy 0 to temperature + range at the greatest possible entropy."""
    likely = probs[probs > 0].astype(np.float64)
    entropy = -float(np.sum(likely * np.log(likely)))
    share = max(entropy, 0.0) / math.log(len(probs))
    low, high = max(0.0, params.temperature - params.dynatemp_range), params.temperature + params.dynatemp_range
    return low + (high - low) * share**params.dynatemp_exponent


# name in SamplingParams.samplers -> what it does, when it does anything, and its link for an executor
SAMPLERS = {
    "top_n_sigma": ChainSampler(top_n_sigma, lambda p: p.top_n_sigma > 0),
    "top_k": ChainSampler(top_k, lambda p: p.top_k > 0, lambda p: Link("top_k", p.top_k)),
    "typ_p": ChainSampler(typical_p, lambda p: p.typical_p < 1),
    "top_p": ChainSampler(top_p, lambda p: p.top_p < 1, lambda p: Link("top_p", p.top_p, least_kept(p))),
    "min_p": ChainSampler(min_p, lambda p: p.min_p > 0, lambda p: Link("min_p", math.log(p.min_p), least_kept(p))),
    # above threshold 0.5 two tokens cannot reach it
    "xtc": ChainSampler(xtc, lambda p: p.xtc_probability > 0 and p.xtc_threshold <= 0.5),
    "temperature": ChainSampler(temperature, lambda p: p.temperature != 1 or has_range(p), temperature_link),
}
