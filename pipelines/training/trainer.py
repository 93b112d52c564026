"""The training loop: a single subclass of `transformers.Trainer`.

Checkpoints, resume, accelerate and logging come from the Trainer. The differences: the optimizer comes from `optim`,
built from named parameters so that its saved state has names; the loss uses only supervised positions; the rows of a
step are split by length into micro-batches with a token budget; and a checkpoint is valid only when it is complete
(`checkpoint_files`).

There are two extension points: `choose` decides which rows of a large batch form the step, and `observe` sees each
step before it is taken.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate.data_loader import BatchSamplerShard
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from transformers.trainer_callback import PrinterCallback
from transformers.trainer_utils import rotate_checkpoints

import optim
from datatools import DataError, files, micro_batches
from optim.zeroth_order import NotFinite
from pipelines.models.finite import FiniteSteps
from pipelines.models.losses import collate, supervised_tokens, token_losses
from pipelines.runs import numerics
from pipelines.runs.messages import say
from pipelines.settings.parts import TrainingConfig
from pipelines.training import zeroth_order
from pipelines.training.checkpoint_files import NUMERICS, mark_complete, saving
from pipelines.training.optimizers import factors, held, optimizer_of
from pipelines.training.token_selection import TokenSelection

Observe = Callable[[int, Sequence[int]], None]
"""Called before each optimizer step, after its gradients, with (step, counted from 1, row numbers of the step)."""


class Choice(Protocol):
    """An object that decides which rows of a large batch form the step: the `choose` of a `DataTrainer`.

    A batch is a dict: `rows`, the numbers of its rows, and `items`, their (input_ids, labels). The result of `reduce`
    may also have `weights`, float [rows], which multiply the mean loss of each row; without them every token has the
    same weight.
    """

    logged: Sequence[str]
    """The keys that `measured` and `noted` add to log entries."""

    def begin(self, trainer: DataTrainer) -> None:
        """Attach to a new Trainer.

        Args:
            trainer: The Trainer.
        """

    def reduce(self, batches: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """Return the batches of the next step with the rows to train on; depends only on the number of the step.

        Args:
            batches: The large batches.
        """

    def measured(self, logs: dict[str, float]) -> dict[str, float]:
        """Return numbers to add to a log.

        Args:
            logs: The values to log.
        """

    def noted(self, history: list[dict[str, Any]]) -> None:
        """Called after a log.

        Args:
            history: The log history.
        """

    def visiting(self) -> AbstractContextManager[Any]:
        """Return a block in which a step runs forward and backward.

        Its value is None, or has a method `watch(rows, losses, where)`, which is called for each micro-batch between
        the two: the row numbers, the loss of each supervised token, and the row of each within the micro-batch.
        """

    def save(self, folder: Path) -> None:
        """Write the state on which the next choices depend into a checkpoint.

        Args:
            folder: The folder of the checkpoint.
        """

    def load(self, folder: Path) -> None:
        """Continue from a checkpoint.

        Args:
            folder: The folder of the checkpoint.
        """


class DataTrainer(FiniteSteps):
    """`transformers.Trainer` with the suite's optimizer and schedule.

    The batch of the Trainer is the optimizer's whole step, from which curvature is estimated too (Sophia, AdaHessian).
    Several processes (torchrun, DDP) all read the whole step, and its micro-batches are distributed among them: a run
    trains on the same rows in the same steps whatever their number, and differs only by rounding.

    Args:
        recipe: The optimizer, its schedule and the batch sizes.
        observe: Called for each step (`Observe`); it must not change anything. `order.Recorder` records a reference
            run with it.
        choose: If given, batches are large, and each step trains on the rows that it keeps (`Choice`).
        tokens: If given, each step trains on the tokens that it keeps.
        name_of: A row's number -> its name in errors.
        validate: A model in evaluation mode -> values on held-out rows; `evaluate` logs them. None uses the Trainer's
            evaluation.
        shuffle: Whether rows are drawn in random order, anew in each epoch.
        held: The number of first steps that have the initial learning rate of the schedule, which begins after them.
        **kwargs: Arguments of the Trainer. An item of `train_dataset` is one row, or a whole step (`fit`).
    """

    loss_is_scaled_for_ga = True  # `training_step` divides by the tokens of the whole step itself

    def __init__(
        self,
        *,
        recipe: TrainingConfig,
        observe: Observe | None = None,
        choose: Choice | None = None,
        tokens: TokenSelection | None = None,
        name_of: Callable[[int], object] = int,
        validate: Callable[[nn.Module], dict[str, float]] | None = None,
        shuffle: bool = True,
        held: int = 0,
        **kwargs: Any,
    ) -> None:
        self.recipe, self.observe, self.choose, self.shuffle, self.held = recipe, observe, choose, shuffle, held
        self.nonfinite_steps, self.tokens = recipe.nonfinite_steps, tokens
        self.validate, self._saved_step = validate, -1
        self.control: Any
        self.name_of, self.seen_tokens = name_of, 0
        self.optimizer: Any
        self.lr_scheduler: Any
        self._step_rows: Sequence[int] = ()
        self._aside: Path | None = None
        super().__init__(**kwargs)
        if choose is not None:
            choose.begin(self)
        self.remove_callback(PrinterCallback)
        self.zeroth = None
        if recipe.gradient == "zo":
            self.zeroth = zeroth_order.source_of(recipe, self.model, seed=self.args.seed)

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
        """Return Trainer's shuffling sampler, or the rows in order."""
        if self.shuffle:
            return super()._get_train_sampler(*args, **kwargs)
        return torch.utils.data.SequentialSampler(self.train_dataset)

    def get_train_dataloader(self) -> Any:
        """Return Trainer's loader, but give every process every whole batch, which `training_step` distributes."""
        loader = super().get_train_dataloader()
        sharded = loader.batch_sampler
        if self.args.world_size > 1:
            assert isinstance(sharded, BatchSamplerShard)
            sharded.num_processes, sharded.process_index, sharded.even_batches = 1, 0, False
        return loader

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Return the optimizer of the recipe over the trained parameters.

        Args:
            model: The model; by default that of the Trainer.
        """
        if self.optimizer is None:
            module = self.model if model is None else model
            self.optimizer = optimizer_of(self.recipe, module)
            narrow = any(p.requires_grad and p.dtype == torch.bfloat16 for p in module.parameters())
            if narrow and self.recipe.rounding != "nearest":
                say("weights in bfloat16 are rounded stochastically, so that small updates are not lost (--rounding)")
            if len(self.optimizer.param_groups) > 1:
                say("\n".join(filter(None, (optim.group_table(self.optimizer), optim.fused_note(self.optimizer)))))
        return self.optimizer  # type: ignore[no-any-return]

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """Return the schedule of the recipe as a `LambdaLR`.

        Step k = 1..T has the factor at k of T + 1, so that a short run wastes neither its first nor its last step on
        rate 0.

        Args:
            num_training_steps: The number of steps.
            optimizer: The optimizer; by default that of the Trainer.
        """
        if self.lr_scheduler is None:
            optimizer = optimizer or self.optimizer
            rates = factors(self.recipe, num_training_steps - self.held, optimizer)
            self.lr_scheduler = LambdaLR(optimizer, [held(factor, self.held) for factor in rates])
        return self.lr_scheduler

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> tuple[list[Any], Any]:
        """Return the batches of the next step, reduced to the rows that `choose` keeps.

        Args:
            epoch_iterator: The iterator over batches.
            num_batches: The number of batches of the step.
            device: The device of the batches.
        """
        batches, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if self.choose is not None and batches:
            batches = self.choose.reduce(batches)
        return batches, items

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """Compute the gradient of the mean loss over the step's supervised tokens in micro-batches; returns the loss.

        A zeroth-order source takes the whole step here; the Trainer's own step then finds no gradient and does
        nothing.

        Args:
            model: The model.
            inputs: The batch.
            num_items_in_batch: Not used.
        """
        model.train(self.zeroth is None)
        rows = inputs.pop("rows")
        items = inputs["items"]
        supervised = supervised_tokens(items) if self.tokens is None else self.tokens.kept(items)
        if supervised == 0:
            raise DataError(f"training: none of the rows {self._called(rows)} of this step has a supervised token")
        self._step_rows, tokens = rows, sum(len(ids) for ids, _ in items)
        self.seen_tokens += tokens
        self._tokens += tokens
        weights = inputs.get("weights")
        visit: Any = None
        world, own = self.args.world_size, self.args.process_index

        def batch_of(group: list[int]) -> dict[str, Tensor]:
            return {key: tensor.to(self.args.device) for key, tensor in collate([items[i] for i in group]).items()}

        def share(place: int, module: nn.Module) -> Tensor:
            group, batch = every[place]
            losses, where = token_losses(module, batch)
            if visit is not None:
                visit.watch([rows[i] for i in group], losses, where)
            if self.tokens is not None:
                losses, where = self.tokens.keep([rows[i] for i in group], losses, where)
            loss: Tensor = losses.sum() / supervised
            if weights is not None:
                loss = (losses * example_weights(weights[group], where, len(items))).sum()
            scaled: Tensor = world * loss  # so that the mean over processes, which DDP takes, is that of the step
            return scaled

        lengths = [len(ids) for ids, _ in items]
        every = micro_batches(lengths, min(self.recipe.micro_tokens, -(-sum(lengths) // world)), batch_of)
        inner = self.accelerator.unwrap_model(model)
        mine = range(len(every))[own::world]
        parts = [partial(share, place, inner) for place in mine]
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
        with ExitStack() as stack:
            if self.choose is not None:
                visit = stack.enter_context(self.choose.visiting())
            for part in parts[:-1]:
                total += self._backward(part())
            # the last part goes through DDP, which then sums all gradients; a process without a part adds zero
            total += self._backward(share(mine[-1], model) if mine else 0.0 * share(-1, model))
        visit = None
        if world > 1:
            total = float(self.accelerator.reduce(torch.tensor(total, device=self.args.device), reduction="mean"))
        if not math.isfinite(total):
            return self._judged_loss(torch.tensor(total, device=self.args.device))
        optim.curvature.refresh(self.optimizer, parts, seed=self.args.seed)  # for rules that use it, when it is due
        if self.observe is not None:
            self.observe(self.state.global_step + 1, rows)
        return torch.tensor(total, device=self.args.device)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Return the values of `validate` on held-out rows, such as `eval_loss`, after logging them.

        Args:
            *args: Arguments of the Trainer's evaluation.
            **kwargs: Arguments of the Trainer's evaluation.
        """
        if self.validate is None:
            return super().evaluate(*args, **kwargs)  # type: ignore[no-any-return]
        model = self.accelerator.unwrap_model(self.model)
        training = model.training
        model.eval()
        with torch.no_grad(), optim.averages_in_place(self.optimizer):
            metrics = self.validate(model)
        model.train(training)
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _called_rows(self) -> str:
        return f", rows {self._called(self._step_rows)}"

    def _advice(self) -> str:
        return f"lower training.learning_rate (now {self.recipe.learning_rate:g}) or look at these rows"

    def _must_have_every_step(self) -> bool:
        return self.observe is not None  # a recorded run needs all of its steps

    def _backward(self, loss: Tensor) -> float:
        self.accelerator.backward(loss)
        return float(loss.detach())

    def _called(self, rows: Sequence[int]) -> str:
        return ", ".join(str(self.name_of(row)) for row in rows[:5])

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log as the Trainer does, with the measurements of `choose`.

        Args:
            logs: The values to log.
            *args: Further arguments of the Trainer.
            **kwargs: Further arguments of the Trainer.
        """
        if self.choose is None:
            super().log(logs, *args, **kwargs)
            return
        super().log({**logs, **self.choose.measured(logs)}, *args, **kwargs)
        self.choose.noted(self.state.log_history)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if self.choose is not None and checkpoint is not None:
            self.choose.load(Path(checkpoint))

    def _get_output_dir(self, trial: Any) -> str:
        return super()._get_output_dir(trial) if self._aside is None else str(self._aside)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Save as the Trainer does, into a new folder that is then moved into place; links are not followed."""
        folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        if self._saved_step == self.state.global_step:
            return  # the best checkpoint may also be the end of an epoch
        files.make_folder(folder.parent)
        with saving(folder), ExitStack() as stack:
            fresh = [str(stack.enter_context(files.atomic_folder(folder))) if self.args.should_save else ""]
            if self.args.world_size > 1:
                torch.distributed.broadcast_object_list(fresh)
            self._aside = Path(fresh[0])
            inner = self._aside / folder.name
            try:
                super()._save_checkpoint(model, trial)
                if self.choose is not None:
                    self.choose.save(inner)
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
                made = files.json_bytes(numerics.facts())
                files.write_bytes(inner.parent / NUMERICS, made, seal=False)  # `mark_complete` has its digest
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


def example_weights(weights: Tensor, rows: Tensor, total: int) -> Tensor:
    """Return the weight of each supervised token [n], so that each row counts `weight` / `total`.

    Args:
        weights: float [rows], the weight of each row.
        rows: int64 [n], the row of each token.
        total: The number of rows of the step.
    """
    tokens = torch.bincount(rows, minlength=len(weights)).clamp_min(1)
    return (weights.to(rows.device) / tokens / total)[rows]
