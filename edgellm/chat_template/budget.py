"""What one load or one render of an untrusted template may cost: steps, bytes alive, time, nesting.

Every operation is charged before it runs, with the most that it can cost: ``allocate`` takes the bytes of its result,
``work`` the nanoseconds of one native call, which nothing can interrupt. So the limits hold without a second process.
The bytes of a large value come back when it is no longer in use: a text that grows over a thousand messages costs its
last length, not the sum of all. Those of small ones never do.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping
from typing import Any
from weakref import WeakKeyDictionary

from edgellm.chat_template.user_text import spans_of

MAX_SOURCE_BYTES = 1 << 20
MAX_TOKENS = 12_000  # the largest published templates have 2,600; this many load in half a second
MAX_SECONDS = 2.0  # of this thread's own time: a busy machine is not the template's fault
MAX_STEPS = 2_000_000
INPUT_BYTES_PER_SECOND = 1 << 20  # of messages, for which a render gets one more second: some go by the character
PAIRS_PER_SECOND = 300_000  # of messages and tools: some look back at all messages for each of them
MOST_MORE_SECONDS = 30.0
MAX_BYTES = 96 << 20  # alive at once; with Python's own overhead under 256 MiB
MAX_NATIVE_NS = 40_000_000  # of one native call at worst
INPUT_NS_PER_BYTE = 16  # a pass over the messages is not the template's fault either
MAX_NESTING = 60
INTEGER_BITS = 1 << 16

STEP_NS = 200
LOOK_NS = 1_000_000  # of work between two looks at the clock
SPAN_BYTES = 160  # of a range of a user's characters
LARGE = 512  # bytes; the register of live values holds those from here on
CHAR_BYTES, USER_CHAR_BYTES = 80, 320  # of one character as a string of its own

VIEWS: tuple[type, ...] = (type({}.items()), type({}.keys()), type({}.values()))


class BudgetExceeded(Exception):
    """A template asked for more than its budget; the message says which part of it ran out."""


def text_bytes(text: str) -> int:
    """The most that a string takes, with its ranges."""
    return 50 + 4 * len(text) + (SPAN_BYTES * len(spans_of(text)) if type(text) is not str else 0)


def char_bytes(text: str) -> int:
    """What the characters of ``text`` take as strings of their own."""
    return (CHAR_BYTES if type(text) is str else USER_CHAR_BYTES) * len(text)


class Budget:
    """The counters of one load or render. Once one has run out every further step raises again.

    ``input_bytes``, ``n_items``: size of the input and its number of messages and tools; the limits grow with them, a
    long chat is not the template's fault.
    """

    def __init__(self, input_bytes: int = 0, n_items: int = 0) -> None:
        self.steps_left = self.most_steps = MAX_STEPS + 2 * input_bytes + 8 * n_items * n_items
        self.most_bytes = self.bytes_left = MAX_BYTES + 24 * input_bytes
        self.tokens_left = MAX_TOKENS
        self.longest_ns = MAX_NATIVE_NS + INPUT_NS_PER_BYTE * input_bytes
        more = input_bytes / INPUT_BYTES_PER_SECOND + n_items * n_items / PAIRS_PER_SECOND
        self.seconds = MAX_SECONDS + min(more, MOST_MORE_SECONDS)
        self.deadline = time.thread_time() + self.seconds
        self.spent = ""
        self._unseen_ns = 0
        self._large: dict[int, tuple[Any, int]] = {}  # values that give their bytes back when nobody else holds them
        self._depths: WeakKeyDictionary[Iterator[Any], int] = WeakKeyDictionary()  # of iterators that filters gave
        self._measured: dict[int, tuple[Any, int, bool]] = {}  # keeps the object alive, so its id stays its own

    def stop(self, reason: str) -> BudgetExceeded:
        """The error to raise; from here on every step raises it again."""
        self.spent = self.spent or reason
        return BudgetExceeded(self.spent)

    def step(self) -> None:
        """Charge one step."""
        self.steps_left -= 1
        if self.spent or self.steps_left < 0:
            raise self.stop(f"more than {self.most_steps:,} steps")
        self._unseen_ns += STEP_NS
        if self._unseen_ns > LOOK_NS:
            self.look()

    def work(self, ns: int) -> None:
        """Charge a native call that may take ``ns`` nanoseconds; one that may take too long does not begin."""
        if ns > self.longest_ns:
            raise self.stop(f"one operation of more than {self.longest_ns // 1_000_000} ms")
        self._unseen_ns += ns
        if self._unseen_ns > LOOK_NS:
            self.look()

    def look(self) -> None:
        """Look at the clock."""
        self._unseen_ns = 0
        if self.spent or time.thread_time() > self.deadline:
            raise self.stop(f"more than {self.seconds:.3g} s")

    def token(self) -> None:
        """Charge one token of the template's source."""
        self.tokens_left -= 1
        if self.tokens_left < 0:
            raise self.stop(f"more than {MAX_TOKENS:,} tokens of source")

    def allocate(self, nbytes: int, ns: int = 0) -> int:
        """Charge ``nbytes`` that are about to be made, by a native call that may take ``ns``; gives the bytes."""
        self.bytes_left -= nbytes
        if self.bytes_left < 0 and not self.spent:
            self._take_back()
        if self.spent or self.bytes_left < 0:
            raise self.stop(f"more than {self.most_bytes >> 20} MiB of text and lists")
        if ns:
            self.work(ns)
        return nbytes

    def _take_back(self) -> None:
        """Credit the large values that only this register still holds, the newest first: lists before their items."""
        self._measured.clear()
        self._unseen_ns += 200 * len(self._large)
        entries = list(self._large.values())
        alive: list[tuple[Any, int]] = []
        self._large.clear()
        while entries:
            entry = entries.pop()
            if references(entry) > ALONE:
                alive.append(entry)
            else:
                self.bytes_left += entry[1]
        self._large = {id(entry[0]): entry for entry in reversed(alive)}
        if self.bytes_left < self.most_bytes // 16:  # or every further byte would look at everything again
            self.bytes_left = -1

    def text(self, text: str, charged: int) -> str:
        """``text``, for which ``charged`` bytes were taken: what it did not need is given back."""
        self._keep(text, text_bytes(text), charged)
        return text

    def parts(self, texts: Any, charged: int) -> Any:
        """A new list or tuple of new texts, for which ``charged`` bytes were taken."""
        for text in texts:
            self._keep(text, text_bytes(text), 0)
        return self.made(texts, charged)

    def _keep(self, value: Any, nbytes: int, charged: int) -> None:
        """Register a new value; one that an operation gave back as it was costs nothing."""
        if nbytes < LARGE:
            self.bytes_left += charged - nbytes
        elif id(value) in self._large:
            self.bytes_left += charged
        else:
            self.bytes_left += charged - nbytes
            self._large[id(value)] = (value, nbytes)

    def each(self, items: Any) -> Iterator[Any]:
        """``items``, one step each."""
        nbytes = self.allocate(char_bytes(items) if isinstance(items, str) else 0)  # a loop may keep what went by
        try:
            for item in items:
                self.step()
                yield item
        finally:
            self.bytes_left += nbytes

    def stream(self, items: Iterator[Any], source: Any) -> Iterator[Any]:
        """What a filter makes of ``source`` item by item; filters of filters end at ``MAX_NESTING``."""
        depth = 1 + (self._depths.get(source, 0) if isinstance(source, Iterator) else 0)
        if depth > MAX_NESTING:
            raise self.stop(f"more than {MAX_NESTING} filters of filters")
        stream = self.each(items)
        self._depths[stream] = depth
        return stream

    def listed(self, items: Iterator[Any]) -> list[Any]:
        """What an iterator gives, charged item by item."""
        found = []
        for item in items:
            self.step()
            self.allocate(16 + (text_bytes(item) if isinstance(item, str) else 64))
            found.append(item)
        return found

    def measure(self, value: Any, depth: int = 0) -> tuple[int, bool]:
        """(size in bytes when written out in full, whether a user's text is inside); raises when over the limit.

        A list that holds another one twice counts it twice: ``repr``, ``==`` and JSON walk it twice as well.
        """
        if isinstance(value, str):
            return 50 + 4 * len(value), type(value) is not str and bool(spans_of(value))
        if isinstance(value, bool | float) or value is None:
            return 32, False
        if isinstance(value, int):
            return 32 + value.bit_length() // 3, False
        if isinstance(value, range):
            return 64 + 48 * len(value), False
        if not isinstance(value, (Mapping, list, tuple, *VIEWS)):
            return 64, True  # objects of the sandbox: their repr is short
        known = self._measured.get(id(value))
        if known is None:
            inside = [part for item in value.items() for part in item] if isinstance(value, Mapping) else value
            known = self._measured[id(value)] = (value, *self._measure_inside(inside, depth + 1))
        return known[1], known[2]

    def _measure_inside(self, inside: Any, depth: int) -> tuple[int, bool]:
        if depth > MAX_NESTING:
            raise self.stop(f"values nested deeper than {MAX_NESTING}")
        self.work(200 * len(inside))
        total, from_user = 64, False
        for part in inside:
            size, marked = self.measure(part, depth)
            total += size + 16
            from_user = from_user or marked
            if total > self.most_bytes:
                raise self.stop(f"a value of more than {self.most_bytes >> 20} MiB")
        return total, from_user

    def held(self, value: Any, charged: int, size: int, from_user: bool) -> Any:
        """A new list, for which ``charged`` bytes were taken, and whose ``measure`` is known from its parts."""
        if size > self.most_bytes:
            raise self.stop(f"a value of more than {self.most_bytes >> 20} MiB")
        self._measured[id(value)] = (value, size, from_user)
        self._keep(value, charged, charged)
        return value

    def made(self, value: Any, charged: int = 0) -> Any:
        """``value`` after charging what was made for it: the characters of a string, the slots of a container.

        ``charged``: what was taken for it before it was made.
        """
        if isinstance(value, str | list | tuple | dict):
            slot = 104 if isinstance(value, dict) else 16
            nbytes = text_bytes(value) if isinstance(value, str) else 64 + slot * len(value)
            self.allocate(nbytes - charged)
            self._keep(value, nbytes, nbytes)
            self.measure(value)
            return value
        if isinstance(value, int):
            self.check_integer(value.bit_length())
        self.bytes_left += charged
        return value

    def check_integer(self, bits: int) -> None:
        """Refuse an integer of more than ``INTEGER_BITS`` bits."""
        if bits > INTEGER_BITS:
            raise self.stop(f"an integer of more than {INTEGER_BITS:,} bits")


def references(entry: tuple[Any, int]) -> int:
    """How many hold the value of an entry of the register, this function included."""
    return sys.getrefcount(entry[0])


ALONE = references(("".join(["a value that", "nobody else holds"]), 0))  # differs between versions of Python
