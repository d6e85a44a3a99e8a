"""Answers that keep a form: JSON Schema, regular expressions, Lark and GBNF, by llguidance (extra `structured`).

``compile_grammar`` makes a ``Grammar`` of a text once for a tokenizer; its ``constraint()`` follows one answer and says
at each token what may come next. What cannot be kept is refused by name when the grammar is made: no answer is ever
left unconstrained. Importing this brings nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from edgellm.structured.constraint import Constraint
    from edgellm.structured.grammar import Grammar, compile_grammar, lark_json

_HOMES = {"Constraint": "constraint", "Grammar": "grammar", "compile_grammar": "grammar"}
_HOMES |= {"lark_json": "grammar"}

__all__ = ["Constraint", "Grammar", "compile_grammar", "lark_json"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'edgellm.structured' has no attribute {name!r}")
    return getattr(importlib.import_module(f"edgellm.structured.{_HOMES[name]}"), name)
