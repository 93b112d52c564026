"""Coresets in the Trainer's loop: large batches from the loader, small ones into the step.

`CoresetMixin` goes before any `transformers.Trainer`, or TRL's `SFTTrainer`:

    class CoresetSFTTrainer(CoresetMixin, SFTTrainer): ...
    trainer = CoresetSFTTrainer(..., choose=CoresetConfig(keep=8), source_key="dataset")

`per_device_train_batch_size` is then the size of the large batch. Steps, epochs, schedules and the place in the data
after a resume are the Trainer's, because the loader is read as ever; the tokens that scale the loss are counted anew.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Collection, Hashable, Iterable, Mapping, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional
from transformers import TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from datatools import (
    CoLM,
    DataError,
    LastLayer,
    Selection,
    UsageError,
    cluster_sources,
    did_you_mean,
    files,
    kept_by_source,
    not_better,
    small_sources,
    token_batches,
)
from pipelines.models.losses import last_states, row_losses
from pipelines.rows.prepare import Rows
from pipelines.runs.messages import warn
from pipelines.runs.progress import progress
from pipelines.runs.provenance import peak_rss_bytes
from pipelines.runs.seeds import derive_seed
from pipelines.settings.parts import TrainingConfig
from pipelines.settings.train import CoresetConfig
from pipelines.training.finite import FiniteSteps

SOURCES, WEIGHTS = "coreset_sources", "coreset_weights"  # keys of a batch that no model gets
_MEDIA = ("pixel_", "image_", "video_", "input_features", "input_values", "audio_")  # what rows are not cut by
_INPUTS = ("input_ids", "labels", "attention_mask", "position_ids", "token_type_ids")


class CoresetMixin(FiniteSteps):
    """A Trainer whose loader gives large batches, of which each step trains on the rows that `choose` keeps.

    choose: the settings (`CoresetConfig`), or their mapping; None chooses nothing.
    nonfinite_steps: so many steps in a row may be skipped because the loss or the gradient is not finite before the run
    stops (`FiniteSteps`, which this is too).
    source_key: the column of the training data that names a row's source; None is one source for all.

    With gradient accumulation every micro-batch is reduced by itself, with several processes every process's. Choices
    are functions of the seed, the step, the micro-batch and the rank; the history of a rule that has one is saved in
    the checkpoint. Evaluation is untouched. The loss is the Trainer's own unless loss_weighting is "example".

    Monitored steps log match_error, match_error_random (mean of 16 draws), select_seconds (measuring the errors apart),
    train_seconds, select_share (of both) and peak_bytes; the log history also has kept_by_source and seen_by_source.
    Where the Trainer logs less often than that (logging_steps), a log has the last monitored step's. peak_bytes is the
    most that tensors have taken of the GPU in the step, choosing included (torch's peak statistics are reset for that);
    on a CPU it is the most that the process has held so far.
    Rows without a supervised token, which train nothing, are never chosen.
    Raises: UsageError for packing, images, FSDP or DeepSpeed, clusters, a missing source column, and sizes that do not
    fit; see also `datatools.CoLM`. Nothing of the training state has changed when a choice raises.
    """

    choose: CoresetConfig | None = None

    def __init__(
        self,
        *args: Any,
        choose: CoresetConfig | Mapping[str, Any] | None = None,
        source_key: str | None = "dataset",
        nonfinite_steps: int = 5,
        **kwargs: Any,
    ) -> None:
        self.nonfinite_steps = nonfinite_steps
        self.choose = choose if choose is None or isinstance(choose, CoresetConfig) else CoresetConfig(**choose)
        self.source_key = source_key
        self._colm: CoLM | None = None
        self._saved_history: dict[str, Tensor] | None = None
        self._watched: dict[str, Any] | None = None
        self._warned = False
        self._idle = 0  # rows without a supervised token so far
        self._weights: Tensor | None = None
        self.data_collator: Any
        self.compute_loss_func: Any
        super().__init__(*args, **kwargs)
        if self.choose is None:
            return
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise UsageError("coreset: FSDP and DeepSpeed shard the layer that choices read; use DDP or one process")
        LastLayer.of(self._bare_model(), self.choose.projection)  # refuse a model before the first step
        self._check_sizes()
        self._count_sources()
        self._arrange_loss()
        self.add_callback(_Clock(self))

    # ------------------------------------------------------------------------------ what another batch layout overrides

    @property
    def _group(self) -> Any:
        """The processes that hold the same batches, and so choose together; None: each chooses among its own rows."""
        return None

    def _count_sources(self) -> None:
        """Read the sources of the training data: how large each is, and numbers for the loader to carry."""
        for name in ("packing", "padding_free"):
            if getattr(self.args, name, False):
                raise UsageError(
                    f"coreset: {name} joins examples into one row, so there is nothing to choose; turn it off"
                )
        assert self.choose is not None
        if self.choose.clusters is not None:
            raise UsageError(
                "coreset: clusters are made by `datatools train` alone; add a column of sources to the data "
                "(datatools.cluster_sources makes them of hidden states) and name it (source_key=)"
            )
        self._names: list[Hashable] = []
        if self.source_key is not None:
            data, columns = self.train_dataset, getattr(self.train_dataset, "column_names", None)
            if columns is not None and self.source_key not in columns:
                raise UsageError(
                    f"coreset: the training data has no column {self.source_key!r}, it has {columns}; name the one "
                    "with the rows' sources (source_key=), or None for one source"
                )
            try:
                sources = data[self.source_key] if columns is not None else [row[self.source_key] for row in data]
            except (KeyError, TypeError) as error:
                raise UsageError(f"coreset: a row of the training data has no {self.source_key!r}: {error}") from error
            self._counts: Mapping[Hashable, int] = Counter(map(str, sources))
            self._names = sorted(self._counts, key=str)
        else:
            self._counts = {}
        self.data_collator = _Carry(self.data_collator, self.source_key, self._names)

    def _arrange_loss(self) -> None:
        assert self.choose is not None
        if self.choose.loss_weighting == "example" or self.choose.method == "matching_pursuit":
            if self.compute_loss_func is not None:
                raise UsageError("coreset: compute_loss_func and weights of rows exclude each other; leave one out")
            self.compute_loss_func = self._example_loss

    def _large(self, batch: dict[str, Any]) -> tuple[dict[str, Tensor], list[Hashable], dict[str, Any]]:
        """What a choice reads of a large batch: tensors, sources; and lengths and names of its rows where known."""
        ids = batch["input_ids"]
        if media := [key for key in batch if key.startswith(_MEDIA)]:
            raise UsageError(f"coreset: the batch has {media[0]!r}; choices read text alone, use text-only data")
        positions = batch.get("position_ids")
        numbers = batch[SOURCES].tolist()
        if len(numbers) != len(ids) or {"cu_seq_lens_q", "seq_idx"} & set(batch) or (
            positions is not None and bool(((positions[:, 1:] < positions[:, :-1]) & (positions[:, 1:] == 0)
                                            & (batch["labels"][:, 1:] != -100)).any())
        ):  # fmt: skip
            raise UsageError(
                f"coreset: the batch holds packed rows ({len(numbers)} examples in {len(ids)}), of which nothing can "
                "be chosen; turn packing off, and use a collator that pads"
            )
        if self.source_key is not None and min(numbers) < 0:
            raise UsageError(
                f"coreset: a row of the training batches has no {self.source_key!r} that the training data had; the "
                "loader must hand each row over with it"
            )
        sources = [None if self.source_key is None else self._names[i] for i in numbers]
        return {key: batch[key].to(self.args.device) for key in _INPUTS if key in batch}, sources, {}

    def _kept(self, batch: dict[str, Any], chosen: Selection) -> dict[str, Any]:
        """The rows of `batch` that a choice keeps, in the loader's order."""
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

    # ---------------------------------------------------------------------------------------------------- the Trainer's

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> tuple[list[Any], Any]:
        """The micro-batches of the next step, each reduced to the rows that are kept."""
        batches, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if self.choose is None or not batches:
            return batches, items
        started, step = _now(), self.state.global_step
        colm = self._chooser()
        watch = step % self.choose.monitor_every == 0
        if watch and torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        reduced: list[Any] = []
        watched: list[tuple[Any, list[Hashable], Selection]] = []
        trained = 0
        for micro, batch in enumerate(batches):
            tensors, sources, known = self._large(batch)
            live = ((tensors["labels"][:, 1:] != -100).sum(1) > 0).nonzero()[:, 0].cpu()
            if len(live) < len(sources):  # rows of which max_length has cut the answer away: they train nothing
                if not self._idle:
                    warn(f"coreset: {len(sources) - len(live)} rows of step {step + 1} have no supervised token; such "
                         "rows are never chosen")  # fmt: skip
                self._idle += len(sources) - len(live)
                if len(live) == 0:
                    reduced.append(self._kept(batch, Selection(torch.zeros(1, dtype=torch.int64), torch.zeros(1))))
                    continue
                tensors = {key: tensor[live.to(tensor.device)] for key, tensor in tensors.items()}
                known = {"names": list(range(len(sources)))} | known
                sources, known = _only(sources, live), {key: _only(rows, live) for key, rows in known.items()}
            keep = max(1, round(self._keep * len(sources) / self._large_batch))  # an epoch's last batch may be short
            lane = micro if self._group is not None else micro * self.args.world_size + self.args.process_index
            chosen = colm(tensors, sources, step=step, lane=lane, keep=min(keep, len(sources)), watch=watch, **known)
            reduced.append(self._kept(batch, Selection(live[chosen.indices], chosen.weights)))
            trained += len(chosen.indices)
            if watch:
                watched.append((colm.last, sources, chosen))
        self._rows_of_step = max(1, trained)
        if watched:
            measuring = math.fsum(last.watch_seconds for last, _, _ in watched)
            self._watched = _summary(watched) | {
                "select_seconds": _now() - started - measuring, "overflows": colm.overflows,
            }  # fmt: skip
        self._since = _now()
        return reduced, self._get_num_items_in_batch(reduced, device)

    def log(self, logs: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        """The Trainer's, with what was measured in a monitored step."""
        seen = self._watched
        if seen is None or "train_seconds" not in seen or "loss" not in logs:
            super().log(logs, *args, **kwargs)
            return
        self._watched = None
        nested = {key: seen.pop(key) for key in ("kept_by_source", "seen_by_source")}
        share = seen["select_seconds"] / max(1e-9, seen["select_seconds"] + seen["train_seconds"])
        super().log({**logs, **seen, "select_share": share}, *args, **kwargs)
        self.state.log_history[-1] |= nested
        if not self._warned and self.choose is not None and self.choose.method != "random_in_source":
            text = not_better([entry for entry in self.state.log_history if "match_error" in entry])
            if text is not None:
                self._warned = True
                warn(text)

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        if self.choose is not None:
            self._weights = inputs.pop(WEIGHTS, None)
            inputs.pop(SOURCES, None)
        prepared: dict[str, Any] = super()._prepare_inputs(inputs)
        return prepared

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        if self.choose is not None and self.source_key is not None and self.source_key not in self._signature_columns:
            self._signature_columns += [self.source_key]

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        mine = self._group is None or self.args.process_index == 0  # together, all have the same history
        if self.choose is not None and self._colm is not None and mine:
            folder = Path(self._get_output_dir(trial=trial)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
            files.make_folder(folder)
            with files.atomic_path(folder / self._history_name) as path:
                save_file(self._colm.state_dict(), path)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if self.choose is None or checkpoint is None:
            return
        path = Path(checkpoint) / self._history_name
        if not path.is_file():
            raise DataError(
                f"coreset: {checkpoint} has no {path.name}; it was saved without a coreset, or by other ranks"
            )
        self._saved_history = load_file(files.checked(path))

    # ---------------------------------------------------------------------------------------------------------- its own

    @property
    def _history_name(self) -> str:
        return f"coreset-{0 if self._group is not None else self.args.process_index}.safetensors"

    def _check_sizes(self) -> None:
        assert self.choose is not None
        self._large_batch = self.args.per_device_train_batch_size
        if self.choose.large_batch not in (None, self._large_batch):
            raise UsageError(
                f"coreset: large_batch is {self.choose.large_batch}, but per_device_train_batch_size, which is the "
                f"large batch here, is {self._large_batch}; leave large_batch out"
            )
        self._keep = self.choose.keep if self.choose.keep is not None else max(1, self._large_batch // 2)
        if not 1 <= self._keep <= self._large_batch:
            raise UsageError(
                f"coreset: {self._keep} rows to keep of a large batch of {self._large_batch}; keep fewer, or raise "
                "per_device_train_batch_size"
            )

    def _bare_model(self) -> Any:
        """The model without DDP and torch.compile around it."""
        return self.accelerator.unwrap_model(self.model, keep_torch_compile=False)

    def _chooser(self) -> CoLM:
        """Made at the first step, when the model is where it will train; and again for another model (`model_init`)."""
        model = self._bare_model()
        if self._colm is None or self._colm.model is not model:
            assert self.choose is not None
            settings = self.choose
            small = small_sources(self._counts) if settings.small == "auto" else frozenset(settings.small)
            _require_known(small, self._counts)
            self._colm = CoLM(
                model,
                row_losses,
                keep=self._keep,
                small=small,
                seed=self.args.seed,
                group=self._group,
                **settings.arguments(),
            )
        if self._saved_history is not None:
            self._colm.load_state_dict(self._saved_history)
            self._saved_history = None
        return self._colm

    def _example_loss(self, outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        """Each row's mean over its own tokens, times its weight, over the rows of the whole step."""
        logits, labels = outputs.logits[:, :-1].float(), labels[:, 1:].to(outputs.logits.device)
        tokens = functional.cross_entropy(logits.mT, labels, reduction="none", ignore_index=-100)
        rows = tokens.sum(1) / (labels != -100).sum(1).clamp_min(1)
        if self._weights is None:  # evaluation
            return rows.mean()
        scale = (
            self.args.world_size if self.args.average_tokens_across_devices and num_items_in_batch is not None else 1
        )
        return (rows * self._weights.to(rows.device)).sum() / (self._rows_of_step * scale)


class _Clock(TrainerCallback):  # type: ignore[misc]
    """Stops the time of a monitored step's training, and reads its peak of memory, when the step is done."""

    def __init__(self, trainer: CoresetMixin) -> None:
        self.trainer = trainer

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        seen = self.trainer._watched
        if seen is not None and "train_seconds" not in seen:
            seen["train_seconds"] = _now() - self.trainer._since
            seen["peak_bytes"] = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else peak_rss_bytes()


def _only(rows: Sequence[Any], places: Tensor) -> list[Any]:
    return [rows[i] for i in places.tolist()]


class _Carry:
    """A collator that takes the source out of each row, and puts its number into the batch: one number for each row."""

    def __init__(
        self, inner: Callable[[list[Any]], dict[str, Any]], key: str | None, names: Sequence[Hashable]
    ) -> None:
        self.inner, self.key = inner, key
        self.number = {name: i for i, name in enumerate(names)}

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        if self.key is None:
            return {**self.inner(rows), SOURCES: torch.zeros(len(rows), dtype=torch.int64)}
        numbers = [self.number.get(str(row.get(self.key)), -1) for row in rows]  # -1: rows to evaluate on
        batch = self.inner([{k: v for k, v in row.items() if k != self.key} for row in rows])
        return {**batch, SOURCES: torch.tensor(numbers)}


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return perf_counter()


def _summary(watched: Sequence[tuple[Any, Sequence[Hashable], Selection]]) -> dict[str, Any]:
    """One entry for the micro-batches of a step: mean errors, sums of rows."""
    kept: Counter[str] = Counter()
    seen: Counter[str] = Counter()
    for _, sources, chosen in watched:
        kept.update(kept_by_source(sources, chosen))
        seen.update(map(str, sources))
    return {
        "match_error": math.fsum(last.match_error for last, _, _ in watched) / len(watched),
        "match_error_random": math.fsum(last.match_error_random for last, _, _ in watched) / len(watched),
        "kept_by_source": dict(sorted(kept.items())),
        "seen_by_source": dict(sorted(seen.items())),
    }


def resolve(recipe: TrainingConfig, choose: CoresetConfig, rows: int) -> tuple[TrainingConfig, CoresetConfig]:
    """The recipe whose batches are the large ones, and the settings with both sizes filled in.

    Raises: UsageError for sizes that do not fit each other or the number of rows.
    """
    keep = recipe.batch_size if choose.keep is None else choose.keep
    large = 2 * keep if choose.large_batch is None else choose.large_batch
    if keep > large:
        raise UsageError(
            f"coreset: {keep} rows to keep of a large batch of {large}; keep fewer (--keep), or draw more "
            "(--large-batch)"
        )
    if rows < keep:
        raise UsageError(f"coreset: {keep} rows to keep a step, and the data has {rows}; keep fewer (--keep)")
    if rows < large:
        warn(f"coreset: a large batch is {large} rows and the data has {rows}: every step sees all of them")
    return recipe.model_copy(update={"batch_size": large}), choose.model_copy(
        update={"keep": keep, "large_batch": large}
    )


MONITORED = (
    "match_error", "match_error_random", "select_seconds", "train_seconds", "select_share", "peak_bytes", "overflows",
    "kept_by_source", "seen_by_source",
)  # fmt: skip
"""What an entry of the log history has in monitored steps beside the Trainer's own."""


def example_weights(weights: Tensor, rows: Tensor, total: int) -> Tensor:
    """What the loss of each supervised token counts [n], so that each row counts `weight` / `total`.

    rows: [n], the row of each token.
    """
    tokens = torch.bincount(rows, minlength=len(weights)).clamp_min(1)
    return (weights.to(rows.device) / tokens / total)[rows]


def _require_known(small: Iterable[Hashable], sources: Collection[Hashable]) -> None:
    if unknown := sorted(str(name) for name in small if name not in sources):
        raise UsageError(
            f"coreset: no row has the small source {unknown[0]!r}{did_you_mean(unknown[0], map(str, sources))}"
        )


def require_sources(choose: CoresetConfig, rows: Rows, chosen: Sequence[int], *, key: str) -> None:
    """Refuse rows of which none names its source, unless they will be clustered or nothing is to be small.

    Raises: UsageError.
    """
    if choose.clusters is not None or choose.small == []:
        return
    nameless = rows.pool.flags["source_from_file"]
    names = {rows.pool.sources[row] for row in chosen}
    if choose.small != "auto":
        _require_known(choose.small, names)
    if nameless == len(rows.pool) and len(names) == 1:
        raise UsageError(
            f"coreset: none of the {nameless} rows names its source (no column {key!r}); name the column with "
            "--source-key, make sources with --set coreset.clusters=8, or take all rows for one with "
            "--set coreset.small=[]"
        )
    if nameless:
        warn(f"coreset: {nameless} of {len(rows.pool)} rows have no column {key!r}; their source is their file's name")
    if len(names) == 1:
        warn(f"coreset: all rows are of one source, {names.pop()!r}: none is small, and rows are chosen among all")


def clusters_of(model: Any, rows: Rows, chosen: Sequence[int], clusters: int, *, seed: int) -> list[str]:
    """Sources made by clustering the mean last hidden state of each row that is used: [rows of the pool], else ""."""
    if clusters > len(chosen):
        raise UsageError(f"coreset: {clusters} clusters of {len(chosen)} rows; make fewer (--set coreset.clusters=N)")
    means: dict[int, torch.Tensor] = {}
    lengths = [int(rows.scan.tokens[row]) for row in chosen]
    with torch.inference_mode(), progress("clustering", len(chosen), "rows") as bar:
        for group in token_batches(lengths, 4096):
            batch = rows.batch([chosen[i] for i in group], model.device)
            hidden = last_states(model, batch["input_ids"]).float().cpu()
            for place, i in enumerate(group):  # padding stands on the right, where nothing looks at it
                means[i] = hidden[place, : lengths[i]].mean(0)
            bar.advance(len(group))
    names, width = [""] * len(rows.pool), len(str(clusters - 1))
    found = torch.stack([means[i] for i in range(len(chosen))])
    numbers = cluster_sources(found, clusters, seed=derive_seed(seed, "clusters")).tolist()
    for row, c in zip(chosen, numbers, strict=True):
        names[row] = f"cluster {c:0{width}d}"
    return names


def facts(
    choose: CoresetConfig, sources: Sequence[Hashable], monitored: Mapping[int, Mapping[str, Any]]
) -> dict[str, Any]:
    """What the report says beside the metrics: settings, sizes of sources, and whether choosing was in vain."""
    counts = Counter(sources)
    small = small_sources(counts) if choose.small == "auto" else frozenset(choose.small)
    entries = [{"step": step, **seen} for step, seen in monitored.items()]
    return {
        "settings": choose.model_dump(mode="json"),
        "sources": {str(name): counts[name] for name in sorted(counts, key=str)},
        "small": sorted(map(str, small)),
        "memory": "gpu" if torch.cuda.is_available() else "process",  # of what `peak_bytes` is the peak
        "warning": None if choose.method == "random_in_source" else not_better(entries),
    }
