"""One training run: a `DataTrainer` made from a recipe and continued from its checkpoints, and its result."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainerState, TrainingArguments

from datatools import DataError, files
from pipelines.runs import memory
from pipelines.runs.messages import warn
from pipelines.runs.progress import Progress as Bar
from pipelines.runs.workers import rank
from pipelines.settings.parts import TrainingConfig
from pipelines.training.callbacks import Progress, WatchRounding, tensorboard_in
from pipelines.training.checkpoint_files import check_numerics, checkpoints, lead_first
from pipelines.training.token_selection import TokenSelection
from pipelines.training.trainer import Choice, DataTrainer, Observe
from pipelines.training.validation import (
    LOSS,
    PREFIX,
    Timed,
    Validate,
    Validation,
    best_of,
    evaluations,
    history_of,
    over,
    resume_point,
    step_of,
)

_TOO_LARGE = (
    "a step of training does not fit. The rows of a step are computed in parts of at most {:,} padded tokens, whose "
    "gradients are added up, so that --batch-size hardly matters: set the micro_tokens of this recipe lower (--set "
    "training.micro_tokens=N, of a warm-up warmup.micro_tokens), which changes results only by rounding, or cut rows "
    "with --max-length. Where weights and the state of the optimizer alone do not fit, train adapters (--lora-rank 8) "
    "or without backpropagation (--gradient zo)"
)


@dataclass(frozen=True)
class Trained:
    """The result of a training run.

    Attributes:
        steps: The number of optimizer steps.
        losses: The loss of each step (mean over supervised tokens); NaN if it was not finite.
        learning_rates: The learning rate of each step.
        tokens: The number of tokens.
        directions: With zeroth-order gradients, the seeds and projected gradients of each step, which replay it.
        entries: The log of each step, as in `metrics.jsonl`.
        skipped: The number of steps that were skipped because loss or gradient was not finite.
        best: (step, loss) of the best evaluation: that of the lowest loss, or of the best accuracy that decides.
        kept: The step whose weights the model has.
        stopped: Whether validation ended the run before its last step.
    """

    steps: int
    losses: list[float]
    learning_rates: list[float]
    tokens: int
    directions: list[dict[str, Any]] = field(default_factory=list)
    entries: list[dict[str, Any]] = field(default_factory=list)
    skipped: int = 0
    best: tuple[int, float] | None = None
    kept: int = 0
    stopped: bool = False

    @property
    def fell(self) -> str:
        """The first and the last loss, as `loss 1.2345 -> 0.6789`."""
        known = [loss for loss in self.losses if math.isfinite(loss)] or [math.nan]
        return f"loss {known[0]:.4f} -> {known[-1]:.4f}"


class WholeSteps(torch.utils.data.Dataset[dict[str, Any]]):
    """The steps of an order, one per item."""

    def __init__(self, encode: Callable[[int], tuple[list[int], list[int]]], steps: Sequence[Sequence[int]]) -> None:
        self.encode, self.steps = encode, steps

    def __len__(self) -> int:
        return len(self.steps)

    def __getitem__(self, step: int) -> dict[str, Any]:
        return {"rows": list(self.steps[step]), "items": [self.encode(row) for row in self.steps[step]]}


class SingleRows(torch.utils.data.Dataset[dict[str, Any]]):
    """Rows, one per item; `gather` makes batches of them."""

    def __init__(self, encode: Callable[[int], tuple[list[int], list[int]]], rows: Sequence[int]) -> None:
        self.encode, self.rows = encode, rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> dict[str, Any]:
        return {"row": self.rows[i], "item": self.encode(self.rows[i])}


def gather(items: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the batch of a `DataTrainer`: `rows`, their numbers, and `items`, their (input_ids, labels).

    Args:
        items: Items of `SingleRows`.
    """
    return {"rows": [item["row"] for item in items], "items": [item["item"] for item in items]}


def planned_steps(rows: int, recipe: TrainingConfig) -> int:
    """Return the number of optimizer steps of a run.

    Args:
        rows: The number of rows.
        recipe: The recipe.
    """
    steps = math.ceil(rows / recipe.batch_size) * recipe.epochs
    return steps if recipe.max_steps is None else min(steps, recipe.max_steps)


def planned_checkpoints(rows: int, recipe: TrainingConfig) -> list[int]:
    """Return the steps at which a run with `save="epoch"` saves: the end of each epoch, and the last step.

    Args:
        rows: The number of rows.
        recipe: The recipe.
    """
    last = planned_steps(rows, recipe)
    return [*range(math.ceil(rows / recipe.batch_size), last, math.ceil(rows / recipe.batch_size)), last]


def _may_skip_parameters(model: nn.Module) -> bool:
    """Return whether a forward pass may skip parameters (those of experts), which DDP must know."""
    config = getattr(model, "config", None)
    return config is not None and any("expert" in name for name in vars(config))


def fit(
    model: Any,
    encode: Callable[[int], tuple[list[int], list[int]]],
    rows: Sequence[int],
    recipe: TrainingConfig,
    folder: Path,
    *,
    seed: int,
    save: int | str | None = None,
    bar: Bar | None = None,
    observe: Observe | None = None,
    choose: Choice | None = None,
    tokens: TokenSelection | None = None,
    name_of: Callable[[int], object] = int,
    steps: Sequence[Sequence[int]] | None = None,
    held: int = 0,
    autocast: bool = False,
    validation: Validation | None = None,
    report_to: str = "none",
) -> Trained:
    """Train the trainable parameters of a model, in place, on rows.

    Args:
        model: The model.
        encode: A row's number -> its (input_ids, labels).
        rows: The numbers of the rows to train on.
        recipe: The optimizer, its schedule, the number of epochs and the batch sizes.
        folder: The folder of the checkpoints. Training continues from the newest valid one, bit for bit as if it had
            not been interrupted.
        seed: The seed of the order of rows, dropout, and all other random choices.
        save: When checkpoints are saved: "epoch", a number of steps, or None for never.
        bar: The progress of the steps.
        observe: Called for each step (`trainer.Observe`).
        choose: If given, batches of `recipe.batch_size` rows are large batches, from which it keeps the rows of a step
            (`trainer.Choice`).
        tokens: If given, the loss is that of the tokens that it keeps.
        name_of: A row's number -> its name in errors.
        steps: The rows of each step, in order, instead of shuffled batches; the recipe's epochs and batch size are
            then ignored.
        held: The number of first steps that have the initial learning rate of the schedule, which begins after them.
        autocast: Whether to compute in bfloat16 with weights in float32 (`recipe.rounding` "master").
        validation: Measures held-out rows during training; needs `save`. The model ends with the weights of the lowest
            loss, or of the best accuracy where that decides.
        report_to: "tensorboard", "wandb" or "trackio", by transformers' own callbacks.

    Returns:
        The result of the run, step by step.

    Raises:
        DataError: Several steps in a row, or weights, are not finite; or the checkpoint was computed with other
            numerics.
        UsageError: The optimizer or schedule is unknown.
    """
    if not rows:
        raise DataError("training: there are no rows to train on")
    if steps is not None:
        recipe = recipe.model_copy(update={"batch_size": 1, "epochs": 1, "max_steps": None})
    strategy = "no" if save is None else "epoch" if save == "epoch" else "steps"
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=recipe.batch_size,
        num_train_epochs=recipe.epochs,
        max_steps=-1 if recipe.max_steps is None else planned_steps(len(rows), recipe),  # Trainer's ignores the epochs
        learning_rate=recipe.learning_rate,
        max_grad_norm=0.0 if recipe.gradient == "zo" else recipe.gradient_clip or 0.0,
        save_strategy=strategy,
        save_steps=save if isinstance(save, int) else 500,
        logging_steps=1,
        logging_nan_inf_filter=False,
        report_to=report_to,
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        ddp_find_unused_parameters=_may_skip_parameters(model),
        use_cpu=next(model.parameters()).device.type == "cpu",
        bf16=autocast,
        seed=seed % 2**32,
        data_seed=seed % 2**32,
    )
    arguments._n_gpu = min(arguments.n_gpu, 1)  # one process uses one device, without DataParallel
    last = planned_steps(len(rows), recipe) if steps is None else len(steps)
    per_epoch = math.ceil(len(rows) / recipe.batch_size) if steps is None else len(steps)
    callbacks: list[TrainerCallback] = [Progress(None if bar is None else bar.advance), WatchRounding()]
    validate: Callable[[nn.Module], dict[str, float]] | None = None if validation is None else validation.values
    if validation is not None and bar is not None:
        validate = Timed(validation, bar)
    if validation is not None:
        every = save if isinstance(save, int) else per_epoch
        callbacks.append(Validate(validation, lambda step: step % every == 0 or step == last))
    with tensorboard_in(folder.parent / "tensorboard"):
        trainer = DataTrainer(
            recipe=recipe,
            observe=observe,
            validate=validate,
            choose=choose,
            tokens=tokens,
            name_of=name_of,
            model=model,
            args=arguments,
            train_dataset=SingleRows(encode, rows) if steps is None else WholeSteps(encode, steps),
            data_collator=gather if steps is None else itemgetter(0),
            shuffle=steps is None,
            held=held,
            callbacks=callbacks,
        )
    with lead_first():
        valid = []
        if save is not None and folder.is_dir():
            if rank() == 0:
                files.remove_leftovers(folder)
            valid = checkpoints(folder)
        start = resume_point(valid, validation)
        if start is not None and rank() == 0:
            check_numerics(start)
    if start is not None and bar is not None:
        bar.resume(step_of(start))
    patience = None if validation is None else validation.patience
    judged = (lambda history: []) if validation is None else validation.judged
    if start is not None and (step_of(start) >= last or over(judged(history_of(start)), patience)):
        trainer._load_from_checkpoint(
            str(start)
        )  # training is complete: the run was stopped before it saved its result
        weights: Path | None = start
        trainer.state = TrainerState.load_from_json(str(start / "trainer_state.json"))
    else:
        with memory.explained(_TOO_LARGE.format(recipe.micro_tokens)):
            trainer.train(resume_from_checkpoint=None if start is None else str(start))
        weights = None
    state = trainer.state
    found = judged(state.log_history)
    best, kept = best_of(found), state.global_step
    if validation is not None and validation.keep_best and best is not None and best[0] != state.global_step:
        kept = best[0]
        weights = folder / f"checkpoint-{best[0]}"
        trainer._load_from_checkpoint(str(weights))
    _use_averages(trainer, weights)
    model.eval()
    entries = _entries(
        state.log_history, gradients=recipe.gradient != "zo", more=() if choose is None else choose.logged
    )
    skipped = sum(entry.get("skipped", False) for entry in entries)
    if skipped:
        warn(f"{skipped} of {state.global_step} steps were skipped: their loss or gradient was not finite")
    return Trained(
        steps=state.global_step,
        losses=[math.nan if entry["loss"] is None else entry["loss"] for entry in entries],
        learning_rates=[entry["learning_rate"] for entry in entries],
        tokens=trainer.seen_tokens,
        directions=[entry for entry in state.log_history if "projected_grad" in entry],
        entries=entries,
        skipped=skipped,
        best=None if best is None else (best[0], dict(evaluations(state.log_history))[best[0]]),
        kept=kept,
        stopped=state.global_step < last and over(found, patience),
    )


def _use_averages(trainer: DataTrainer, checkpoint: Path | None) -> None:
    """Leave averaged weights in the model, where the optimizer has any (Schedule-Free).

    checkpoint: the one whose weights the model has, if they are not those of the last step.
    """
    if trainer.optimizer is None:
        trainer.create_optimizer()
    optimizer = getattr(trainer.optimizer, "optimizer", trainer.optimizer)  # accelerate wraps it
    if any(group["rule"].averages for group in optimizer.param_groups):
        if checkpoint is not None:
            optimizer.load_state_dict(torch.load(checkpoint / "optimizer.pt", weights_only=True, map_location="cpu"))
        optimizer.eval()


def _entries(history: Sequence[Mapping[str, Any]], *, gradients: bool, more: Sequence[str]) -> list[dict[str, Any]]:
    """Return one entry per step for `metrics.jsonl`: non-finite values are null, and skipped steps are marked."""
    found: list[dict[str, Any]] = []
    skipped = 0
    validated = {
        seen["step"]: {key: value for key, value in seen.items() if key.startswith(PREFIX)}
        for seen in history
        if LOSS in seen
    }
    for seen in history:
        if "loss" not in seen:
            continue
        entry = {"step": seen["step"], "loss": _number(seen["loss"]), "learning_rate": seen["learning_rate"]}
        if gradients:
            entry["grad_norm"] = _number(seen.get("grad_norm"))
        if seen.get("skipped_steps", 0) > skipped:
            skipped, entry["skipped"] = seen["skipped_steps"], True
        for key in ("tokens_per_second", *more):
            if key in seen:
                entry[key] = seen[key]
        entry |= {key: _number(value) for key, value in validated.get(seen["step"], {}).items()}
        found.append(entry)
    return found


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None
