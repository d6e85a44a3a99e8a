"""The filters a chat template may use, one row each, charged before they run; a user's characters stay marked.

``PASSING`` filters hand on the objects they get; ``MAKING`` filters make a string of their own, which is a user's as
soon as any argument is; ``ANSWERING`` ones give a number. A filter in no table is refused when the template is loaded.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import jinja2
from jinja2.filters import FILTERS, make_attrgetter
from jinja2.utils import pass_environment
from markupsafe import Markup

from edgellm.chat_template.budget import MAX_NESTING, Budget, char_bytes, text_bytes
from edgellm.chat_template.formatting import percent
from edgellm.chat_template.operations import Operand, joined
from edgellm.chat_template.rewrite import CONCAT, EACH, NEW, OPERAND, SLICE, SPREAD
from edgellm.chat_template.string_methods import STRING_METHODS, call_string_method, escape, linear
from edgellm.chat_template.user_text import SafeText, charwise, exact, is_users, safe, unsafe, whole

MAX_COUNT = 4096  # of lines, slices, widths, digits
PAIR_BYTES = 120  # of a group, or of a key and its value
MAX_DIGITS = 1 << 14  # of a number in a text

Cost = Callable[[Budget, list[Any]], int]  # charges a call with these values, and gives the bytes it charged


class Printer(Protocol):
    """What the filters need of the sandbox."""

    @property
    def budget(self) -> Budget:
        """The running budget."""

    def text(self, value: Any) -> str:
        """``str(value)`` with its marks."""

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """The arithmetic operators."""


# -- what a filter costs -----------------------------------------------------------------------------------------------


def small(budget: Budget, values: list[Any]) -> int:
    """One that looks at an item, or hands on one after the other while a step is charged for each."""
    return 0


def counted(budget: Budget, values: list[Any]) -> int:
    """One with a number that says how much is made."""
    if any(isinstance(value, int) and abs(value) > MAX_COUNT for value in values[1:]):
        raise budget.stop(f"a filter with a number over {MAX_COUNT}")
    return 0


def slots(budget: Budget, values: list[Any]) -> int:
    """One that makes a list of the items."""
    counted(budget, values)
    items = values[0]
    length = len(items) if hasattr(items, "__len__") else 0
    of_text = isinstance(items, str)  # each character becomes a string
    return budget.allocate(64 + 16 * length + (char_bytes(items) if of_text else 0), (500 if of_text else 100) * length)


def walk(budget: Budget, values: list[Any]) -> int:
    """One that compares or hashes each item once."""
    budget.work(2 * sum(budget.measure(value)[0] for value in values))
    return slots(budget, values)


def ordered(budget: Budget, values: list[Any]) -> int:
    """One that sorts: each item is compared about log2(n) times, at most to its end, after a copy in lower case."""
    items = values[0]
    length = len(items) if hasattr(items, "__len__") else 1
    size = budget.measure(items)[0]
    copied = budget.allocate(size, (length.bit_length() + 1) * (size // 2 + 100 * length))
    return slots(budget, values) + copied


def words(budget: Budget, values: list[Any]) -> int:
    """One that takes a text apart into words."""
    text = values[0] if isinstance(values[0], str) else ""
    return budget.allocate(44 * len(text), 100 * len(text))


def number(budget: Budget, values: list[Any]) -> int:
    """One that makes a number, maybe of a text."""
    if isinstance(values[0], str):
        if len(values[0]) > MAX_DIGITS and str.isalnum(values[0]):
            raise budget.stop(f"a number of more than {MAX_DIGITS:,} digits")
        linear(budget, values[0])
    if any(isinstance(value, int) and abs(value) > 308 for value in values[1:2]):
        raise budget.stop("rounding to more than 308 digits")
    return 0


def padded(budget: Budget, values: list[Any]) -> int:
    """One that makes a text: as long as its arguments, and as wide as its numbers in every line."""
    counted(budget, values)
    text = values[0] if isinstance(values[0], str) else ""
    width = sum(value for value in values[1:] if isinstance(value, int))
    width += sum(len(value) for value in values[1:] if isinstance(value, str))
    lines = 1 + str.count(text, "\n")
    charge = 6 * sum(budget.measure(value)[0] for value in values) + 4 * lines * width
    return budget.allocate(charge, charge)


def shortened(budget: Budget, values: list[Any]) -> int:
    """One that makes a text of no more than its arguments."""
    charge = 4 * sum(budget.measure(value)[0] for value in values)
    return budget.allocate(charge, charge)


PASSING: dict[str, Cost] = {
    **dict.fromkeys(("first", "last", "default", "d", "attr", "items"), small),
    **dict.fromkeys(("select", "selectattr", "reject", "rejectattr", "map"), small),
    **dict.fromkeys(("list", "reverse", "slice", "batch"), slots),
    **dict.fromkeys(("unique", "min", "max"), walk),
    **dict.fromkeys(("sort", "groupby", "dictsort"), ordered),
}
ANSWERING: dict[str, Cost] = {
    **dict.fromkeys(("count", "length"), small),
    **dict.fromkeys(("abs", "float", "int", "round"), number),
    "wordcount": words,
}
MAKING: dict[str, Cost] = {"indent": padded, "center": padded, "truncate": shortened}
FRESH = ("list", "reverse", "slice", "batch", "unique", "sort", "groupby", "dictsort", *ANSWERING)  # make their result
ATTRIBUTE = {"selectattr": 1, "rejectattr": 1, "groupby": 1, "unique": 2, "min": 2, "max": 2, "sort": 3}  # its place
WHOLE = ("list", "sort", "reverse", "slice", "groupby", "dictsort", "unique", "min", "max")  # take all of an iterator


def chat_filters(sandbox: Printer) -> dict[str, Any]:
    """Every filter by name, the private ones of the sandbox included."""
    return {
        **{name: bounded(sandbox, name, cost) for table in (PASSING, ANSWERING) for name, cost in table.items()},
        **{name: making(sandbox, name, cost) for name, cost in MAKING.items()},
        **{name: of_method(sandbox, name) for name in ("upper", "lower", "capitalize", "title")},
        **own_filters(sandbox),
        **private_filters(sandbox),
    }


def check_attribute(budget: Budget, attribute: Any) -> None:
    """Refuse the path of an attribute that is looked up part by part for every item."""
    for path in (attribute,) if isinstance(attribute, str) else attribute or ():
        if isinstance(path, str) and str.count(path, ".") + str.count(path, ",") > MAX_NESTING:
            raise budget.stop(f"an attribute of more than {MAX_NESTING} parts")


def bounded(sandbox: Printer, name: str, cost: Cost) -> Callable[..., Any]:
    """jinja2's filter ``name``, charged before it runs; its result is measured."""
    fn = FILTERS[name]
    n_hidden = 1 if hasattr(fn, "jinja_pass_arg") else 0  # the context or environment

    def run(*args: Any, **kwargs: Any) -> Any:
        budget = sandbox.budget
        budget.step()
        hidden, given = args[:n_hidden], list(args[n_hidden:])
        if given and name in WHOLE and isinstance(given[0], Iterator):
            given[0] = budget.listed(given[0])
        check_attribute(budget, kwargs.get("attribute", given[ATTRIBUTE[name] :][:1] if name in ATTRIBUTE else ()))
        charged = cost(budget, [*given, *kwargs.values()] or [None])
        result = fn(*hidden, *given, **kwargs)
        of_text = bool(given) and isinstance(given[0], str)
        if isinstance(result, Iterator):
            budget.bytes_left += 0 if of_text else charged
            return budget.stream(result, given[0] if given else None)
        if name not in FRESH:
            budget.bytes_left += charged
            return result
        if isinstance(result, list):
            budget.allocate(PAIR_BYTES * len(result) if name in ("groupby", "dictsort") else 0)
            return budget.parts(result, charged) if of_text else budget.made(result, charged)
        return budget.made(result, charged)

    if n_hidden:
        run.jinja_pass_arg = fn.jinja_pass_arg  # type: ignore[attr-defined]
    return run


def making(sandbox: Printer, name: str, cost: Cost) -> Callable[..., str]:
    """jinja2's filter ``name``, which makes a text of its arguments."""
    fn = FILTERS[name]
    n_hidden = 1 if hasattr(fn, "jinja_pass_arg") else 0

    def run(*args: Any, **kwargs: Any) -> str:
        budget = sandbox.budget
        budget.step()
        hidden, (value, *given) = args[:n_hidden], args[n_hidden:]
        text = sandbox.text(value)
        values = [text, *given, *kwargs.values()]
        charged = cost(budget, values)
        html = isinstance(text, SafeText)
        result = str(fn(*hidden, Markup(exact(text)) if html else text, *given, **kwargs))
        result = whole(result) if is_users(*values) else result
        return budget.text(safe(result) if html else unsafe(result), charged)

    if n_hidden:
        run.jinja_pass_arg = fn.jinja_pass_arg  # type: ignore[attr-defined]
    return run


def of_method(sandbox: Printer, name: str) -> Callable[[Any], str]:
    """A filter that changes a string character by character; ``title`` is not the method's."""
    fn = FILTERS[name]

    def run(value: Any) -> str:
        text = sandbox.text(value)
        if name != "title":
            return str(call_string_method(sandbox.budget, name, text, (), {}))
        charged = words(sandbox.budget, [text])
        return sandbox.budget.text(charwise(unsafe(text), fn(exact(text))), charged)

    return run


def to_json(budget: Budget, value: Any, ensure_ascii: Any, indent: Any, separators: Any, sort_keys: Any) -> str:
    """``json.dumps`` with Hugging Face's defaults; a user's as soon as any part is."""
    budget.step()
    size, from_user = budget.measure(value)
    spaces = indent if isinstance(indent, int) else len(indent or "")
    if spaces > 16 or any(len(part) > 16 for part in separators or ()):
        raise budget.stop("tojson with an indent or separator over 16 characters")
    charge = budget.allocate(size * (3 + max(spaces, 0)), size * (3 if indent is None else 12))
    text = json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
    return budget.text(whole(text) if from_user else text, charge)


def own_filters(sandbox: Printer) -> dict[str, Any]:
    """The filters written anew: because they keep marks exactly, or because jinja2's could not be bounded."""

    def tojson(
        x: Any, ensure_ascii: Any = False, indent: Any = None, separators: Any = None, sort_keys: Any = False
    ) -> str:
        return to_json(sandbox.budget, x, ensure_ascii, indent, separators, sort_keys)

    @pass_environment
    def join(environment: Any, value: Any, d: Any = "", attribute: Any = None) -> str:
        check_attribute(sandbox.budget, attribute)
        items = value if attribute is None else map(make_attrgetter(environment, attribute), value)
        texts = (unsafe(sandbox.text(item)) for item in items)
        return str(STRING_METHODS["join"](sandbox.budget, unsafe(sandbox.text(d)), texts))

    def replace(s: Any, old: Any, new: Any, count: Any = None) -> str:
        text, old, new = (unsafe(sandbox.text(value)) for value in (s, old, new))
        return str(STRING_METHODS["replace"](sandbox.budget, text, old, new, -1 if count is None else count))

    def trim(value: Any, chars: Any = None) -> str:
        return str(call_string_method(sandbox.budget, "strip", sandbox.text(value), (chars,), {}))

    def format_(value: Any, *args: Any, **kwargs: Any) -> str:
        if args and kwargs:
            raise jinja2.TemplateRuntimeError("format: positional and keyword arguments at the same time")
        return percent(sandbox.budget, sandbox.text(value), kwargs or args)

    @pass_environment
    def sum_(environment: Any, iterable: Any, attribute: Any = None, start: Any = 0) -> Any:
        check_attribute(sandbox.budget, attribute)
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
        "safe": lambda value: marked_safe(sandbox.budget, sandbox.text(value)),
        **dict.fromkeys(("e", "escape"), lambda value: escape(sandbox.budget, sandbox.text(value))),
        "forceescape": lambda value: escape(sandbox.budget, unsafe(sandbox.text(value))),
    }


def marked_safe(budget: Budget, text: str) -> str:
    """``text|safe``."""
    linear(budget, text, 1)
    charge = budget.allocate(text_bytes(text))
    return budget.text(safe(text), charge)


class Each:
    """What a ``for`` goes through, one step for each item; as long as what it holds."""

    def __init__(self, budget: Budget, items: Any) -> None:
        self.budget, self.items = budget, items

    def __iter__(self) -> Iterator[Any]:
        return self.budget.each(self.items)

    def __len__(self) -> int:
        return len(self.items)


def private_filters(sandbox: Printer) -> dict[str, Any]:
    """What the syntax tree's loops, ``~``, slices, comparisons and literals were turned into."""

    def tilde(*values: Any) -> str:
        texts = [unsafe(sandbox.text(value)) for value in values]
        return joined(sandbox.budget, texts)

    def take(value: Any, start: Any, stop: Any, step: Any) -> Any:
        budget = sandbox.budget
        budget.step()
        piece = slice(start, stop, step)
        if not isinstance(value, str | list | tuple):
            return value[piece]
        length = len(range(*piece.indices(len(value))))
        charge = 64 + (4 if isinstance(value, str) else 16) * length
        budget.allocate(charge, charge)
        taken = value[piece]
        if taken is value:
            budget.bytes_left += charge
            return value
        return budget.made(taken, charge)

    def new(value: Any) -> Any:
        sandbox.budget.step()
        return sandbox.budget.made(value)

    def spread(value: Any) -> Any:
        budget = sandbox.budget
        if isinstance(value, str):
            budget.allocate(char_bytes(value))
        else:
            budget.work(2 * budget.measure(value)[0])
        return budget.each(value) if isinstance(value, Iterator) else value

    return {
        EACH: lambda value: Each(sandbox.budget, value),
        CONCAT: tilde,
        SLICE: take,
        NEW: new,
        OPERAND: lambda value: Operand(sandbox.budget, value),
        SPREAD: spread,
    }
