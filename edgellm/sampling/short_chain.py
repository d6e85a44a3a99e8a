"""The usual chain as an executor does it: the few candidates that top-k leaves, cut, shaped and drawn without Python.

``Sampler`` takes this way when its settings and the logits allow it, and the executor when it decodes several tokens
by itself; the chain on arrays is the judge.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from edgellm.kernels.draw import Draw, Drawn, DrawSpec, TokenDraw
from edgellm.sampling.chain import SAMPLERS, has_range
from edgellm.sampling.choice import Sampled
from edgellm.sampling.params import SamplingParams


class ShortChain:
    """Samplers that begin with a top-k, then a draw; ``draw`` is what the executor is given."""

    def __init__(self, params: SamplingParams, names: Sequence[str], draw: TokenDraw) -> None:
        self.params = params
        self.names = names
        self.draw = draw

    def sampled(self, n: int) -> list[Sampled]:
        """The first n tokens that were drawn, with what the parameters ask for."""
        if not self.params.n_probs and not self.params.logprobs:
            return [Sampled(token) for token in self.draw.tokens(n)]
        return [self._reported(drawn) for drawn in self.draw.drawn(n)]

    def _reported(self, drawn: Drawn) -> Sampled:
        positions, values = drawn.positions, drawn.values
        log_sum, n_probs = values[0] + math.log(drawn.sum), self.params.n_probs
        top = tuple([(positions[i], values[i] - log_sum) for i in range(min(n_probs, len(positions)))])
        after = self._after(drawn, n_probs) if self.params.sampler_trace else None
        return Sampled(drawn.token, values[drawn.place] - log_sum, top, after)

    def _after(self, drawn: Drawn, n_probs: int) -> dict[int, float | str]:
        """What the chain has made of the likeliest ones and of the chosen one."""
        n_left, shaped = drawn.left[-1], drawn.shaped
        log_left = shaped[0] + math.log(drawn.shaped_sum)
        after: dict[int, float | str] = {}
        for i in {*range(min(n_probs, len(drawn.positions))), drawn.place}:
            cut = next(name for name, n in zip(self.names, drawn.left, strict=True) if n <= i) if i >= n_left else ""
            after[drawn.positions[i]] = cut or shaped[i] - log_left
        return after


def short_chain(
    names: list[str],
    params: SamplingParams,
    n_vocab: int,
    greedy: bool,
    rng: np.random.Generator,
    draw: Draw | None,
    banned: tuple[int, ...] = (),
) -> ShortChain | None:
    """The chain of these samplers for an executor, which draws no banned id.

    None when one of them needs arrays or all of the vocabulary.
    """
    makers = [SAMPLERS[name].link for name in names if name in SAMPLERS]
    if draw is None or not names or len(makers) < len(names) or None in makers:
        return None
    if "temperature" in names and has_range(params):
        return None
    links = [maker(params) for maker in makers if maker is not None]
    if greedy:
        links = [link for link in links if link.name == "temperature"]
    n = 1 if greedy else min(params.top_k, n_vocab) if links[0].name == "top_k" else 0
    k = max(n + len(banned), min(params.n_probs, n_vocab))
    if not 0 < n <= k <= min(draw.max_k, n_vocab) or (banned and (params.sampler_trace or not draw.bans)):
        return None
    spec = DrawSpec(tuple(links), n, k, bool(params.n_probs or params.logprobs), banned)
    return ShortChain(params, [link.name for link in links], draw.open(spec, rng))
