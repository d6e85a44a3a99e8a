"""The samplers that look back at the tokens so far: penalties and DRY. Both only touch the tokens they punish."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence

import numpy as np

from edgellm.formats.errors import ParameterError
from edgellm.sampling.params import SamplingParams

MAX_BREAKER_CHARS = 40
MAX_BREAKER_TOKENS = 20


class Penalties:
    """Repeat, frequency and presence penalty over the last n tokens."""

    def __init__(self, params: SamplingParams) -> None:
        self.repeat = params.repeat_penalty
        self.frequency = params.frequency_penalty
        self.presence = params.presence_penalty
        self.recent: deque[int] = deque()
        self.last_n = params.penalty_last_n
        self.counts: dict[int, int] = {}

    @staticmethod
    def wanted(params: SamplingParams) -> bool:
        """Off without a window, and when all three are neutral."""
        neutral = params.repeat_penalty == 1 and params.frequency_penalty == 0 and params.presence_penalty == 0
        return params.penalty_last_n != 0 and not neutral

    def accept(self, token: int) -> None:
        """Take ``token`` into the window."""
        self.recent.append(token)
        self.counts[token] = self.counts.get(token, 0) + 1
        if 0 <= self.last_n < len(self.recent):
            oldest = self.recent.popleft()
            self.counts[oldest] -= 1
            if not self.counts[oldest]:
                del self.counts[oldest]

    def affected(self) -> tuple[np.ndarray, np.ndarray]:
        """(ids of the tokens in the window, how often each is there)."""
        n = len(self.counts)
        return np.fromiter(self.counts, np.int64, n), np.fromiter(self.counts.values(), np.float64, n)

    def punish(self, logits: np.ndarray, counts: np.ndarray) -> np.ndarray:
        """The new logits of tokens that are there ``counts`` times."""
        scaled = np.where(logits <= 0, logits * self.repeat, logits / self.repeat)
        return scaled - counts * self.frequency - self.presence


class DRY:
    """Don't repeat yourself: punish the token that would go on with a sequence that was there before.

    For every earlier place where the last tokens stand as well, ``length`` tokens long, the token that followed there
    loses multiplier * base ** (length - allowed_length). A breaker ends the sequence that is looked back at.
    """

    def __init__(self, params: SamplingParams, breakers: dict[int, list[list[int]]]) -> None:
        self.multiplier = params.dry_multiplier
        self.base = params.dry_base
        self.allowed = params.dry_allowed_length
        self.last_n = params.dry_penalty_last_n
        self.breakers = breakers  # first token -> the rests that complete a breaker; [] when it is one alone
        self.tokens: list[int] = []
        # longer matches cannot cost more: base ** longer would leave float32
        self.max_exponent = int(88.7228391 / math.log(self.base)) if self.base > 1.000001 else 0

    @staticmethod
    def wanted(params: SamplingParams) -> bool:
        """Off at multiplier 0, below base 1, and without a window."""
        return params.dry_multiplier != 0 and params.dry_base >= 1 and params.dry_penalty_last_n != 0

    def accept(self, token: int) -> None:
        """Remember ``token``."""
        self.tokens.append(token)
        if 0 <= 2 * self.last_n < len(self.tokens):
            del self.tokens[: -self.last_n]

    def affected(self) -> tuple[np.ndarray, np.ndarray]:
        """(ids of the tokens that would go on with a repeat, length of the longest one)."""
        window = np.asarray(self.tokens if self.last_n < 0 else self.tokens[-self.last_n :], np.int64)
        longest = {t: n for t, n in self.longest_repeats(window).items() if [] not in self.breakers.get(t, ())}
        return np.fromiter(longest, np.int64, len(longest)), np.fromiter(longest.values(), np.float64, len(longest))

    def punish(self, logits: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """The new logits of tokens that would go on with a repeat of ``lengths`` tokens."""
        exponents = lengths - self.allowed
        if self.max_exponent > 0:
            exponents = np.minimum(exponents, self.max_exponent)
        return logits - self.multiplier * self.base**exponents

    def longest_repeats(self, window: np.ndarray) -> dict[int, int]:
        """Token that would go on with a repeat -> length of the longest, where it is at least ``allowed``."""
        n = len(window)
        if n <= self.allowed:
            return {}
        limit = self.reach(window)
        if limit < self.allowed:
            return {}
        ends = np.arange(n - 1)  # a repeat ends at window[end], window[end + 1] went on with it
        lengths = np.zeros(n - 1, np.int64)
        limit = min(limit, self.allowed + max(self.max_exponent, 1))
        length = 0
        while length < limit and len(ends):
            ends = ends[(ends >= length) & (window[ends - length] == window[n - 1 - length])]
            length += 1
            lengths[ends] = length
        longest: dict[int, int] = {}
        for end in np.flatnonzero(lengths >= self.allowed):
            token = int(window[end + 1])
            longest[token] = max(longest.get(token, 0), int(lengths[end]))
        return longest

    def reach(self, window: np.ndarray) -> int:
        """How many of the last tokens may count: those after the last breaker."""
        if not self.breakers:
            return len(window)
        backwards = window[::-1].tolist()
        for i, token in enumerate(backwards):
            rests = self.breakers.get(token)
            if rests is None:
                continue
            fitting = [len(rest) for rest in rests if len(rest) <= i and rest == backwards[i - len(rest) : i][::-1]]
            if fitting:
                return i - max(fitting)
        return len(window)


def breaker_tokens(
    breakers: Sequence[str],
    n_vocab: int,
    token_bytes: Callable[[int], bytes] | None,
    tokenize: Callable[[str], list[int]] | None,
) -> dict[int, list[list[int]]]:
    """Every token that holds a breaker (rest []) or begins one (rest: the tokens of what is missing).

    One pass over the vocabulary; ParameterError when there is no tokenizer to ask.
    """
    if breakers and token_bytes is None:
        raise ParameterError(
            "dry_sequence_breakers: needs a tokenizer. Give token_bytes to the Sampler, or no breakers."
        )
    found: dict[int, list[list[int]]] = {}
    if token_bytes is None or not breakers:
        return found
    texts = [token_bytes(token) for token in range(n_vocab)]
    for breaker in breakers:
        whole = breaker.encode()[:MAX_BREAKER_CHARS]
        heads = {whole[:size]: whole[size:] for size in range(1, len(whole))}
        rests = {}
        for head, rest in heads.items():
            if tokenize is None:
                raise ParameterError(f"dry_sequence_breakers: {breaker!r} needs tokenize, it may span several tokens.")
            rests[head] = list(tokenize(rest.decode(errors="replace")))[:MAX_BREAKER_TOKENS]
        for token, text in enumerate(texts):
            if whole in text:
                found.setdefault(token, []).append([])
                continue
            for head, rest_tokens in rests.items():
                if text.endswith(head) and rest_tokens not in found.get(token, []):
                    found.setdefault(token, []).append(rest_tokens)
    return found
