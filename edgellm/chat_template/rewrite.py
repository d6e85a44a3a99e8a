"""Rewrites a template's syntax tree so that what jinja2 compiles to native Python goes through the sandbox's filters.

Loops, ``~``, slices, comparisons, ``*args`` and list or dict literals become calls of private filters, which charge
the budget and keep a user's characters marked. The result of a template does not change. Statements, filters and tests
that chat templates may not use are refused here, by name.
"""

from __future__ import annotations

from typing import Any

import jinja2
import jinja2.filters
import jinja2.tests
from jinja2 import nodes
from jinja2.sandbox import SecurityError
from jinja2.visitor import NodeTransformer

from edgellm.chat_template.budget import INTEGER_BITS, BudgetExceeded

# Private filter names; the sandbox gives them to no template that spells them.
EACH, CONCAT, SLICE, NEW, OPERAND, SPREAD = "\0each", "\0concat", "\0slice", "\0new", "\0operand", "\0spread"

MAX_DEPTH = 100  # of the syntax tree; the deepest published template has 22
REFUSED: dict[type[nodes.Node], str] = {
    nodes.Extends: "{% extends %}: there is no other template",
    nodes.Include: "{% include %}: there is no other template",
    nodes.Import: "{% import %}: there is no other template",
    nodes.FromImport: "{% from %}: there is no other template",
    nodes.ScopedEvalContextModifier: "{% autoescape %} is for web pages",
}


class CountedNodes(NodeTransformer):
    """Rewrites what jinja2 compiles to native Python into calls of the private filters."""

    def __init__(self, environment: jinja2.Environment) -> None:
        self.environment = environment
        self.depth = 0

    def visit(self, node: nodes.Node, *args: Any, **kwargs: Any) -> Any:
        if type(node) in REFUSED:
            raise SecurityError(REFUSED[type(node)])
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise BudgetExceeded(f"a syntax nested deeper than {MAX_DEPTH}")
        try:
            return super().visit(node, *args, **kwargs)
        finally:
            self.depth -= 1

    def wrap(self, node: Any, name: str, *args: nodes.Expr) -> nodes.Filter:
        return nodes.Filter(node, name, list(args), [], None, None, lineno=node.lineno, environment=self.environment)

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self.generic_visit(node)
        node.iter = self.wrap(node.iter, EACH)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return self.wrap(node.nodes[0], CONCAT, *node.nodes[1:])

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        self.generic_visit(node)
        if not isinstance(node.arg, nodes.Slice):
            return node
        none = nodes.Const(None, lineno=node.lineno, environment=self.environment)
        bounds = (node.arg.start, node.arg.stop, node.arg.step)
        return self.wrap(node.node, SLICE, *(none if bound is None else bound for bound in bounds))

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:
        self.generic_visit(node)
        node.expr = self.wrap(node.expr, OPERAND)
        for operand in node.ops:
            operand.expr = self.wrap(operand.expr, OPERAND)
        return node

    def visit_List(self, node: nodes.List | nodes.Tuple | nodes.Dict) -> nodes.Node:
        self.generic_visit(node)
        literal = all(isinstance(child, nodes.Const) for child in node.iter_child_nodes())
        return node if literal or getattr(node, "ctx", "load") != "load" else self.wrap(node, NEW)

    visit_Tuple = visit_Dict = visit_List

    def visit_Const(self, node: nodes.Const) -> nodes.Node:
        if isinstance(node.value, int) and node.value.bit_length() > INTEGER_BITS:
            raise BudgetExceeded(f"an integer of more than {INTEGER_BITS:,} bits")
        return node

    def visit_Call(self, node: nodes.Call | nodes.Filter | nodes.Test) -> nodes.Node:
        self.generic_visit(node)
        if node.dyn_args is not None:
            node.dyn_args = self.wrap(node.dyn_args, SPREAD)
        if node.dyn_kwargs is not None:
            node.dyn_kwargs = self.wrap(node.dyn_kwargs, SPREAD)
        return node

    def visit_Filter(self, node: nodes.Filter) -> nodes.Node:
        if node.name in jinja2.filters.FILTERS and node.name not in self.environment.filters:
            raise SecurityError(f"the filter {node.name!r} is not one that chat templates may use")
        return self.visit_Call(node)

    def visit_Test(self, node: nodes.Test) -> nodes.Node:
        if node.name in jinja2.tests.TESTS and node.name not in self.environment.tests:
            raise SecurityError(f"the test {node.name!r} is not one that chat templates may use")
        return self.visit_Call(node)
