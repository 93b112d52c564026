"""Scores of batches, from which orders are made: what a pass over the data, the reference run, or a column says."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from datatools import DataError, UsageError, did_you_mean, files
from datatools.files import sealed
from pipelines.models.states import pooled, states_and_losses
from pipelines.order.columns import COLUMN
from pipelines.order.kept import kept, reference, start
from pipelines.order.setting import Setting
from pipelines.runs.progress import progress


def measured(setting: Setting, names: Sequence[str]) -> dict[str, list[float]]:
    """Return one number per batch for each score; they are computed once and kept in scores/.

    Args:
        setting: The setting of the run.
        names: The names of scores.

    Raises:
        DataError: A score is not finite.
    """
    found: dict[str, list[float]] = {}
    for name in names:
        if name.startswith(COLUMN):
            found[name] = setting.columns[name]
            continue
        path = setting.kept("scores", f"{name}-", name, setting.config.training.learning_rate)
        if (values := kept(path)) is None:
            with setting.run.stage(f"score: {name}"):
                values = {"values": SCORES[name](setting)}
            if wrong := [batch for batch, value in enumerate(values["values"]) if not math.isfinite(value)]:
                raise DataError(
                    f"order: the score {name} of batch {wrong[0]} is not finite, so that batches cannot be sorted by "
                    f"it; leave it out of `scores`, or lower --learning-rate if training diverges"
                )
            files.make_folder(path.parent)
            sealed.write_json(path, values)
        found[name] = list(values["values"])
    return found


def _length(setting: Setting) -> list[float]:
    """Tokens per row."""
    return setting.lengths


def _loss(setting: Setting) -> list[float]:
    """Loss at the start of the run."""
    params = start(setting).params
    return [setting.problem.train_loss(params, b) for b in _batches(setting, "losses")]


def _gradient_norm(setting: Setting) -> list[float]:
    """Norm of the gradient at the start of the run."""
    params = start(setting).params
    norms = []
    for b in _batches(setting, "gradient norms"):
        grads = setting.problem.gradient(params, b)
        norms.append(math.sqrt(sum(float(g.double().square().sum()) for g in grads.values())))
    return norms


def _influence(setting: Setting) -> list[float]:
    """Inner product of the gradient with the held-out gradient, at the start."""
    params = start(setting).params
    held = setting.problem.held_out_gradient(params)
    return [
        sum(float((g.double() * held[n]).sum()) for n, g in setting.problem.gradient(params, b).items())
        for b in _batches(setting, "influence")
    ]


def _learnability(setting: Setting) -> list[float]:
    """Fall of the loss from the start to the end of the reference run."""
    run_ = reference(setting)
    before, after = run_.start.params, run_.end.params
    problem = setting.problem
    return [problem.train_loss(before, b) - problem.train_loss(after, b) for b in _batches(setting, "learnability")]


def _similarity(setting: Setting) -> list[float]:
    """Mean cosine of the hidden states of the rows with those of the held-out rows (as RDS+; means over answers)."""
    with torch.inference_mode():
        held = torch.cat([_states(setting, part) for batch in setting.problem.validation for _, part in batch])
        direction = held.mean(0)
        return [
            float((torch.cat([_states(setting, part) for _, part in setting.problem.batches[b]]) @ direction).mean())
            for b in _batches(setting, "hidden states")
        ]


def _states(setting: Setting, part: dict[str, Tensor]) -> Tensor:
    """Return unit vectors of the rows of a padded part [rows, width]."""
    states, _ = states_and_losses(setting.module, part)
    width = torch.full((len(states),), states.shape[1])  # padding has no loss, and an answer is where there is a loss
    vectors = pooled(states, part["labels"], width, "answer").nan_to_num(0.0)
    return functional.normalize(vectors, dim=1)


def _batches(setting: Setting, label: str) -> Iterator[int]:
    """Yield the numbers of the batches, with a bar."""
    count = len(setting.problem.batches)
    with progress(f"scores: {label}", count, "batches") as bar:
        for batch in range(count):
            yield batch
            bar.advance(1)


SCORES: dict[str, Callable[[Setting], list[float]]] = {
    "length": _length,
    "loss": _loss,
    "gradient-norm": _gradient_norm,
    "influence": _influence,
    "learnability": _learnability,
    "similarity": _similarity,
}
"""Name -> one number per batch."""


def check_scores(names: Sequence[str]) -> None:
    """Refuse unknown scores.

    Args:
        names: The names of scores.

    Raises:
        UsageError: A name is unknown.
    """
    for name in names:
        if name not in SCORES and not (name.startswith(COLUMN) and name != COLUMN):
            raise UsageError(
                f"scores: there is no score {name!r}{did_you_mean(name, SCORES)}; {COLUMN}NAME is a numeric column"
            )
