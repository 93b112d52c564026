"""The functions of a method's file: `score`, and those that it may have besides. Without one, its default stands here.

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
from pipelines.settings.methods import SCORERS
from pipelines.settings.select import SelectConfig


@dataclass(frozen=True)
class Work:
    """What scores cost, known before they are computed.

    Attributes:
        whole: tokens of the whole run, by the label of their progress bar.
        left: what is not done yet of them.
        bytes: what the features will occupy on disk.
    """

    whole: Mapping[str, float] = field(default_factory=dict)
    left: Mapping[str, float] = field(default_factory=dict)
    bytes: int = 0


@dataclass(frozen=True)
class Asked:
    """A question of `datatools explain`: why this row of a finished run?

    Attributes:
        config: the run's settings.
        folder: the run's folder.
        pool: its pool.
        target: its target rows.
        index: the pool row.
    """

    config: SelectConfig
    folder: Path
    pool: Rows
    target: Rows
    index: int


Columns = Callable[[Context, Sequence[int] | None], Tensor]


@dataclass(frozen=True)
class Space:
    """One part of the space in which a method compares rows: stores of unit vectors, and what it counts.

    Attributes:
        weight: of its inner products; those of all parts sum to 1.
        pool: the folder of the pool's store.
        target: the folder of the target's.
    """

    weight: float
    pool: Path
    target: Path


@dataclass(frozen=True)
class Scorer:
    """The functions of one method.

    Attributes:
        score: scores the pool.
        columns: (context, pool rows, or None for the whole pool) -> float32 [rows, m], what `score` aggregates: the
            similarity of each of these rows to each usable target row, or to whatever else the columns are. Higher is
            better; NaN stands where a row cannot be used. Only the features of these rows are computed, and they are
            kept, so that an expensive method can score a shortlist. A row's values do not depend on which others are
            asked for, except by rounding. None for a method that scores rows without columns.
        groups: the names and the group, int64 [m], of the columns, as `datatools.aggregate` takes them.
        work: what that costs.
        check: raises a UsageError for settings that it cannot work with, before anything is read.
        reuse: flags with which another run computes none of the features again, for a finished run in `config.out`.
        nearest: float32 [m], the similarity of a pool row to each usable target row; None if it compares with none.
        tokens: the loss of each token of a pool row's answer with the model as it is and as the method adapts it, as
            `[{"token": ..., "before": ..., "after": ...}]`; None for a method that adapts nothing.
        spaces: where a finished run keeps the vectors that it compared; None if it keeps none.
        layers: which layers carry the similarity with some target rows (rows of `target`), as
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
    layers: Callable[[Asked, list[int]], list[dict[str, Any]]] = lambda asked, rows: []


def scorer(name: str) -> Scorer:
    """The functions of the method `name`; its module is imported."""
    module = import_module(SCORERS[name])
    optional = ("columns", "groups", "work", "check", "reuse", "nearest", "spaces", "tokens", "layers")
    return Scorer(module.score, **{part: getattr(module, part) for part in optional if hasattr(module, part)})
