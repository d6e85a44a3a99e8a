"""What a caller of the library passed, checked at the door: a wrong type or value is a ParameterError with its name.

Each function gives the value in the one type that the rest of the library knows. The screen imports this before its
first picture: nothing heavy here.
"""

from __future__ import annotations

import numbers
import operator
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from edgellm.formats.errors import ParameterError
from edgellm.formats.findings import short
from edgellm.machine.paths import typed_path

MAX_CONTEXT = 1 << 24  # tokens
MAX_THREADS = 1024
MAX_TOKENS_PER_STEP = 1 << 16
MOST_LENGTH_PENALTY = 40.0  # either way: the longest answer to this power is still a number
CACHE_TYPES = ("f16", "bf16", "f32", "q8_0", "q5_1", "q5_0", "iq4_nl", "q4_1", "q4_0", "kivi2")
"""What keys and values can be kept as; kernels/cache_types.py has the rows."""
KV_KEEPS = {"quest": 256, "snapkv": 64}
"""How fewer keys are read or kept, and the least tokens of each, of which all are multiples."""
MAX_KEPT_TOKENS = 1 << 19


def wrong(name: str, value: Any, expected: str) -> ParameterError:
    """The error: what was found, what was expected."""
    return ParameterError(f"{name} is {shown(value)}. It must be {expected}.")


def shown(value: Any) -> str:
    """What was found, for a message: text in quotes, all of it cut."""
    return short(repr(value) if isinstance(value, str) else value)


def whole_number(name: str, value: Any, least: int, most: int) -> int:
    """An int, or a numpy integer, within bounds; True and False are none."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or not least <= int(value) <= most:
        raise wrong(name, value, f"a whole number from {least} to {most}")
    return int(value)


def number(name: str, value: Any, least: float, most: float) -> float:
    """A float, or any other real number, within bounds; True, False and NaN are none."""
    is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not is_number or not least <= value <= most:  # an int may be larger than any float
        raise wrong(name, value, f"a number from {least:g} to {most:g}")
    return float(value)


def cache_type(name: str, value: Any) -> str:
    """A type of keys or values."""
    if not isinstance(value, str) or value not in CACHE_TYPES:
        raise wrong(name, value, f"one of {', '.join(CACHE_TYPES)}")
    return value


class KVKeep(NamedTuple):
    """How fewer keys are read or kept, and how many tokens of a context are."""

    way: str
    n_tokens: int


def kv_keep(name: str, value: Any) -> KVKeep | None:
    """``WAY:TOKENS``, None for all keys; ParameterError names what it may be."""
    if value is None or value == "all":
        return None
    way, _, number = value.partition(":") if isinstance(value, str) else ("", "", "")
    if way == "h2o":
        raise ParameterError(
            f"{name} is {shown(value)}. What heavy hitters are depends on every token before, one after the other, so "
            "a prompt would have other numbers in each chunking: h2o is not there. Take quest:TOKENS or snapkv:TOKENS."
        )
    each = KV_KEEPS.get(way)
    if each is None or not number.isascii() or not number.isdecimal() or len(number) > 9:
        raise wrong(name, value, f"all, or one of {', '.join(KV_KEEPS)} with a number of tokens, such as quest:1024")
    if int(number) % each or not 0 < int(number) <= MAX_KEPT_TOKENS:
        expected = f"{way} with a multiple of {each} tokens up to {MAX_KEPT_TOKENS}, such as {way}:{max(each, 1024)}"
        raise wrong(name, value, expected)
    return KVKeep(way, int(number))


def text(name: str, value: Any) -> str:
    """A str."""
    if not isinstance(value, str):
        raise wrong(name, value, "text")
    return value


def flag(name: str, value: Any) -> bool:
    """True or False."""
    if not _is_bool(value):
        raise wrong(name, value, "True or False")
    return bool(value)


def mapping(name: str, value: Any) -> Mapping[str, Any]:
    """A mapping with texts as keys."""
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise wrong(name, value, "a mapping of names to values")
    return value


def function(name: str, value: Any) -> Callable[..., Any]:
    """Something that can be called."""
    if not callable(value):
        raise wrong(name, value, "a function")
    return value


def items(name: str, value: Any, expected: str) -> list[Any]:
    """A list of things: any iterable but a text, bytes or a mapping."""
    if isinstance(value, str | bytes | bytearray | Mapping) or not isinstance(value, Iterable):
        raise wrong(name, value, expected)
    try:
        return list(value)
    except TypeError:  # an array without dimensions
        raise wrong(name, value, expected) from None


def token_ids(name: str, value: Any) -> list[int]:
    """A list of ids; whether the vocabulary has them is for the engine to say."""
    expected = "a sequence of token ids"
    ids = items(name, value, expected)
    if any(map(_is_bool, ids)):
        raise wrong(name, value, expected)
    try:
        return [operator.index(token) for token in ids]
    except TypeError:
        raise wrong(name, value, expected) from None


def path(name: str, value: Any, *, new: bool = False) -> Path:
    """A path that a file can have, ``~`` for a home, a ``new`` one with a name; ParameterError for anything else."""
    if not isinstance(value, str | os.PathLike) or not isinstance(os.fspath(value), str):
        raise wrong(name, value, "a path")
    given = typed_path(value)
    if new and not given.name:
        raise wrong(name, os.fspath(value), "the path of a file, with its name")
    return given


def _is_bool(value: Any) -> bool:
    return type(value).__name__ in ("bool", "bool_")  # numpy's too
