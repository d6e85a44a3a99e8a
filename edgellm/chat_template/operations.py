"""Operators, comparisons and tests of a template: one table each, every row charged by its cost at worst.

What is in no table is refused by name: a template gets no function, method or test that was not weighed here.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

from jinja2.sandbox import SecurityError
from jinja2.tests import TESTS

from edgellm.chat_template.budget import VIEWS, Budget, text_bytes
from edgellm.chat_template.formatting import percent
from edgellm.chat_template.string_methods import charge_search, escape, linear
from edgellm.chat_template.user_text import SafeText, concat, is_users, safe, unsafe, whole

CONTAINERS = (list, tuple, dict, range, *VIEWS)


# -- comparisons -------------------------------------------------------------------------------------------------------


def charge_comparison(budget: Budget, left: Any, right: Any) -> None:
    """A comparison walks both sides up to the first difference."""
    budget.step()
    if isinstance(left, str):
        budget.work(min(len(left), len(right)) if isinstance(right, str) else 0)
    elif isinstance(left, CONTAINERS) and isinstance(right, CONTAINERS):
        budget.work(min(budget.measure(left)[0], budget.measure(right)[0]))


def contains(budget: Budget, container: Any, item: Any) -> bool:
    """``item in container``."""
    budget.step()
    if isinstance(container, str):
        charge_search(budget, container, item)
    elif isinstance(container, dict):
        budget.work(budget.measure(item)[0])  # its hash
    elif isinstance(container, CONTAINERS):
        budget.work(budget.measure(container)[0] + budget.measure(item)[0])
    elif isinstance(container, Iterator):
        container = budget.each(container)
    return item in container


def compared(compare: Callable[[Any, Any], Any], budget: Budget, left: Any, right: Any) -> bool:
    """``left == right`` and its kin."""
    charge_comparison(budget, left, right)
    return bool(compare(left, right))


COMPARISONS = {name: partial(compared, getattr(operator, name)) for name in ("eq", "ne", "lt", "le", "gt", "ge")}


def side(name: str) -> Any:
    """The method of an operand that is its comparison with another one."""
    return lambda self, other: COMPARISONS[name](self.budget, self.value, other.value)


class Operand:
    """A side of a comparison in a template; Python's own rules chain them, and each is charged before it runs."""

    __slots__ = ("budget", "value")
    __hash__ = None  # type: ignore[assignment]
    __eq__, __ne__, __lt__, __le__, __gt__, __ge__ = map(side, COMPARISONS)

    def __init__(self, budget: Budget, value: Any) -> None:
        self.budget, self.value = budget, value

    def __contains__(self, item: Any) -> bool:
        return contains(self.budget, self.value, item.value)


# -- tests -------------------------------------------------------------------------------------------------------------

CHEAP_TESTS = (
    "boolean", "callable", "defined", "escaped", "false", "float", "integer", "iterable", "mapping", "none", "number",
    "sameas", "sequence", "string", "true", "undefined",
)  # fmt: skip
REMAINDER_TESTS = {"odd": 1, "even": 0, "divisibleby": 0}  # of a division by two, or by the number given
TEXT_TESTS = ("lower", "upper")
COMPARING_TESTS = {
    "eq": ("eq", "equalto", "=="),
    "ne": ("ne", "!="),
    "lt": ("lt", "lessthan", "<"),
    "le": ("le", "<="),
    "gt": ("gt", "greaterthan", ">"),
    "ge": ("ge", ">="),
}


def chat_tests(sandbox: Any) -> dict[str, Any]:
    """Every test by name."""

    def cheap(test: Any, *args: Any) -> Any:
        sandbox.budget.step()
        return test(*args)

    def of_numbers(expected: int, value: Any, divisor: Any = 2) -> Any:
        return binary_operation(sandbox.budget, "%", value, divisor) == expected

    def of_text(method: Any, value: Any) -> Any:
        text = sandbox.text(value)
        linear(sandbox.budget, text)
        return method(text)

    def comparing(name: str, left: Any, right: Any) -> bool:
        return COMPARISONS[name](sandbox.budget, left, right)

    return {
        **{name: partial(cheap, TESTS[name]) for name in CHEAP_TESTS},
        **{name: partial(of_numbers, expected) for name, expected in REMAINDER_TESTS.items()},
        **{name: partial(of_text, getattr(str, f"is{name}")) for name in TEXT_TESTS},
        **{alias: partial(comparing, name) for name, aliases in COMPARING_TESTS.items() for alias in aliases},
        "in": lambda item, container: contains(sandbox.budget, container, item),
        "filter": lambda name: isinstance(name, str) and name in sandbox.filters and not name.startswith("\0"),
        "test": lambda name: isinstance(name, str) and name in sandbox.tests,
    }


# -- arithmetic --------------------------------------------------------------------------------------------------------


def add_texts(budget: Budget, left: str, right: str) -> str:
    """``left + right``; behind ``|safe`` what is added is escaped."""
    html = isinstance(left, SafeText) or isinstance(right, SafeText)
    if html:
        left, right = unsafe(escape(budget, left)), unsafe(escape(budget, right))
    return joined(budget, (left, right), html)


def joined(budget: Budget, texts: Sequence[str], html: bool = False) -> str:
    """One text of several."""
    charge = sum(map(text_bytes, texts))
    budget.allocate(charge, 100 + charge // 4)
    text = concat(texts)
    return budget.text(safe(text) if html else text, charge)


def repeat_text(budget: Budget, text: str, times: int) -> str:
    """``text * times``."""
    charge = 50 + max(times, 0) * text_bytes(text)
    budget.allocate(charge, charge // 4)
    result = whole(str.__mul__(text, times)) if is_users(text) else str.__mul__(text, times)
    return budget.text(safe(result) if isinstance(text, SafeText) else result, charge)


def add_lists(budget: Budget, left: Any, right: Any) -> Any:
    """List + list, tuple + tuple."""
    (size, marked), (more, also) = budget.measure(left), budget.measure(right)
    charge = 64 + 16 * (len(left) + len(right))
    budget.allocate(charge, charge)
    return budget.held(left + right, charge, size + more - 64, marked or also)


def repeat_list(budget: Budget, items: Any, times: int) -> Any:
    """List * number."""
    size, marked = budget.measure(items)
    charge = 64 + 16 * len(items) * max(times, 0)
    budget.allocate(charge, charge)
    return budget.held(items * times, charge, 64 + (size - 64) * max(times, 0), marked)


def calculate(budget: Budget, name: str, left: Any, right: Any) -> Any:
    """A number and a number: an integer of too many bits is refused before it is computed."""
    if isinstance(left, int) and isinstance(right, int):
        bits = left.bit_length() + right.bit_length()
        if name == "**":
            bits = left.bit_length() * max(right, 1)
        budget.check_integer(bits)
        budget.work(100 + bits * bits // 10_000)
    return ARITHMETIC[name](left, right)


ARITHMETIC: dict[str, Callable[[Any, Any], Any]] = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "/": operator.truediv,
    "//": operator.floordiv,
    "%": operator.mod,
    "**": operator.pow,
}


def binary_operation(budget: Budget, name: str, left: Any, right: Any) -> Any:
    """``left name right`` for every arithmetic operator of a template."""
    budget.step()
    if isinstance(left, str):
        if name == "+" and isinstance(right, str):
            return add_texts(budget, left, right)
        if name == "%":
            return percent(budget, left, right)
        if name == "*" and isinstance(right, int):
            return repeat_text(budget, left, right)
    elif isinstance(left, list | tuple):
        if name == "+" and type(left) is type(right):
            return add_lists(budget, left, right)
        if name == "*" and isinstance(right, int):
            return repeat_list(budget, left, right)
    elif isinstance(left, int) and name == "*" and isinstance(right, str | list | tuple):
        return binary_operation(budget, name, right, left)
    elif isinstance(left, int | float) and isinstance(right, int | float):
        return calculate(budget, name, left, right)
    elif isinstance(left, VIEWS) or isinstance(right, VIEWS):
        raise SecurityError(f"the operator {name!r} of the view of a dict")
    return ARITHMETIC[name](left, right)  # what is left raises: Undefined its own error, the others TypeError
