"""Reads tests given as statements, and rewrites them so that a program cannot slip through.

Three things that Python allows would let wrong programs pass. NaN compares as False whichever way
one asks, so `not abs(f(x) - y) > 1e-6` holds for it; a called function may change its arguments,
among them what its result is compared with; and an IndexError ends a loop over a class that has
only `__getitem__`. So the operands of `<`, `<=`, `>` and `>=` are wrapped in `__ordered__`, methods
such as `__gt__` in `__comparing__`, a function whose result is not used in `__for_effect__`, and
classes in `__looped__`, see `code_peer`.
"""

from __future__ import annotations

import ast

NOT_COUNTED = (
    ast.Import,
    ast.ImportFrom,
    ast.FunctionDef,
    ast.AsyncFunctionDef,
    ast.ClassDef,
    ast.Assign,
    ast.AnnAssign,
    ast.AugAssign,
)
ORDERING = (ast.Lt, ast.LtE, ast.Gt, ast.GtE)
METHODS = ("__lt__", "__le__", "__gt__", "__ge__", "sort")
"""Attributes that compare by order."""


def split(text: str) -> list[tuple[str, bool]]:
    """Split a text into statements, each with True if it counts as a test.

    Imports, definitions and assignments do not count.

    Raises:
        ValueError: the text is not Python.
    """
    try:
        body = ast.parse(text).body
    except SyntaxError as error:
        raise ValueError(f"the tests cannot be parsed: {error}; they are {text[:80]!r}") from None
    guard = _Guard()
    return [(ast.unparse(guard.visit(node)), not isinstance(node, NOT_COUNTED)) for node in body]


class _Guard(ast.NodeTransformer):
    def visit_Compare(self, node: ast.Compare) -> ast.AST:
        self.generic_visit(node)
        sides = [node.left, *node.comparators]
        for place, operator in enumerate(node.ops):
            if isinstance(operator, ORDERING):
                sides[place : place + 2] = map(_ordered, sides[place : place + 2])
        node.left, *node.comparators = sides
        return node

    def visit_Attribute(self, node: ast.Attribute) -> ast.AST:
        self.generic_visit(node)
        if node.attr not in METHODS or not isinstance(node.ctx, ast.Load):
            return node
        return _wrapped("__comparing__", node.value, ast.Constant(node.attr))

    def visit_ClassDef(self, node: ast.ClassDef) -> ast.AST:
        self.generic_visit(node)
        node.decorator_list.append(ast.Name("__looped__", ast.Load()))
        return node

    def visit_Expr(self, node: ast.Expr) -> ast.AST:
        self.generic_visit(node)
        if isinstance(node.value, ast.Call):
            node.value.func = _wrapped("__for_effect__", node.value.func)
        return node


def _ordered(node: ast.expr) -> ast.expr:
    return _wrapped("__ordered__", node)


def _wrapped(name: str, *nodes: ast.expr) -> ast.expr:
    return ast.Call(ast.Name(name, ast.Load()), [*nodes], [])
