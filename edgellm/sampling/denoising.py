"""Masked denoising: an answer is a canvas of masks; step by step those places get tokens of which a model is surest.

A canvas is denoised block by block, a block in a number of steps. A step looks at the logits of all places of the block
that are still masked, draws a token for each, and reveals some of them by an algorithm; what is revealed stays. Where
blocks are as long as the canvas, how many a step reveals follows a time that runs from 1 to ``diffusion_eps``, as in
Dream (https://arxiv.org/abs/2508.15487); else every step reveals as many, as in LLaDA (https://arxiv.org/abs/2502.09992).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from edgellm.formats.errors import UnsupportedError
from edgellm.sampling.candidates import Candidates
from edgellm.sampling.params import SamplingParams
from edgellm.sampling.sampler import check_largest

if TYPE_CHECKING:
    from edgellm.kernels.program import Denoising
    from edgellm.sampling.sampler import Sampler

ALGORITHMS = ("origin", "entropy", "margin", "random", "confidence")
"""By which places are revealed, in llama.cpp's order: each with the same chance, or those with the least entropy, the
largest margin between the best two, at random, or the likeliest token."""
LEAST_PROBABILITY = 1e-10  # in a logarithm


def check_denoises(params: SamplingParams, *, has_mask: bool, begins: bool) -> None:
    """UnsupportedError for what needs an order of tokens, which an answer that is denoised does not come in."""
    looks_back = params.repeat_penalty != 1.0 or params.presence_penalty or params.frequency_penalty
    adaptive = params.adaptive_target >= 0 or "adaptive_p" in params.samplers
    asked = {
        "a form of the answer (tools, a grammar, a schema or a regular expression)": has_mask,
        "logprobs": params.logprobs or params.n_probs or params.sampler_trace or params.post_sampling_probs,
        "penalties of repetition": looks_back,
        "DRY": params.dry_multiplier,
        "mirostat": params.mirostat,
        "adaptive-p": adaptive,
        "processors": params.processors,
        "an answer that is begun": begins,
    }
    if wrong := [what for what, is_asked in asked.items() if is_asked]:
        raise UnsupportedError(
            f"This model writes by denoising, all places of its answer at once, and {wrong[0]} needs one token after "
            "the other. Ask without it, or take another model.",
            code="DENOISING",
        )


class Denoiser:
    """The text of one answer while it is written: the prompt, and behind it what is revealed and what is masked.

    tokens   the prompt, what is written, and the canvas
    done     how many tokens behind the prompt stand for good, without a gap; the rest of the canvas may still change
    """

    def __init__(self, prompt: Sequence[int], denoising: Denoising, sampler: Sampler, limit: int) -> None:
        params = sampler.params
        self.mask, self.shifted = denoising.mask, denoising.shifted
        self.sampler, self.limit, self.n_prompt = sampler, limit, len(prompt)
        self.tokens, self.done = list(prompt), 0
        self.length = params.diffusion_length
        self.steps = params.diffusion_steps
        self.block_length = denoising.block if params.diffusion_block_length < 0 else params.diffusion_block_length
        number = params.diffusion_algorithm
        self.algorithm = denoising.algorithm if number < 0 else ALGORITHMS[number]
        self.guidance, self.alg_temp = params.diffusion_cfg_scale, params.diffusion_alg_temp
        self.eps = params.diffusion_eps
        self._blocks: list[tuple[int, int, int]] = []  # of the canvas: first place, end, steps
        self._step = 0  # of the first of them
        self._next_canvas()

    @property
    def places(self) -> list[int]:
        """The masked places that the next step looks at; none when the answer has all its tokens."""
        if not self._blocks:
            return []
        first, end, _ = self._blocks[0]
        return [place for place in range(first, end) if self.tokens[place] == self.mask]

    @property
    def rows(self) -> list[int]:
        """The rows whose logits the next step needs, one for each place."""
        return [place - self.shifted for place in self.places]

    def unconditional(self) -> list[int]:
        """The text without the prompt, for guidance."""
        return [self.mask] * self.n_prompt + self.tokens[self.n_prompt :]

    def see(self, logits: np.ndarray) -> None:
        """Take a step: ``logits`` (n, n_vocab) are those of ``rows``."""
        places, found = self.places, [self._propose(row) for row in logits]
        tokens, sure = [token for token, _ in found], np.array([confidence for _, confidence in found])
        for i in self._revealed(sure):
            self.tokens[places[i]] = tokens[i]
        self._advance()

    def _propose(self, logits: np.ndarray) -> tuple[int, float]:
        """A token for one place, and how sure it is."""
        sampler = self.sampler
        row = logits.astype(np.float64)
        row[self.mask] = -np.inf  # a place that is revealed has a token
        if sampler.params.temperature > 0:
            candidates = sampler.candidates(row.astype(np.float32))
            probs = candidates.probs().astype(np.float64)
            position = sampler.choice.choose(candidates)
            token = candidates.token(position)
        else:
            row[sampler.bias_ids] += sampler.bias
            check_largest(float(row.max()))
            probs = Candidates(row).probs()
            token = position = int(row.argmax())
        if self.algorithm == "entropy":
            return token, float(np.sum(probs * np.log(probs + LEAST_PROBABILITY)))
        if self.algorithm == "margin":
            best = np.partition(probs, -2)[-2:] if len(probs) > 1 else np.array([0.0, probs[0]])
            return token, float(best[1] - best[0])
        if self.algorithm == "confidence":
            return token, float(probs[position])
        return token, float(sampler.rng.random())

    def _revealed(self, sure: np.ndarray) -> list[int]:
        """Which of the places get their tokens in this step."""
        n, share = self._due(len(sure))
        if self.algorithm == "origin":
            return np.flatnonzero(sure < share).tolist()  # they are uniform numbers
        if self.alg_temp > 0:  # in turn, each by the softmax over those that are left
            sure = sure / self.alg_temp + self.sampler.rng.gumbel(size=len(sure))
        return sorted(np.argsort(-sure, kind="stable")[:n].tolist())

    def _due(self, n_masked: int) -> tuple[int, float]:
        """How many of so many places this step reveals, and which share of them."""
        first, end, steps = self._blocks[0]
        if self._step >= steps - 1:
            return n_masked, 1.0
        if self.block_length:
            n = (end - first) // steps + (self._step < (end - first) % steps)
            return n, n / n_masked
        time, then = (1 - step / steps * (1 - self.eps) for step in (self._step, self._step + 1))
        return int(n_masked * (1 - then / time)), 1 - then / time

    def _advance(self) -> None:
        """Go on to the next step that reveals something, and count what stands for good."""
        self._step += 1
        while self._blocks and (not self.places or self._step >= self._blocks[0][2]):
            self._blocks.pop(0)
            self._step = 0
        end = self.n_prompt + self.done
        while end < len(self.tokens) and self.tokens[end] != self.mask:
            end += 1
        self.done = end - self.n_prompt
        if not self._blocks:
            self._next_canvas()
        while self._blocks and self.algorithm != "origin" and not self._due(len(self.places))[0]:
            self._step += 1

    def _next_canvas(self) -> None:
        """Masks behind what is written, up to the limit."""
        n = min(self.length, self.limit - self.done)
        if n <= 0:
            return
        start, block = len(self.tokens), self.block_length or n
        self.tokens += [self.mask] * n
        each = max(1, (self.steps or n) // -(-n // block))
        for first in range(start, start + n, block):
            end = min(first + block, start + n)
            self._blocks.append((first, end, min(each, end - first) if self.block_length else each))
        while self.algorithm != "origin" and not self._due(len(self.places))[0]:
            self._step += 1
