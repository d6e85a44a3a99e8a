"""What a field of a message or a session may hold when it comes from a file: each check gives the value or says no.

A file that is brought in is refused with the reason; in the own store, which someone else may have written to, the
field is dropped and the reason is told.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from edgellm.formats.errors import ParameterError

ROLES = ("system", "user", "assistant", "tool")
REASONS = ("stop", "length", "context_full", "cancelled")
LEFT_OUT = "left_out_n"  # among the timings of an answer: messages before it that its prompt went without
TIMINGS = (
    *("prompt_n", "reused_n", "computed_n", "prompt_ms", "prompt_tps", "generation_n", "generation_ms"),
    *("generation_tps", "time_to_first_token_ms", "drafted_n", "accepted_n", "gained_n", LEFT_OUT),
)
BELOW_0 = ("gained_n",)  # of these, those that may be: drafts can cost more than they bring
GREATEST = 1e15  # of a count or a time
LAST_MOMENT = 253_402_000_000.0  # December 9999: no calendar goes further
MAX_NAME_LENGTH = 4096  # of a model, which may be a path


def moment(value: Any) -> float:
    """Seconds since 1970."""
    if not _is_number(value) or not 0 <= value <= LAST_MOMENT:
        raise ParameterError(f"created is {shortly(value)}, expected seconds since 1970, up to the year 9999")
    return float(value)


def timings(value: Any) -> dict[str, float]:
    """Counts and times of an answer."""
    if not isinstance(value, Mapping):
        raise ParameterError(f"timings is {shortly(value)}, expected an object")
    for name, number in value.items():
        if name not in TIMINGS:
            raise ParameterError(f"timings has {shortly(name)}, expected {', '.join(TIMINGS)}")
        least = -GREATEST if name in BELOW_0 else 0
        if not _is_number(number) or not least <= number <= GREATEST:
            raise ParameterError(f"timings: {name} is {shortly(number)}, expected {least:g} to {GREATEST:g}")
    return dict(value)


def finish_reason(value: Any) -> str | None:
    """Why an answer ended; None: it did not."""
    if value is not None and value not in REASONS:
        raise ParameterError(f"finish_reason is {shortly(value)}, expected null or {', '.join(REASONS)}")
    return None if value is None else str(value)


def role(value: Any) -> str:
    """Whose message it is."""
    if value not in ROLES:
        raise ParameterError(f"the role is {shortly(value)}, expected {', '.join(ROLES)}")
    return str(value)


def text(name: str, value: Any, limit: int | None = None) -> str:
    """Text of at most ``limit`` characters; a lone surrogate would not go into a file."""
    if not isinstance(value, str):
        raise ParameterError(f"{name} is {type(value).__name__}, not text")
    if limit is not None and len(value) > limit:
        raise ParameterError(f"{name} has {len(value)} characters, expected at most {limit}")
    return sound(value)


def sound(text: str) -> str:
    """Text without lone surrogates, such as a model's path has for bytes that are no UTF-8; no file takes them."""
    return text.encode("utf-8", "replace").decode("utf-8")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def shortly(value: Any) -> str:
    """An untrusted value in a message."""
    shown = repr(value)
    return shown if len(shown) <= 60 else f"{shown[:57]}..."
