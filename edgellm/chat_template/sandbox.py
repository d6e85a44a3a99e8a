"""The environment a chat template runs in: Hugging Face's functions, jinja2's immutable sandbox, and a budget.

jinja2 lets an environment answer for calls, operators, filters and tests. What it does natively is turned into filters
on the syntax tree first (loops, ``~``, slices, comparisons, list and dict literals), so nothing that costs time or
memory, and nothing that makes a string, happens outside this folder.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Mapping
from types import BuiltinMethodType
from typing import Any

import jinja2
import jinja2.ext
from jinja2 import nodes
from jinja2.lexer import Token, TokenStream
from jinja2.runtime import LoopContext
from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError, safe_range
from jinja2.utils import Cycler, Joiner

from edgellm.chat_template.budget import Budget, BudgetExceeded, text_bytes
from edgellm.chat_template.calls import (
    LOOP_ARGUMENTS,
    TEMPLATE_DICT,
    RaisedByTemplate,
    TemplateNamespace,
    copy,
    copy_keys,
    cost_of_call,
    raise_exception,
    strftime_now,
)
from edgellm.chat_template.filters import Each, chat_filters
from edgellm.chat_template.formatting import format_text
from edgellm.chat_template.operations import binary_operation, chat_tests
from edgellm.chat_template.rewrite import CountedNodes
from edgellm.chat_template.string_methods import STRING_METHODS, call_string_method
from edgellm.chat_template.user_text import concat, whole


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
        self.tests = chat_tests(self)
        self.globals = {
            "range": safe_range,
            "dict": TEMPLATE_DICT,
            "namespace": TemplateNamespace,
            "cycler": Cycler,
            "joiner": Joiner,
            "raise_exception": raise_exception,
            "strftime_now": strftime_now,
        }

    @property
    def budget(self) -> Budget:
        """The running budget."""
        budget = self.active.budget
        assert budget is not None, "template code runs only inside ChatTemplate's load and render"
        return budget

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        return CountedNodes(self).visit(super()._parse(source, name, filename))

    def printed(self, value: Any) -> Any:
        """What ``{{ value }}`` prints; a list or dict is written out here, within the budget and with its marks."""
        budget = self.budget
        budget.step()
        if value is None or isinstance(value, str | int | float | jinja2.Undefined):
            return value
        size, from_user = budget.measure(value)
        charge = budget.allocate(3 * size, 6 * size)
        text = str(value)
        return budget.text(whole(text) if from_user else text, charge)

    def text(self, value: Any) -> str:
        """``str(value)`` with its marks."""
        return str(self.printed(value))

    def concat(self, parts: Iterable[str]) -> str:
        """Join what a macro or a block printed."""
        budget, texts, charge = self.budget, [], 0
        for part in parts:  # the parts of a generator are made as they are asked for
            budget.step()
            charge += budget.allocate(text_bytes(part))
            texts.append(part)
        return budget.text(concat(texts or [""]), charge)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """The arithmetic operators."""
        return binary_operation(self.budget, operator, left, right)

    def call_filter(self, name: str, *args: Any, **kwargs: Any) -> Any:
        """A filter that ``map`` names."""
        self._check_name("filter", name, self.filters)
        return super().call_filter(name, *args, **kwargs)

    def call_test(self, name: str, *args: Any, **kwargs: Any) -> Any:
        """A test that ``select`` names."""
        self._check_name("test", name, self.tests)
        return super().call_test(name, *args, **kwargs)

    def _check_name(self, kind: str, name: Any, table: Mapping[str, Any]) -> None:
        if not isinstance(name, str) or name.startswith("\0") or name not in table:
            raise SecurityError(f"the {kind} {str(name)[:80]!r} is not one that chat templates may use")

    def call(self, context: Any, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        """Every call of a template: its macros, the functions of Hugging Face, methods of strings and containers."""
        budget = self.budget
        budget.step()
        if isinstance(obj, BuiltinMethodType) and isinstance(obj.__self__, str):
            named = {key: value for key, value in kwargs.items() if key not in LOOP_ARGUMENTS}
            if obj.__name__ == "format":
                return format_text(budget, self, obj.__self__, args, named)
            if obj.__name__ in STRING_METHODS:
                return call_string_method(budget, obj.__name__, obj.__self__, args, named)
        cost = cost_of_call(obj, (GenerationTag,))
        owner = (obj.__self__,) if isinstance(obj, BuiltinMethodType) else ()
        cost(budget, (*owner, *args), kwargs)
        if isinstance(obj, LoopContext) and args:
            args = (Each(budget, args[0]), *args[1:])
        result = super().call(context, obj, *args, **kwargs)
        return budget.made(result) if cost in (copy, copy_keys) else result

    def wrap_str_format(self, value: Any) -> None:
        """``str.format`` needs no wrapper: ``call`` answers for it."""
        return None


__all__ = ["BudgetExceeded", "RaisedByTemplate", "Sandbox", "SecurityError"]
