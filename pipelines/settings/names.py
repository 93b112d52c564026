"""The names in the tables of optimizers, schedules, etc., read from the source of the tables, without torch."""

from __future__ import annotations

import ast
import sys
from collections.abc import Mapping
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from datatools import UsageError
from optim.unknown import did_you_mean, instead_of

_ROOT = Path(__file__).resolve().parents[2]
TABLES: dict[str, tuple[str, str]] = {
    "optimizer": ("optim/rules/__init__.py", ""),
    "schedule": ("optim/schedules.py", "SCHEDULES"),
    "projector": ("datatools/projectors/__init__.py", "PROJECTORS"),
    "aggregation": ("datatools/less/aggregate.py", "AGGREGATIONS"),
    "selector": ("datatools/selection/selectors.py", "SELECTORS"),
    "estimator": ("datatools/order/estimators/__init__.py", "ESTIMATORS"),
    "coreset method": ("datatools/colm/choice.py", "CORESET_METHODS"),
    "coreset feature": ("datatools/colm/colm.py", "CORESET_FEATURES"),
    "shape": ("datatools/order/shapes.py", "SHAPES"),
    "search": ("datatools/order/search.py", "SEARCHES"),
    "check": ("pipelines/diagnose/checks/__init__.py", "CHECKS"),
}
"""What is named -> the file, and the dictionary in it whose keys are the names, or that is made of a tuple of records
(HERDING is 'herding'); without a dictionary, the names are those of the modules that the file imports."""


def known(kind: str) -> tuple[str, ...]:
    """Return the names of one table, in order: from the table itself if it is loaded, else from its source.

    Args:
        kind: A key of `TABLES`.

    Returns:
        The names; empty if the source cannot be read.
    """
    return tuple(_entries(kind))


def fact(kind: str, name: str, attribute: str) -> Any:
    """Return a plain attribute of a method's record, for tables whose entries are "module:RECORD" or the record itself.

    Args:
        kind: A key of `TABLES`.
        name: The name of the method.
        attribute: The name of the attribute.

    Returns:
        The attribute of the class if its module is loaded, else from its source, without inherited attributes. None if
        it is missing.
    """
    entry = _entries(kind).get(name)
    if not isinstance(entry, str):
        return getattr(entry, attribute, None)
    module, _, record = entry.partition(":")
    if module in sys.modules:
        return getattr(getattr(sys.modules[module], record), attribute, None)
    return _attributes(module, record).get(attribute)


def _entries(kind: str) -> Mapping[str, Any]:
    file, table = TABLES[kind]
    loaded = sys.modules.get(file.removesuffix(".py").removesuffix("/__init__").replace("/", "."))
    found: Mapping[str, Any] = getattr(loaded, table) if table and hasattr(loaded, table) else _read(file, table)
    return found


@cache
def _read(file: str, table: str) -> dict[str, str]:
    """Return the names in the source of a table, each with its entry if that is a text."""
    try:
        tree = _parsed(_ROOT / file)
    except OSError:
        return {}
    if not table:
        return {str(node.module).rpartition(".")[2]: "" for node in tree.body if isinstance(node, ast.ImportFrom)}
    for node in tree.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.target.id == table:
            if isinstance(node.value, ast.DictComp) and isinstance(records := node.value.generators[0].iter, ast.Tuple):
                return {ast.unparse(record).lower(): "" for record in records.elts}
            entries = zip(node.value.keys, node.value.values, strict=True) if isinstance(node.value, ast.Dict) else ()
            return {
                key.value: str(value.value) if isinstance(value, ast.Constant) else ""
                for key, value in entries
                if isinstance(key, ast.Constant) and isinstance(key.value, str)
            }
    return {}


def title(optimizer: str) -> str:
    """Return what an optimizer is called in texts: the name with which the docstring of its file begins.

    Args:
        optimizer: Its name in settings, or any other text, which is returned as it is.
    """
    if optimizer not in known("optimizer"):
        return optimizer
    called, colon, _ = (ast.get_docstring(source_of(f"optim.rules.{optimizer}")) or "").partition(": ")
    return called if colon else optimizer


def source_of(module: str) -> ast.Module:
    """Return the syntax tree of a module, which is not imported: for records of methods, whose values are literals.

    Args:
        module: Dotted name of the module.

    Returns:
        Its syntax tree.

    Raises:
        OSError: There is no source to read.
    """
    path = _ROOT / f"{module.replace('.', '/')}.py"
    if not path.is_file():  # a plugin; finding one of our modules would import its package, and so torch
        found = find_spec(module)
        path = Path(found.origin or "") if found else path
    return _parsed(path)


def _parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


@cache
def _attributes(module: str, record: str) -> dict[str, Any]:
    """Return the plain values that a class, or the call that makes a record, sets in its source."""
    tree = source_of(module)
    made = {ast.unparse(node.targets[0]): node.value for node in tree.body if isinstance(node, ast.Assign)}
    if isinstance(call := made.get(record), ast.Call):
        return {str(part.arg): part.value.value for part in call.keywords if isinstance(part.value, ast.Constant)}
    body = next(node.body for node in tree.body if isinstance(node, ast.ClassDef) and node.name == record)
    return {
        ast.unparse(node.target): node.value.value
        for node in body
        if isinstance(node, ast.AnnAssign) and isinstance(node.value, ast.Constant)
    }


def check(kind: str, name: str, setting: str) -> None:
    """Refuse a name that is in no table, with the message of the table's own package.

    Args:
        kind: A key of `TABLES`.
        name: The name.
        setting: The setting that has this value, for the message.

    Raises:
        UsageError: The name is unknown.
    """
    names = known(kind)
    if not names or name in names:
        return
    if kind == "optimizer":
        raise UsageError(f"{setting}: no optimizer is called {name!r}{instead_of(name, names)}")
    raise UsageError(f"{setting}: no {kind} is called {name!r}{did_you_mean(name, names)}")
