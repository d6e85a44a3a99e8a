"""The filters a chat template may use: jinja2's, bounded, with a user's characters kept marked, and HF's ``tojson``.

``passing`` filters hand on the objects they get; ``making`` filters make a string or a number of their own, and the
string is a user's as soon as any argument is. A filter that is in neither table is refused when the template is loaded.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import jinja2
import jinja2.filters
from jinja2.filters import FILTERS, make_attrgetter
from jinja2.utils import pass_environment
from markupsafe import escape as escape_html

from edgellm.chat_template.budget import Budget
from edgellm.chat_template.rewrite import CONCAT, EACH, NEW, SLICE, TICK
from edgellm.chat_template.string_methods import STRING_METHODS, is_users, percent
from edgellm.chat_template.user_text import charwise, concat, whole

# fmt: off
PASSING = (
    "first", "last", "list", "sort", "reverse", "unique", "min", "max", "batch", "slice", "select", "selectattr",
    "reject", "rejectattr", "map", "groupby", "dictsort", "items", "default", "d", "attr",
)
MAKING = (
    "abs", "count", "float", "int", "length", "round", "wordcount", "indent", "center", "truncate",
)
# fmt: on
COUNTING = ("batch", "slice", "indent", "center", "round")  # a number among their arguments says how much is made
ANSWERING = ("abs", "count", "float", "int", "length", "round", "wordcount")  # with a number
MAX_COUNT = 4096  # of lines, slices, widths, digits


class Printer(Protocol):
    """What the filters need of the sandbox."""

    @property
    def budget(self) -> Budget:
        """The running budget."""

    def text(self, value: Any) -> str:
        """``str(value)`` with its marks."""

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """The arithmetic operators."""


def chat_filters(sandbox: Printer) -> dict[str, Any]:
    """Every filter by name, the private ones of the sandbox included."""
    return {
        **{name: bounded(sandbox, name, makes_text=False) for name in PASSING},
        **{name: bounded(sandbox, name, makes_text=True) for name in MAKING},
        **{name: charwise_filter(sandbox, name) for name in ("upper", "lower", "capitalize", "title")},
        **own_filters(sandbox),
        **private_filters(sandbox),
    }


def arguments(fn: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """``args`` without the context or environment that jinja2 passes first."""
    return args[1:] if hasattr(fn, "jinja_pass_arg") else args


def bounded(sandbox: Printer, name: str, makes_text: bool) -> Callable[..., Any]:
    """jinja2's filter ``name``, charged before and after."""
    fn = FILTERS[name]

    def run(*args: Any, **kwargs: Any) -> Any:
        budget = sandbox.budget
        budget.step()
        values = (*arguments(fn, args), *kwargs.values())
        numbers = [value for value in values[1:] if isinstance(value, int)]
        if name in COUNTING and any(abs(number) > MAX_COUNT for number in numbers):
            raise budget.stop(f"the filter {name!r} with a number over {MAX_COUNT}")
        if name == "round" and any(abs(number) > 308 for number in numbers):
            raise budget.stop("rounding to more than 308 digits")
        from_user = False
        if makes_text and name not in ANSWERING:
            measured = [budget.measure(value) for value in values]
            lines = 1 + (str.count(values[0], "\n") if name == "indent" and isinstance(values[0], str) else 0)
            width = sum(numbers) + sum(len(value) for value in values[1:] if isinstance(value, str))
            budget.allocate(6 * sum(size for size, _ in measured) + 4 * lines * width)
            from_user = any(marked for _, marked in measured)
        result = fn(*args, **kwargs)
        if isinstance(result, Iterator):
            return budget.each(result)
        if type(result) is str and from_user:
            return whole(result)
        return budget.made(result)

    if hasattr(fn, "jinja_pass_arg"):
        run.jinja_pass_arg = fn.jinja_pass_arg  # type: ignore[attr-defined]
    return run


def charwise_filter(sandbox: Printer, name: str) -> Callable[[Any], str]:
    """A filter that changes a string character by character."""
    fn = FILTERS[name]

    def run(value: Any) -> str:
        text = sandbox.text(value)
        sandbox.budget.allocate(12 * len(text))
        return charwise(text, fn(text))

    return run


def to_json(budget: Budget, value: Any, ensure_ascii: Any, indent: Any, separators: Any, sort_keys: Any) -> str:
    """``json.dumps`` with Hugging Face's defaults; a user's as soon as any part is."""
    budget.step()
    size, from_user = budget.measure(value)
    spaces = indent if isinstance(indent, int) else len(indent or "")
    if spaces > 16 or any(len(part) > 16 for part in separators or ()):
        raise budget.stop("tojson with an indent or separator over 16 characters")
    budget.allocate(size * (3 + spaces))
    text = json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
    return whole(text) if from_user else text


def own_filters(sandbox: Printer) -> dict[str, Any]:
    """The filters written anew: because they keep marks exactly, or because jinja2's could not be bounded."""

    def tojson(
        x: Any, ensure_ascii: Any = False, indent: Any = None, separators: Any = None, sort_keys: Any = False
    ) -> str:
        return to_json(sandbox.budget, x, ensure_ascii, indent, separators, sort_keys)

    @pass_environment
    def join(environment: Any, value: Any, d: Any = "", attribute: Any = None) -> str:
        items = value if attribute is None else map(make_attrgetter(environment, attribute), value)
        texts = (sandbox.text(item) for item in items)
        return STRING_METHODS["join"](sandbox.budget, sandbox.text(d), texts)

    def replace(s: Any, old: Any, new: Any, count: Any = None) -> str:
        return STRING_METHODS["replace"](
            sandbox.budget, sandbox.text(s), sandbox.text(old), sandbox.text(new), -1 if count is None else count
        )

    def trim(value: Any, chars: Any = None) -> str:
        return STRING_METHODS["strip"](sandbox.budget, sandbox.text(value), chars)

    def format_(value: Any, *args: Any, **kwargs: Any) -> str:
        if args and kwargs:
            raise jinja2.TemplateRuntimeError("format: positional and keyword arguments at the same time")
        return percent(sandbox.budget, sandbox.text(value), kwargs or args)

    def escape(value: Any) -> str:
        text = sandbox.text(value)
        sandbox.budget.allocate(24 * len(text))
        result = str(escape_html(text))
        return whole(result) if is_users(text) else result

    @pass_environment
    def sum_(environment: Any, iterable: Any, attribute: Any = None, start: Any = 0) -> Any:
        items = iterable if attribute is None else map(make_attrgetter(environment, attribute), iterable)
        if isinstance(start, str):
            raise TypeError("sum of strings: use join")
        total = start
        for item in sandbox.budget.each(items):
            total = sandbox.call_binop(None, "+", total, item)
        return total

    return {
        "tojson": tojson,
        "join": join,
        "replace": replace,
        "trim": trim,
        "format": format_,
        "sum": sum_,
        "string": sandbox.text,
        "safe": sandbox.text,  # nothing is escaped here unless the template asks for it
        **dict.fromkeys(("e", "escape", "forceescape"), escape),
    }


def private_filters(sandbox: Printer) -> dict[str, Any]:
    """What the syntax tree's loops, ``~``, slices, comparisons and literals were turned into."""

    def tilde(*values: Any) -> str:
        texts = [sandbox.text(value) for value in values]
        sandbox.budget.allocate(50 + 4 * sum(map(len, texts)))
        return concat(texts)

    def take(value: Any, start: Any, stop: Any, step: Any) -> Any:
        sandbox.budget.step()
        return sandbox.budget.made(value[start:stop:step])

    def tick(value: Any) -> Any:
        sandbox.budget.step()
        return value

    def new(value: Any) -> Any:
        sandbox.budget.step()
        return sandbox.budget.made(value)

    return {
        EACH: lambda value: sandbox.budget.each(value),
        CONCAT: tilde,
        SLICE: take,
        NEW: new,
        TICK: tick,
    }
