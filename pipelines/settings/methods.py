"""The table of selection methods, and what is known about each before its code is loaded.

A method is a file with a record, `METHOD = Method(...)`, and a function `score`; `pipelines.select.scorer` lists the
other functions that it may have. Whoever asks by name (settings, help, `ls`, reports, audits) gets the record. It is
read from the source, so that asking does not import torch: its values must be literals.
"""

from __future__ import annotations

import ast
import sys
from dataclasses import dataclass, replace
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

SCORERS: dict[str, str] = {
    "less": "pipelines.select.less",
    "random": "pipelines.select.random",
    "random-length": "pipelines.select.random_length",
    "tfidf": "pipelines.select.tfidf",
    "bm25": "pipelines.select.bm25",
    "rds": "pipelines.select.rds",
    "loss": "pipelines.select.loss",
}
"""Name -> the module. The order is that of lists and messages."""

FULL = "full"
"""The arm of an audit that is no method: the whole pool."""


@dataclass(frozen=True, kw_only=True)
class Method:
    """What the rest of the program knows about a method. Higher scores are better: rank 1 is the highest.

    Attributes:
        summary: what rows are chosen by, for `datatools ls methods`.
        title: its name in reports.
        meaning: what one score means, in full sentences, for reports.
        label: what an audit calls it.
        rows: the rows that it picks, after "than with ..."; the label when empty.
        needs: what it needs: a target; a model; gradients (with a warm-up run, or checkpoints of the user's own).
        kind: what it is in an audit: a baseline (random rows), a rival that compares texts or states, or neither ("").
        matches_length: whether it is the control for answer length.
        selector: how rows are taken by default, a name of `datatools.SELECTORS`.
        forward: the rows that go through the model for a score, forward alone; what an audit estimates its cost from.
        stored: whether the features that it computes are kept and may serve another run.
        nearest: the heading over the nearest target rows in `datatools explain`.
        measure: what the similarity in that table is.
        cost: what a score costs.
        limits: what it cannot see.
        name: its name in `SCORERS`; set when the record is read.
    """

    summary: str
    title: str
    meaning: str
    label: str
    cost: str
    limits: str
    rows: str = ""
    needs: tuple[Literal["target", "model", "gradients"], ...] = ()
    kind: Literal["baseline", "similarity", ""] = ""
    matches_length: bool = False
    selector: str = "top_k"
    forward: tuple[Literal["pool", "target"], ...] = ()
    stored: bool = False
    nearest: str = "target rows that it is most like"
    measure: str = "cosine"
    name: str = ""


def method(name: str) -> Method | None:
    """The record of the method `name`; None if the table has no such name (an older version's, say)."""
    if name not in SCORERS:
        return None
    module = SCORERS[name]
    loaded = sys.modules.get(module)
    found: Method = loaded.METHOD if loaded is not None and hasattr(loaded, "METHOD") else _read(module)
    return replace(found, name=name)


def known(name: str) -> Method:
    """The record of a method that settings name: they have been checked.

    Raises:
        KeyError: if there is none.
    """
    found = method(name)
    if found is None:
        raise KeyError(name)
    return found


def arms() -> tuple[str, ...]:
    """What an audit may compare a selection with: the methods that need no gradients, and the whole pool."""
    return (*(name for name in SCORERS if "gradients" not in known(name).needs), FULL)


@cache
def _read(module: str) -> Method:
    """The record in the source of `module`."""
    spec = find_spec(module)
    assert spec is not None and spec.origin is not None, module
    for node in ast.parse(Path(spec.origin).read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "METHOD":
            assert isinstance(node.value, ast.Call), module
            return Method(**{str(part.arg): ast.literal_eval(part.value) for part in node.value.keywords})
    raise AssertionError(f"{module} has no METHOD")
