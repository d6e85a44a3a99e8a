"""How much text a regular expression may ask for by counting: ``(a{1000}){1000}`` is a million letters in 15."""

from __future__ import annotations

import re

from edgellm.formats.errors import ParameterError

MAX_REPEATS = 50_000
_PARTS = re.compile(r"\\.|\[\^?\]?(?:\\.|\[:\w+:\]|[^\]\\])*\]|\{([0-9]+)(?:,([0-9]*))?\}|[()]", re.DOTALL)


def check_repeats(regex: str, place: str) -> None:
    """ParameterError where counts within counts multiply to more than ``MAX_REPEATS``."""
    most = [1]  # of what stands in each open group
    last = 1  # of the part just read
    for part in _PARTS.finditer(regex):
        text = part.group()
        if text == "(":
            most.append(1)
            last = 1
        elif text == ")":
            last = most.pop() if len(most) > 1 else 1
            most[-1] = max(most[-1], last)
        elif part.group(1):
            last *= max(int(part.group(1)), int(part.group(2) or 0), 1)
            most[-1] = max(most[-1], last)
        else:
            last = 1
        if most[-1] > MAX_REPEATS:
            raise ParameterError(
                f"{place} repeats a part {most[-1]:,} times. Expected at most {MAX_REPEATS:,}.", code="GRAMMAR"
            )
