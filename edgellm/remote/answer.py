"""The events of ``/v1/chat/completions`` as chunks of an answer, as ``LLM.stream`` gives them.

What was thought comes between the marks that a session keeps it by. A token is known by its bytes; its id is the
server's where that tells it, else one that equal tokens share.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterator, Mapping
from time import perf_counter
from typing import Any, TypeGuard

from edgellm.engine.requests import FinishReason, Timings
from edgellm.formats.errors import RemoteError
from edgellm.generation import GenerationChunk, TokenLogprob
from edgellm.remote.connection import Connection, error_of
from edgellm.sessions.tree import END_THINK, THINK

MAX_TEXT = 16 << 20  # characters of an answer
MAX_TOKENS = 1 << 20
MAX_KEPT_NBYTES = 256 << 20  # of memory, for tokens and what was likely in their place
ROW_NBYTES = 176  # of a token in memory, besides its own bytes
MAX_TOKEN_NBYTES = 256
MOST = 1e15  # of a count or a time
REASONS: Mapping[str, FinishReason] = {"length": "length"}  # any other one is an end like "stop"
OPEN, CLOSE = f"{THINK}\n", f"\n{END_THINK}\n\n"


class AnswerReader:
    """Turns the events of one answer into chunks.

    progress   called with (done, total) tokens of the prompt
    n_ctx      of the model, 0 where the server does not tell
    limited    whether the request had a limit of its own: else only a full context cuts an answer
    n_top      alternatives that each token was asked for with; more are left
    """

    def __init__(
        self,
        connection: Connection,
        progress: Callable[[int, int], None] | None,
        n_ctx: int,
        limited: bool,
        n_top: int = 0,
    ) -> None:
        self._connection, self._progress = connection, progress
        self._n_ctx, self._limited, self._n_top = n_ctx, limited, n_top
        self._began = perf_counter()
        self._first = self._last = 0.0
        self._thinks = False
        self._held: list[TokenLogprob] = []  # they came without text: parts of a character, of a mark
        self._length = self._n_tokens = self._kept_nbytes = 0
        self._timings = Timings()
        self._told: Timings | None = None  # the server's own
        self._reason: FinishReason | None = None

    def chunks(self, event: Any) -> Iterator[GenerationChunk]:
        """The chunks of one event."""
        if not isinstance(event, Mapping):
            raise self._connection.nonsense("an event that is no object")
        if event.get("error"):
            status = event["error"].get("code") if isinstance(event["error"], Mapping) else 500
            raise error_of(event, status if isinstance(status, int) else 500, str(self._connection.address))
        self._read_times(event)
        choice = _first(event.get("choices"))
        delta = as_object(choice.get("delta"))
        thought = _text(delta.get("reasoning_content")) or _text(delta.get("reasoning"))
        said, rows = _text(delta.get("content")), as_object(choice.get("logprobs")).get("content")
        read = [read_token(row, self._n_top) for row in (rows if isinstance(rows, list) else ())]
        tokens = [token for token in read if token is not None]
        self._bound(len(thought) + len(said), tokens)
        if thought or said:
            yield from self._marks(bool(thought), bool(said), tokens)
            yield from self._spread(thought or said, tokens)
            if thought and said:
                yield from self._marks(False, True, tokens)
                yield from self._spread(said, [])
        else:
            self._held += tokens
        if isinstance(choice.get("finish_reason"), str):
            self._reason = REASONS.get(choice["finish_reason"], "stop")

    def last(self, cancelled: bool) -> GenerationChunk:
        """The chunk that ends the answer. RemoteError REMOTE_LOST when the server never said that it is over."""
        if self._reason is None and not cancelled:
            raise self._connection.lost("the answer ended in the middle")
        timings = self._told or self._timings
        reason: FinishReason = self._reason or "cancelled"
        full = self._n_ctx and timings.prompt_n + timings.generation_n >= self._n_ctx
        if reason == "length" and (full or not self._limited):
            reason = "context_full"
        return GenerationChunk("", None, None, reason, timings)

    def _bound(self, length: int, tokens: list[TokenLogprob]) -> None:
        """Count what has come; RemoteError when it is more than any answer has."""
        self._length += length
        self._kept_nbytes += sum(ROW_NBYTES + len(one.bytes) for token in tokens for one in (token, *token.top))
        if self._length > MAX_TEXT or self._n_tokens > MAX_TOKENS or self._kept_nbytes > MAX_KEPT_NBYTES:
            raise RemoteError(f"{self._connection.address} does not stop talking. The answer was broken off there.")

    def _marks(self, thinks: bool, says: bool, tokens: list[TokenLogprob]) -> Iterator[GenerationChunk]:
        if thinks and not self._thinks:
            self._thinks = True
            yield self._mark(OPEN, tokens)
        elif says and not thinks and self._thinks:
            self._thinks = False
            yield self._mark(CLOSE, tokens)

    def _mark(self, text: str, tokens: list[TokenLogprob]) -> GenerationChunk:
        """A mark is a token only in an answer that has tokens: they stand for all of its text."""
        spelled = text.encode()
        token = TokenLogprob(made_id(spelled), spelled, None) if self._held or tokens else None
        if b"".join(held.bytes for held in self._held).strip() == spelled.strip():
            self._held.clear()  # the server's own tokens of it
        return GenerationChunk(text, made_id(spelled), token, None, self._timings)

    def _spread(self, text: str, tokens: list[TokenLogprob]) -> Iterator[GenerationChunk]:
        """A piece of text over the tokens that came with it and before it; without any it stands for one."""
        now = perf_counter()
        self._first, self._last = self._first or now, now
        tokens, self._held = [*self._held, *tokens], []
        self._n_tokens += len(tokens) or 1
        self._timings = self._timings._replace(
            generation_n=self._n_tokens,
            generation_ms=1e3 * (self._last - self._first),
            time_to_first_token_ms=1e3 * (self._first - self._began),
        )
        for token in tokens[:-1]:
            yield GenerationChunk("", token.token, token, None, self._timings)
        last = tokens[-1] if tokens else None
        yield GenerationChunk(text, last.token if last else made_id(text.encode()), last, None, self._timings)

    def _read_times(self, event: Mapping[str, Any]) -> None:
        progress = as_object(event.get("prompt_progress") or _first(event.get("choices")).get("prompt_progress"))
        if progress:
            done, total, reused = (int(_number(progress.get(name))) for name in ("processed", "total", "cache"))
            self._timings = self._timings._replace(prompt_n=total, reused_n=min(reused, total))
            if self._progress is not None:
                self._progress(min(done, total), total)
        usage, times = event.get("usage"), event.get("timings")
        first_ms = self._timings.time_to_first_token_ms
        if isinstance(times, Mapping):
            n = {name: _number(times.get(name)) for name in TIMES}
            self._told = Timings(
                int(n["cache_n"] + n["prompt_n"]), int(n["cache_n"]), n["prompt_ms"], int(n["predicted_n"]),
                n["predicted_ms"], first_ms, int(n["draft_n"]), int(n["draft_n_accepted"]),
            )  # fmt: skip
        elif isinstance(usage, Mapping) and self._told is None:
            cached = _number(as_object(usage.get("prompt_tokens_details")).get("cached_tokens"))
            n_prompt, n_made = int(_number(usage.get("prompt_tokens"))), int(_number(usage.get("completion_tokens")))
            made = n_made or self._timings.generation_n
            self._timings = self._timings._replace(
                prompt_n=n_prompt, reused_n=min(int(cached), n_prompt), generation_n=made
            )


TIMES = ("cache_n", "prompt_n", "prompt_ms", "predicted_n", "predicted_ms", "draft_n", "draft_n_accepted")


def read_token(row: Any, n_top: int = 0) -> TokenLogprob | None:
    """A row of ``logprobs.content`` with at most ``n_top`` alternatives; None for what is none."""
    if not isinstance(row, Mapping):
        return None
    raw, text, value, told = row.get("bytes"), row.get("token"), row.get("logprob"), row.get("id")
    if isinstance(raw, list) and len(raw) <= MAX_TOKEN_NBYTES and all(_is_byte(byte) for byte in raw):
        spelled = bytes(raw)
    elif isinstance(text, str):
        spelled = text[:MAX_TOKEN_NBYTES].encode("utf-8", "replace")[:MAX_TOKEN_NBYTES]
    else:
        return None
    logprob = None
    if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        logprob = min(float(value), 0.0)
    others = row.get("top_logprobs")
    read = [read_token(other) for other in others[:n_top]] if isinstance(others, list) else []
    top = tuple(one for one in read if one is not None)
    return TokenLogprob(told if is_count(told) else made_id(spelled), spelled, logprob, top)


def made_id(spelled: bytes) -> int:
    """An id for a token that is known by its bytes alone."""
    return zlib.crc32(spelled) & 0x7FFFFFFF


def as_object(value: Any) -> Mapping[str, Any]:
    """A JSON object, an empty one for anything else."""
    return value if isinstance(value, Mapping) else {}


def is_count(value: Any, end: int = 1 << 31) -> TypeGuard[int]:
    """Whether it is a whole number below ``end``."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < end


def _first(choices: Any) -> Mapping[str, Any]:
    return as_object(choices[0]) if isinstance(choices, list) and choices else {}


def _is_byte(value: Any) -> bool:
    return is_count(value, 256)


def _text(value: Any) -> str:
    return value if isinstance(value, str) else ""


def _number(value: Any) -> float:
    """A count or a time, 0 for what is none."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= MOST:
        return 0.0
    return float(value)
