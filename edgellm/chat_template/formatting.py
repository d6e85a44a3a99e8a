"""``text % values`` and ``text.format(...)``: charged by the width and the argument of every field before they run."""

from __future__ import annotations

import re
from string import Formatter
from typing import Any

from jinja2.sandbox import SandboxedFormatter, SecurityError

from edgellm.chat_template.budget import USER_CHAR_BYTES, Budget
from edgellm.chat_template.string_methods import escape
from edgellm.chat_template.user_text import SafeText, concat, is_users, safe, unsafe, whole

MAX_FIELD_WIDTH = 4096
FIELD_NS = 4000
DIRECTIVE = re.compile(r"[#0\- +]*(\*|\d*)(?:\.(\*|\d*))?[hlL]?(.?)", re.DOTALL)
NUMBER = re.compile(r"\d+")


def field_width(budget: Budget, digits: str) -> int:
    """A width or a precision; one that is computed, or too large, is refused."""
    if digits == "*" or len(digits) > 4 or int(digits or 0) > MAX_FIELD_WIDTH:
        raise budget.stop(f"a format field wider than {MAX_FIELD_WIDTH}")
    return int(digits or 0)


def percent_fields(budget: Budget, text: str) -> list[tuple[int, bool]]:
    """(characters of width and precision, whether it has a key) of each field, found as CPython finds them."""
    budget.work(100 + 50 * len(text))
    fields = []
    position = str.find(text, "%") + 1
    while position:
        budget.work(FIELD_NS)
        keyed = str.startswith(text, "(", position)
        if keyed:
            position = after_key(text, position)
        directive = DIRECTIVE.match(text, position)
        assert directive is not None, "every part of it may be empty"
        if directive[3] != "%":
            fields.append((field_width(budget, directive[1]) + field_width(budget, directive[2] or ""), keyed))
        position = str.find(text, "%", directive.end()) + 1
    return fields


def after_key(text: str, position: int) -> int:
    """The place behind a ``(key)`` that begins at ``position``; brackets nest in it."""
    depth = 0
    for bracket in re.compile(r"[()]").finditer(text, position):
        depth += 1 if bracket[0] == "(" else -1
        if depth == 0:
            return bracket.end()
    return len(text)


def charge_fields(budget: Budget, text: str, fields: list[tuple[int, bool]], values: Any) -> tuple[int, bool]:
    """Charge the result: each field its width and its argument; a keyed one may write out all of them.

    (bytes charged, whether a user's text is among the values)
    """
    size, from_user = budget.measure(values)
    budget.work(16 * len(text) + FIELD_NS * len(fields))
    keyed = sum(key for _, key in fields)
    repeats = keyed + (len(fields) > keyed)
    charge = 50 + 4 * len(text) + sum(4 * width + 1400 for width, _ in fields) + 3 * size * repeats + USER_CHAR_BYTES
    # 1400: a float has up to 309 digits before its point
    return budget.allocate(charge, 6 * size * repeats), from_user


def percent(budget: Budget, text: str, values: Any) -> str:
    """``text % values``; with ``%s`` alone the marks are kept, else a user's argument marks it all."""
    fields = percent_fields(budget, text)
    charge, from_user = charge_fields(budget, text, fields, values)
    if isinstance(text, SafeText):
        return safe(percent(budget, unsafe(text), escaped_values(budget, values)))
    result = str.__mod__(text, values)
    if from_user or is_users(text):
        parts = str.split(text, "%s")
        items = values if isinstance(values, tuple) else (values,)
        plain = all(isinstance(item, str) for item in items) and "%" not in "".join(parts)
        marked = is_users(text) or not plain or len(parts) != len(items) + 1
        result = whole(result) if marked else concat(woven(parts, items))
    return budget.text(result, charge)


def woven(parts: Any, items: Any) -> list[str]:
    """part, item, part, item, ... part."""
    return [parts[0], *(piece for pair in zip(items, parts[1:], strict=True) for piece in pair)]


def escaped_values(budget: Budget, values: Any) -> Any:
    """The arguments of a ``SafeText``'s ``%`` or ``format``: strings as HTML."""
    if isinstance(values, tuple):
        return tuple(escaped_values(budget, value) for value in values)
    if isinstance(values, dict):
        return {key: escaped_values(budget, value) for key, value in values.items()}
    if isinstance(values, str):
        return escape(budget, values)
    if isinstance(values, list):
        size, from_user = budget.measure(values)
        budget.allocate(2 * size)
        text = str(values)
        return escape(budget, whole(text) if from_user else text)
    return values


def format_text(budget: Budget, sandbox: Any, text: str, args: Any, kwargs: Any) -> str:
    """``text.format(*args, **kwargs)``; with ``{}`` alone the marks are kept."""
    if isinstance(text, SafeText):
        args, kwargs = escaped_values(budget, tuple(args)), escaped_values(budget, kwargs)
        return safe(format_text(budget, sandbox, unsafe(text), args, kwargs))
    budget.work(100 + 100 * len(text))
    fields = []
    for _, name, spec, _ in Formatter().parse(text):
        if spec and "{" in spec:
            raise SecurityError("a format field whose width is computed")
        if name is not None:
            width = sum(field_width(budget, digits) for digits in NUMBER.findall(spec or ""))
            fields.append((width, name != ""))
    charge, from_user = charge_fields(budget, text, fields, [*args, *kwargs.values()])
    parts = plain_fields(text)
    if parts is not None and len(parts) == len(args) + 1:
        return budget.text(concat(woven(parts, [sandbox.text(value) for value in args])), charge)
    result = SandboxedFormatter(sandbox).vformat(text, args, kwargs)
    return budget.text(whole(result) if from_user or is_users(text) else result, charge)


def plain_fields(text: str) -> list[str] | None:
    """``text`` around its ``{}`` fields, or None when it has anything else between braces."""
    parts = str.split(text, "{}")
    return None if any("{" in part or "}" in part for part in parts) else parts
