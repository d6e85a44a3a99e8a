"""Sampler: the chain for one sequence, built once from SamplingParams, then one call per token."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from edgellm.formats.errors import NumericError, ParameterError
from edgellm.kernels.draw import Draw
from edgellm.sampling.candidates import Candidates
from edgellm.sampling.chain import SAMPLERS
from edgellm.sampling.choice import AdaptiveP, Distribution, Mirostat, MirostatV2, Sampled
from edgellm.sampling.mask import AllowedTokens, TokenMask
from edgellm.sampling.params import RANDOM_SEEDS, SamplingParams
from edgellm.sampling.repetition import DRY, Penalties, breaker_tokens
from edgellm.sampling.short_chain import short_chain

SCAN = 1024  # so many candidates are looked through one by one


class Sampler:
    """Chooses the tokens of one sequence; not shared between threads.

    ``accept`` every token of the sequence in order, the prompt's too: penalties and DRY look back at them.
    ``seed`` is the seed in use, drawn when the parameters ask for that. ``eog_ids`` are what ``ignore_eos`` bans,
    ``suppressed_ids`` what the model's file does, whatever ``logit_bias`` says.
    ``draw`` is an executor's, for the largest logits and whole chains; without one numpy does all of it.
    ``token_bytes`` is asked for DRY's breakers, ``tokenize`` (text -> ids) for breakers and texts in ``logit_bias``.
    ``mask`` says before the chain which tokens may come; ``history`` is not its affair, tokens accepted later are.
    ``begins`` are tokens that an answer is known to begin with: they are taken and nothing is drawn for them.
    """

    def __init__(
        self,
        params: SamplingParams,
        n_vocab: int,
        eog_ids: Iterable[int] = (),
        *,
        suppressed_ids: Iterable[int] = (),
        token_bytes: Callable[[int], bytes] | None = None,
        tokenize: Callable[[str], list[int]] | None = None,
        history: Iterable[int] = (),
        draw: Draw | None = None,
        mask: TokenMask | None = None,
    ) -> None:
        self.params = params
        self.mask = mask
        self.begins: tuple[int, ...] = ()
        self.n_vocab = n_vocab
        drawn = params.seed is None or params.seed in RANDOM_SEEDS
        self.seed: int = secrets.randbits(32) if drawn else int(params.seed or 0)
        self.rng = np.random.Generator(np.random.PCG64(self.seed))
        self.tokens: list[int] = []
        self.bias_ids, self.bias = bias_arrays(
            params, n_vocab, [*suppressed_ids, *(eog_ids if params.ignore_eos else ())], tokenize
        )
        self.looking_back: list[Penalties | DRY] = []
        self.chain: list[tuple[str, Callable[[Candidates], None]]] = []  # by the names in ``params.samplers``
        self._build_chain(token_bytes, tokenize)
        self.greedy = self._is_greedy()
        plain = isinstance(self.choice, Distribution) and not params.post_sampling_probs
        plain = plain and not params.processors and bool(np.isneginf(self.bias).all()) and mask is None
        self.draw = draw
        names = [name for name, _ in self.chain] if plain else []
        banned = tuple(self.bias_ids.tolist()) if plain else ()
        self.short = short_chain(names, params, n_vocab, self.greedy, self.rng, draw, banned)
        self._remember(history)

    def _build_chain(self, token_bytes: Any, tokenize: Any) -> None:
        params = self.params
        if params.mirostat:
            self.choice: Any = (Mirostat, MirostatV2)[params.mirostat - 1](params, self.n_vocab, self.rng)
            self._add("temperature")
            return
        adaptive = params.adaptive_target >= 0 or "adaptive_p" in params.samplers
        self.choice = (AdaptiveP if adaptive else Distribution)(params, self.n_vocab, self.rng)
        for name in params.samplers:
            if name == "penalties" and Penalties.wanted(params):
                self._look_back(name, Penalties(params))
            elif name == "dry" and DRY.wanted(params):
                breakers = breaker_tokens(params.dry_sequence_breakers, self.n_vocab, token_bytes, tokenize)
                self._look_back(name, DRY(params, breakers))
            elif name in SAMPLERS:
                self._add(name)

    def _add(self, name: str) -> None:
        row, params, rng = SAMPLERS[name], self.params, self.rng
        if row.wanted(params):
            self.chain.append((name, lambda candidates: row.apply(candidates, params, rng)))

    def _look_back(self, name: str, sampler: Penalties | DRY) -> None:
        self.looking_back.append(sampler)
        self.chain.append((name, lambda candidates: punish(candidates, sampler)))

    def _is_greedy(self) -> bool:
        # at temperature 0 the largest logit wins, unless an earlier sampler may drop it or the order changes later
        params = self.params
        if params.mirostat or params.temperature > 0 or params.dynatemp_range > 0:
            return False
        names = [name for name in params.samplers if name in ("penalties", "dry")]
        first = params.samplers[: len(names)] == tuple(names)
        droppers = any(name in ("xtc", "typ_p") for name, _ in self.chain)
        return "temperature" in params.samplers and first and not droppers and not isinstance(self.choice, AdaptiveP)

    def accept(self, token: int) -> None:
        """Say that ``token`` is now the last one of the sequence; ParameterError when it is no token id."""
        if not (0 <= token < self.n_vocab):
            raise ParameterError(f"token: got {token}, expected an id from 0 to {self.n_vocab - 1}.")
        token = int(token)
        self.tokens.append(token)
        for sampler in self.looking_back:
            sampler.accept(token)
        self.choice.accept(token)
        if self.mask is not None:
            self.mask.accept(token)

    def forced(self) -> Sampled | None:
        """The token that the mask forces, chosen as ``sample`` would, where nobody wants to see logits; else None."""
        params = self.params
        if self.mask is None or params.n_probs or params.logprobs or params.processors:
            return None
        token = self.mask.forced()
        if token is None or token in self.bias_ids[np.isneginf(self.bias)]:  # ``sample`` says that it is banned
            return None
        self.choice.choose(Candidates(np.zeros(1), np.array([token]), is_sorted=True))
        return Sampled(token)

    def _remember(self, history: Iterable[int]) -> None:
        # a prompt: `accept` in a loop, without its checks where nobody looks back
        tokens = [int(token) for token in history]
        if tokens and not (min(tokens) >= 0 and max(tokens) < self.n_vocab):
            raise ParameterError(f"history: expected token ids from 0 to {self.n_vocab - 1}.")
        self.tokens.extend(tokens)
        for sampler in self.looking_back:
            for token in tokens:
                sampler.accept(token)

    def sample(self, logits: np.ndarray) -> Sampled:
        """Choose a token from ``logits`` (n_vocab,) float32, which stay as they are; NumericError for NaN or none left.

        Does not accept the token: the caller does, once it is really used.
        """
        params = self.params
        logits = self._checked(logits)
        reports = bool(params.n_probs or params.logprobs)
        if self.short is not None and (reports or not self.greedy) and self.short.draw.draw(logits):
            return self.short.sampled(1)[0]
        if not reports:
            candidates = self.candidates(logits)
            return Sampled(candidates.token(self.choice.choose(candidates)))
        raw = Candidates(logits, draw=self.draw)
        raw.look(params.n_probs, with_sum=True)
        top = raw.largest(min(params.n_probs, len(raw))) if params.n_probs else np.array([], np.int64)
        trace = Trace(top.tolist()) if params.sampler_trace and isinstance(self.choice, Distribution) else None
        candidates = self.candidates(logits, trace)
        token = candidates.token(self.choice.choose(candidates))
        if params.post_sampling_probs:
            return reported(candidates, token, candidates.largest(params.n_probs))
        sampled = reported(raw, token, top)
        if trace is None:
            return sampled
        left = candidates.logprobs({*trace.watched, token})
        banned = {other: "logit_bias" for other, value in left.items() if value == -np.inf}
        return sampled._replace(after={**left, **banned, **trace.cut})

    def _checked(self, logits: np.ndarray) -> np.ndarray:
        logits = np.asarray(logits, np.float32)
        if logits.shape != (self.n_vocab,):
            raise ParameterError(f"logits: got shape {logits.shape}, expected ({self.n_vocab},).")
        return logits

    def candidates(self, logits: np.ndarray, trace: Trace | None = None) -> Candidates:
        """What is left of ``logits`` (n_vocab,) for the choice, after bias, processors and chain. ParameterError for
        another shape."""
        logits = raw = self._checked(logits)
        if len(self.bias_ids):
            logits = logits.copy()
            logits[self.bias_ids] += self.bias
        for processor in self.params.processors:
            logits = processed(processor, self.tokens, logits.copy() if logits is raw else logits)
        allowed, chain = self.mask.allowed() if self.mask is not None else None, self.chain
        candidates = self._head(logits, allowed) if allowed is not None and trace is None else None
        if candidates is not None:
            chain = chain[1:]
        elif allowed is not None:
            candidates = allowed.candidates(logits, self.draw)
        else:
            candidates = Candidates(logits, draw=self.draw)
        if trace is not None and allowed is not None:
            trace.leave_out(allowed)
        if self.greedy:
            candidates = self._largest(candidates)
            if trace is not None:
                trace.look(candidates, "temperature")
            return candidates
        check_largest(candidates.max())
        for name, apply in chain:
            apply(candidates)
            if trace is not None:
                trace.look(candidates, name)
        return candidates

    def _head(self, logits: np.ndarray, allowed: AllowedTokens) -> Candidates | None:
        """What a top-k, or the largest alone, leaves of the allowed tokens; None where only a look at all tells.

        Mostly the largest of all logits are allowed, and a copy of a whole vocabulary costs more than to see that.
        """
        if allowed.ids is not None or self.looking_back:
            return None
        if self.greedy:
            best = int(np.argmax(logits))
            return Candidates(logits[best : best + 1], np.array([best])) if allowed.flags[best] else None
        if self.draw is None or not self.chain or self.chain[0][0] != "top_k":
            return None
        k = min(self.params.top_k, len(logits))
        head = self.draw.top_k(logits, min(self.draw.max_k, len(logits)))
        if head is None:
            return None
        kept = np.flatnonzero(allowed.flags[head.positions])[:k]
        if len(kept) < k:
            return None
        return Candidates(head.values[kept].astype(np.float64), head.positions[kept], is_sorted=True)

    def _largest(self, candidates: Candidates) -> Candidates:
        for sampler in self.looking_back:
            punish(candidates, sampler)
        best = int(np.argmax(candidates.logits))  # the first of equals; the first NaN if there is one
        check_largest(float(candidates.logits[best]))
        ids = np.array([candidates.token(best)])
        return Candidates(candidates.logits[best : best + 1], ids, is_sorted=True)


class Trace:
    """Which sampler cut which of the watched tokens."""

    def __init__(self, watched: list[int]) -> None:
        self.watched = watched
        self.alive = set(watched)
        self.cut: dict[int, float | str] = {}
        self.n = 0  # candidates at the last look

    def leave_out(self, allowed: AllowedTokens) -> None:
        """Note what the mask does not allow."""
        banned = {token for token in self.watched if not allowed.flags[token]}
        self.cut.update(dict.fromkeys(banned, "grammar"))
        self.alive -= banned

    def look(self, candidates: Candidates, name: str) -> None:
        """Note what the sampler ``name`` has dropped."""
        if candidates.ids is None or len(candidates) == self.n:
            return
        self.n = len(candidates)
        ids = candidates.ids if self.n <= SCAN else candidates.ids[np.isin(candidates.ids, list(self.alive))]
        gone = self.alive.difference(ids.tolist())
        self.cut.update(dict.fromkeys(gone, name))
        self.alive -= gone


def punish(candidates: Candidates, sampler: Penalties | DRY) -> None:
    """Let penalties or DRY change the logits of the tokens they name, as far as these are still candidates."""
    positions, amounts = sampler.affected()
    if candidates.ids is not None:
        _, positions, which = np.intersect1d(candidates.ids, positions, return_indices=True)
        amounts = amounts[which]
    if len(positions):
        logits = candidates.logits.copy()
        logits[positions] = sampler.punish(logits[positions].astype(np.float64), amounts)
        candidates.logits = logits
        candidates.sorted = False


def bias_arrays(
    params: SamplingParams, n_vocab: int, banned: Iterable[int], tokenize: Callable[[str], list[int]] | None
) -> tuple[np.ndarray, np.ndarray]:
    """(token ids, what to add to their logits); a text counts for each of its tokens."""
    total: dict[int, float] = {}
    for key, value in params.logit_bias.items():
        if isinstance(key, str) and tokenize is None:
            raise ParameterError(f"logit_bias: {key!r} is a text. Give tokenize to the Sampler, or token ids.")
        for token in tokenize(key) if isinstance(key, str) and tokenize else [int(key)]:
            if not (0 <= token < n_vocab):
                raise ParameterError(f"logit_bias: token {token} is not in the vocabulary of {n_vocab}.")
            total[token] = total.get(token, 0.0) + value
    total.update({int(token): -np.inf for token in banned})
    return np.fromiter(total, np.int64, len(total)), np.fromiter(total.values(), np.float32, len(total))


def processed(processor: Any, tokens: list[int], logits: np.ndarray) -> np.ndarray:
    """What a user's processor makes of ``logits``; ParameterError when it is no array of the same shape."""
    result = np.asarray(processor(tuple(tokens), logits))
    if result.shape != logits.shape or result.dtype.kind not in "fiu":
        got = f"{result.dtype} of shape {result.shape}"
        raise ParameterError(f"processors: {processor!r} returned {got}, expected numbers of shape {logits.shape}.")
    return result.astype(np.float32, copy=False)


def check_largest(largest: float) -> None:
    """NumericError unless the largest logit is a number (a NaN anywhere makes the maximum NaN)."""
    if not np.isfinite(largest):
        raise NumericError(
            f"The largest logit is {largest}. Expected a finite number: the model computed NaN or infinity, or every "
            "token is banned. Check the model file with `edgellm verify`, then logit_bias and processors."
        )


def reported(candidates: Candidates, token: int, likeliest: np.ndarray) -> Sampled:
    """``token`` with its log probability among ``candidates`` and those at the positions ``likeliest``."""
    logits = candidates.logits
    log_sum = candidates.log_sum()
    top = tuple((candidates.token(int(i)), float(logits[i]) - log_sum) for i in likeliest)
    position = token if candidates.ids is None else int(np.flatnonzero(candidates.ids == token)[0])
    return Sampled(token, float(logits[position]) - log_sum, top)
