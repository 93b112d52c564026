"""Scores from the stored gradients of pool and target rows: weighted cosines, aggregated over target rows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from datatools import DataError, GradientFeatures, LessScores, less_scores
from pipelines.rows.rows import Rows
from pipelines.select import objectives
from pipelines.select.gradients import Features
from pipelines.select.scored import Context, Scored, common_rows, spread, subtask_columns, subtask_groups
from pipelines.select.scorer import Asked
from pipelines.select.stores import kept
from pipelines.select.warm_up import stops
from pipelines.settings.select import SelectConfig
from pipelines.training import checkpoints


def result(
    context: Context, chosen: list[int], found: list[checkpoints.Checkpoint], made: list[Features], how: str
) -> LessScores:
    """Return the scores and similarities of pool rows from their stored features.

    Args:
        context: What is scored.
        chosen: Usable pool rows.
        found: The checkpoints.
        made: The features at each of them.
        how: The name of the aggregation.

    Raises:
        DataError: A target row has no finite, non-zero gradient.
    """
    pool, target = context.pool, context.wanted
    wanted = np.flatnonzero(target.usable).tolist()
    target_keys = objectives.keys(context.config, target)
    for one in made:
        _refuse_dead_targets(one.target, target, wanted, target_keys)
    return less_scores(
        [one.train for one in made],
        [one.target for one in made],
        [c.weight for c in found],
        subtask_groups(target)[1],
        keys=pool.keys.some(np.asarray(chosen)),
        target_keys=target_keys,
        how=how,
        advantages=objectives.weights(context.config, target),
        common=context.config.common,
        sample=_sample(pool, context.config),
    )


def _refuse_dead_targets(store: GradientFeatures, target: Rows, wanted: list[int], keys: list[str]) -> None:
    """Refuse target rows, with these keys in the store, without a finite, non-zero gradient."""
    held = store.rows()
    states = dict(zip(held.keys, held.status, strict=True))
    if dead := [row for row, key in zip(wanted, keys, strict=True) if states[key] != "ok"]:
        raise DataError(
            f"target row {target.pool.where(dead[0])} has no finite, non-zero gradient ({len(dead)} such rows in "
            f"{store.folder.name}); remove it from the target"
        )


def _sample(pool: Rows, config: SelectConfig) -> list[str]:
    """Return the keys of the rows that show common directions; none if these are not removed."""
    return [] if config.common is None else [pool.keys[i] for i in common_rows(pool, config.seed)]


def scored(
    context: Context,
    chosen: list[int],
    found: list[checkpoints.Checkpoint],
    made: list[Features],
    tokens: int,
    formula: Mapping[str, Any],
) -> Scored:
    """Return the scores of the whole pool from the stored features.

    Args:
        context: What is scored.
        chosen: Usable pool rows.
        found: The checkpoints.
        made: The features at each of them.
        tokens: The tokens that went through the model.
        formula: See `Scored`.
    """
    config, pool = context.config, context.pool
    usable = torch.tensor(chosen, dtype=torch.int64)
    names, groups = subtask_groups(context.wanted)
    of = result(context, chosen, found, made, config.aggregate)
    folder = None if pool.kept is None else pool.kept.folder
    similarity = spread(of.similarity, usable, len(pool), folder)
    return Scored(
        scores=spread(of.scores, usable, len(pool)),
        formula=formula,
        status={int(usable[i]): status for i, status in of.status.items()},
        similarity=similarity,
        subtasks=subtask_columns(similarity, names, groups),
        norms=spread(of.norms, usable, len(pool)),
        coverage=made[-1].coverage,
        checkpoints=[{"path": c.folder.name, "step": c.step, "mean_lr": c.mean_lr, "weight": c.weight} for c in found],
        feature_bytes=sum(
            p.stat().st_size for one in made for s in (one.train, one.target) for p in s.folder.iterdir()
        ),
        tokens=tokens,
    )


def nearest(asked: Asked, prefix: str = "") -> Tensor:
    """Return the weighted cosines, float32 [m], of the features that the run has kept.

    Args:
        asked: The question.
        prefix: The prefix of the names of the stores.

    Raises:
        DataError: The features are missing.
    """
    found = stops(asked.config, asked.folder)
    home = kept(asked, *(f"{prefix}train-{stop.step}" for stop in found))
    keys = objectives.keys(asked.config, asked.target)
    return less_scores(
        [GradientFeatures.open(home / f"{prefix}train-{stop.step}") for stop in found],
        [GradientFeatures.open(home / f"{prefix}{objectives.folder(asked.config, stop.step)}") for stop in found],
        [stop.weight for stop in found],
        torch.zeros(len(keys), dtype=torch.int64),
        keys=[asked.pool.keys[asked.index]],
        target_keys=keys,
        how="mean",
        common=asked.config.common,
        sample=_sample(asked.pool, asked.config),
        advantages=objectives.weights(asked.config, asked.target),
    ).similarity[0]
