"""The table of selection methods, and the facts about each that are known before its code is loaded.

A method is a file with a record, `METHOD = Method(...)`, and a function `score`; `pipelines.select.scorer` lists the
other functions that it may have. Code that needs facts about a method (settings, help, `ls`, reports, audits) reads
the record from the source, without importing torch, so its values must be literals.
"""

from __future__ import annotations

import ast
import sys
from dataclasses import dataclass, replace
from functools import cache
from typing import Literal

from pipelines.settings.names import source_of

SCORERS: dict[str, str] = {
    "auto": "pipelines.select.auto",
    "less": "pipelines.select.less",
    "gist": "pipelines.select.gist",
    "random": "pipelines.select.random",
    "random-length": "pipelines.select.random_length",
    "tfidf": "pipelines.select.tfidf",
    "bm25": "pipelines.select.bm25",
    "rds": "pipelines.select.rds",
    "tov": "pipelines.select.tov",
    "tacs": "pipelines.select.tacs",
    "loss": "pipelines.select.loss",
}
"""Name -> the module, in the order of lists and messages."""

DEFAULT = next(iter(SCORERS))
"""The method of a selection that names none."""

FULL = "full"
"""The arm of an audit that is no method: the whole pool."""


@dataclass(frozen=True, kw_only=True)
class Method:
    """The facts that the rest of the program knows about a method. Higher scores are better: rank 1 is the highest.

    Attributes:
        summary: How rows are chosen, for `datatools ls methods`.
        title: The name in reports.
        meaning: The meaning of one score, in full sentences, for reports.
        label: The name in an audit.
        rows: The chosen rows in the sentence "than with ..."; the label if empty.
        needs: What the method needs: a target, a model, gradients (with a warm-up run or the user's own checkpoints).
        kind: The role in an audit: a baseline (random rows), a method that compares texts or states, or neither ("").
        matches_length: Whether the method is the control for answer length.
        selector: How rows are taken by default, a name in `datatools.SELECTORS`.
        forward: The rows that need a forward pass; an audit estimates the cost from them.
        walks: Whether the model takes steps on the target, which need gradients.
        passes: How often the gradient of a pool row is computed, on average; None is once at each checkpoint.
        candidates: The selections that `verify` compares, if the method has several; the first is the method's own.
        stored: Whether the computed features are kept and may serve another run.
        checkpoints: The checkpoints of the warm-up at which gradients are taken, unless `features.checkpoints` says.
        objectives: What its target may be, values of the setting `objective`.
        nearest: The heading above the nearest target rows in `datatools explain`.
        measure: The kind of similarity in that table.
        cost: The cost of a score.
        limits: What the method cannot see.
        name: The name in `SCORERS`, set when the record is read.
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
    walks: bool = False
    passes: float | None = None
    candidates: tuple[str, ...] = ()
    stored: bool = False
    checkpoints: Literal["all", "last"] = "all"
    objectives: tuple[Literal["ce", "dpo", "reward"], ...] = ("ce",)
    nearest: str = "target rows that it is most like"
    measure: str = "cosine"
    name: str = ""


def method(name: str) -> Method | None:
    """Return the record of a method; None if the table does not have the name (for example, that of an older version).

    Args:
        name: The name of the method.
    """
    if name not in SCORERS:
        return None
    module = SCORERS[name]
    loaded = sys.modules.get(module)
    found: Method = loaded.METHOD if loaded is not None and hasattr(loaded, "METHOD") else _read(module)
    return replace(found, name=name)


def known(name: str) -> Method:
    """Return the record of a method that settings name and that has been checked.

    Args:
        name: The name of the method.

    Raises:
        KeyError: The table does not have the name.
    """
    found = method(name)
    if found is None:
        raise KeyError(name)
    return found


def arms() -> tuple[str, ...]:
    """Return what an audit may compare a selection with: the methods that need no gradients, and the whole pool."""
    return (*(name for name in SCORERS if "gradients" not in known(name).needs), FULL)


def default_arms(*, target: bool) -> tuple[str, ...]:
    """What an audit compares a selection with unless it is told: random rows, and what is chosen by words alone.

    Args:
        target: whether there are target rows, which some of them need.
    """
    records = [known(name) for name in SCORERS]
    cheap = [one for one in records if one.kind == "baseline" or (one.kind and "model" not in one.needs)]
    return tuple(one.name for one in cheap if target or "target" not in one.needs)


@cache
def _read(module: str) -> Method:
    """Return the record in the source of `module`."""
    for node in source_of(module).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "METHOD":
            assert isinstance(node.value, ast.Call), module
            return Method(**{str(part.arg): ast.literal_eval(part.value) for part in node.value.keywords})
    raise AssertionError(f"{module} has no METHOD")
