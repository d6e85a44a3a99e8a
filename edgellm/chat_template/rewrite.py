"""Rewrites a template's syntax tree so that what jinja2 compiles to native Python goes through the sandbox's filters.

Loops, ``~``, slices, comparisons and list or dict literals become calls of private filters, which charge the budget and
keep a user's characters marked. The result of a template does not change.
"""

from __future__ import annotations

from typing import Any

import jinja2
import jinja2.filters
from jinja2 import nodes
from jinja2.sandbox import SecurityError
from jinja2.visitor import NodeTransformer

# Private filter names: no template can spell them.
EACH, CONCAT, SLICE, NEW, TICK = "\0each", "\0concat", "\0slice", "\0new", "\0tick"


class CountedNodes(NodeTransformer):
    """Rewrites what jinja2 compiles to native Python into calls of the private filters."""

    def __init__(self, environment: jinja2.Environment) -> None:
        self.environment = environment

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
        return self.wrap(node, TICK)

    def visit_List(self, node: nodes.List | nodes.Tuple | nodes.Dict) -> nodes.Node:
        self.generic_visit(node)
        literal = all(isinstance(child, nodes.Const) for child in node.iter_child_nodes())
        return node if literal or getattr(node, "ctx", "load") != "load" else self.wrap(node, NEW)

    visit_Tuple = visit_Dict = visit_List

    def visit_ScopedEvalContextModifier(self, node: nodes.ScopedEvalContextModifier) -> nodes.Node:
        raise SecurityError("{% autoescape %} is for web pages")

    def visit_Filter(self, node: nodes.Filter) -> nodes.Node:
        if node.name in jinja2.filters.FILTERS and node.name not in self.environment.filters:
            raise SecurityError(f"the filter {node.name!r} is not one that chat templates may use")
        return self.generic_visit(node)
