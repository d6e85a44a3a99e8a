"""What a template may call, one row each, charged before it runs: methods of containers, loops, macros, functions.

String methods have a table of their own. Whatever is in neither is refused by name.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime
from types import BuiltinMethodType, MethodType
from typing import Any

import jinja2
from jinja2.runtime import BlockReference, LoopContext, Macro
from jinja2.sandbox import SecurityError, safe_range
from jinja2.utils import Cycler, Joiner, Namespace

from edgellm.chat_template.budget import Budget
from edgellm.chat_template.user_text import is_users, whole

LOOP_ARGUMENTS = ("_loop_vars", "_block_vars")  # jinja2 passes these for functions that want the context


class RaisedByTemplate(jinja2.TemplateError):
    """The template called ``raise_exception``; the message is its own."""


class TemplateNamespace(Namespace):
    """``namespace()`` without underscore names, and with a short ``repr``."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, *rest = args
        attributes = dict(*rest, **kwargs)
        for name in attributes:
            TemplateNamespace._check_name(name)
        Namespace.__init__(self, attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        TemplateNamespace._check_name(name)
        Namespace.__setitem__(self, name, value)

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


def small(budget: Budget, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """A call whose cost does not grow with its arguments."""


def walk(budget: Budget, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """A call that may walk all of its arguments, to write, compare or hash them."""
    budget.work(100 + 2 * sum(budget.measure(value)[0] for value in (*args, *kwargs.values())))


def copy(budget: Budget, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """A call that makes a container of its arguments; its result is charged again by its slots."""
    walk(budget, args, kwargs)
    slots = sum(len(value) for value in args if hasattr(value, "__len__")) + len(args) + len(kwargs)
    budget.bytes_left += budget.allocate(104 * slots)


def copy_keys(budget: Budget, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """``dict(pairs)``: keys other than text may be made to collide, and then each is compared with each."""
    copy(budget, args, kwargs)
    pairs = args[0] if args and isinstance(args[0], list | tuple) else ()
    n_chosen = sum(not (isinstance(pair, list | tuple) and pair and isinstance(pair[0], str)) for pair in pairs)
    budget.work(50 * n_chosen * n_chosen)


Cost = Callable[[Budget, tuple[Any, ...], dict[str, Any]], None]

# (type, method) -> its cost; the object itself counts as the first argument
METHODS: dict[tuple[type, str], Cost] = {
    **{(kind, name): walk for kind in (list, tuple) for name in ("index", "count")},
    **{(dict, name): small for name in ("items", "keys", "values")},
    (dict, "get"): small,
    (dict, "copy"): copy,
    (list, "copy"): copy,
    (float, "is_integer"): small,
    (LoopContext, "cycle"): small,
    (LoopContext, "changed"): walk,
    (Cycler, "next"): small,
    (Cycler, "reset"): small,
}

TEMPLATE_DICT = TemplateDict()
FUNCTIONS: dict[Any, Cost] = {
    safe_range: small,
    TEMPLATE_DICT: copy_keys,
    TemplateNamespace: copy,
    Cycler: copy,
    Joiner: small,
    raise_exception: walk,
    strftime_now: small,
}

# objects that are called themselves
CALLABLES: dict[type, Cost] = {Macro: walk, BlockReference: small, Joiner: small, LoopContext: small}


def cost_of_call(called: Any, extensions: tuple[type, ...]) -> Cost:
    """The row of what a template calls; SecurityError when there is none."""
    if isinstance(called, BuiltinMethodType | MethodType):
        owner, name = called.__self__, called.__name__
        if isinstance(owner, extensions):
            return small
        if (type(owner), name) not in METHODS:
            raise SecurityError(f"the method {name!r} of {type(owner).__name__} is not one that chat templates may use")
        return METHODS[type(owner), name]
    try:
        cost = FUNCTIONS.get(called)
    except TypeError:  # not hashable
        cost = None
    if cost is None:
        cost = next((cost for kind, cost in CALLABLES.items() if isinstance(called, kind)), None)
    if cost is None and not isinstance(called, jinja2.Undefined):  # whose call raises its own error
        raise SecurityError(f"a {type(called).__name__} is not something that chat templates may call")
    return cost or small
