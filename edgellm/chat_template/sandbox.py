"""The environment a chat template runs in: Hugging Face's functions, jinja2's immutable sandbox, and a budget.

jinja2 lets an environment answer for calls, operators, filters and tests. What it does natively is turned into filters
on the syntax tree first (loops, ``~``, slices, comparisons, list and dict literals), so nothing that costs time or
memory, and nothing that makes a string, happens outside this folder.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from datetime import datetime
from string import Formatter
from types import BuiltinMethodType
from typing import Any

import jinja2
import jinja2.ext
from jinja2 import nodes
from jinja2.lexer import Token, TokenStream
from jinja2.runtime import LoopContext, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment, SandboxedFormatter, SecurityError

from edgellm.chat_template.budget import Budget, BudgetExceeded
from edgellm.chat_template.filters import chat_filters
from edgellm.chat_template.rewrite import CountedNodes
from edgellm.chat_template.string_methods import STRING_METHODS, check_widths, is_users, percent, plain_fields
from edgellm.chat_template.user_text import concat, whole

COMPARING_TESTS = (
    "in",
    "eq",
    "equalto",
    "==",
    "ne",
    "!=",
    "lt",
    "lessthan",
    "<",
    "le",
    "<=",
    "gt",
    "greaterthan",
    ">",
    "ge",
)
CONTAINER_METHODS = frozenset({"get", "items", "keys", "values", "copy", "index", "count", "is_integer"})


class RaisedByTemplate(jinja2.TemplateError):
    """The template called ``raise_exception``; the message is its own."""


class GenerationTag(jinja2.ext.Extension):
    """``{% generation %}...{% endgeneration %}``: marks the answer for training, prints its body; counts tokens."""

    tags = {"generation"}

    def parse(self, parser: Any) -> nodes.Node:
        lineno = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_body"), [], [], body).set_lineno(lineno)

    def _body(self, caller: Any) -> Any:
        return caller()

    def filter_stream(self, stream: TokenStream) -> Iterator[Token]:
        environment: Any = self.environment
        for token in stream:
            environment.budget.token()
            yield token


class TemplateNamespace(jinja2.utils.Namespace):
    """``namespace()`` without underscore names, and with a short ``repr``."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, *rest = args
        attributes = dict(*rest, **kwargs)
        for name in attributes:
            TemplateNamespace._check_name(name)
        jinja2.utils.Namespace.__init__(self, attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        TemplateNamespace._check_name(name)
        jinja2.utils.Namespace.__setitem__(self, name, value)

    def __repr__(self) -> str:
        return "<Namespace>"

    @staticmethod
    def _check_name(name: Any) -> None:
        if isinstance(name, str) and name.startswith("_"):
            raise SecurityError(f"a namespace cannot hold the name {name!r}")


class TemplateDict:
    """``dict()`` as a function, so that no method of the type can be reached through it."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def __repr__(self) -> str:
        return "<dict>"


def raise_exception(message: Any) -> None:
    """What a template calls to refuse the messages."""
    raise RaisedByTemplate(str(message))


def strftime_now(template: str) -> str:
    """The local date and time, written as the template asks."""
    if len(template) > 256:
        raise SecurityError("strftime_now: a format of more than 256 characters")
    text = datetime.now().strftime(template)
    return whole(text) if is_users(template) else text


class ActiveBudget(threading.local):
    """The budget of the load or render that this thread is in."""

    budget: Budget | None = None


class Sandbox(ImmutableSandboxedEnvironment):
    """One environment serves every template and every thread; ``active.budget`` is set around each load and render."""

    intercepted_binops = frozenset({"+", "-", "*", "/", "//", "%", "**"})

    def __init__(self) -> None:
        self.active = ActiveBudget()
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[GenerationTag, jinja2.ext.loopcontrols],
            finalize=self.printed,
            optimized=False,  # nothing of a template runs before the budget of its render is set
        )
        self.filters = chat_filters(self)
        for name in COMPARING_TESTS:
            if name in self.tests:
                self.tests[name] = self._ticking(self.tests[name])
        del self.globals["lipsum"]  # random text
        self.globals.update(
            raise_exception=raise_exception,
            strftime_now=strftime_now,
            dict=TemplateDict(),
            namespace=TemplateNamespace,
        )

    @property
    def budget(self) -> Budget:
        """The running budget."""
        budget = self.active.budget
        assert budget is not None, "template code runs only inside ChatTemplate's load and render"
        return budget

    def _ticking(self, test: Any) -> Any:
        def ticking(*args: Any) -> Any:
            self.budget.step()
            return test(*args)

        return ticking

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        return CountedNodes(self).visit(super()._parse(source, name, filename))

    def printed(self, value: Any) -> Any:
        """What ``{{ value }}`` prints; a list or dict is written out here, within the budget and with its marks."""
        budget = self.budget
        budget.step()
        if value is None or isinstance(value, str | int | float | jinja2.Undefined):
            return value
        size, from_user = budget.measure(value)
        budget.allocate(3 * size)
        text = str(value)
        return whole(text) if from_user else text

    def text(self, value: Any) -> str:
        """``str(value)`` with its marks."""
        return str(self.printed(value))

    def concat(self, parts: Iterable[str]) -> str:
        """Join what a macro or a block printed."""
        parts = list(parts)
        self.budget.allocate(4 * sum(map(len, parts)))
        return concat(parts)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """The arithmetic operators; those that can make something large are charged first."""
        budget = self.budget
        budget.step()
        if operator == "+" and isinstance(left, str) and isinstance(right, str):
            budget.allocate(50 + 4 * (len(left) + len(right)))
            return concat((left, right))
        if operator == "%" and isinstance(left, str):
            return percent(budget, left, right)
        if isinstance(left, str | list | tuple) or isinstance(right, str | list | tuple):
            return self._sequence_binop(context, operator, left, right)
        if isinstance(left, int) and isinstance(right, int):
            bits = left.bit_length() * right if operator == "**" else left.bit_length() + right.bit_length()
            budget.check_integer(max(bits, left.bit_length(), right.bit_length() if operator != "**" else 0))
        return super().call_binop(context, operator, left, right)

    def _sequence_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        # list + list, sequence * number
        size, times = 0, 1
        for side in (left, right):
            if isinstance(side, int):
                times = max(side, 1)
            else:
                size += self.budget.measure(side)[0]
        self.budget.allocate(size * times if operator == "*" else size)
        result = super().call_binop(context, operator, left, right)
        if type(result) is str and is_users(left, right):
            return whole(result)
        return self.budget.made(result)

    def call(self, context: Any, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        """Every call of a template: its macros, the functions of Hugging Face, methods of strings and containers."""
        budget = self.budget
        budget.step()
        if isinstance(obj, BuiltinMethodType):
            owner, name = obj.__self__, obj.__name__
            if isinstance(owner, str):
                scope = ("_loop_vars", "_block_vars")  # jinja2 passes these for functions that want the context
                named = {key: value for key, value in kwargs.items() if key not in scope}
                if name == "format":
                    return self._format(owner, args, named)
                if name in STRING_METHODS:
                    return STRING_METHODS[name](budget, owner, *args, **named)
            if not isinstance(owner, list | tuple | dict | float) or name not in CONTAINER_METHODS:
                raise SecurityError(
                    f"the method {name!r} of {type(owner).__name__} is not one that chat templates may use"
                )
        elif isinstance(obj, LoopContext) and args:
            args = (budget.each(args[0]), *args[1:])
        elif isinstance(obj, Macro):
            size = sum(budget.measure(value)[0] for value in (*args, *kwargs.values()))
            budget.allocate(64 + 16 * (len(args) + len(kwargs)))
            if size > budget.bytes_left:
                raise budget.stop("arguments of a macro larger than the limit")
        return budget.made(super().call(context, obj, *args, **kwargs))

    def wrap_str_format(self, value: Any) -> None:
        """``str.format`` needs no wrapper: ``call`` answers for it."""
        return None

    def _format(self, text: str, args: Any, kwargs: Any) -> str:
        budget = self.budget
        size = budget.measure([*args, *kwargs.values()])[0]
        fields = [field for field in Formatter().parse(text) if field[1] is not None]
        specs = " ".join(field[2] or "" for field in fields)
        if "{" in specs:
            raise SecurityError("a format field whose width is computed")
        check_widths(budget, specs, len(fields), size)
        parts = plain_fields(text)
        if parts is not None and len(parts) == len(args) + 1:
            values = [self.text(value) for value in args]
            return concat([parts[0], *(piece for pair in zip(values, parts[1:], strict=True) for piece in pair)])
        result = SandboxedFormatter(self).vformat(text, args, kwargs)
        from_user = is_users(text) or any(budget.measure(value)[1] for value in (*args, *kwargs.values()))
        return whole(result) if from_user else result


__all__ = ["BudgetExceeded", "RaisedByTemplate", "Sandbox", "SecurityError"]
