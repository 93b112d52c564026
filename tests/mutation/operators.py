"""Small wrong changes of a Python file: what a slip of the hand, or of the head, would leave behind.

A mutant replaces one piece of the text and nothing else. Texts are not changed: annotations, decorators, docstrings,
and what is said in an error (`raise` itself is). Neither are assertions, `zip(strict=)` among them: they hold unless
the code around them is wrong.
"""

from __future__ import annotations

import ast
import copy
from collections.abc import Iterator
from dataclasses import dataclass

COMPARISONS: dict[type[ast.cmpop], tuple[type[ast.cmpop], ...]] = {
    ast.Lt: (ast.LtE, ast.GtE), ast.LtE: (ast.Lt, ast.Gt), ast.Gt: (ast.GtE, ast.LtE), ast.GtE: (ast.Gt, ast.Lt),
    ast.Eq: (ast.NotEq,), ast.NotEq: (ast.Eq,), ast.In: (ast.NotIn,), ast.NotIn: (ast.In,),
    ast.Is: (ast.IsNot,), ast.IsNot: (ast.Is,),
}  # fmt: skip
ARITHMETIC: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult,
    ast.Mod: ast.Mult, ast.Pow: ast.Mult, ast.MatMult: ast.Mult, ast.LShift: ast.RShift, ast.RShift: ast.LShift,
}  # fmt: skip
PARTNERS = {
    "min": "max", "amin": "amax", "argmin": "argmax", "any": "all", "floor": "ceil", "sum": "mean",
    "clamp_min": "clamp_max", "triu": "tril", "sort": "flip", "startswith": "endswith", "append": "extend",
}  # fmt: skip
PARTNERS |= {b: a for a, b in PARTNERS.items()}
OPERATORS = (
    "comparison", "constant", "arithmetic", "and/or", "negated condition", "removed statement", "left-out keyword",
    "partner", "sign",
)  # fmt: skip


@dataclass(frozen=True)
class Mutant:
    """One change: `text` stands in place of the characters start:end of the file."""

    file: str
    operator: str
    start: int
    end: int
    text: str
    line: int

    def apply(self, source: str) -> str:
        """The file with the change in it."""
        return source[: self.start] + self.text + source[self.end :]

    def lines(self, source: str) -> tuple[str, str]:
        """The changed lines as they were and as they are, without indentation, joined by spaces."""
        first = source.rfind("\n", 0, self.start) + 1
        last = source.find("\n", self.end)
        last = len(source) if last < 0 else last
        before, after = source[first:last], self.apply(source)[first : last + len(self.text) - (self.end - self.start)]
        return tuple(" ".join(part.split()) for part in (before, after))  # type: ignore[return-value]


def mutants(file: str, source: str) -> list[Mutant]:
    """All of a file, in order."""
    tree = ast.parse(source)
    starts = [0]
    for line in source.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    encoded = source.splitlines(keepends=True)

    def place(line: int, column: int) -> int:  # columns count bytes
        return starts[line - 1] + len(encoded[line - 1].encode()[:column].decode())

    found: dict[tuple[int, int, str], Mutant] = {}
    for node, operator, replacement in changes(tree):
        start, end = place(node.lineno, node.col_offset), place(node.end_lineno, node.end_col_offset)  # type: ignore[attr-defined]
        text = replacement if isinstance(replacement, str) else f"({ast.unparse(replacement)})"
        mutant = Mutant(file, operator, start, end, text, node.lineno)  # type: ignore[attr-defined]
        if text != source[start:end]:
            found.setdefault((start, end, text), mutant)
    return sorted(found.values(), key=lambda m: (m.start, m.end, m.text))


def changes(tree: ast.AST) -> Iterator[tuple[ast.AST, str, ast.AST | str]]:
    """(node, operator, what stands in its place) for every change."""
    skipped: set[int] = set()
    for node in ast.walk(tree):
        if id(node) in skipped:
            skipped.update(id(child) for child in ast.iter_child_nodes(node))
            continue
        for part in texts(node):
            skipped.add(id(part))
        yield from of_node(node)


def texts(node: ast.AST) -> Iterator[ast.AST]:
    """The parts of a node in which nothing is changed."""
    for name in ("annotation", "returns"):
        if isinstance(part := getattr(node, name, None), ast.AST):
            yield part
    yield from getattr(node, "decorator_list", [])
    yield from getattr(node, "type_params", [])
    if isinstance(node, ast.Raise):
        yield from ast.iter_child_nodes(node)
    if isinstance(node, ast.JoinedStr | ast.Assert):
        yield from ast.iter_child_nodes(node)
    if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
        yield from ast.iter_child_nodes(node)
    if isinstance(node, ast.Call):
        called = ast.unparse(node.func)
        if called in ("isinstance", "issubclass"):
            yield from node.args[1:]
        if called in ("warnings.warn", "TypeVar", "Field", "cast", "Literal") or called.endswith("filterwarnings"):
            yield from ast.iter_child_nodes(node)
    if isinstance(node, ast.keyword) and node.arg == "strict":
        yield node.value
    if isinstance(node, ast.Subscript) and ast.unparse(node.value) in ("Literal", "ClassVar", "Mapping", "Callable"):
        yield from ast.iter_child_nodes(node)


def of_node(node: ast.AST) -> Iterator[tuple[ast.AST, str, ast.AST | str]]:
    """The changes of one node, of its children none."""
    if isinstance(node, ast.Compare):
        for i, operator in enumerate(node.ops):
            for other in COMPARISONS[type(operator)]:
                changed = copy.deepcopy(node)
                changed.ops[i] = other()
                yield node, "comparison", changed
    elif isinstance(node, ast.Constant):
        yield from ((node, "constant", text) for text in other_constants(node.value))
    elif isinstance(node, ast.BinOp) and type(node.op) in ARITHMETIC:
        if not isinstance(node.left, ast.Constant | ast.JoinedStr) or not isinstance(node.left.value, str):  # type: ignore[union-attr]
            yield node, "arithmetic", ast.BinOp(node.left, ARITHMETIC[type(node.op)](), node.right)
    elif isinstance(node, ast.AugAssign) and type(node.op) in ARITHMETIC:
        changed_assign = copy.deepcopy(node)
        changed_assign.op = ARITHMETIC[type(node.op)]()
        yield node, "arithmetic", ast.unparse(changed_assign)
        yield node, "removed statement", "pass"
    elif isinstance(node, ast.BoolOp):
        other_op = ast.Or() if isinstance(node.op, ast.And) else ast.And()
        yield node, "and/or", ast.BoolOp(other_op, node.values)
    elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
        yield node, "removed statement", "pass"
    elif isinstance(node, ast.Raise | ast.Continue | ast.Break):
        yield node, "removed statement", "pass"
    elif isinstance(node, ast.Assign) and all(isinstance(t, ast.Attribute | ast.Subscript) for t in node.targets):
        yield node, "removed statement", "pass"
    elif isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Load):
        name = node.id if isinstance(node, ast.Name) else node.attr
        if name in PARTNERS:
            other_name = PARTNERS[name]
            whole = other_name if isinstance(node, ast.Name) else f"{ast.unparse(node.value)}.{other_name}"
            yield node, "partner", whole
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.Not):
        yield node, "sign", node.operand
    for condition in conditions(node):
        if not (isinstance(condition, ast.UnaryOp) and isinstance(condition.op, ast.Not)):
            yield condition, "negated condition", ast.UnaryOp(ast.Not(), condition)
    if isinstance(node, ast.Call):
        for i, keyword in enumerate(node.keywords):
            if keyword.arg not in (None, "strict"):
                changed_call = ast.Call(node.func, node.args, node.keywords[:i] + node.keywords[i + 1 :])
                yield node, "left-out keyword", ast.unparse(changed_call)


def conditions(node: ast.AST) -> Iterator[ast.expr]:
    """What decides: of `if`, `while`, an inline `if` and comprehensions. Comparisons have changes of their own."""
    found: list[ast.expr] = []
    if isinstance(node, ast.If | ast.While | ast.IfExp):
        found = [node.test]
    elif isinstance(node, ast.comprehension):
        found = node.ifs
    yield from (test for test in found if not isinstance(test, ast.Compare))


def other_constants(value: object) -> list[str]:
    """Off by one, the other truth value, or twice as much; texts stay, and None."""
    if isinstance(value, bool):
        return [repr(not value)]
    if isinstance(value, int):
        return [repr(value + 1)] + ([repr(value - 1)] if value > 1 else [])
    if isinstance(value, float):
        return [repr(2 * value if value else 1.0)]
    return []
