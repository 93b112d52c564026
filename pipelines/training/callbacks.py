"""Callbacks that watch a training run without changing it: progress, and updates that rounding loses."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

import optim
from pipelines.runs.messages import warn


class WatchRounding(TrainerCallback):  # type: ignore[misc]
    """Measures in the first steps how much of the updates of bfloat16 weights is kept, and warns about losses."""

    steps, lost = 5, 0.9

    def on_train_begin(self, args: Any, state: Any, control: Any, optimizer: Any = None, **_: Any) -> None:
        """Begin to measure, unless no weight is rounded to the nearest value or the first steps are over.

        Args:
            args: The training arguments.
            state: The state of the Trainer.
            control: The control of the Trainer.
            optimizer: The optimizer.
        """
        inner = getattr(optimizer, "optimizer", optimizer)  # accelerate wraps it
        rounded = [group for group in inner.param_groups if group.get("rounding") == "nearest"]
        self.optimizer = inner if rounded and state.global_step < self.steps else None
        if self.optimizer is not None:
            self.optimizer.arrived = optim.Arrived()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Warn after the first steps.

        Args:
            args: The training arguments.
            state: The state of the Trainer.
            control: The control of the Trainer.
        """
        if state.global_step >= self.steps:
            self._say()

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Warn if the run was shorter.

        Args:
            args: The training arguments.
            state: The state of the Trainer.
            control: The control of the Trainer.
        """
        self._say()

    def _say(self) -> None:
        if self.optimizer is None:
            return
        arrived, self.optimizer.arrived, self.optimizer = self.optimizer.arrived, None, None
        if arrived.share is None or min(arrived.share, 1.0 if arrived.small is None else arrived.small) >= self.lost:
            return
        norms = "" if arrived.small is None else f", of norms and biases {arrived.small:.0%}"
        warn(
            f"weights in bfloat16, rounded to the nearest: {arrived.share:.0%} of the intended updates arrived{norms}, "
            "the rest was rounded away; use --rounding stochastic or master, or --set model.dtype=float32"
        )


class Progress(TrainerCallback):  # type: ignore[misc]
    """Calls `advance(1)` after each step."""

    def __init__(self, advance: Callable[[int], Any] | None) -> None:
        self.advance = advance

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Count the step.

        Args:
            args: The training arguments.
            state: The state of the Trainer.
            control: The control of the Trainer.
        """
        if self.advance is not None:
            self.advance(1)


@contextmanager
def tensorboard_in(folder: Path) -> Iterator[None]:
    """Let a tensorboard callback that is created inside write to `folder`, unless the user has named another one.

    Its own choice is a folder among the checkpoints whose name holds the name of the host.

    Args:
        folder: Folder of the run.

    Yields:
        Nothing; the variable is removed afterwards.
    """
    name = "TENSORBOARD_LOGGING_DIR"
    if name in os.environ:
        yield
        return
    os.environ[name] = str(folder)
    try:
        yield
    finally:
        del os.environ[name]
