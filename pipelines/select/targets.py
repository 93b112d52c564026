"""Several targets at once: which target rows belong to which target, and the selection that the targets share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from datatools import Selection, UsageError, several, subtask_means
from pipelines.rows.rows import Rows
from pipelines.select.scored import Context, Scored, candidates, subtask_groups


def named(target: Rows) -> tuple[list[str], Tensor]:
    """Return the names of the targets, sorted, and the target of each usable target row, int64 [m].

    A row's target is its `subtask`. If no row has one, it is the file that the row is from, without its suffix.

    Args:
        target: The target rows.
    """
    names, groups = subtask_groups(target)
    files = {info.path for info in target.pool.files}
    rows = [int(i) for i in target.usable.nonzero()[0]]
    if len(names) > 1 or len(files) < 2 or any(target.pool[i].subtask for i in rows[:1]):
        return names, groups
    stems = [_stem(target.pool.file(i)) for i in rows]
    if len(set(stems)) < len({target.pool.file(i) for i in rows}):  # files of equal name are told apart by path
        stems = [target.pool.file(i) for i in rows]
    names = sorted(set(stems))
    return names, torch.tensor([names.index(stem) for stem in stems])


def _stem(path: str) -> str:
    return path.removeprefix("memory:").rsplit("/", 1)[-1].split(".", 1)[0] or path


def choose(context: Context, scored: Scored) -> Selection:
    """Return the selection that the targets share, as `targets` of the settings says.

    Args:
        context: What was scored.
        scored: The scores.

    Raises:
        UsageError: There is only one target, the method keeps no similarity to target rows, or a budget does not fit.
    """
    config, target = context.config, context.wanted
    names, groups = named(target)
    if len(names) < 2:
        raise UsageError(
            f"--targets {config.targets.share} is for several targets, and there is one ({names[0]}); name one file "
            "for each with --target, or give target rows a column `subtask`"
        )
    if scored.similarity is None:
        raise UsageError(
            f"--targets {config.targets.share} needs a score of every row for each target, and --method "
            f"{config.method} keeps no similarity to target rows; use a method that does, such as tfidf, rds or less"
        )
    rows = candidates(context.pool, scored)
    means = subtask_means(torch.where(rows.eligible[:, None], scored.similarity, 0.0), groups)
    return several(
        config.targets.share,
        means,
        names,
        rows,
        config.budget,
        budgets=config.targets.budgets,
        max_per_source=config.max_per_source,
    )


def summary(context: Context, selection: Selection) -> dict[str, Any]:
    """Return how many rows each target took, for `summary.json`; empty if one score ranked the rows for all targets.

    Args:
        context: What was scored.
        selection: The selected rows.
    """
    how = context.config.targets.share
    if how == "no" or context.target is None or selection.why is None:
        return {}
    names, _ = named(context.target)
    taken: Mapping[str, int] = {
        name: sum(why.startswith(f"taken for target {name}, score ") for why in selection.why) for name in names
    }
    return {"targets": {"share": how, "rows": dict(taken)}}
