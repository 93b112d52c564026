"""Public docstrings of datatools are in Google style, and say what the code has: arguments, results and errors."""

import ast
import re
from collections.abc import Iterator
from importlib import import_module
from types import ModuleType

import pytest

from tests.conftest import REPOSITORY

FILES = sorted(str(path.relative_to(REPOSITORY)) for path in (REPOSITORY / "datatools").rglob("*.py"))
SECTION = re.compile(r"^(\w+):(.*)$")
ENTRY = re.compile(r"    (\*{0,2}\w+(?:, \w+)*): ")


def sections(text: str) -> dict[str, list[str]]:
    """The lines under each heading of a docstring."""
    found: dict[str, list[str]] = {}
    current: list[str] = []
    for line in text.splitlines():
        if match := SECTION.match(line):
            current = found.setdefault(match[1], [])
        elif line and not line.startswith("    "):
            current = []
        else:
            current.append(line)
    return found


def entries(lines: list[str]) -> list[str]:
    """The names that a section describes."""
    heads = [match[1] for line in lines if (match := ENTRY.match(line))]
    return [name.strip("* ") for head in heads for name in head.split(",")]


def arguments(function: ast.FunctionDef) -> list[str]:
    of = function.args
    given = [*of.posonlyargs, *of.args, *of.kwonlyargs, *(a for a in (of.vararg, of.kwarg) if a)]
    return [argument.arg for argument in given if argument.arg not in ("self", "cls")]


def fields(kind: ast.ClassDef) -> list[str]:
    """What a class is made from: the arguments of its `__init__`, or the public fields of a dataclass."""
    for node in kind.body:
        if isinstance(node, ast.FunctionDef) and node.name == "__init__":
            return arguments(node)
    named = [node for node in kind.body if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)]
    return [
        node.target.id
        for node in named
        if not node.target.id.startswith("_") and "ClassVar" not in ast.unparse(node.annotation)
    ]


def raised(function: ast.FunctionDef) -> set[str]:
    """The exceptions that the body raises by name."""
    nodes = [node.exc for node in ast.walk(function) if isinstance(node, ast.Raise) and node.exc is not None]
    names = [ast.unparse(node.func if isinstance(node, ast.Call) else node).rpartition(".")[2] for node in nodes]
    return {name for name in names if name[0].isupper() and name != "NotImplementedError"}


def lacking(node: ast.FunctionDef | ast.ClassDef) -> Iterator[str]:
    """What the docstring of a function or class does not say, or says wrongly."""
    text = ast.get_docstring(node)
    if not text:
        yield "it has no docstring"
        return
    has = sections(text)
    if re.search(r"^.*\b(Args|Returns|Raises|Yields): *\S", text, re.MULTILINE):
        yield "a section must begin on a line of its own"
    if isinstance(node, ast.ClassDef):
        told = entries([*has.get("Args", []), *has.get("Attributes", [])])
        yield from (f"{name} is not described" for name in fields(node) if name not in told)
        return
    told, given = entries(has.get("Args", [])), arguments(node)
    yield from (f"argument {name} is not described" for name in given if name not in told)
    yield from (f"there is no argument {name}" for name in told if name not in given)
    of_property = any("property" in ast.unparse(decorator) for decorator in node.decorator_list)
    result = ast.unparse(node.returns) if node.returns else "None"
    if not of_property and result not in ("None", "Never", "Iterator[None]") and not {"Returns", "Yields"} & set(has):
        yield f"{result} is not described under Returns or Yields"
    named = " ".join(has.get("Raises", []))
    yield from (f"{name} is not described under Raises" for name in raised(node) if name not in named)
    if ">>> " in text and "Example" not in has:
        yield "an example must be under Example"


def overrides(module: ModuleType, name: str) -> bool:
    """Whether a method is documented by a base class: then a summary is enough."""
    kind, _, method = name.rpartition(".")
    return bool(kind) and any(method in vars(base) for base in getattr(module, kind).__mro__[1:])


def public(body: list[ast.stmt], prefix: str = "") -> Iterator[tuple[str, ast.FunctionDef | ast.ClassDef]]:
    """Public functions, classes and their public methods, by their names."""
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            yield prefix + node.name, node
            if isinstance(node, ast.ClassDef):
                yield from public(node.body, f"{prefix}{node.name}.")


@pytest.mark.parametrize("file", FILES)
def test_public_docstrings_are_complete(file):
    tree = ast.parse((REPOSITORY / file).read_text(encoding="utf-8"))
    module = import_module(file.removesuffix(".py").removesuffix("/__init__").replace("/", "."))
    said = [
        f"{file}:{node.lineno} {name}: {what}"
        for name, node in public(tree.body)
        if not (overrides(module, name) and ast.get_docstring(node))
        for what in lacking(node)
    ]
    assert not said, "\n".join(said)
    assert ast.get_docstring(tree), f"{file} has no docstring"


def test_what_is_lacking_is_seen():
    code = '''
def f(a, b) -> int:
    """Add.

    Args:
        a: a number.
        c: another.

    Raises: nothing.
    """
    raise ValueError
'''
    (said,) = [list(lacking(node)) for _, node in public(ast.parse(code).body)]
    assert said == [
        "a section must begin on a line of its own",
        "argument b is not described",
        "there is no argument c",
        "int is not described under Returns or Yields",
        "ValueError is not described under Raises",
    ]
