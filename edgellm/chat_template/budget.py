"""What one load or one render of a stranger's template may cost: steps, bytes ever made, time, nesting.

The counters are charged before an operation makes something large, so the limits hold without a second process: a loop
step, a call, a filter, an operator and a comparison are one step each, and no single operation works on a value whose
written-out size is over the limit.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

MAX_SOURCE_BYTES = 1 << 20
MAX_TOKENS = 25_000  # the largest published templates have 2,600; this many load in a second
MAX_SECONDS = 2.0
INPUT_BYTES_PER_SECOND = 4 << 20  # of messages, for which a render gets one more second
MAX_STEPS = 2_000_000
MAX_BYTES = 96 << 20  # of everything made in one render, garbage or not; with Python's own overhead under 256 MiB
MAX_NESTING = 60
INTEGER_BITS = 1 << 16


class BudgetExceeded(Exception):
    """A template asked for more than its budget; the message says which part of it ran out."""


class Budget:
    """The counters of one load or render. Once one has run out every further step raises again.

    ``input_bytes``: size of the messages; the limits grow with it, a long chat is not the template's fault.
    """

    def __init__(self, input_bytes: int = 0) -> None:
        self.steps_left = MAX_STEPS + input_bytes // 16
        self.bytes_left = MAX_BYTES + 24 * input_bytes
        self.tokens_left = MAX_TOKENS
        self.seconds = MAX_SECONDS + input_bytes / INPUT_BYTES_PER_SECOND
        self.deadline = time.monotonic() + self.seconds
        self.spent = ""
        self._measured: dict[int, tuple[Any, int, bool]] = {}  # keeps the object alive, so its id stays its own

    def stop(self, reason: str) -> BudgetExceeded:
        """The error to raise; from here on every step raises it again."""
        self.spent = self.spent or reason
        return BudgetExceeded(self.spent)

    def step(self) -> None:
        """Charge one step and look at the clock."""
        self.steps_left -= 1
        if self.spent or self.steps_left < 0:
            raise self.stop(f"more than {MAX_STEPS:,} steps")
        if time.monotonic() > self.deadline:
            raise self.stop(f"more than {self.seconds:.3g} s")

    def token(self) -> None:
        """Charge one token of the template's source."""
        self.tokens_left -= 1
        if self.tokens_left < 0:
            raise self.stop(f"more than {MAX_TOKENS:,} tokens of source")

    def allocate(self, nbytes: int) -> None:
        """Charge ``nbytes`` that are about to be made."""
        self.bytes_left -= nbytes
        if self.spent or self.bytes_left < 0:
            raise self.stop(f"more than {MAX_BYTES >> 20} MiB of text and lists")

    def each(self, items: Iterable[Any]) -> Iterator[Any]:
        """``items``, one step each."""
        for item in items:
            self.step()
            yield item

    def measure(self, value: Any, depth: int = 0) -> tuple[int, bool]:
        """(size in bytes when written out in full, whether a user's text is inside); raises when over the limit.

        A list that holds another one twice counts it twice: ``repr``, ``==`` and JSON walk it twice as well.
        """
        if isinstance(value, str):
            return 50 + 4 * len(value), type(value) is not str
        if isinstance(value, bool | float) or value is None:
            return 32, False
        if isinstance(value, int):
            return 32 + value.bit_length() // 3, False
        if isinstance(value, Mapping):
            inside: Iterable[Any] = (part for item in value.items() for part in item)
        elif isinstance(value, list | tuple | type({}.items()) | type({}.keys()) | type({}.values())):
            inside = value
        else:
            return 64, True  # objects of the sandbox: their repr is short
        known = self._measured.get(id(value))
        if known is None:
            known = self._measured[id(value)] = (value, *self._measure_inside(inside, depth + 1))
        return known[1], known[2]

    def _measure_inside(self, inside: Iterable[Any], depth: int) -> tuple[int, bool]:
        if depth > MAX_NESTING:
            raise self.stop(f"values nested deeper than {MAX_NESTING}")
        total, from_user = 64, False
        for part in inside:
            self.step()
            size, marked = self.measure(part, depth)
            total += size + 16
            from_user = from_user or marked
            if total > self.bytes_left:
                raise self.stop(f"a value of more than {self.bytes_left >> 20} MiB")
        return total, from_user

    def made(self, value: Any) -> Any:
        """``value`` after charging what was made for it: the characters of a string, the slots of a container."""
        if isinstance(value, str):
            self.allocate(50 + 4 * len(value))
        elif isinstance(value, list | tuple | dict):
            self.allocate(64 + 16 * len(value))
            self.measure(value)
        return value

    def check_integer(self, bits: int) -> None:
        """Refuse an integer of more than ``INTEGER_BITS`` bits."""
        if bits > INTEGER_BITS:
            raise self.stop(f"an integer of more than {INTEGER_BITS:,} bits")
