"""The string methods a template may call: each charged before it runs, each keeping a user's characters marked.

One row of ``STRING_METHODS`` is one method; what is not in the table is refused. Arguments are the budget, the string,
then the call's own. The results are those of ``str``, and of markupsafe's ``Markup`` for a ``SafeText``.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from edgellm.chat_template.budget import USER_CHAR_BYTES, Budget, text_bytes
from edgellm.chat_template.user_text import (
    SafeText,
    charwise,
    clipped,
    concat,
    escaped,
    is_users,
    pieces,
    safe,
    spans_of,
    unsafe,
    whole,
    with_spans,
)

Method = Callable[..., Any]
MAX_WIDTH = 1 << 16  # characters that one call may pad to
PART_BYTES = 88  # of a part of a string without its characters
LINE_ENDS = "\n\r\v\f\x1c\x1d\x1e\x85\u2028\u2029"
WHITE_SPACE = "".join(c for c in map(chr, range(0x3001)) if c.isspace())
ESCAPING = {"replace": 1, "center": 1, "ljust": 1, "rjust": 1}  # argument that Markup's method escapes


def call_string_method(budget: Budget, name: str, text: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """``text.name(*args, **kwargs)``."""
    method = STRING_METHODS[name]
    if not isinstance(text, SafeText):
        return method(budget, text, *args, **kwargs)
    at = ESCAPING.get(name, len(args))
    given = [escape(budget, arg) if i == at and isinstance(arg, str) else arg for i, arg in enumerate(args)]
    if name == "join":
        given = [[escape(budget, item) if isinstance(item, str) else item for item in budget.each(args[0])]]
    result = method(budget, unsafe(text), *given, **kwargs)
    if isinstance(result, list | tuple):
        return type(result)(safe(part) for part in result)
    return safe(result) if isinstance(result, str) else result


def escape(budget: Budget, text: str) -> str:
    """``text`` as HTML, charged."""
    if isinstance(text, SafeText):
        return text
    linear(budget, text, 24)
    charge = budget.allocate(24 * len(text) + text_bytes(text))
    return budget.text(escaped(text), charge)


def linear(budget: Budget, text: str, ns: int = 16) -> None:
    """Charge one pass over ``text`` and its ranges."""
    budget.work(100 + ns * len(text) + 100 * len(spans_of(text)))


def charge_search(budget: Budget, text: str, what: Any, backwards: bool = False) -> None:
    """Charge a search for ``what``: forwards CPython's is linear, backwards it compares at every place."""
    longest = len(what) if isinstance(what, str) else 1
    budget.work(100 + (len(text) * longest if backwards else len(text) * min(longest, 16)))


def join(budget: Budget, separator: str, items: Any) -> str:
    """``separator.join(items)``."""
    parts: list[str] = []
    charge = 50
    for item in budget.each(items):
        if parts:
            parts.append(separator)
        charge += budget.allocate(16 + (text_bytes(item) + text_bytes(separator) if isinstance(item, str) else 0))
        parts.append(item)
    return budget.text(concat(parts), charge)


def split(name: str) -> Method:
    """``split``, ``rsplit``, ``splitlines``, ``partition``, ``rpartition``: parts of the string in its order."""
    method = getattr(str, name)

    def run(budget: Budget, text: str, *args: Any, **kwargs: Any) -> Any:
        separator = args[0] if args else kwargs.get("sep")
        charge_search(budget, text, separator, name.startswith("r"))
        most = most_parts(name, text, separator, args[1] if len(args) > 1 else kwargs.get("maxsplit"))
        n_spans = len(spans_of(text))
        charge = (PART_BYTES + (USER_CHAR_BYTES if n_spans else 0)) * most + 2 * text_bytes(text)
        budget.allocate(charge, 16 * len(text) + 300 * most + 200 * n_spans)
        parts = method(text, *args, **kwargs)
        between = separator if name.endswith("split") and isinstance(separator, str) else ""
        found = pieces(text, parts, between) if n_spans else parts
        return budget.parts(tuple(found) if isinstance(parts, tuple) else found, charge)

    return run


def most_parts(name: str, text: str, separator: Any, limit: Any) -> int:
    """How many parts ``split`` and its kin can give at most."""
    if name.endswith("partition"):
        return 3
    if name == "splitlines":
        return 1 + sum(str.count(text, c) for c in LINE_ENDS)
    if isinstance(separator, str):
        most = 1 + str.count(text, separator) if separator else 0
    else:
        most = 1 + sum(str.count(text, c) for c in WHITE_SPACE)
    return min(most, limit + 1) if isinstance(limit, int) and limit >= 0 else most


def strip(name: str) -> Method:
    """``strip``, ``lstrip``, ``rstrip``, ``removeprefix``, ``removesuffix``: one slice of the string."""
    method = getattr(str, name)
    from_left = name in ("strip", "lstrip", "removeprefix")

    def run(budget: Budget, text: str, *args: Any) -> str:
        set_size = len(args[0]) if args and isinstance(args[0], str) else 1
        charge = budget.allocate(text_bytes(text), 100 + len(text) * (8 + set_size) + 100 * len(spans_of(text)))
        kept = method(text, *args)
        if type(text) is str:
            return budget.text(kept, charge)
        # what is cut on the left is what the same cut on the right leaves over
        start = len(text) - len(str.lstrip(text, *args)) if name == "strip" else len(text) - len(kept)
        start = start if from_left else 0
        return budget.text(with_spans(kept, clipped(spans_of(text), start, start + len(kept))), charge)

    return run


def replace(budget: Budget, text: str, old: str, new: str, count: int = -1) -> str:
    """``text.replace(old, new, count)``."""
    charge_search(budget, text, old)
    hits = str.count(text, old) if old else len(text) + 1
    hits = hits if count is None or count < 0 else min(hits, count)
    users = is_users(text, new)
    n_spans = len(spans_of(text)) + hits * (1 + len(spans_of(new))) if users else 0
    charge = text_bytes(text) + 4 * hits * len(new) + USER_CHAR_BYTES * n_spans
    budget.allocate(charge, 16 * (len(text) + hits * len(new)) + 1000 * n_spans)
    if not users or not old:
        result = str.replace(text, old, new, -1 if count is None else count)
        return budget.text(whole(result) if users else result, charge)
    parts = pieces(text, str.split(text, old, hits), old)
    return budget.text(concat([part for piece in parts for part in (new, piece)][1:]), charge)


def case(name: str) -> Method:
    """``upper`` and its kin: a change character by character."""
    method = getattr(str, name)

    def run(budget: Budget, text: str, *args: Any) -> str:
        linear(budget, text, 48)
        charge = budget.allocate(text_bytes(text) + 12 * len(text))
        return budget.text(charwise(text, method(text, *args)), charge)

    return run


def pad(name: str) -> Method:
    """``center``, ``ljust``, ``rjust``, ``zfill``: at most ``width`` characters."""
    method = getattr(str, name)

    def run(budget: Budget, text: str, width: int, *args: Any) -> str:
        if isinstance(width, int) and width > max(MAX_WIDTH, len(text)):
            raise budget.stop(f"{name}() to more than {MAX_WIDTH:,} characters")
        linear(budget, text)
        charge = budget.allocate(50 + 4 * max(len(text), width) + USER_CHAR_BYTES)
        result = method(text, width, *args)
        return budget.text(whole(result) if is_users(text, *args) else result, charge)

    return run


def asked(name: str, charge: Callable[..., None]) -> Method:
    """A method that makes no text, but answers with a number or a truth value."""
    method = getattr(str, name)

    def run(budget: Budget, text: str, *args: Any) -> Any:
        charge(budget, text, *args)
        return method(text, *args)

    return run


def searched(budget: Budget, text: str, what: Any = "", *bounds: Any, backwards: bool = False) -> None:
    """One search from the left, or from the right."""
    charge_search(budget, text, what, backwards)


def at_an_end(budget: Budget, text: str, *args: Any) -> None:
    """One comparison for each of the given pieces."""
    budget.work(100 + sum(budget.measure(arg)[0] for arg in args))


STRING_METHODS: dict[str, Method] = {
    "join": join,
    "replace": replace,
    **{name: split(name) for name in ("split", "rsplit", "splitlines", "partition", "rpartition")},
    **{name: strip(name) for name in ("strip", "lstrip", "rstrip", "removeprefix", "removesuffix")},
    **{name: case(name) for name in ("upper", "lower", "title", "capitalize", "swapcase", "casefold")},
    **{name: pad(name) for name in ("center", "ljust", "rjust", "zfill")},
    **{name: asked(name, searched) for name in ("find", "index", "count")},
    **{name: asked(name, partial(searched, backwards=True)) for name in ("rfind", "rindex")},
    **{name: asked(name, at_an_end) for name in ("startswith", "endswith")},
    **{
        name: asked(name, linear)
        for name in (
            "isalnum", "isalpha", "isascii", "isdecimal", "isdigit", "isidentifier", "islower", "isnumeric",
            "isprintable", "isspace", "istitle", "isupper",
        )
    },
}  # fmt: skip
