"""Numbers that are not finite: such steps are skipped, such checkpoints are not written, and such weights are named.

A gradient that has overflowed does not indicate a direction, and one step along it makes weights NaN permanently.
Therefore `FiniteSteps` skips such a step, counts it, and stops after several in a row. A result with a number that is
not finite is never saved.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback
from transformers.trainer_callback import ExportableState

from datatools import DataError
from pipelines.runs.messages import warn

OPTIMIZER = "optimizer.pt"


def first_not_finite(tensors: Iterable[tuple[str, Tensor]]) -> str | None:
    """Return the name of the first tensor with an entry that is NaN or infinite; None if all are finite.

    Args:
        tensors: (name, tensor) pairs; tensors of any shape and dtype.
    """
    names: list[str] = []
    sound: list[Tensor] = []
    for name, tensor in tensors:
        if tensor.is_floating_point() and tensor.numel():
            local = tensor.to_local() if hasattr(tensor, "to_local") else tensor  # a shard of a DTensor
            names.append(name)
            sound.append((local.float() if local.dtype.itemsize < 2 else local).isfinite().all().detach().cpu())
    return next((name for name, fine in zip(names, sound, strict=True) if not fine), None)


def trained_parameters(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Return the parameters of a model that train, which are those in a checkpoint or an adapter.

    Args:
        model: The model.
    """
    return ((name, p.detach()) for name, p in model.named_parameters() if p.requires_grad)


def state_tensors(optimizer: Any) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of an optimizer's state, named after their parameters if these have names.

    Args:
        optimizer: The optimizer, perhaps wrapped by accelerate.
    """
    inner = getattr(optimizer, "optimizer", optimizer)  # accelerate wraps it
    number = 0
    for group in inner.param_groups:
        names = group.get("param_names") or [f"parameter {number + i}" for i in range(len(group["params"]))]
        number += len(names)
        for name, param in zip(names, group["params"], strict=True):
            yield from _leaves(f"the optimizer's state of {name}", inner.state.get(param, {}))


def _leaves(name: str, value: Any) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _leaves(f"{name}, {key}", inner)
    elif isinstance(value, list | tuple):
        for key, inner in enumerate(value):
            yield from _leaves(f"{name}, {key}", inner)


def rotten(folder: Path) -> str | None:
    """Return what is not finite in the saved weights or optimizer state of a folder; None if everything is.

    Files that cannot be read are ignored here; the code that loads them refuses them.

    Args:
        folder: The folder of a checkpoint, an adapter or a model.
    """
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, "pt") as saved:
                found = first_not_finite((name, saved.get_tensor(name)) for name in saved.keys())  # noqa: SIM118
        except (SafetensorError, OSError):
            continue
        if found is not None:
            return found
    try:
        state = torch.load(folder / OPTIMIZER, map_location="cpu", weights_only=True, mmap=True)
        return first_not_finite(_leaves("the optimizer's state", state["state"]))
    except Exception:  # missing, of another kind, or not readable without unpickling
        return None


class _Skips(TrainerCallback, ExportableState):  # type: ignore[misc]
    """The number of skipped steps, in total and in a row; part of a checkpoint, so that a resumed run continues it."""

    def __init__(self, trainer: FiniteSteps | None = None) -> None:
        self.trainer, self.total, self.in_row = trainer, 0, 0

    def state(self) -> dict[str, Any]:
        """Return the part that a checkpoint keeps."""
        return {"args": {}, "attributes": {"total": self.total, "in_row": self.in_row}}

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        saved = state.stateful_callbacks.setdefault(
            type(self).__name__, self.state()
        )  # missing in checkpoints of older versions
        saved = (saved[0] if isinstance(saved, list) else saved).get("attributes", {})
        self.total, self.in_row = (saved.get(key, 0) if state.global_step else 0 for key in ("total", "in_row"))

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.trainer is not None:
            self.trainer._judge_step()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.trainer is not None:
            self.trainer._count_step()

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.trainer is not None:
            self.trainer._require_result()


class FiniteSteps(Trainer):  # type: ignore[misc]
    """A Trainer that takes no step along a gradient, or from a loss, that is not finite.

    Such a step is skipped: parameters and optimizer state stay unchanged, weight decay included, while the schedule
    and the position in the data advance. Several processes all skip it together. Logs then have `skipped_steps`, the
    number so far, and each skipped step is reported on the terminal. `nonfinite_steps` of them in a row stop the run.
    The run stops at once if the weights themselves are not finite, because no later step can repair that. A checkpoint
    with a number that is not finite in weights or optimizer state is not written. With a gradient scaler (float16) or
    DeepSpeed, which skip steps to find a scale, only losses are checked.

    Logs also have `tokens_per_second`, if the batches have `input_ids` (or `_count_tokens` returns their number): the
    tokens of the steps since the last log divided by their time, without evaluations and saving.

    Raises:
        DataError: A step stops the run; the message names the step, its rows if they are known, and the tensor.
    """

    nonfinite_steps: int = 5

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._norm: Any = None
        self._bad_loss: float | None = None
        self._window, self._window_bad = 0, 0  # steps since the last log, and those without a loss
        self._tokens, self._seconds, self._started = 0, 0.0, perf_counter()
        super().__init__(*args, **kwargs)
        self._skips = _Skips(self)
        self.add_callback(self._skips)

    @property
    def skipped_steps(self) -> int:
        """The number of skipped steps of this run, including those before a resume."""
        return self._skips.total

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> tuple[list[Any], Any]:
        """Return the batches of the next step, as the Trainer does. The time of a step begins here.

        Args:
            epoch_iterator: The iterator over batches.
            num_batches: The number of batches of the step.
            device: The device of the batches.
        """
        self._started = perf_counter()
        found: tuple[list[Any], Any] = super().get_batch_samples(epoch_iterator, num_batches, device)
        return found

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        """Run the Trainer's step, and keep a loss that is not finite out of the running mean, where it would stay.

        Args:
            model: The model.
            inputs: One batch.
            *args: Further arguments of the Trainer.
            **kwargs: Further arguments of the Trainer.
        """
        self._tokens += self._count_tokens(inputs)
        loss: Tensor = super().training_step(model, inputs, *args, **kwargs)
        return self._judged_loss(loss)

    def _judged_loss(self, loss: Tensor) -> Tensor:
        value = float(loss.detach())
        if math.isfinite(value):
            return loss
        self._bad_loss = value
        return torch.zeros_like(loss)

    def _count_tokens(self, inputs: Mapping[str, Any]) -> int:
        ids = inputs.get("input_ids")
        return 0 if ids is None else int(ids.numel()) * self.args.world_size

    def _called_rows(self) -> str:
        """Return the rows of the present step, for messages; empty if they are not known."""
        return ""

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        self._norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        return self._norm

    def _judge_step(self) -> None:
        """Before the optimizer's step: do nothing, remove the gradients, or stop the run."""
        norm, self._norm = self._norm, None
        loss, self._bad_loss = self._bad_loss, None
        scaled = self.accelerator.scaler is not None or self.is_deepspeed_enabled
        norm = 0.0 if norm is None or scaled else float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)
        skip = loss is not None or not math.isfinite(norm)
        if self.args.world_size > 1:  # one decision for all processes, because losses may differ
            flag = torch.tensor(float(skip), device=self.args.device)
            others = float(self.accelerator.reduce(flag, reduction="sum"))
            if others and not skip:
                skip, loss = True, math.nan
        if not skip:
            self._skips.in_row = 0
            return
        self._window_bad += loss is not None
        self._skips.total, self._skips.in_row = self._skips.total + 1, self._skips.in_row + 1
        model = self.accelerator.unwrap_model(self.model)
        for p in model.parameters():
            p.grad = None  # an optimizer does not change a parameter without gradient, nor its state
        what = f"the loss of step {self.state.global_step + 1} is {loss}"
        if loss is None:
            what = f"the gradient of step {self.state.global_step + 1} is not finite (its norm is {norm})"
        what += self._called_rows()
        advice = self._advice()
        if self._skips.in_row == 1:
            found = first_not_finite((name, p.detach()) for name, p in model.named_parameters())
            if found is not None:
                if self.state.global_step == 0:
                    advice = "the model came with it: restore its files, or give another model"
                raise DataError(f"training: {what}, because the weight {found} is not finite; {advice}")
        limit = min(self.nonfinite_steps, max(1, self.state.max_steps))
        if self._skips.in_row >= limit or self._must_have_every_step():
            row = f", as in the {limit - 1} steps before" if limit > 1 else ""
            row = "" if self._must_have_every_step() else row
            raise DataError(f"training: {what}{row}; {advice}")
        warn(f"training: {what}; the step is skipped ({self._skips.total} so far)")

    def _must_have_every_step(self) -> bool:
        return False

    def _advice(self) -> str:
        return f"lower the learning rate (now {self.args.learning_rate:g}) or look at these rows"

    def _count_step(self) -> None:
        self._window += 1
        self._seconds += perf_counter() - self._started

    def log(self, logs: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        """Log as the Trainer does, with tokens per second and the number of skipped steps.

        Args:
            logs: The values to log.
            *args: Further arguments of the Trainer.
            **kwargs: Further arguments of the Trainer.
        """
        if "loss" in logs and self._window:
            steps, bad = self._window, self._window_bad
            logs["loss"] = math.nan if bad == steps else logs["loss"] * (steps / (steps - bad) if bad else 1)
            if self._tokens and self._seconds > 0:
                logs["tokens_per_second"] = round(self._tokens / self._seconds, 1)
            if self._skips.total:
                logs["skipped_steps"] = self._skips.total
            self._window, self._window_bad, self._tokens, self._seconds = 0, 0, 0, 0.0
        super().log(logs, *args, **kwargs)

    def _require_finite(self, what: str) -> None:
        """Raise a DataError that names a tensor of the trained weights or the optimizer's state that is not finite."""
        model = self.accelerator.unwrap_model(self.model)
        found = first_not_finite(trained_parameters(model)) or first_not_finite(state_tensors(self.optimizer))
        if self.args.world_size > 1:  # shards may differ
            flag = torch.tensor(float(found is not None), device=self.args.device)
            if float(self.accelerator.reduce(flag, reduction="sum")) and found is None:
                found = "a tensor of another process"
        if found is not None:
            raise DataError(
                f"training: after step {self.state.global_step}, {found} is not finite, and {what}; {self._advice()}"
            )

    def _require_result(self) -> None:
        if not self.is_deepspeed_enabled and self.optimizer is not None:
            self._require_finite("such weights are not saved")

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        if not self.is_deepspeed_enabled:
            self._require_finite("no checkpoint was written")
        super()._save_checkpoint(model, trial)
