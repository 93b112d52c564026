"""Coresets in any Trainer's loop: large batches from the loader, small ones in the step.

`CoresetMixin` goes before any `transformers.Trainer`, or TRL's `SFTTrainer`:

    class CoresetSFTTrainer(CoresetMixin, SFTTrainer): ...
    trainer = CoresetSFTTrainer(..., choose=CoresetConfig(keep=8), source_key="dataset")

`per_device_train_batch_size` is then the size of the large batch. Steps, epochs, schedules and the position in the
data after a resume are those of the Trainer, because the loader is unchanged; the tokens that scale the loss are
counted again.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from datatools import CORESET_FEATURES, CORESET_METHODS, FeatureTable, Selection, UsageError
from pipelines.colm import stored
from pipelines.colm.choosing import Choosing
from pipelines.colm.featuring import check_loss, check_target, drawn
from pipelines.colm.given import check_visits
from pipelines.models.finite import FiniteSteps
from pipelines.models.load import digests_like
from pipelines.rows.encoded import Encoded
from pipelines.settings.train import CoresetConfig

SOURCES, WEIGHTS, NUMBERS = "coreset_sources", "coreset_weights", "coreset_rows"  # keys that the model does not get
_MEDIA = (
    "pixel_",
    "image_",
    "video_",
    "input_features",
    "input_values",
    "audio_",
)  # inputs that cannot be split by row
_INPUTS = ("input_ids", "labels", "attention_mask", "position_ids", "token_type_ids")


class CoresetMixin(FiniteSteps):
    """A Trainer whose loader gives large batches, of which each step trains on the rows that `choose` keeps.

    With gradient accumulation, every micro-batch is reduced separately, and with several processes, that of every
    process. Choices depend on the seed, the step, the micro-batch and the rank. If a rule has a history, it is saved
    in the checkpoint. Evaluation is unchanged. The loss is the Trainer's own unless `loss_weighting` is "example".

    Monitored steps log `match_error`, `match_error_random` (the mean of 16 draws), `select_seconds` (without measuring
    the errors), `train_seconds`, `select_share` (the share of choosing in both) and `peak_bytes`; the log history also
    has `kept_by_source` and `seen_by_source`. If the Trainer logs less often (`logging_steps`), a log has the values
    of the last monitored step. `peak_bytes` is the peak GPU memory of tensors in the step, choosing included (torch's
    peak statistics are reset for this); on a CPU it is the peak memory of the process so far.

    Rows without a supervised token, which train nothing, are never chosen.

    Args:
        choose: The settings (`CoresetConfig`), or a mapping of them; None chooses nothing.
        source_key: The column of the training data that names the source of a row; None is one source for all.
        target_dataset: Rows of the same kind as the training data, for methods that compare rows with target rows.
        nonfinite_steps: The number of steps in a row that may be skipped because the loss or the gradient is not
            finite, before the run stops (this class is a `FiniteSteps` too).

    Raises:
        UsageError: Packing, images, FSDP or DeepSpeed, clusters, a missing source column, or sizes that do not fit;
            see also `datatools.CoLM`. If a choice raises, the training state has not changed.

    Example:
        >>> from transformers import Trainer
        >>> class CoresetTrainer(CoresetMixin, Trainer):
        ...     pass
        >>> [base.__name__ for base in CoresetTrainer.__mro__[:4]]
        ['CoresetTrainer', 'CoresetMixin', 'FiniteSteps', 'Trainer']
    """

    choose: CoresetConfig | None = None

    def __init__(
        self,
        *args: Any,
        choose: CoresetConfig | Mapping[str, Any] | None = None,
        source_key: str | None = "dataset",
        target_dataset: Any = None,
        nonfinite_steps: int = 5,
        **kwargs: Any,
    ) -> None:
        self.nonfinite_steps = nonfinite_steps
        self.choose = choose if choose is None or isinstance(choose, CoresetConfig) else CoresetConfig(**choose)
        self.source_key = source_key
        self._weights: Tensor | None = None
        self._weighed = False
        self._numbers: list[int] = []
        self._collector: Any = None
        self._choosing: _Batches | None = None
        self.data_collator: Any
        self.compute_loss_func: Any
        super().__init__(*args, **kwargs)
        if self.choose is None:
            return
        self._choosing = _Batches(self.choose, source_key, target_dataset)
        self._choosing.begin(self)
        if self._choosing.weighs_rows:
            if self.compute_loss_func is not None:
                raise UsageError("coreset: compute_loss_func and row weights exclude each other; omit one of them")
            check_loss(self.args)
            self.compute_loss_func = self._example_loss

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> tuple[list[Any], Any]:
        """Return the micro-batches of the next step, each reduced to the kept rows.

        Args:
            epoch_iterator: The iterator over batches.
            num_batches: The number of batches of the step.
            device: The device of the batches.
        """
        batches, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if self._choosing is None or not batches:
            return batches, items
        reduced = self._choosing.reduce(batches)
        return reduced, self._get_num_items_in_batch(reduced, device)

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """Run the Trainer's step, and collect by-products of its rows where features are made of them.

        Args:
            *args: Arguments of the Trainer.
            **kwargs: Arguments of the Trainer.
        """
        if self._choosing is None:
            return super().training_step(*args, **kwargs)
        self._weighed = False
        with self._choosing.visiting() as self._collector:
            loss = super().training_step(*args, **kwargs)
        self._collector = None
        if self._choosing.weighs_rows and not self._weighed:
            raise UsageError(
                f"coreset: {type(self).__name__} computes the loss itself, without the weights of the rows; leave out "
                "its compute_loss, or choose without weights (loss_weighting='token', weights='uniform')"
            )
        return loss

    def log(self, logs: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        """Log as the Trainer does, with the measurements of a monitored step.

        Args:
            logs: The values to log.
            *args: Further arguments of the Trainer.
            **kwargs: Further arguments of the Trainer.
        """
        if self._choosing is None:
            super().log(logs, *args, **kwargs)
            return
        super().log({**logs, **self._choosing.measured(logs)}, *args, **kwargs)
        self._choosing.noted(self.state.log_history)

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        if self.choose is not None:
            self._weights = inputs.pop(WEIGHTS, None)
            inputs.pop(SOURCES, None)
            numbers = inputs.pop(NUMBERS, None)
            self._numbers = [] if numbers is None else numbers.tolist()
        prepared: dict[str, Any] = super()._prepare_inputs(inputs)
        return prepared

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        if self.choose is not None and self.source_key is not None and self.source_key not in self._signature_columns:
            self._signature_columns += [self.source_key]
        if self.choose is not None and NUMBERS not in self._signature_columns:
            self._signature_columns += [NUMBERS]

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        if self._choosing is not None:
            place = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
            self._choosing.save(Path(self._get_output_dir(trial=trial)) / place)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if self._choosing is not None and checkpoint is not None:
            self._choosing.load(Path(checkpoint))

    def _example_loss(self, outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        """Return the mean of each row over its own tokens, times its weight, over the rows of the whole step."""
        self._weighed, whole = True, labels
        logits, labels = outputs.logits[:, :-1].float(), labels[:, 1:].to(outputs.logits.device)
        tokens = functional.cross_entropy(logits.mT, labels, reduction="none", ignore_index=-100)
        rows = tokens.sum(1) / (labels != -100).sum(1).clamp_min(1)
        if self._weights is None or self._choosing is None:  # evaluation
            return rows.mean()
        if self._collector is not None:
            self._collector.watch(self._numbers, rows, torch.arange(len(rows), device=rows.device), whole)
        scale = (
            self.args.world_size if self.args.average_tokens_across_devices and num_items_in_batch is not None else 1
        )
        return (rows * self._weights.to(rows.device)).sum() / (self._choosing.rows_of_step * scale)


class _Batches(Choosing):
    """Chooses rows of the padded batches from a Trainer's collator."""

    def __init__(self, settings: CoresetConfig, source_key: str | None, target: Any = None) -> None:
        super().__init__(settings)
        self.source_key, self._target_rows = source_key, target

    def begin(self, trainer: Any) -> None:
        """Read the sources of the training data: their sizes, and numbers that the loader passes on."""
        super().begin(trainer)
        for name in ("packing", "padding_free"):
            if getattr(trainer.args, name, False):
                raise UsageError(f"coreset: {name} joins rows into one, so there is nothing to choose; turn it off")
        if self.settings.clusters is not None:
            raise UsageError(
                "coreset: only `datatools train` makes clusters; add a column of sources to the data "
                "(datatools.cluster_sources makes them from hidden states) and name it (source_key=)"
            )
        self._names: list[Hashable] = []
        if self.source_key is not None:
            data, columns = trainer.train_dataset, getattr(trainer.train_dataset, "column_names", None)
            if not hasattr(data, "__len__"):
                raise UsageError(
                    "coreset: the training data is a stream of rows, whose sources cannot be counted before it ends; "
                    "use source_key=None, which chooses among all rows of a batch, or a data set with a length"
                )
            if columns is not None and self.source_key not in columns:
                raise UsageError(
                    f"coreset: the training data has no column {self.source_key!r}, it has {columns}; name the one "
                    "with the rows' sources (source_key=), or None for one source"
                )
            try:
                sources = data[self.source_key] if columns is not None else [row[self.source_key] for row in data]
            except (KeyError, TypeError) as error:
                raise UsageError(f"coreset: a row of the training data has no {self.source_key!r}: {error}") from error
            self.counts = Counter(map(str, sources))
            self._names = sorted(self.counts, key=str)
        else:
            self.counts = {}
        check_target(self.settings, None if self._target_rows is None else len(self._target_rows))
        if self._target_rows is not None:
            self.target = self._targets
        trainer.data_collator = _Carry(trainer.data_collator, self.source_key, self._names)
        if CORESET_FEATURES[self.settings.features].free:
            if self.settings.store is not None:
                self._table = _stored(self.settings, trainer, self._collate)
            trainer.train_dataset = _numbered(trainer.train_dataset)
            self._begin_given(range(len(trainer.train_dataset)))
        if self._given is not None and self._given.visits:
            args = trainer.args
            rows = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
            per_epoch = -(-len(trainer.train_dataset) // rows)
            steps = args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * per_epoch)
            check_visits(self.settings, per_epoch=per_epoch, steps=steps)

    def _targets(self, step: int) -> tuple[dict[str, Tensor], list[int] | None]:
        picks = drawn(len(self._target_rows), self.settings, step, self.trainer.args.seed)
        batch = self._collate([self._target_rows[i] for i in picks])
        return {key: batch[key].to(self.trainer.args.device) for key in _INPUTS if key in batch}, None

    @property
    def weighs_rows(self) -> bool:
        """Whether each row counts by its own weight, which the Trainer's loss over tokens does not know."""
        free = CORESET_FEATURES[self.settings.features].free
        expected = self.settings.weights == "expectation" or (free and self.settings.weights == "auto")
        visits = self._given is not None and self._given.visits
        example = self.settings.loss_weighting == "example"
        return example or CORESET_METHODS[self.settings.method].weighted or expected or visits

    def numbers(self, batch: dict[str, Any]) -> list[int]:
        """Return the numbers of the rows of a batch."""
        found: list[int] = batch[NUMBERS].tolist()
        return found

    def everything(self) -> Iterator[dict[str, Any]]:
        """Yield batches of all rows of the training data."""
        data = self.trainer.train_dataset
        for start in range(0, len(data), self._large_batch):
            yield self._collate([data[i] for i in range(start, min(start + self._large_batch, len(data)))])

    def _collate(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        """Return a batch of rows that no loader has read, without the columns that the Trainer's loader removes."""
        collate = self.trainer._get_collator_with_removed_columns(self.trainer.data_collator)
        found: dict[str, Any] = collate(rows)
        return found

    def large(self, batch: dict[str, Any]) -> tuple[dict[str, Tensor], list[Hashable], dict[str, Any]]:
        """Return what a choice needs of a large batch: tensors, sources, and lengths and names if known."""
        ids = batch["input_ids"]
        if media := [key for key in batch if key.startswith(_MEDIA)]:
            raise UsageError(f"coreset: the batch has {media[0]!r}; choices read only text; use text-only data")
        positions = batch.get("position_ids")
        numbers = batch[SOURCES].tolist()
        if len(numbers) != len(ids) or {"cu_seq_lens_q", "seq_idx"} & set(batch) or (
            positions is not None and bool(((positions[:, 1:] < positions[:, :-1]) & (positions[:, 1:] == 0)
                                            & (batch["labels"][:, 1:] != -100)).any())
        ):  # fmt: skip
            raise UsageError(
                f"coreset: the batch contains packed rows ({len(numbers)} examples in {len(ids)}), of which none "
                "can be chosen; turn packing off, and use a collator that pads"
            )
        if self.source_key is not None and min(numbers) < 0:
            raise UsageError(
                f"coreset: a row of the training batches has no {self.source_key!r} that the training data had; the "
                "loader must pass it on with each row"
            )
        sources = [None if self.source_key is None else self._names[i] for i in numbers]
        return {key: batch[key].to(self.trainer.args.device) for key in _INPUTS if key in batch}, sources, {}

    def kept(self, batch: dict[str, Any], chosen: Selection) -> dict[str, Any]:
        """Return the rows of `batch` that a choice keeps, in the loader's order."""
        order = chosen.indices.argsort()
        rows, n = chosen.indices[order], len(batch["input_ids"])
        kept = {
            key: value[rows.to(value.device)]
            if isinstance(value, Tensor) and value.ndim and len(value) == n
            else [value[i] for i in rows.tolist()]
            if isinstance(value, list | tuple) and len(value) == n
            else value
            for key, value in batch.items()
            if key != SOURCES
        }
        return kept | {WEIGHTS: chosen.weights[order]}


class _Carry:
    """A collator that removes the source from each row and adds one number per row to the batch."""

    def __init__(
        self, inner: Callable[[list[Any]], dict[str, Any]], key: str | None, names: Sequence[Hashable]
    ) -> None:
        self.inner, self.key = inner, key
        self.number = {name: i for i, name in enumerate(names)}

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        more = {}
        if rows and NUMBERS in rows[0]:
            more = {NUMBERS: torch.tensor([row[NUMBERS] for row in rows])}
            rows = [{k: v for k, v in row.items() if k != NUMBERS} for row in rows]
        if self.key is None:
            return {**self.inner(rows), SOURCES: torch.zeros(len(rows), dtype=torch.int64), **more}
        numbers = [self.number.get(str(row.get(self.key)), -1) for row in rows]  # -1: rows to evaluate on
        batch = self.inner([{k: v for k, v in row.items() if k != self.key} for row in rows])
        return {**batch, SOURCES: torch.tensor(numbers), **more}


class _Numbered(torch.utils.data.Dataset[dict[str, Any]]):
    """A data set whose rows have their number."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def __len__(self) -> int:
        return len(self.inner)

    def __getitem__(self, i: int) -> dict[str, Any]:
        return {**self.inner[i], NUMBERS: i}


def _numbered(data: Any) -> Any:
    """Return the training data with a number for each row."""
    if not hasattr(data, "__len__") or not hasattr(data, "__getitem__"):
        raise UsageError(
            "coreset: stored and stale features belong to rows with a number, which a stream of rows does not have; "
            "use a data set with a length, or exact features"
        )
    if hasattr(data, "add_column"):
        return data.add_column(NUMBERS, list(range(len(data))))
    return _Numbered(data)


def _stored(
    settings: CoresetConfig, trainer: Any, collate: Callable[[list[dict[str, Any]]], dict[str, Any]]
) -> FeatureTable:
    """Return the features of a store for the rows of a Trainer, which its collator encodes one by one."""
    keys: dict[int, str] = {}
    for number in range(len(trainer.train_dataset)):
        batch = collate([trainer.train_dataset[number]])
        ids, labels = batch["input_ids"][0], batch["labels"][0]
        mask = batch.get("attention_mask")
        real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask[0] != 0
        keys[number] = Encoded(ids[real].tolist(), labels[real].tolist()).key
    return stored.read(
        settings,
        keys,
        model=partial(digests_like, trainer.model),
        where=lambda row: f"row {row}",
        seed=trainer.args.seed,
    )
