"""GIST: updates of pool rows within the span of the target's own gradients; exact, and a few numbers per row.

Source: GIST, arXiv 2602.18584.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from datatools import (
    AGGREGATIONS,
    DataError,
    TargetSpan,
    files,
    gram_matrix,
    per_sample_grads,
    span_coefficients,
)
from datatools.files import sealed
from pipelines.models.losses import answer_losses_for, losses_for
from pipelines.rows.rows import Rows
from pipelines.runs import following, workers
from pipelines.runs.memory import token_budget
from pipelines.runs.messages import library_warnings
from pipelines.select import gradients, influence, objectives
from pipelines.select.gradients import At, Recipe, described
from pipelines.select.scored import Context, Scored, spread, usable_among
from pipelines.select.scorer import Asked, Work
from pipelines.select.stores import filling
from pipelines.settings.methods import Method
from pipelines.settings.select import SelectConfig

METHOD = Method(
    summary="gradient influence in the span of the target's own gradients (GIST)",
    title="Target-span gradients (GIST)",
    meaning="The score is a cosine between the update that a row would cause and the gradient of the target rows, both "
    "seen in the span of the target's gradients, so that what the target knows nothing about does not count. Above "
    "zero: to first order, training on the row lowers the loss on the target; below zero: it raises it.",
    label="target-span gradients",
    needs=("target", "model", "gradients"),
    stored=True,
    checkpoints="last",
    objectives=("ce", "dpo", "reward"),
    nearest="target rows it helps most",
    measure="cosine in the span of the target's gradients",
    cost="a warm-up run, then forward and backward of every row at its last checkpoint",
    limits="the first-order effect of one step per row; features serve one target only",
)


def score(context: Context) -> Scored:
    """Score by cos(P^T update(z), P^T grad(z')), where the columns of P are an orthonormal basis of target gradients.

    Args:
        context: What is scored.

    Source:
        GIST, arXiv 2602.18584. Differs: pool rows are compared by the optimizer's update unless `gist.update` is plain;
        the target rows of a subtask are averaged after the cosine unless `aggregate` is paper; the basis has every
        direction that float32 gradients tell apart, unless `gist.rank` is smaller. Targets that are preferences or
        rewards (`objective`) are ours: the basis spans the gradients of the DPO loss, or those of the answers, each
        times its advantage.
    """
    chosen = np.flatnonzero(context.pool.usable).tolist()
    recipe = _recipe(context.config, context.wanted)
    found, made, tokens = gradients.gradients(context, chosen, recipe)
    config = context.config
    update = "grad l(z; theta)" if recipe.plain else f"{made[-1].rule.name} update of grad l(z; theta)"
    weighed = "A(z') " if config.objective == "reward" else ""
    formula: dict[str, Any] = {
        "name": f"gist-{made[-1].rule.name}" if not recipe.plain else "gist",
        "text": f"score(z) = {AGGREGATIONS[config.aggregate].formula} {weighed}cos( P^T {update}, P^T grad "
        f"{objectives.LOSSES[config.objective]}(z'; theta) ),  P: an orthonormal basis of the target's gradients "
        f"({made[-1].train.dim} directions)" + (f", {objectives.ADVANTAGE}" if weighed else ""),
        "settings": described(made[-1].rule),
    }
    with context.run.stage("scores"):
        tokens += sum(one.tokens for one in made)
        return influence.scored(context, chosen, found, made, tokens, formula)


def columns(context: Context, rows: Sequence[int] | None = None) -> Tensor:
    """Return the cosines in the span of the target's gradients, as `Scorer.columns` says.

    Args:
        context: What is scored.
        rows: Pool rows; None for all of them.
    """
    chosen, places, n = usable_among(context.pool, rows)
    found, made, _ = gradients.gradients(context, chosen, _recipe(context.config, context.wanted))
    with context.run.stage("scores"):
        return spread(influence.result(context, chosen, found, made, "mean").similarity, places, n)


def _recipe(config: SelectConfig, target: Rows) -> Recipe:
    return Recipe(_span, prefix=_prefix(config, target), plain=config.gist.update == "plain")


def _prefix(config: SelectConfig, target: Rows) -> str:
    """Return the prefix of the stores, which serve only this target, rank and kind of update."""
    return f"span-{files.digest(files.json_bytes(_facts(config, target)))[:12]}-"


def _facts(config: SelectConfig, target: Rows) -> dict[str, Any]:
    """Return what the basis is a function of, besides the model; that of answers is as in earlier versions."""
    found: dict[str, Any] = {"rows": sorted(objectives.unique(config, target)), "rank": config.gist.rank}
    found["update"] = config.gist.update
    if config.objective != "ce":
        found["objective"] = config.objective
    if (weights := _weights(config, target)) is not None:
        found["weights"] = weights
    return found


def _weights(config: SelectConfig, target: Rows) -> list[float] | None:
    """Return the weight of each row of `objectives.unique`, in the order of the sorted keys; None without rewards.

    Rows with equal answers and different rewards are one row here: sqrt(sum A^2) gives the basis that all would give.
    """
    advantages = objectives.weights(config, target)
    if advantages is None:
        return None
    squares: dict[str, float] = {}
    for key, advantage in zip(objectives.keys(config, target), advantages.tolist(), strict=True):
        squares[key] = squares.get(key, 0.0) + advantage**2
    return [squares[key] ** 0.5 for key in sorted(squares)]


def _span(at: At) -> TargetSpan:
    """Return the span of the target's gradients at a checkpoint, and keep the coefficients of its basis.

    Without them, a run that continues on another machine could rotate directions of equal length into each other.
    """
    config, target = at.context.config, at.context.wanted
    unique = objectives.unique(config, target)
    rows = [unique[key] for key in sorted(unique)]
    grads = _target_gradients(at, rows)
    if (weights := _weights(config, target)) is not None:
        for grad in grads.values():
            grad *= torch.tensor(weights, device=grad.device).view(-1, *[1] * (grad.dim() - 1))
    facts = _facts(config, target)
    home = at.context.features_folder
    path = home / f"{_prefix(config, target)}basis-{at.checkpoint.step}" / "coefficients.safetensors"
    about = files.digest(files.json_bytes({**at.meta, **facts}))
    files.make_folder(path.parent)
    if workers.helps():
        following.reached(f"basis {about}")
    with filling(path.parent):
        kept = _kept_basis(path, about)
        if kept is None:
            combined, singular = span_coefficients(gram_matrix(grads), config.gist.rank)
            kept = {"combined": combined, "singular": singular, "about": torch.tensor(list(about.encode()))}
            sealed.write_tensors(path, kept)
    following.reached(f"basis {about}")
    return TargetSpan.spanned(grads, kept["combined"], {"target": files.digest(files.json_bytes(facts))})


def _kept_basis(path: Path, about: str) -> dict[str, Tensor] | None:
    """Return the coefficients that were kept; None if they are missing, damaged, or of another target or model."""
    if path.is_file():
        with suppress(sealed.Damaged):
            kept = sealed.read_tensors(path)
            if bytes(kept["about"].tolist()).decode() == about:
                return kept
    return None


def _target_gradients(at: At, rows: list[int]) -> dict[str, Tensor]:
    """Return the plain gradients of these target rows, float32: name -> [rows, *shape], on the device of the model.

    The gradient of a pair is that of its DPO loss without its positive factor (`extract_preferences`).
    """
    config, target = at.context.config, at.context.wanted
    how = config.features
    found = {name: torch.zeros(len(rows), *at.plain.params[name].shape) for name in at.names}
    sides = [(1.0, target, losses_for(how.method))]
    budget = token_budget(how.token_budget, "gradients of the target")
    if config.objective == "dpo":
        loss = answer_losses_for(how.method)
        sides = [(1.0, target, loss), (-1.0, objectives.rejected(at.context, at.context.model()), loss)]
    with library_warnings():
        for sign, answers, loss in sides:

            def add(group: list[int], batch: dict[str, Tensor], sign: float = sign, loss: Any = loss) -> None:
                made = per_sample_grads(loss, at.module, batch, at.names, method=how.method)  # type: ignore[arg-type]
                whole = {name: grad.float().cpu() for name, grad in made.items()}  # before anything is added
                for name, grad in whole.items():
                    found[name][torch.tensor(group)] += sign * grad

            answers.each_batch(add, rows, budget, at.module.device)
    norms = torch.stack([one.flatten(1).double().square().sum(1) for one in found.values()]).sum(0)
    if dead := [row for row, norm in zip(rows, norms.tolist(), strict=True) if not (np.isfinite(norm) and norm > 0)]:
        raise DataError(
            f"target row {target.pool.where(dead[0])} has no finite, non-zero gradient ({len(dead)} such rows of "
            f"{len(rows)}); remove it from the target"
        )
    return {name: grad.to(at.module.device) for name, grad in found.items()}


def work(context: Context) -> Work:
    """Return the tokens of the warm-up and of the gradients; the features take one number per direction.

    Args:
        context: What is scored.
    """
    config, target = context.config, context.wanted
    directions = len(objectives.unique(config, target)) if config.gist.rank is None else config.gist.rank
    return gradients.work(context, directions, _prefix(config, target))


def nearest(asked: Asked) -> Tensor:
    """Return the cosines, float32 [m], of the features that the run has kept.

    Args:
        asked: The question.
    """
    return influence.nearest(asked, _prefix(asked.config, asked.target))


reuse = gradients.reuse
