"""Accuracy on held-out rows of a training run: at every evaluation, and once on the weights that are saved."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

from datatools import UsageError
from pipelines.models import load as models
from pipelines.rows.rows import Rows
from pipelines.runs.messages import say
from pipelines.runs.workers import rank, world_size
from pipelines.settings import metrics
from pipelines.settings.train import TrainConfig
from pipelines.training import evaluation
from pipelines.training.accuracy import measure
from pipelines.training.validation import LOSS, PREFIX, Validation


def plan_of(config: TrainConfig, rows: Rows | None, loaded: models.LoadedModel) -> measure.Plan | None:
    """Return what is measured besides the loss, and print it; None if that is nothing.

    Args:
        config: The settings of the run.
        rows: The held-out rows.
        loaded: The tokenizer and the limits of the model.

    Raises:
        UsageError: The best weights are chosen by something that is not measured.
        DataError: No row offers what a metric needs.
        EnvironmentProblem: A package or the isolation of processes is missing.
    """
    if config.metrics is None or rows is None:
        return None
    found = measure.plan(config.metrics, rows, [], loaded.tokenizer, loaded.limits)
    if rank() == 0:
        for sentence in found.said or ["validation: the loss alone; the rows offer no accuracy (see --metric)"]:
            say(sentence)
    if config.metrics.best_by not in (metrics.LOSS, *found.metrics):
        measured = f"measured are {', '.join((metrics.LOSS, *found.metrics))}"
        raise UsageError(f"--best-by {config.metrics.best_by}: {measured}; name it with --metric too")
    return found if found.metrics else None


def validation(
    config: TrainConfig, rows: Rows | None, plan: measure.Plan | None, *, every: int, step: float
) -> Validation | None:
    """Return when held-out rows are measured, and about how long that takes; None without such rows.

    Args:
        config: The settings of the run.
        rows: The held-out rows.
        plan: What is measured besides the loss.
        every: Steps between evaluations.
        step: Tokens of a training step.
    """
    if rows is None:
        return None
    # forward alone is about a third of a training step
    passes = 3 if config.training.gradient == "backprop" else 2 * config.training.zo.q
    loss = partial(evaluation.validation_loss, rows=rows, token_budget=config.training.micro_tokens)
    during = plan if config.metrics is not None and config.metrics.during else None
    tokens = rows.tokens() + sum(many for many, _ in work(during))
    by = LOSS if config.metrics is None or during is None else PREFIX + config.metrics.best_by
    measured = None if during is None else partial(accuracies, plan=during)
    return Validation(loss, every, config.patience, config.keep_best, tokens / (passes * step), measured, by)


def work(plan: measure.Plan | None) -> list[tuple[int, float]]:
    """Return (tokens, passes) of each measurement besides the loss.

    Args:
        plan: What is measured.
    """
    return [] if plan is None else [(many, float(passes)) for many, passes in plan.work().values()]


def accuracies(model: nn.Module, plan: measure.Plan) -> dict[str, float]:
    """Return the accuracies of a model by their names in the log; the first process measures for all of them.

    Args:
        model: The model, in evaluation mode.
        plan: What is measured.
    """
    means = _by_the_first(lambda: {name: one.accuracy for name, one in measure.measure(model, plan).items()})
    return {f"{PREFIX}{name}": value for name, value in means.items()}


def _by_the_first(measured: Callable[[], Mapping[str, float]]) -> Mapping[str, float]:
    """Return what the first process measures, in all processes, which then decide alike."""
    found: list[Any] = [measured() if rank() == 0 else None]
    if world_size() > 1:
        torch.distributed.broadcast_object_list(found)
    values: Mapping[str, float] = found[0]
    return values


def at_the_end(model: nn.Module, plan: measure.Plan) -> dict[str, dict[str, Any]]:
    """Return each accuracy of the weights that are saved, with its interval over rows, and print it.

    Args:
        model: The model, in evaluation mode.
        plan: What is measured.
    """
    with torch.no_grad():
        found = evaluation.accuracies(model, plan)
    for name, one in found.items():
        mean, low, high = (100 * one[key] for key in ("mean", "low", "high"))
        say(f"validation: {plan.label(name)} {mean:.1f} % (95 % {low:.0f} to {high:.0f}, {one['rows']} rows)")
    return {name: {"label": plan.label(name), **one} for name, one in found.items()}
