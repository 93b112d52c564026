"""The functions of a method's file: `score`, and optional ones, whose defaults are defined here.

A method is added with one file (see `pipelines.settings.methods.Method` for its record) and one line in `SCORERS`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

from torch import Tensor

from pipelines.rows.rows import Rows
from pipelines.select.scored import Context, Scored, subtask_groups
from pipelines.settings.methods import SCORERS, Method
from pipelines.settings.select import SelectConfig


@dataclass(frozen=True)
class Work:
    """The cost of scores, known before they are computed.

    Attributes:
        whole: The tokens of the whole run, by the label of their progress bar.
        left: The part of them that is not done yet.
        bytes: The size that the features will have on disk.
    """

    whole: Mapping[str, float] = field(default_factory=dict)
    left: Mapping[str, float] = field(default_factory=dict)
    bytes: int = 0


@dataclass(frozen=True)
class Asked:
    """A question of `datatools explain`: why was this row of a finished run selected or not?

    Attributes:
        config: The settings of the run.
        folder: The folder of the run.
        pool: Its pool.
        target: Its target rows.
        index: The pool row.
        candidate: The candidate that was kept, with `verify`; "" for the method's own scores.
    """

    config: SelectConfig
    folder: Path
    pool: Rows
    target: Rows
    index: int
    candidate: str = ""


@dataclass(frozen=True)
class Candidate:
    """One of the selections of a method that `verify` compares.

    Attributes:
        record: Its title, the meaning of its scores, its selector, and what is said about similarities.
        score: Returns its scores from what the candidates share (`Scorer.shared`); None if they cannot be computed for
            these rows.
    """

    record: Method
    score: Callable[[Any], Scored | None]


Columns = Callable[[Context, Sequence[int] | None], Tensor]


@dataclass(frozen=True)
class Space:
    """One part of the space in which a method compares rows: stores of unit vectors and their weight.

    Attributes:
        weight: The weight of its inner products; those of all parts sum to 1.
        pool: The folder of the pool's store.
        target: The folder of the target's store.
    """

    weight: float
    pool: Path
    target: Path


@dataclass(frozen=True)
class Scorer:
    """The functions of one method.

    Attributes:
        score: Scores the pool.
        columns: (context, pool rows, or None for the whole pool) -> float32 [rows, m], what `score` aggregates: the
            similarity of each of these rows to each usable target row, or to whatever else the columns are. Higher is
            better; rows that cannot be used have NaN. Only the features of these rows are computed, and they are kept,
            so that an expensive method can score a shortlist. Apart from rounding, the values of a row do not depend
            on which other rows are requested. None for a method that scores rows without columns.
        groups: Returns the names and the group, int64 [m], of the columns, as `datatools.aggregate` takes them.
        work: Returns the cost of the scores.
        check: Raises a UsageError for settings that the method cannot work with, before anything is read.
        reuse: Returns flags with which another run computes none of the features again, for a finished run in
            `config.out`.
        nearest: Returns the similarity of a pool row to each usable target row, float32 [m]; None if the method
            compares with none.
        tokens: Returns the loss of each token of a pool row's answer with the model as it is and as the method adapts
            it, as `[{"token": ..., "before": ..., "after": ...}]`; None for a method that adapts nothing.
        spaces: Returns where a finished run keeps the vectors that it compared; None if it keeps none.
        candidates: Returns the selections that `verify` compares, by the names of `Method.candidates`.
        shared: Returns what the candidates need of one context, so that they compute it once.
        layers: Returns which layers contribute to the similarity with some target rows (rows of `target`), as
            `[{"layer": ..., "cosine": ...}]`.
    """

    score: Callable[[Context], Scored]
    columns: Columns | None = None
    groups: Callable[[Context], tuple[list[str], Tensor]] = lambda context: subtask_groups(context.wanted)
    work: Callable[[Context], Work] = lambda context: Work()
    check: Callable[[SelectConfig], None] = lambda config: None
    reuse: Callable[[SelectConfig], list[str]] = lambda config: []
    nearest: Callable[[Asked], Tensor] | None = None
    tokens: Callable[[Asked], list[dict[str, Any]]] | None = None
    spaces: Callable[[SelectConfig, Path], list[Space]] | None = None
    candidates: Callable[[], Mapping[str, Candidate]] = dict
    shared: Callable[[Context], Any] = lambda context: context
    layers: Callable[[Asked, list[int]], list[dict[str, Any]]] = lambda asked, rows: []


def scorer(name: str) -> Scorer:
    """Import the module of a method, and return its functions.

    Args:
        name: The name of the method.
    """
    module = import_module(SCORERS[name])
    optional = ("columns", "groups", "work", "check", "reuse", "nearest", "spaces", "tokens", "layers",
                "candidates", "shared")  # fmt: skip
    return Scorer(module.score, **{part: getattr(module, part) for part in optional if hasattr(module, part)})
