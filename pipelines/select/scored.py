"""What a method receives (`Context`) and returns (`Scored`), and functions that methods share."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from datatools import AGGREGATIONS, Candidates, UsageError, aggregate, large, subtask_means
from pipelines.models import load as models
from pipelines.rows.rows import Rows
from pipelines.runs import following
from pipelines.runs.folder import Run
from pipelines.runs.seeds import derive_seed
from pipelines.settings.methods import Method
from pipelines.settings.select import SelectConfig


@dataclass(frozen=True, kw_only=True)
class Scored:
    """One score per pool row, higher is better, and how it was computed.

    Attributes:
        scores: float32 [n]; NaN where a row has no score.
        formula: `name` and `text` of the formula, and the `settings` of the update if there is one.
        status: Pool row -> "empty" or "nonfinite", if scoring found one of these.
        similarity: float32 [n, m], of each pool row with each target row.
        subtasks: Name -> float32 [n], the mean similarity with its target rows.
        norms: float32 [n], of the updates.
        coverage: Which of the trainable parameters the scores cover.
        checkpoints: The checkpoints at which gradients were computed.
        feature_bytes: The size of the features on disk.
        tokens: The tokens that went through a model for these scores, over all attempts.
        record: The record that describes the scores, if it is not that of the run's method.
        race: How `verify` came to these scores, for `summary.json`; empty without it.
    """

    scores: Tensor
    formula: Mapping[str, Any]
    status: Mapping[int, str] = field(default_factory=dict)
    similarity: Tensor | None = None
    subtasks: Mapping[str, Tensor] = field(default_factory=dict)
    norms: Tensor | None = None
    coverage: Mapping[str, Any] = field(default_factory=dict)
    checkpoints: list[dict[str, Any]] = field(default_factory=list)
    feature_bytes: int = 0
    tokens: int = 0
    record: Method | None = None
    race: Mapping[str, Any] = field(default_factory=dict)

    @cached_property
    def nearest(self) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """The most similar usable target row of each pool row (as a column of `similarity`), and its similarity.

        -1 and NaN for rows with a similarity that is not finite, and without `similarity`.
        """
        n = len(self.scores)
        if self.similarity is None:
            return np.full(n, -1), np.full(n, np.nan, np.float32)
        places, values = np.full(n, -1), np.full(n, np.nan, np.float32)
        for rows in large.blocks(self.similarity):
            part = self.similarity[rows]
            good = part.isfinite().all(1)
            best = part.nan_to_num(-torch.inf).max(1)
            places[rows] = torch.where(good, best.indices, -1).numpy()
            values[rows] = torch.where(good, best.values, torch.nan).float().numpy()
        return places, values


@dataclass(frozen=True)
class Context:
    """What a method may use; `model()` loads the model on first use, so methods that compare words need not load it.

    With `more`, work that a team shares may follow the scores; otherwise the leader does the rest by itself.
    """

    config: SelectConfig
    run: Run
    pool: Rows
    target: Rows | None
    model: Callable[[], models.LoadedModel]
    more: bool = True

    @property
    def wanted(self) -> Rows:
        """The target rows.

        Raises:
            UsageError: There are none.
        """
        if self.target is None:
            raise UsageError(f"--method {self.config.method} compares with target rows; name them with --target FILE")
        return self.target

    @property
    def features_folder(self) -> Path:
        """The folder in which features are kept."""
        return self.config.features.folder or self.run.path("features")

    def merge(self) -> None:
        """Mark the place after which scores are made from what the whole team has computed."""
        if not self.more:
            following.leave()


def subtask_groups(target: Rows) -> tuple[list[str], Tensor]:
    """Return the names of the subtasks, sorted, and the subtask of each usable target row, int64 [m].

    Args:
        target: The target; a row without a subtask belongs to "target".
    """
    rows = [target.pool[int(i)] for i in np.flatnonzero(target.usable)]
    named = [row.subtask or "target" for row in rows]
    names = sorted(set(named))
    return names, torch.tensor([names.index(name) for name in named])


def from_similarity(
    context: Context,
    similarity: Tensor,
    *,
    formula: Mapping[str, Any],
    good: Tensor | None = None,
    tokens: int = 0,
    groups: tuple[list[str], Tensor] | None = None,
) -> Scored:
    """Return scores of the whole pool from the similarity of pool rows to target rows.

    Args:
        context: What is scored.
        similarity: float32 [usable pool rows, usable target rows].
        formula: See `Scored`.
        good: bool [usable pool rows]; the others are marked "nonfinite" and have no score.
        tokens: See `Scored`.
        groups: The names and the group, int64 [m], of columns that are not target rows; there are then no nearest rows.
    """
    pool, how = context.pool, context.config.aggregate
    names, of_column = subtask_groups(context.wanted) if groups is None else groups
    usable = torch.from_numpy(np.flatnonzero(pool.usable))
    columns, of = (
        (subtask_means(similarity, of_column), torch.arange(len(names)))
        if AGGREGATIONS[how].means
        else (similarity, of_column)
    )
    values = aggregate(columns, of, how, keys=pool.keys.some(usable.numpy()), eligible=good)
    bad = [] if good is None else usable[~good].tolist()
    whole = spread(similarity, usable, len(pool), None if pool.kept is None else pool.kept.folder)
    whole[bad] = float("nan")
    return Scored(
        scores=spread(values, usable, len(pool)),
        formula=formula,
        status=dict.fromkeys(bad, "nonfinite"),
        similarity=whole if groups is None else None,
        subtasks=subtask_columns(whole, names, of_column),
        tokens=tokens,
    )


def subtask_columns(similarity: Tensor, names: Sequence[str], groups: Tensor) -> dict[str, Tensor]:
    """Return subtask -> the mean similarity of each row with its target rows, float32 [n].

    Args:
        similarity: float32 [n, m].
        names: The subtasks.
        groups: int64 [m], the subtask of each target row.
    """
    found = {name: torch.zeros(len(similarity)) for name in names}
    for rows in large.blocks(similarity):
        part = similarity[rows]
        for i, name in enumerate(names):
            found[name][rows] = part[:, groups == i].mean(1)
    return found


def usable_among(pool: Rows, rows: Sequence[int] | None) -> tuple[list[int], Tensor, int]:
    """Return the usable ones among some pool rows.

    Args:
        pool: The pool.
        rows: Pool rows; None for all of them.

    Returns:
        The usable rows; their positions in `rows`, int64; and the number of requested rows.
    """
    asked = np.arange(len(pool)) if rows is None else np.asarray(rows, dtype=np.int64)
    places = np.flatnonzero(pool.usable[asked])
    return asked[places].tolist(), torch.from_numpy(places), len(asked)


def unique_among(rows: Rows, chosen: Sequence[int]) -> dict[str, int]:
    """Return `Rows.unique` for the contents of some rows only, in the same order.

    Args:
        rows: The pool or the target.
        chosen: Usable rows of it.
    """
    wanted = {rows.keys[i] for i in chosen}
    return {key: i for key, i in rows.unique().items() if key in wanted}


COMMON_ROWS = 64, 256
"""The minimum and maximum size of the sample for common directions, which is otherwise a twentieth of the pool."""


def common_rows(pool: Rows, seed: int) -> list[int]:
    """Return the random sample of the pool, drawn by content, from which common directions are computed.

    Args:
        pool: The pool.
        seed: The seed.
    """
    ordered = pool.unique_rows()
    ordered = ordered[np.argsort(pool.rank[ordered])]  # by content
    generator = np.random.Generator(np.random.Philox(derive_seed(seed, "common directions")))
    count = min(max(COMMON_ROWS[0], len(ordered) // 20), COMMON_ROWS[1])
    return ordered[generator.permutation(len(ordered))[:count]].tolist()  # type: ignore[no-any-return]


def spread(values: Tensor, rows: Tensor, n: int, folder: Path | None = None) -> Tensor:
    """Place values of some rows in a tensor of all rows, float32 [n, ...], with NaN for the others.

    Args:
        values: [k, ...].
        rows: The rows that they belong to, int64 [k].
        n: The number of all rows.
        folder: Where a matrix too large for memory is kept, see `large.table`.
    """
    if values.ndim == 1 or 4 * n * values[0:1].numel() <= large.LARGE:
        return torch.full((n, *values.shape[1:]), float("nan")).index_copy(0, rows, values.float())
    if len(values) == n:  # `rows` ascend
        return values.float()
    found = large.table(n, values.shape[1], folder)
    for block in large.blocks(found):
        found[block] = float("nan")
    for block in large.blocks(values):
        found[rows[block]] = values[block].float()
        large.release(found)
    return found


def no_scores(pool: Rows) -> Tensor:
    """Return the scores of a method that draws at random: float32 [n], all NaN.

    Args:
        pool: The pool of n rows.
    """
    return torch.full((len(pool),), float("nan"))


def candidates(pool: Rows, scored: Scored | None = None, target: Rows | None = None) -> Candidates:
    """Return the rows that may be selected: usable ones, without those that scoring excluded.

    Scoring excludes rows with a status and, if any row has a finite score, rows without one.

    Args:
        pool: The rows.
        scored: Their scores.
        target: The target rows, for a selector in which they take turns, which needs their similarities.
    """
    eligible, scores = torch.from_numpy(pool.usable), None
    similarity = None if scored is None or target is None else scored.similarity
    if scored is not None:
        for row in scored.status:
            eligible[row] = False
        if scored.scores.isfinite().any():
            eligible &= scored.scores.isfinite()
            scores = torch.where(eligible, scored.scores, 0.0)
    return Candidates(
        keys=pool.labels,  # ties between rows of equal content are broken by id
        scores=scores,
        sources=pool.pool.sources,
        tokens=pool.scan.tokens,
        supervised=pool.scan.supervised,
        eligible=eligible,
        similarity=similarity,
        groups=None if similarity is None or target is None else subtask_groups(target)[1],
    )
