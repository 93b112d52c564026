"""The training loop: `transformers.Trainer`, subclassed once.

Checkpoints, resume, accelerate and logging are the Trainer's. What differs: the optimizer is one of `optim`'s, built
from named parameters so that its saved state has names; the loss sees only supervised positions; a step's rows are
split by length into micro-batches of a token budget; and a checkpoint counts only once `complete.json` (sizes and
hashes, written last) stands in it, so that a run killed inside a save continues from the checkpoint before.
"""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch
from accelerate.data_loader import BatchSamplerShard
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainerCallback, TrainerState, TrainingArguments
from transformers.trainer_callback import PrinterCallback
from transformers.trainer_utils import rotate_checkpoints

import optim
from datatools import DataError, EnvironmentProblem, Selection, UsageError, files, token_batches
from optim.zeroth_order import NotFinite
from pipelines.colm.coresets import MONITORED, WEIGHTS, CoresetMixin, example_weights
from pipelines.models.losses import collate, supervised_tokens, token_losses
from pipelines.models.quiet import quiet
from pipelines.runs.messages import say, warn
from pipelines.runs.workers import rank, world_size
from pipelines.settings.parts import TrainingConfig
from pipelines.settings.train import CoresetConfig
from pipelines.training import zeroth_order
from pipelines.training.finite import rotten
from pipelines.training.validation import (
    LOSS,
    Validate,
    Validation,
    best_of,
    evaluations,
    history_of,
    over,
    resume_point,
    step_of,
)

COMPLETE = "complete.json"


@dataclass(frozen=True)
class Trained:
    """What a training run did: optimizer steps, and loss (mean over supervised tokens) and learning rate of each.

    A loss is NaN where it was not finite. directions: with zeroth-order gradients, the seeds and projected gradients of
    each step, which replay it. entries: what was logged of each step, as `metrics.jsonl` has it. skipped: steps that
    were left out because loss or gradient was not finite. best: (step, loss) of the lowest validation loss. stopped:
    whether that ended the run before its last step.
    """

    steps: int
    losses: list[float]
    learning_rates: list[float]
    tokens: int
    directions: list[dict[str, Any]] = field(default_factory=list)
    entries: list[dict[str, Any]] = field(default_factory=list)
    skipped: int = 0
    best: tuple[int, float] | None = None
    stopped: bool = False

    @property
    def monitored(self) -> dict[int, dict[str, Any]]:
        """With a coreset, what was measured of the choice, by step."""
        found = {e["step"]: {key: e[key] for key in MONITORED if key in e} for e in self.entries}
        return {step: seen for step, seen in found.items() if "match_error" in seen}

    @property
    def fell(self) -> str:
        """`loss 1.2345 -> 0.6789`."""
        known = [loss for loss in self.losses if math.isfinite(loss)] or [math.nan]
        return f"loss {known[0]:.4f} -> {known[-1]:.4f}"


class DataTrainer(CoresetMixin):
    """`transformers.Trainer` with the suite's optimizer and schedule. The batch of the Trainer is the optimizer's
    whole step, from which curvature is estimated too (Sophia, AdaHessian).

    Several processes (torchrun, DDP) all read the whole step, and its micro-batches are dealt out among them: a run
    trains on the same rows in the same steps, whatever their number, and differs by rounding only.

    observe: called before each optimizer step, once its gradients are there, with (step from 1 on, row indices of the
    step); it must not change anything. `order.Recorder` records a reference run so.
    choose: batches are large, and each step trains on the rows that this keeps of them (`CoresetMixin`).
    source_of: the source of a row by its index, for `choose`; None is one source for all.
    name_of: what errors call a row; its index otherwise.
    held: so many first steps have the learning rate of the step after them, where the schedule begins.
    validate: a model in evaluation mode -> its loss on held-out rows; `evaluate` logs it. None is the Trainer's own.
    """

    loss_is_scaled_for_ga = True  # `training_step` divides by the tokens of the whole step itself

    def __init__(
        self,
        *,
        recipe: TrainingConfig,
        observe: Callable[[int, Sequence[int]], None] | None = None,
        choose: CoresetConfig | None = None,
        source_of: Callable[[int], Hashable] | None = None,
        name_of: Callable[[int], object] = int,
        validate: Callable[[nn.Module], float] | None = None,
        shuffle: bool = True,
        held: int = 0,
        **kwargs: Any,
    ) -> None:
        self.recipe, self.observe, self.shuffle, self.held = recipe, observe, shuffle, held
        self.validate, self._saved_step = validate, -1
        self.control: Any
        self.source_of, self.name_of = source_of or (lambda row: ""), name_of
        self.seen_tokens = 0
        self.optimizer: Any
        self.lr_scheduler: Any
        self._step_rows: Sequence[int] = ()
        self._aside: Path | None = None
        super().__init__(choose=choose, nonfinite_steps=recipe.nonfinite_steps, **kwargs)
        self.remove_callback(PrinterCallback)
        self.zeroth = None
        if recipe.gradient == "zo":
            self.zeroth = zeroth_order.source_of(recipe, self.model, seed=self.args.seed)

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
        """Trainer's shuffling sampler, or the rows as they stand."""
        if self.shuffle:
            return super()._get_train_sampler(*args, **kwargs)
        return torch.utils.data.SequentialSampler(self.train_dataset)

    def get_train_dataloader(self) -> Any:
        """Trainer's, but that every process gets every batch whole: `training_step` deals it out."""
        loader = super().get_train_dataloader()
        sharded = loader.batch_sampler
        if self.args.world_size > 1:
            assert isinstance(sharded, BatchSamplerShard)
            sharded.num_processes, sharded.process_index, sharded.even_batches = 1, 0, False
        return loader

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The optimizer that the recipe names, over the parameters that train."""
        if self.optimizer is None:
            module = self.model if model is None else model
            self.optimizer = optimizer_of(self.recipe, module)
            narrow = any(p.requires_grad and p.dtype == torch.bfloat16 for p in module.parameters())
            if narrow and self.recipe.rounding != "nearest":
                say("weights in bfloat16 are rounded up or down at random, so that small updates arrive (--rounding)")
            if len(self.optimizer.param_groups) > 1:
                say(optim.group_table(self.optimizer))
        return self.optimizer  # type: ignore[no-any-return]

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """The schedule that the recipe names, as a `LambdaLR`.

        Step k = 1..T has the factor at k of T + 1: a short run wastes neither its first step nor its last on rate 0.
        """
        if self.lr_scheduler is None:
            optimizer = optimizer or self.optimizer
            factors = _factors(self.recipe, num_training_steps - self.held, optimizer)
            self.lr_scheduler = LambdaLR(optimizer, [_held(factor, self.held) for factor in factors])
        return self.lr_scheduler

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """Gradients of the mean loss over the step's supervised tokens, by micro-batches; that loss, detached.

        A zeroth-order source takes the whole step here; the Trainer's own then finds no gradient and does nothing.
        """
        model.train(self.zeroth is None)
        rows = inputs.pop("rows")
        items = inputs["items"]
        supervised = supervised_tokens(items)
        if supervised == 0:
            raise DataError(f"training: none of the rows {self._called(rows)} of this step has a supervised token")
        self._step_rows, tokens = rows, sum(len(ids) for ids, _ in items)
        self.seen_tokens += tokens
        self._tokens += tokens
        weights = inputs.get(WEIGHTS)
        if self.choose is not None and self.choose.loss_weighting == "token":
            weights = None
        world, own = self.args.world_size, self.args.process_index

        def share(group: list[int], module: nn.Module) -> Tensor:
            batch = {key: tensor.to(self.args.device) for key, tensor in collate([items[i] for i in group]).items()}
            losses, where = token_losses(module, batch)
            loss: Tensor = losses.sum() / supervised
            if weights is not None:
                loss = (losses * example_weights(weights[group], where, len(items))).sum()
            scaled: Tensor = world * loss  # the mean over processes, which DDP takes, is then the step's
            return scaled

        lengths = [len(ids) for ids, _ in items]
        groups = token_batches(lengths, min(self.recipe.micro_tokens, -(-sum(lengths) // world)))
        inner = self.accelerator.unwrap_model(model)
        mine = groups[own::world]
        parts = [partial(share, group, inner) for group in mine]
        if self.zeroth is not None:
            taken = self.state.global_step
            if self.observe is not None:
                self.observe(taken + 1, rows)
            try:
                total, directions = zeroth_order.step(self.zeroth, self.optimizer, parts, taken=taken, rows=rows)
            except NotFinite as error:
                return self._judged_loss(torch.tensor(error.value, device=self.args.device))
            self.state.log_history.append(directions)
            return torch.tensor(total, device=self.args.device)
        total = 0.0
        for part in parts[:-1]:
            total += self._backward(part())
        # the last through DDP, which then adds up the gradients of all; a process without a part adds nothing
        total += self._backward(share(mine[-1], model) if mine else 0.0 * share(groups[-1], model))
        if world > 1:
            total = float(self.accelerator.reduce(torch.tensor(total, device=self.args.device), reduction="mean"))
        if not math.isfinite(total):
            return self._judged_loss(torch.tensor(total, device=self.args.device))
        optim.curvature.refresh(self.optimizer, parts, seed=self.args.seed)  # for rules that read it, when it is due
        if self.observe is not None:
            self.observe(self.state.global_step + 1, rows)
        return torch.tensor(total, device=self.args.device)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """The loss on the held-out rows of `validate`, logged as `eval_loss`."""
        if self.validate is None:
            return super().evaluate(*args, **kwargs)  # type: ignore[no-any-return]
        model = self.accelerator.unwrap_model(self.model)
        training = model.training
        model.eval()
        with torch.no_grad():
            metrics = {LOSS: self.validate(model)}
        model.train(training)
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _called_rows(self) -> str:
        return f", rows {self._called(self._step_rows)}"

    def _advice(self) -> str:
        return f"lower training.learning_rate (now {self.recipe.learning_rate:g}) or look at these rows"

    def _must_have_every_step(self) -> bool:
        return self.observe is not None  # a recorded run is a run of all its steps

    def _backward(self, loss: Tensor) -> float:
        self.accelerator.backward(loss)
        return float(loss.detach())

    @property
    def _group(self) -> Any:
        return torch.distributed.group.WORLD if self.args.world_size > 1 else None

    def _count_sources(self) -> None:
        self._counts = Counter(self.source_of(row) for row in self.train_dataset.rows)

    def _arrange_loss(self) -> None:
        pass  # `training_step` weighs the rows

    def _called(self, rows: Sequence[int]) -> str:
        return ", ".join(str(self.name_of(row)) for row in rows[:5])

    def _large(self, batch: dict[str, Any]) -> tuple[dict[str, Tensor], list[Hashable], dict[str, Any]]:
        tensors = {key: tensor.to(self.args.device) for key, tensor in collate(batch["items"]).items()}
        known = {"lengths": [len(ids) for ids, _ in batch["items"]], "names": [self.name_of(r) for r in batch["rows"]]}
        return tensors, [self.source_of(row) for row in batch["rows"]], known

    def _kept(self, batch: dict[str, Any], chosen: Selection) -> dict[str, Any]:
        order = chosen.indices.argsort()
        kept = chosen.indices[order].tolist()
        return {key: [batch[key][i] for i in kept] for key in ("rows", "items")} | {WEIGHTS: chosen.weights[order]}

    def _get_output_dir(self, trial: Any) -> str:
        return super()._get_output_dir(trial) if self._aside is None else str(self._aside)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Trainer's, into a fresh folder that is moved into place when it is complete; a link there is not followed."""
        folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        if self._saved_step == self.state.global_step:
            return  # the best of its kind, and the end of an epoch
        files.make_folder(folder.parent)
        with saving(folder), ExitStack() as stack:
            fresh = [str(stack.enter_context(files.atomic_folder(folder))) if self.args.should_save else ""]
            if self.args.world_size > 1:
                torch.distributed.broadcast_object_list(fresh)
            self._aside = Path(fresh[0])
            inner = self._aside / folder.name
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self._aside = None
            self.accelerator.wait_for_everyone()  # each process saves the state of its generators
            if self.args.should_save:
                if self.state.best_global_step:
                    best = folder.with_name(f"checkpoint-{self.state.best_global_step}")
                    self.state.best_model_checkpoint = str(best)
                    self.state.save_to_json(str(inner / "trainer_state.json"))
                for path in sorted(inner.iterdir()):
                    files.move(path, inner.parent / path.name)
                inner.rmdir()
                mark_complete(inner.parent)
        self._saved_step = self.state.global_step
        self.accelerator.wait_for_everyone()
        if self.args.should_save and self.args.save_total_limit:
            rotate_checkpoints(
                output_dir=self.args.output_dir,
                save_total_limit=self.args.save_total_limit,
                best_model_checkpoint=self.state.best_model_checkpoint,
                use_mtime=True,
            )


def head_dim(model: nn.Module) -> int | None:
    """Rows of a query matrix that are one head, as the model's configuration says; None where it does not."""
    config = getattr(model, "config", None)
    try:
        stated = getattr(config, "head_dim", None)
    except RuntimeError:  # layers of several sizes, each with a configuration of its own
        return None
    hidden, heads = (getattr(config, key, None) for key in ("hidden_size", "num_attention_heads"))
    found = hidden // heads if stated is None and hidden and heads and hidden % heads == 0 else stated
    return found if isinstance(found, int) else None


def optimizer_of(recipe: TrainingConfig, module: nn.Module) -> optim.Optimizer:
    """The optimizer that the recipe names over the parameters of `module` that train. Raises: UsageError.

    Norms and biases have no weight decay, as with Trainer (`optim.without_decay`); bfloat16 weights are rounded as the
    recipe says.
    """
    optimizer = _optimizer(recipe, module, head_dim(module))
    if any(p.dtype == torch.bfloat16 for p in module.parameters() if p.requires_grad):
        optim.set_rounding(optimizer, "nearest" if recipe.rounding == "nearest" else "stochastic")
    return optimizer


def _optimizer(
    recipe: TrainingConfig, parameters: nn.Module | Sequence[tuple[str, Tensor]], head: int | None = None
) -> optim.Optimizer:
    """head: `head_dim` of the model, for Adam-mini, whose blocks are heads where the user says nothing else."""
    options: dict[str, Any] = dict(recipe.optimizer_options)
    if recipe.optimizer == "adam_mini" and head and not {"dim", "n_heads", "head_dim", "blocks"} & set(options):
        options["head_dim"] = head
    try:
        return optim.create(
            recipe.optimizer,
            parameters,
            lr=recipe.learning_rate,
            weight_decay=recipe.weight_decay,
            decay_all=recipe.decay_all or not recipe.weight_decay,
            block_ratios=recipe.block_ratios,
            **options,
        )
    except (ValueError, TypeError) as error:
        raise UsageError(f"training.optimizer: {error}") from error


def _factors(recipe: TrainingConfig, steps: int, optimizer: torch.optim.Optimizer) -> list[Callable[[int], float]]:
    """One function a param group, from the steps taken to the factor of the next: the schedule at that of T + 1."""

    def next_step(factor: Callable[[int], float]) -> Callable[[int], float]:
        return lambda step: factor(step + 1)

    try:
        options: dict[str, Any] = dict(recipe.schedule_options)
        if "warmup_steps" in optim.schedule_options(recipe.schedule):
            options.setdefault("warmup_steps", math.ceil(recipe.warmup_ratio * steps))
        factors = optim.group_factors(optimizer, recipe.schedule, total_steps=steps + 1, **options)
        return [next_step(factor) for factor in factors]
    except (ValueError, TypeError) as error:
        raise UsageError(f"training.schedule: {error}") from error


def _held(factor: Callable[[int], float], steps: int) -> Callable[[int], float]:
    """`factor`, which stands still for so many steps before it begins."""
    return factor if not steps else lambda step: factor(max(step - steps, 0))


def check(recipe: TrainingConfig) -> None:
    """Refuse an optimizer, a hyper-parameter or a schedule that does not exist, before anything is loaded.

    Raises: UsageError.
    """
    examples = optim.example_parameters(recipe.block_ratios)
    options = dict(recipe.optimizer_options)
    for key in ("assign", "blocks"):
        if isinstance(options.get(key), Mapping):
            options[key] = {}  # of names that the examples do not have
    optimizer = _optimizer(recipe.model_copy(update={"optimizer_options": options}), examples)
    _factors(recipe, 1, optimizer)
    if recipe.gradient == "zo":
        zeroth_order.check(recipe, optimizer, examples)


@contextmanager
def saving(folder: Path) -> Iterator[None]:
    """What torch, safetensors and peft raise when the disk refuses, as an error that says how to go on."""
    try:
        with quiet():
            yield
    except OSError as error:
        raise files.explain(error, folder, "write") from error
    except (SafetensorError, RuntimeError) as error:  # theirs carry no errno
        first = str(error).strip().splitlines()[0][:200]
        raise EnvironmentProblem(
            f"cannot write {folder}: {first}; check the disk (is it full?) and run the same command again, it "
            "continues from the checkpoint before"
        ) from error


def mark_complete(folder: Path) -> None:
    """Write `complete.json`: size and hash of every file in the checkpoint. Its presence is what makes one valid."""
    adapter = folder / "adapter_config.json"
    if adapter.is_file():  # peft writes a set of names in whatever order it has; equal runs shall have equal bytes
        config = files.read_json(adapter)
        ordered = {k: sorted(v) if k == "target_modules" and isinstance(v, list) else v for k, v in config.items()}
        files.write_bytes(adapter, files.json_bytes(ordered), seal=False)  # `COMPLETE` has its digest
    found = {p.name: [p.stat().st_size, files.digest_file(p)] for p in sorted(folder.iterdir()) if p.name != COMPLETE}
    files.write_json(folder / COMPLETE, found)


def is_complete(folder: Path) -> bool:
    """Whether every file that `complete.json` lists is there, byte for byte; no when it is damaged itself."""
    try:
        listed: Mapping[str, Sequence[Any]] = files.read_json(folder / COMPLETE)
        return len(listed) > 0 and all(
            (folder / name).is_file()
            and (folder / name).stat().st_size == size
            and files.digest_file(folder / name) == digest
            for name, (size, digest) in listed.items()
        )
    except (DataError, AttributeError, TypeError, ValueError):  # missing, not JSON, or not what `mark_complete` wrote
        return False


def is_sound(folder: Path) -> bool:
    """Whether what was saved in `folder` is complete, finite, and here: no link leads out of it."""
    if folder.is_symlink() or (folder.is_dir() and any(path.is_symlink() for path in folder.iterdir())):
        return False
    if not is_complete(folder):
        return False
    if (found := rotten(folder)) is not None:
        warn(f"{folder}: {found} is not finite; what was saved there is not used")
        return False
    return True


def checkpoints(folder: Path, steps: Sequence[int] | None = None) -> list[Path]:
    """The valid checkpoints in `folder`, oldest first; damaged ones are renamed `*.broken` and never used.

    One whose weights or optimizer state are not finite is damaged too, and so is a symbolic link.
    steps: those there should be (`planned_checkpoints`). What comes behind the first that is missing is set aside too:
    training goes on before the gap and makes the rest again, bit for bit.
    """
    found = []
    for path in folder.glob("checkpoint-*"):
        step = path.name.removeprefix("checkpoint-")
        if step.isdigit():
            if is_sound(path):
                found.append((int(step), path))
            else:
                _set_aside(path)
    found.sort()
    if steps is not None:
        sound = 0
        while sound < min(len(found), len(steps)) and found[sound][0] == steps[sound]:
            sound += 1
        for _, path in found[sound:]:
            _set_aside(path)
        found = found[:sound]
    return [path for _, path in found]


def _set_aside(path: Path) -> None:
    number, aside = 1, path.with_name(f"{path.name}.broken")
    while os.path.lexists(aside):  # the same step may break twice: killed inside its save, and again
        number += 1
        aside = path.with_name(f"{path.name}.broken-{number}")
    files.move(path, aside)


class _Watch(TrainerCallback):  # type: ignore[misc]
    """Measures in the first steps how much of the updates of bfloat16 weights arrives, and warns of what is lost."""

    steps, lost = 5, 0.9

    def on_train_begin(self, args: Any, state: Any, control: Any, optimizer: Any = None, **_: Any) -> None:
        inner = getattr(optimizer, "optimizer", optimizer)  # accelerate wraps it
        rounded = [group for group in inner.param_groups if group.get("rounding") == "nearest"]
        self.optimizer = inner if rounded and state.global_step < self.steps else None
        if self.optimizer is not None:
            self.optimizer.arrived = optim.Arrived()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step >= self.steps:
            self._say()

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
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


class _Progress(TrainerCallback):  # type: ignore[misc]
    def __init__(self, advance: Callable[[int], Any] | None) -> None:
        self.advance = advance

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.advance is not None:
            self.advance(1)


class _Sequence(torch.utils.data.Dataset[dict[str, Any]]):
    """The batches of an order, one an item."""

    def __init__(self, encode: Callable[[int], tuple[list[int], list[int]]], steps: Sequence[Sequence[int]]) -> None:
        self.encode, self.steps = encode, steps

    def __len__(self) -> int:
        return len(self.steps)

    def __getitem__(self, step: int) -> dict[str, Any]:
        return {"rows": list(self.steps[step]), "items": [self.encode(row) for row in self.steps[step]]}


class _Rows(torch.utils.data.Dataset[dict[str, Any]]):
    def __init__(self, encode: Callable[[int], tuple[list[int], list[int]]], rows: Sequence[int]) -> None:
        self.encode, self.rows = encode, rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> dict[str, Any]:
        return {"row": self.rows[i], "item": self.encode(self.rows[i])}


def _gather(items: list[dict[str, Any]]) -> dict[str, Any]:
    return {"rows": [item["row"] for item in items], "items": [item["item"] for item in items]}


@contextmanager
def lead_first() -> Iterator[None]:
    """Of several processes the first does the block, then the others do: it makes or repairs what they read."""
    if world_size() > 1 and rank() > 0:
        torch.distributed.barrier()
    yield
    if world_size() > 1 and rank() == 0:
        torch.distributed.barrier()


def planned_steps(rows: int, recipe: TrainingConfig) -> int:
    """Optimizer steps of a run over `rows` rows."""
    steps = math.ceil(rows / recipe.batch_size) * recipe.epochs
    return steps if recipe.max_steps is None else min(steps, recipe.max_steps)


def planned_checkpoints(rows: int, recipe: TrainingConfig) -> list[int]:
    """The steps at which a run with `save="epoch"` saves: the end of each epoch, and the last step."""
    last = planned_steps(rows, recipe)
    return [*range(math.ceil(rows / recipe.batch_size), last, math.ceil(rows / recipe.batch_size)), last]


def _may_skip_parameters(model: nn.Module) -> bool:
    """Whether a forward pass may leave out parameters, which DDP must know: those of experts."""
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
    advance: Callable[[int], Any] | None = None,
    observe: Callable[[int, Sequence[int]], None] | None = None,
    choose: CoresetConfig | None = None,
    source_of: Callable[[int], Hashable] | None = None,
    name_of: Callable[[int], object] = int,
    steps: Sequence[Sequence[int]] | None = None,
    held: int = 0,
    autocast: bool = False,
    validation: Validation | None = None,
    report_to: str = "none",
) -> Trained:
    """Train `model`'s trainable parameters in place on `rows`; `encode(row)` gives (input_ids, labels).

    choose, source_of: batches of `recipe.batch_size` are large ones, of which the step trains on a few rows
    (`DataTrainer`). name_of: what errors call a row.

    steps: the rows of each step, in order, in place of shuffled batches; `recipe.epochs` and its batch size then say
    nothing. held: the first of them, at the learning rate with which the schedule begins after them.

    autocast: compute in bfloat16 with weights in float32 (`recipe.rounding` "master").

    save: "epoch", a number of steps, or None for no checkpoint. With checkpoints in `folder`, training continues from
    the newest valid one, bit for bit as if it had not stopped.

    validation: measures held-out rows on the way; needs `save`. The model ends with the weights of the lowest loss.
    report_to: "tensorboard", "wandb" or "trackio", by transformers' own callbacks.
    Raises: DataError for steps in a row, or weights, that are not finite; UsageError for an unknown optimizer or
    schedule.
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
        use_cpu=not torch.cuda.is_available(),
        bf16=autocast,
        seed=seed % 2**32,
        data_seed=seed % 2**32,
    )
    arguments._n_gpu = min(arguments.n_gpu, 1)  # one process is one device: no DataParallel around the model
    last = planned_steps(len(rows), recipe) if steps is None else len(steps)
    per_epoch = math.ceil(len(rows) / recipe.batch_size) if steps is None else len(steps)
    callbacks: list[TrainerCallback] = [_Progress(advance), _Watch()]
    if validation is not None:
        every = save if isinstance(save, int) else per_epoch
        callbacks.append(Validate(validation, lambda step: step % every == 0 or step == last))
    trainer = DataTrainer(
        recipe=recipe,
        observe=observe,
        validate=None if validation is None else validation.loss,
        choose=choose,
        source_of=source_of,
        name_of=name_of,
        model=model,
        args=arguments,
        train_dataset=_Rows(encode, rows) if steps is None else _Sequence(encode, steps),
        data_collator=_gather if steps is None else itemgetter(0),
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
    if start is not None and advance is not None:
        advance(step_of(start))
    patience = None if validation is None else validation.patience
    if start is not None and (step_of(start) >= last or over(evaluations(history_of(start)), patience)):
        trainer._load_from_checkpoint(str(start))  # all is trained: the run was stopped between its end and its result
        trainer.state = TrainerState.load_from_json(str(start / "trainer_state.json"))
    else:
        trainer.train(resume_from_checkpoint=None if start is None else str(start))
    state = trainer.state
    found = evaluations(state.log_history)
    best = best_of(found)
    if validation is not None and validation.keep_best and best is not None and best[0] != state.global_step:
        trainer._load_from_checkpoint(str(folder / f"checkpoint-{best[0]}"))
    model.eval()
    entries = _entries(state.log_history, gradients=recipe.gradient != "zo")
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
        best=best,
        stopped=state.global_step < last and over(found, patience),
    )


def _entries(history: Sequence[Mapping[str, Any]], *, gradients: bool) -> list[dict[str, Any]]:
    """One entry a step for `metrics.jsonl`: what is not finite is null, and a skipped step is marked."""
    found: list[dict[str, Any]] = []
    skipped = 0
    validated = dict(evaluations(history))
    for seen in history:
        if "loss" not in seen:
            continue
        entry = {"step": seen["step"], "loss": _number(seen["loss"]), "learning_rate": seen["learning_rate"]}
        if gradients:
            entry["grad_norm"] = _number(seen.get("grad_norm"))
        if seen.get("skipped_steps", 0) > skipped:
            skipped, entry["skipped"] = seen["skipped_steps"], True
        for key in ("tokens_per_second", *MONITORED):
            if key in seen:
                entry[key] = seen[key]
        if seen["step"] in validated:
            entry[LOSS] = _number(validated[seen["step"]])
        found.append(entry)
    return found


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None
