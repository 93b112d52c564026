"""Public docstrings of optim are in Google style, as those of datatools: summary, arguments, results and errors."""

import ast
import re
from importlib import import_module

import pytest

from tests.conftest import REPOSITORY
from tests.datatools.test_docstrings import lacking, overrides, public

FILES = sorted(str(path.relative_to(REPOSITORY)) for path in (REPOSITORY / "optim").rglob("*.py"))
SUMMARY_END = re.compile(r"[.:?')]$")


def is_overload(node):
    """Whether a definition is a signature without a body, which the documented implementation follows."""
    return any(ast.unparse(decorator) == "overload" for decorator in node.decorator_list)


def without_summary(node):
    """What is wrong with the first line of a docstring."""
    summary, _, rest = (ast.get_docstring(node) or "").partition("\n")
    if (rest and not rest.startswith("\n")) or not SUMMARY_END.search(summary):
        yield "it has no summary on one line"


@pytest.mark.parametrize("file", FILES)
def test_public_docstrings_are_complete(file):
    tree = ast.parse((REPOSITORY / file).read_text(encoding="utf-8"))
    module = import_module(file.removesuffix(".py").removesuffix("/__init__").replace("/", "."))
    said = [
        f"{file}:{node.lineno} {name}: {what}"
        for name, node in public(tree.body)
        if not is_overload(node)
        for what in (
            *(() if overrides(module, name) and ast.get_docstring(node) else lacking(node)),
            *without_summary(node),
        )
    ]
    assert not said, "\n".join(said)
    assert ast.get_docstring(tree), f"{file} has no docstring"


def test_a_summary_of_two_lines_is_found():
    (said,) = [list(without_summary(node)) for _, node in public(ast.parse('def f():\n    """Add\n    one."""').body)]
    assert said == ["it has no summary on one line"]
