"""Validation during training: when it is due, which step was the best, and when to stop.

All decisions are made from the log history, which is part of every checkpoint, so that a resumed run decides like one
that was never interrupted.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn
from transformers import TrainerCallback

from datatools import files
from pipelines.runs.messages import warn
from pipelines.runs.progress import Progress
from pipelines.runs.workers import rank

LOSS = "eval_loss"
PREFIX = "eval_"
"""How the names of validation values begin in a log history."""


@dataclass(frozen=True)
class Validation:
    """Held-out rows during training.

    Attributes:
        loss: A model in evaluation mode -> its loss on the rows, which may be NaN.
        every: Optimizer steps between evaluations; the last step is always evaluated.
        patience: Stop after this many evaluations in a row without a new lowest loss; None never stops.
        keep_best: Whether the trained weights are those of the lowest loss, for which a checkpoint is kept.
        steps: The number of training steps that take about as long as an evaluation; used until one has been timed.
        measure: A model in evaluation mode -> further values by their names in the log; None measures the loss alone.
        by: The name of the value that decides which step is the best: the loss, or an accuracy.
    """

    loss: Callable[[nn.Module], float]
    every: int
    patience: int | None = None
    keep_best: bool = True
    steps: float = 0.0
    measure: Callable[[nn.Module], Mapping[str, float]] | None = None
    by: str = LOSS

    def values(self, model: nn.Module) -> dict[str, float]:
        """Return all values of an evaluation by their names in the log.

        Args:
            model: The model, in evaluation mode.
        """
        return {LOSS: self.loss(model), **(self.measure(model) if self.measure is not None else {})}

    def judged(self, history: Sequence[Mapping[str, Any]]) -> list[tuple[int, float]]:
        """Return (step, value) of each evaluation by which the best is chosen; the lowest value is the best.

        Args:
            history: The log history.

        Returns:
            The losses, or the accuracies times -1; NaN where the loss is not finite.
        """
        sign = 1.0 if self.by == LOSS else -1.0
        seen = [entry for entry in history if LOSS in entry and self.by in entry]
        return [(one["step"], sign * one[self.by] if math.isfinite(one[LOSS]) else math.nan) for one in seen]


def planned(steps: int, every: int, done: int = 0) -> int:
    """How many evaluations a run of `steps` steps has after its step `done`.

    Args:
        steps: Optimizer steps of the run.
        every: Steps between two evaluations.
        done: Steps already taken.

    Returns:
        The number of evaluations still to come.
    """
    return 0 if done >= steps else steps // every - done // every + (steps % every > 0)


class Timed:
    """The values of a validation, measured on a bar whose rate and time left it keeps right.

    Args:
        validation: What is measured, and when.
        bar: Of the training steps.
    """

    def __init__(self, validation: Validation, bar: Progress) -> None:
        self.validation, self.bar = validation, bar
        self._seconds, self._times = 0.0, 0
        bar.more = self.left

    def __call__(self, model: nn.Module) -> dict[str, float]:
        """Return the values of `model`, as `Validation.values` does."""
        began = time.monotonic()
        with self.bar.aside():
            values = self.validation.values(model)
        self._seconds, self._times = self._seconds + time.monotonic() - began, self._times + 1
        return values

    def left(self, step: float) -> float:
        """Return the seconds of the evaluations to come.

        Args:
            step: The seconds that a training step takes.
        """
        each = self._seconds / self._times if self._times else self.validation.steps * step
        return each * planned(self.bar.total or 0, self.validation.every, self.bar.done)


def evaluations(history: Sequence[Mapping[str, Any]]) -> list[tuple[int, float]]:
    """Return (step, validation loss) of each evaluation in a log history.

    Args:
        history: The log history.
    """
    return [(entry["step"], entry[LOSS]) for entry in history if LOSS in entry]


def best_of(found: Sequence[tuple[int, float]]) -> tuple[int, float] | None:
    """Return the first evaluation with the lowest value; None if no value is finite.

    Args:
        found: (step, value) of each evaluation, as `Validation.judged` returns them.
    """
    finite = [one for one in found if math.isfinite(one[1])]
    return min(finite, key=lambda one: (one[1], one[0])) if finite else None


def over(found: Sequence[tuple[int, float]], patience: int | None) -> bool:
    """Return whether training stops: the last `patience` evaluations had no new lowest value.

    Args:
        found: (step, value) of each evaluation, as `Validation.judged` returns them.
        patience: The number of evaluations; None never stops.
    """
    if patience is None or len(found) <= patience:
        return False
    best = best_of(found)
    since = found if best is None else [one for one in found if one[0] > best[0]]
    return len(since) >= patience


def history_of(checkpoint: Path) -> list[dict[str, Any]]:
    """Return the log history in a checkpoint.

    Args:
        checkpoint: The folder of the checkpoint.
    """
    found: list[dict[str, Any]] = json.loads(files.read_bytes(checkpoint / "trainer_state.json"))["log_history"]
    return found


def step_of(checkpoint: Path) -> int:
    """Return the step of `checkpoint-N`.

    Args:
        checkpoint: The folder of the checkpoint.
    """
    return int(checkpoint.name.removeprefix("checkpoint-"))


def resume_point(valid: Sequence[Path], validation: Validation | None) -> Path | None:
    """Return the newest valid checkpoint whose best predecessor still exists; None for a new run.

    Args:
        valid: The valid checkpoints, oldest first.
        validation: The validation, if any.
    """
    steps = {step_of(path) for path in valid}
    for path in reversed(valid):
        if validation is None or not validation.keep_best:
            return path
        best = best_of(validation.judged(history_of(path)))
        if best is None or best[0] in steps:
            return path
    return None


class Validate(TrainerCallback):  # type: ignore[misc]
    """Requests evaluations, a checkpoint of each new best model, and the end of training.

    Args:
        validation: The validation.
        regular: Step -> whether a checkpoint is saved at it anyway; other checkpoints are removed when they are no
            longer the best.
    """

    def __init__(self, validation: Validation, regular: Callable[[int], bool]) -> None:
        self.validation, self.regular = validation, regular

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Evaluate every few steps and at the last step.

        Args:
            args: The training arguments.
            state: The state of the Trainer.
            control: The control of the Trainer.
        """
        if state.global_step % self.validation.every == 0 or state.global_step >= state.max_steps:
            control.should_evaluate = True

    def on_evaluate(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Save the best model, and stop training if it is due.

        Args:
            args: The training arguments.
            state: The state of the Trainer.
            control: The control of the Trainer.
        """
        loss = evaluations(state.log_history)[-1][1]
        if not math.isfinite(loss):
            warn(f"validation: the loss after step {state.global_step} is {loss}; it cannot be the best")
        found = self.validation.judged(state.log_history)
        best = best_of(found)
        if self.validation.keep_best and best is not None and best[0] == state.global_step:
            control.should_save = True
        if over(found, self.validation.patience):
            control.should_training_stop = True

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Remove checkpoints that were saved only for their validation loss and are no longer the best.

        Args:
            args: The training arguments.
            state: The state of the Trainer.
            control: The control of the Trainer.
        """
        best = best_of(self.validation.judged(state.log_history))
        if rank() != 0 or best is None:
            return
        for path in Path(args.output_dir).glob("checkpoint-*"):
            step = int(number) if (number := path.name.removeprefix("checkpoint-")).isdigit() else best[0]
            if step < state.global_step and step != best[0] and not self.regular(step):
                files.remove_folder(path)
