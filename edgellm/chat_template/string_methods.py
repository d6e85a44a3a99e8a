"""The string methods a template may call: each bounded before it runs, each keeping a user's characters marked.

One row of ``STRING_METHODS`` is one method; what is not in the table is refused. Arguments are the string, then the
call's own. The results are those of ``str``.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from edgellm.chat_template.budget import Budget
from edgellm.chat_template.user_text import (
    charwise,
    clipped,
    concat,
    pieces,
    spans_of,
    whole,
    with_spans,
)

Method = Callable[..., Any]
MAX_FIELD_WIDTH = 4096
LONG_NUMBER = re.compile(r"\d{4,}")


def is_users(*values: Any) -> bool:
    """Whether any of the strings among ``values`` is not purely the template's."""
    return any(isinstance(value, str) and type(value) is not str for value in values)


def join(budget: Budget, separator: str, items: Any) -> str:
    """``separator.join(items)``."""
    parts: list[str] = []
    for item in budget.each(items):
        if parts:
            parts.append(separator)
        budget.allocate(16 + 4 * (len(item) + len(separator)) if isinstance(item, str) else 16)
        parts.append(item)
    return concat(parts)


def split(name: str) -> Method:
    """``split``, ``rsplit``, ``splitlines``, ``partition``, ``rpartition``: parts of the string in its order."""
    method = getattr(str, name)

    def run(budget: Budget, text: str, *args: Any, **kwargs: Any) -> Any:
        budget.allocate(5 * len(text))
        parts = method(text, *args, **kwargs)
        budget.allocate(80 * len(parts))
        if type(text) is str:
            return parts
        separator = args[0] if args else kwargs.get("sep")
        found = pieces(text, parts, separator if name.endswith("split") and isinstance(separator, str) else "")
        return tuple(found) if isinstance(parts, tuple) else found

    return run


def strip(name: str) -> Method:
    """``strip``, ``lstrip``, ``rstrip``, ``removeprefix``, ``removesuffix``: one slice of the string."""
    method = getattr(str, name)
    from_left = name in ("strip", "lstrip", "removeprefix")

    def run(budget: Budget, text: str, *args: Any) -> str:
        budget.allocate(4 * len(text))
        kept = method(text, *args)
        if type(text) is str:
            return kept
        # what is cut on the left is what the same cut on the right leaves over
        start = len(text) - len(str.lstrip(text, *args)) if name == "strip" else len(text) - len(kept)
        start = start if from_left else 0
        return with_spans(kept, clipped(spans_of(text), start, start + len(kept)))

    return run


def replace(budget: Budget, text: str, old: str, new: str, count: int = -1) -> str:
    """``text.replace(old, new, count)``."""
    hits = str.count(text, old) if old else len(text) + 1
    hits = hits if count is None or count < 0 else min(hits, count)
    budget.allocate(4 * (len(text) + hits * len(new)) + (16 * hits if is_users(text, new) else 0))
    if not is_users(text, new) or not old:
        result = str.replace(text, old, new, -1 if count is None else count)
        return whole(result) if is_users(text, new) else result
    parts = pieces(text, str.split(text, old, hits), old)
    return concat([part for piece in parts for part in (new, piece)][1:])


def case(name: str) -> Method:
    """``upper`` and its kin: a change character by character."""
    method = getattr(str, name)

    def run(budget: Budget, text: str, *args: Any) -> str:
        budget.allocate(12 * len(text))
        return charwise(text, method(text, *args))

    return run


def pad(name: str) -> Method:
    """``center``, ``ljust``, ``rjust``, ``zfill``: at most ``width`` characters."""
    method = getattr(str, name)

    def run(budget: Budget, text: str, width: int, *args: Any) -> str:
        budget.allocate(4 * max(len(text), int(width)))
        result = method(text, width, *args)
        return whole(result) if is_users(text, *args) else result

    return run


def question(name: str) -> Method:
    """A method that answers with a number or a truth value."""
    method = getattr(str, name)

    def run(budget: Budget, text: str, *args: Any) -> Any:
        return method(text, *args)

    return run


def check_widths(budget: Budget, directives: str, n_fields: int, sizes: int) -> None:
    """Charge the result of a format: ``n_fields`` fields that may each write all the arguments, ``sizes`` bytes."""
    if "*" in directives or LONG_NUMBER.search(directives):
        raise budget.stop(f"a format field wider than {MAX_FIELD_WIDTH}")
    budget.allocate(n_fields * (3 * sizes + 4 * MAX_FIELD_WIDTH if n_fields < 1000 else 3 * sizes))


def percent(budget: Budget, text: str, values: Any) -> str:
    """``text % values``; with ``%s`` alone the marks are kept, else a user's argument marks it all."""
    fields = re.findall(r"%(?:\([^)]*\))?([^a-zA-Z%]*)[a-zA-Z]", text)
    size, from_user = budget.measure(values)
    check_widths(budget, " ".join(fields), len(fields), size)
    result = str.__mod__(text, values)
    if not (from_user or is_users(text)):
        return result
    parts = str.split(text, "%s")
    items = values if isinstance(values, tuple) else (values,)
    plain = all(isinstance(item, str) for item in items) and "%" not in "".join(parts)
    if type(text) is not str or not plain or len(parts) != len(items) + 1:
        return whole(result)
    return concat([parts[0], *(piece for pair in zip(items, parts[1:], strict=True) for piece in pair)])


def plain_fields(text: str) -> list[str] | None:
    """``text`` around its ``{}`` fields, or None when it has anything else between braces."""
    parts = str.split(text, "{}")
    return None if any("{" in part or "}" in part for part in parts) else parts


STRING_METHODS: dict[str, Method] = {
    "join": join,
    "replace": replace,
    **{name: split(name) for name in ("split", "rsplit", "splitlines", "partition", "rpartition")},
    **{name: strip(name) for name in ("strip", "lstrip", "rstrip", "removeprefix", "removesuffix")},
    **{name: case(name) for name in ("upper", "lower", "title", "capitalize", "swapcase", "casefold")},
    **{name: pad(name) for name in ("center", "ljust", "rjust", "zfill")},
    **{name: question(name) for name in ("startswith", "endswith", "find", "rfind", "index", "rindex", "count")},
    **{name: question(name) for name in dir(str) if name.startswith("is")},
}
