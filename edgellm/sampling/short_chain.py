"""The usual chain on the few candidates that top-k leaves, as plain floats: a fifth of the time that arrays take.

Between two steps the caches are empty, so what counts is how little code is touched. ``Sampler`` takes this way when
its settings and the logits allow it; the chain on arrays is the judge.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence

import numpy as np

from edgellm.kernels.likeliest import MAX_K, Likeliest
from edgellm.sampling.chain import ChainSampler, MinP, Shortener, Temperature, TopK, TopP, running_sums
from edgellm.sampling.choice import Sampled
from edgellm.sampling.params import SamplingParams

SHORTENERS = (TopK, TopP, MinP, Temperature)


class ShortChain:
    """Samplers that begin with a top-k, then a draw.

    n   candidates that the chain needs to see
    """

    def __init__(self, chain: Sequence[Shortener], n: int, names: Sequence[str], rng: np.random.Generator) -> None:
        self.chain = list(zip(chain, names, strict=True))
        self.n = n
        self.rng = rng

    def choose(self, head: Likeliest) -> tuple[int, list[float], list[tuple[str, int]]]:
        """The place of the chosen one in ``head``, what the samplers left, and how many each of them left."""
        values: list[float] = head.values[: self.n].tolist()
        left = []
        for sampler, name in self.chain:
            values = sampler.shorten(values)
            left.append((name, len(values)))
        if len(values) == 1:
            return 0, values, left
        reached = running_sums(values)
        return min(bisect_right(reached, self.rng.random() * reached[-1]), len(values) - 1), values, left

    def sample(self, head: Likeliest, params: SamplingParams) -> Sampled:
        """Choose, and report what the parameters ask for."""
        place, values, left = self.choose(head)
        positions = head.positions.tolist()
        if head.log_sum is None:
            return Sampled(positions[place])
        log_sum, raw = head.log_sum, head.values.tolist()
        top = tuple((positions[i], raw[i] - log_sum) for i in range(min(params.n_probs, len(raw))))
        sampled = Sampled(positions[place], raw[place] - log_sum, top)
        if not params.sampler_trace:
            return sampled
        after: dict[int, float | str] = {}
        log_left = values[0] + math.log(running_sums(values)[-1])
        for i in {*range(len(top)), place}:
            after[positions[i]] = values[i] - log_left if i < len(values) else next(name for name, n in left if n <= i)
        return sampled._replace(after=after)


def short_chain(
    chain: Sequence[ChainSampler], names: dict[type, str], greedy: bool, rng: np.random.Generator
) -> ShortChain | None:
    """The same chain in short, or None when it has a sampler that needs arrays or all of the vocabulary."""
    short = [sampler for sampler in chain if isinstance(sampler, SHORTENERS)]
    if not chain or len(short) < len(chain):
        return None
    if any(isinstance(sampler, Temperature) and sampler.range > 0 for sampler in short):
        return None
    if greedy:
        short = [sampler for sampler in short if isinstance(sampler, Temperature)]
    first = short[0]
    n = 1 if greedy else first.k if isinstance(first, TopK) else 0
    return ShortChain(short, n, [names[type(s)] for s in short], rng) if 0 < n <= MAX_K else None
