"""Public docstrings of pipelines are in Google style: a summary line, and every argument under Args."""

import ast
import re
from collections.abc import Iterator

import pytest

from tests.conftest import REPOSITORY

FILES = sorted(str(path.relative_to(REPOSITORY)) for path in (REPOSITORY / "pipelines").rglob("*.py"))
ENTRY = re.compile(r"    (\*{0,2}\w+(?:, \*{0,2}\w+)*): ")
INLINE = re.compile(r"\b(Args|Returns|Raises|Yields|Source|Cost): *\S")


def entries(text: str, section: str) -> list[str]:
    """The names that a section of a docstring describes."""
    found = re.search(rf"^{section}:\n((?:    .*\n?|\n(?=    ))+)", f"{text}\n", re.MULTILINE)
    heads = [match[1] for line in (found[1] if found else "").splitlines() if (match := ENTRY.match(line))]
    return [name.strip("* ") for head in heads for name in head.split(",")]


def arguments(function: ast.FunctionDef) -> list[str]:
    of = function.args
    given = [*of.posonlyargs, *of.args, *of.kwonlyargs, *(a for a in (of.vararg, of.kwarg) if a)]
    return [one.arg for one in given if one.arg not in ("self", "cls") and not one.arg.startswith("_")]


def lacking(node: ast.FunctionDef | ast.ClassDef) -> Iterator[str]:
    """What the docstring of a function or class lacks."""
    text = ast.get_docstring(node)
    if not text:
        yield "has no docstring"
        return
    summary, _, rest = text.partition("\n")
    if rest and not rest.startswith("\n"):
        yield "has no summary on one line"
    if not re.search(r"[.:?')]$", summary):
        yield "has a summary without an end"
    if INLINE.search(text):
        yield "has a section that does not begin on a line of its own"
    if isinstance(node, ast.FunctionDef) and sorted(told := entries(text, "Args")) != sorted(arguments(node)):
        yield f"has the arguments {arguments(node)} and describes {told}"
    if heads := re.findall(r"^(Args|Attributes|Raises):\n    (?!\S+: )", text, re.MULTILINE):
        yield f"has no names under {heads[0]}"


def public(body: list[ast.stmt], prefix: str = "") -> Iterator[tuple[str, ast.FunctionDef | ast.ClassDef]]:
    """Public functions and classes with their public methods, by name."""
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            yield prefix + node.name, node
            if isinstance(node, ast.ClassDef):
                yield from public(node.body, f"{prefix}{node.name}.")


@pytest.mark.parametrize("file", FILES)
def test_public_docstrings_are_complete(file):
    tree = ast.parse((REPOSITORY / file).read_text(encoding="utf-8"))
    assert ast.get_docstring(tree), f"{file} has no docstring"
    wrong = [f"{file}:{node.lineno} {name} {what}" for name, node in public(tree.body) for what in lacking(node)]
    assert not wrong, "\n".join(wrong)


def test_what_is_lacking_is_found():
    code = '''
def f(a, b):
    """Add
    two numbers. Raises: nothing.

    Args:
        a: The first number.
        c: Another number.
    """
'''
    ((_, node),) = public(ast.parse(code).body)
    assert [what.split(" and ")[0] for what in lacking(node)] == [
        "has no summary on one line",
        "has a summary without an end",
        "has a section that does not begin on a line of its own",
        "has the arguments ['a', 'b']",
    ]
