"""An answer of a model that writes by denoising: each step has all of the text, with masks where tokens are to come.

Nothing of such a text is kept between two steps, as every token sees every other. Its steps are shared with others,
like those of texts that are embedded. The caller gets tokens in their order, as soon as no mask stands before them.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from time import perf_counter
from typing import TYPE_CHECKING

import numpy as np

from edgellm.engine.requests import AnswerRequest, CancelFlag, FinishReason, GeneratedToken, Progress
from edgellm.formats.errors import UnsupportedError
from edgellm.sampling.choice import Sampled
from edgellm.sampling.denoising import Denoiser, check_denoises

if TYPE_CHECKING:
    from edgellm.kernels.program import Denoising, Program
    from edgellm.sampling import Sampler


def check_in_order(program: Program) -> None:
    """UnsupportedError for a model whose tokens do not come one after the other, where that is needed."""
    if program.denoising is not None:
        raise UnsupportedError(
            f"A {program.architecture} model writes by denoising and has no probabilities of a next token: it gives no "
            "scores, no perplexity and no beams. Take another model.",
            code="DENOISING",
        )


class DenoisingRequest(AnswerRequest):
    """The steps of one answer. With guidance every step is two: of the text, and of the text without the prompt.

    limit    of tokens to write; ``ending`` is the reason when they are all there
    """

    shared = False
    whole = True

    def __init__(
        self,
        denoising: Denoising,
        lock: threading.Lock,
        tokens: Sequence[int],
        cancel: CancelFlag | None,
        sampler: Sampler,
        limit: int,
        stop_ids: frozenset[int],
        reports: bool,
    ) -> None:
        check_denoises(sampler.params, has_mask=sampler.mask is not None, begins=bool(sampler.begins))
        super().__init__(lock, tokens, cancel, stop_ids, reports)
        self.denoiser = Denoiser(tokens, denoising, sampler, limit)
        self.tokens = self.denoiser.tokens
        self._conditional: np.ndarray | None = None  # logits of the text, while those without the prompt are computed

    def next_tokens(self, n: int) -> tuple[Sequence[int], int]:
        denoiser = self.denoiser
        if not denoiser.places:
            return self.tokens, 0
        tokens = self.tokens if self._conditional is None else denoiser.unconditional()
        return tokens, len(denoiser.places)

    @property
    def output_rows(self) -> list[int]:  # type: ignore[override]
        """Those of masked places."""
        return self.denoiser.rows

    def accept(self, tokens: Sequence[int], logits: np.ndarray) -> int:
        if not len(logits):
            return 0
        if self.denoiser.guidance and self._conditional is None:
            self._conditional = logits.copy()
            return 0
        if self._conditional is not None:
            logits = logits + (self.denoiser.guidance + 1) * (self._conditional - logits)
            self._conditional = None
        self.denoiser.see(logits)
        return 0  # the cache keeps nothing

    def publish(self, seconds: float) -> Iterator[Progress | GeneratedToken]:
        written = self.tokens[self.n_prompt + self.published : self.n_prompt + self.denoiser.done]
        if self.reports and not self.published:
            yield Progress(self.n_prompt, self.n_prompt)
        if not self.published:
            self.first_s = perf_counter() - self.submitted
        if self.prompt_s:
            self.generation_s += seconds
        else:  # the first step reads it
            self.prompt_s = seconds
        for token in written:
            self.published += 1
            ends = self.published == self.denoiser.limit
            reason: FinishReason | None = "stop" if token in self.stop_ids else self.ending if ends else None
            yield GeneratedToken(token, Sampled(token), reason, self.timings())
            if reason is not None:
                return
        if not self.denoiser.limit:
            yield GeneratedToken(None, None, self.ending, self.timings())

    def _work(self) -> str:
        return f"prompt {self.n_prompt}, {self.published} tokens denoised"
