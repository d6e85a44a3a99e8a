"""Untrusted JSON, with limits on all that it can be made of.

Refused are bad syntax, more bytes or levels than expected, a name that is there twice, NaN, numbers that no float or
integer of a format holds, and half a character (``"\\ud800"``). What it must hold besides is for the reader to check.
"""

from __future__ import annotations

import json
import math
import re
from typing import Any

from edgellm.formats.errors import FormatError
from edgellm.formats.findings import PULL_AGAIN, short

MAX_DEPTH = 64  # real ones have up to ten levels
MAX_DIGITS = 40  # of a whole number: tokenizer_config.json says "no limit" with 31

_HALF_CHARACTER = re.compile(r"\\u[dD][89a-fA-F]")


def parse_json(
    text: bytes | str, file: str, code: str, *, advice: str = PULL_AGAIN, infinities: bool = False, mends: bool = False
) -> Any:
    """The value. FormatError ``code`` for all that the head of this file names.

    infinities   take Infinity and -Infinity, as Python writes a bias that bans a token
    mends        put ? for half a character, which a cut through an emoji leaves, instead of refusing it
    """

    def number(digits: str) -> float:
        value = float(digits)
        if not math.isfinite(value):
            raise ValueError(f"the number {short(digits)} is too large")
        return value

    def constant(name: str) -> float:
        if name == "NaN" or not infinities:
            raise ValueError(f"{name} is no number of JSON")
        return float(name)

    try:
        text = text.decode("utf-8-sig") if isinstance(text, bytes) else text
        value = json.loads(
            text, object_pairs_hook=_object, parse_int=_whole_number, parse_float=number, parse_constant=constant
        )
        _check_depth(value)
        if _HALF_CHARACTER.search(text):  # or a whole one, written as two
            whole = json.dumps(value, ensure_ascii=False).encode("utf-8", "replace" if mends else "strict")
            value = json.loads(whole) if mends else value
    except (ValueError, RecursionError) as error:  # an error of encoding is a ValueError
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else short(str(error))
        raise FormatError(f"{file}: sound JSON was expected: {reason}. {advice}", code=code) from None
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name is there twice")
    return found


def _whole_number(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise ValueError(f"a whole number has {len(digits)} digits, expected up to {MAX_DIGITS}")
    return int(digits)


def _check_depth(value: Any) -> None:
    """Level by level, so that no depth of it can exhaust the stack."""
    level = [value]
    for _ in range(MAX_DEPTH + 1):
        level = [
            child
            for node in level
            for child in (node.values() if isinstance(node, dict) else node if isinstance(node, list) else ())
            if isinstance(child, dict | list)
        ]
        if not level:
            return
    raise RecursionError
