"""The names in the tables of optimizers, schedules, ..., read from the tables' source: torch is not imported for it."""

from __future__ import annotations

import ast
import sys
from functools import cache
from pathlib import Path

from datatools import UsageError
from optim.unknown import did_you_mean, instead_of

_ROOT = Path(__file__).resolve().parents[2]
TABLES: dict[str, tuple[str, str]] = {
    "optimizer": ("optim/rules/__init__.py", ""),
    "schedule": ("optim/schedules.py", "SCHEDULES"),
    "projector": ("datatools/projectors/__init__.py", "PROJECTORS"),
    "aggregation": ("datatools/less/aggregate.py", "AGGREGATIONS"),
    "selector": ("datatools/selection/selectors.py", "SELECTORS"),
}
"""What is named -> the file, and the dictionary in it whose keys are the names; without one, the names are those of the
modules that it imports."""


def known(kind: str) -> tuple[str, ...]:
    """The names of one table, in its order: of the table itself where it is loaded, else of its source.

    Returns:
        No names where the source is not there to be read.
    """
    file, table = TABLES[kind]
    loaded = sys.modules.get(file.removesuffix(".py").removesuffix("/__init__").replace("/", "."))
    return tuple(getattr(loaded, table)) if table and hasattr(loaded, table) else _read(file, table)


@cache
def _read(file: str, table: str) -> tuple[str, ...]:
    try:
        tree = ast.parse((_ROOT / file).read_text(encoding="utf-8"))
    except OSError:
        return ()
    if not table:
        return tuple(str(node.module).rpartition(".")[2] for node in tree.body if isinstance(node, ast.ImportFrom))
    for node in tree.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.target.id == table:
            keys = node.value.keys if isinstance(node.value, ast.Dict) else []
            return tuple(key.value for key in keys if isinstance(key, ast.Constant) and isinstance(key.value, str))
    return ()


def check(kind: str, name: str, setting: str) -> None:
    """Refuse a name that is in no table, in the words of the table's own package. Raises: UsageError."""
    names = known(kind)
    if not names or name in names:
        return
    if kind == "optimizer":
        raise UsageError(f"{setting}: no optimizer is called {name!r}{instead_of(name, names)}")
    raise UsageError(f"{setting}: no {kind} is called {name!r}{did_you_mean(name, names)}")
