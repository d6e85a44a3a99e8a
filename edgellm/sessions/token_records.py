"""The tokens of an answer as bytes for the store: JSON lists, compressed; any other bytes are a FormatError.

A token is [id, its bytes as Latin-1, log-probability, log-probability after the samplers or null, the sampler that cut
it or null, the likeliest in its place in the same form without the last item].
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable
from typing import Any

from edgellm.formats.errors import FormatError
from edgellm.formats.json_text import parse_json
from edgellm.generation import TokenLogprob

LOWEST, HIGHEST = -1e4, 1e-3  # of a log-probability: JSON has no infinity; sums of float32 may end just above 0
MAX_NAME_LENGTH = 64  # of a sampler
MAX_RECORD_NBYTES = 64 << 20  # unpacked, of one run


def as_lists(tokens: Iterable[TokenLogprob]) -> list[list[Any]]:
    """Plain lists, ready for JSON."""
    return [[*_plain(token), [_plain(other) for other in token.top]] for token in tokens]


def from_lists(records: Any) -> list[TokenLogprob]:
    """The other way round; FormatError for anything else."""
    try:
        return [_token(record[:5], tuple(_token(other) for other in record[5])) for record in records]
    except (TypeError, ValueError, OverflowError, IndexError, KeyError, AttributeError) as error:
        raise FormatError(f"Tokens of an answer: {error}. Expected those of a session.", code="SESSION_FILE") from None


def pack(tokens: Iterable[TokenLogprob]) -> bytes:
    """A run of tokens as one value of the store."""
    return zlib.compress(json.dumps(as_lists(tokens), separators=(",", ":")).encode(), 1)


def unpack(data: bytes) -> list[TokenLogprob]:
    """The tokens of one value of the store; FormatError when it is damaged."""
    try:
        unpacker = zlib.decompressobj()
        text = unpacker.decompress(data, MAX_RECORD_NBYTES)
        if not unpacker.eof:
            raise ValueError("it is cut short or too large")
        return from_lists(parse_json(text, "Tokens", "SESSION_STORE", infinities=True))
    except (zlib.error, ValueError, TypeError) as error:
        raise FormatError(f"Tokens of an answer: {error}. The text is not affected.", code="SESSION_STORE") from None


def _plain(token: TokenLogprob) -> list[Any]:
    logprob, after = (None if value is None else max(round(value, 5), LOWEST) for value in (token.logprob, token.after))
    return [token.token, token.bytes.decode("latin-1"), logprob, after, token.cut_by]


def _token(record: Any, top: tuple[TokenLogprob, ...] = ()) -> TokenLogprob:
    token, text, logprob, after, cut_by = record
    if type(token) is not int or not 0 <= token < 2**31:
        raise ValueError("an id is not a whole number from 0 to 2147483647")
    if cut_by is not None and not (isinstance(cut_by, str) and len(cut_by) <= MAX_NAME_LENGTH):
        raise ValueError("the sampler that cut one is not a short text")
    return TokenLogprob(token, text.encode("latin-1"), _logprob(logprob), top, _logprob(after), cut_by)


def _logprob(value: Any) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not value <= HIGHEST:
        raise ValueError("a log-probability is not a number up to 0")
    return max(float(value), LOWEST)
