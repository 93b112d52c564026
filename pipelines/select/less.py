"""LESS: the rows whose update by the optimizer would lower the loss on the target rows most.

From top to bottom: a warm-up on a random share of the pool gives checkpoints; at each of them, the updates of the pool
rows and the gradients of the target rows become features; their cosines, weighted by learning rate, become scores.

Source: Xia et al. 2024, arXiv 2402.04333.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from datatools import AGGREGATIONS, PROJECTORS, Projector
from optim import AdamWRule
from pipelines.runs.seeds import derive_seed
from pipelines.select import gradients, influence, objectives
from pipelines.select.gradients import At, Features, Recipe, described
from pipelines.select.layers import layers_of
from pipelines.select.scored import Context, Scored, spread, usable_among
from pipelines.select.scorer import Asked, Space, Work
from pipelines.select.warm_up import stops
from pipelines.settings.methods import Method
from pipelines.settings.select import SelectConfig

METHOD = Method(
    summary="gradient influence on the target rows (Xia et al. 2024)",
    title="LESS",
    meaning="The score is a cosine between the update that a row would cause and the gradient of the target rows, "
    "averaged over the checkpoints by their weight and, in its best subtask, over the target rows. Above zero: to "
    "first order, training on the row lowers the loss on the target; below zero: it raises it.",
    label="less",
    needs=("target", "model", "gradients"),
    stored=True,
    objectives=("ce", "dpo", "reward"),
    nearest="target rows it helps most",
    measure="cosine, weighted over checkpoints",
    cost="a warm-up run, then forward and backward of every row at each checkpoint",
    limits="the first-order effect of one step per row; short answers tend to score high",
)


def score(context: Context) -> Scored:
    """Score by sum_c w_c cos(update of the optimizer for a pool row, gradient of a target row) over checkpoints c.

    Args:
        context: What is scored.

    Source:
        Xia et al. 2024, arXiv 2402.04333. Differs: any optimizer of the suite is possible; by default the update is the
        one of the paper (see features.adam_mode).
    """
    chosen = np.flatnonzero(context.pool.usable).tolist()
    found, made, tokens = gradients.gradients(context, chosen, RECIPE)
    with context.run.stage("scores"):
        tokens += sum(one.tokens for one in made)
        return influence.scored(context, chosen, found, made, tokens, _formula(context.config, made[-1]))


def columns(context: Context, rows: Sequence[int] | None = None) -> Tensor:
    """Return the cosines, weighted over checkpoints, as `Scorer.columns` says.

    Args:
        context: What is scored.
        rows: Pool rows; None for all of them.
    """
    chosen, places, n = usable_among(context.pool, rows)
    found, made, _ = gradients.gradients(context, chosen, RECIPE)
    with context.run.stage("scores"):
        return spread(influence.result(context, chosen, found, made, "mean").similarity, places, n)


def _projector(at: At) -> Projector:
    """Return the random projection that the settings name."""
    how = at.context.config.projector
    shapes = {name: at.plain.params[name].shape for name in at.names}
    return PROJECTORS[how.name].of(shapes, how.dim, derive_seed(at.context.config.seed, "projector"))


RECIPE = Recipe(_projector)


def _formula(config: SelectConfig, made: Features) -> dict[str, Any]:
    goal = f"grad {objectives.LOSSES[config.objective]}(z'; theta_c)"
    weighed = "A(z') " if config.objective == "reward" else ""
    mode = {"paper": "less-paper", "code": "less-official", "precond_only": "less-preconditioner"}
    return {
        "name": mode[config.features.adam_mode] if type(made.rule) is AdamWRule else f"less-{made.rule.name}",
        "text": f"score(z) = {AGGREGATIONS[config.aggregate].formula} "
        f"{weighed}sum_c w_c cos( {made.rule.name} update of grad l(z; theta_c), {goal} ),  "
        "w_c = mean learning rate of c / sum"
        + (f", {objectives.ADVANTAGE}" if weighed else "")
        + ("" if config.common is None else f"; without the mean and {config.common} main directions of all updates"),
        "settings": described(made.rule),
    }


def work(context: Context) -> Work:
    """Return the tokens of the warm-up and of the gradients, and the bytes of the features at all checkpoints.

    Args:
        context: What is scored.
    """
    return gradients.work(context, context.config.projector.dim)


def nearest(asked: Asked) -> Tensor:
    """Return the weighted cosines, float32 [m], of the features that the run has kept.

    Args:
        asked: The question.
    """
    return influence.nearest(asked)


def spaces(config: SelectConfig, folder: Path) -> list[Space]:
    """Return the features at all checkpoints that count, each with its weight.

    Args:
        config: The settings of the finished run.
        folder: The folder of the run.
    """
    home, found = config.features.folder or folder / "features", stops(config, folder)
    return [
        Space(stop.weight, home / f"train-{stop.step}", home / objectives.folder(config, stop.step)) for stop in found
    ]


def layers(asked: Asked, rows: list[int]) -> list[dict[str, Any]]:
    """Return the share of each layer at the checkpoint with the largest weight; none for pairs and rewards.

    Args:
        asked: The question.
        rows: Target rows.
    """
    if asked.config.objective != "ce":
        return []
    heaviest = max(stops(asked.config, asked.folder), key=lambda c: c.weight)
    return layers_of(asked.config, heaviest, asked.pool, asked.index, asked.target, rows)


reuse = gradients.reuse
