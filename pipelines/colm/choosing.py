"""Choosing rows of large batches for a Trainer: the common part of `datatools train` and any other Trainer.

A `Choosing` reduces the batches of each step, measures its choices, and saves its history in the checkpoints. Its two
subclasses define how a batch is read and reduced: `pipelines.colm.coresets` for the rows of `datatools train`,
`pipelines.colm.mixin` for the tensors of any other Trainer.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed import ProcessGroup
from transformers import TrainerCallback

from datatools import (
    CORESET_FEATURES,
    CORESET_METHODS,
    CoLM,
    DataError,
    FeatureTable,
    LastLayer,
    Selection,
    UsageError,
    coreset_method,
    costs_more,
    did_you_mean,
    files,
    not_better,
    saved_seconds,
    small_sources,
)
from pipelines.colm import given as givens
from pipelines.colm import measured
from pipelines.colm.featuring import Featuring, now
from pipelines.colm.sources import require_known
from pipelines.models.losses import row_losses
from pipelines.runs.messages import warn
from pipelines.runs.provenance import peak_rss_bytes
from pipelines.settings.train import CoresetConfig

MONITORED = (
    "match_error", "match_error_random", "select_seconds", "train_seconds", "select_share", "peak_bytes", "overflows",
    "kept_rows", "drawn_rows", "saved_seconds", "costs_more", "known_share", "feature_age",
    "kept_by_source", "seen_by_source",
)  # fmt: skip
"""The keys of a monitored step's log entry that do not come from the Trainer."""


RARELY = 5
"""How many times as rarely choices are measured whose features cost no pass: measuring costs one."""


def check(settings: CoresetConfig) -> None:
    """Refuse methods and features that do not exist, and row weights that the loss cannot use.

    Args:
        settings: The settings of coresets.

    Raises:
        UsageError: A setting cannot be used.
    """
    method = coreset_method(settings.method)
    if settings.features not in CORESET_FEATURES:
        asked = settings.features
        raise UsageError(f"coreset: no feature is called {asked!r}{did_you_mean(asked, CORESET_FEATURES)}")
    if method.weighted and settings.loss_weighting == "token":
        raise UsageError(f"coreset: {method.name} gives weights to rows, which loss_weighting 'token' cannot use")
    givens.check(settings)


class Choosing(Featuring):
    """Reduces the batches of a Trainer's steps to the rows that `settings.method` keeps.

    Choices depend on the seed, the step, the micro-batch and (without a group) the rank, so that a resumed run makes
    the same ones. If a choice raises, the training state has not changed.

    Args:
        settings: How many rows are kept, and how they are chosen.
        table: Features of the rows from a store, by row number, for `stored` features with a store.
    """

    counts: Mapping[Hashable, int]
    """The number of rows of each source in the whole training set."""
    logged: Sequence[str] = MONITORED
    """The keys that this adds to entries of the log history."""

    def __init__(self, settings: CoresetConfig, table: FeatureTable | None = None) -> None:
        super().__init__(settings, table)
        self.rows_of_step = 1  # rows of this process on which the present step trains
        self._colm: CoLM | None = None
        self._saved_history: dict[str, Tensor] | None = None
        self._watched: dict[str, Any] | None = None  # measurements that are not logged yet
        self._tables: dict[str, Any] = {}  # nested values, which go into the log history only
        self._warned = self._warned_of_cost = False
        self._idle = 0  # rows without a supervised token so far

    @property
    def group(self) -> ProcessGroup | None:
        """The processes that have the same batches and choose together; None means that each chooses alone."""
        return None

    @abstractmethod
    def kept(self, batch: dict[str, Any], chosen: Selection) -> dict[str, Any]:
        """Return the chosen rows of a batch, in the loader's order, with their weights.

        Args:
            batch: The batch.
            chosen: The choice.
        """

    def begin(self, trainer: Any) -> None:
        """Attach to a new Trainer.

        Args:
            trainer: The Trainer.

        Raises:
            UsageError: The Trainer uses FSDP or DeepSpeed, or sizes do not fit each other.
            DataError: The model has no layer whose gradients distinguish rows.
        """
        check(self.settings)
        self.trainer = trainer
        if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
            raise UsageError(
                "coreset: FSDP and DeepSpeed shard the layer that choices read, and gather it in passes that all "
                "processes run together, while each chooses among rows of its own; use DDP or one process"
            )
        LastLayer.of(self._bare_model(), self.settings.projection)  # refuse a model before the first step
        self._check_sizes()
        trainer.add_callback(_Clock(self))

    def reduce(self, batches: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """Return the micro-batches of the next step, each reduced to the kept rows.

        Rows without a supervised token, which train nothing, are never chosen.

        Args:
            batches: The large micro-batches.
        """
        args, step, started = self.trainer.args, self.trainer.state.global_step, now()
        colm = self._chooser()
        refreshing = self._refresh(colm, step)
        self._aim(colm, step)
        watch = step % (self.settings.monitor_every * (RARELY if colm.kind.free else 1)) == 0
        if watch and torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        kept = self.settings.kept_at(step, self.trainer.state.max_steps, keep=self._keep, large=self._large_batch)
        reduced: list[Any] = []
        watched: list[tuple[Any, list[Hashable], Selection]] = []
        trained = 0
        for micro, batch in enumerate(batches):
            tensors, sources, known = self.large(batch)
            if self._given is not None:
                known = known | {"given": self._given.table.take(self.numbers(batch), step=step)}
            live = ((tensors["labels"][:, 1:] != -100).sum(1) > 0).nonzero()[:, 0].cpu()
            if len(live) < len(sources):  # rows whose answer was cut by max_length train nothing
                if not self._idle:
                    warn(f"coreset: {len(sources) - len(live)} rows of step {step + 1} have no supervised token; such "
                         "rows are never chosen")  # fmt: skip
                self._idle += len(sources) - len(live)
                if len(live) == 0:
                    reduced.append(self.kept(batch, Selection(torch.zeros(1, dtype=torch.int64), torch.zeros(1))))
                    continue
                tensors = {key: tensor[live.to(tensor.device)] for key, tensor in tensors.items()}
                known = {"names": list(range(len(sources)))} | known
                sources, known = _only(sources, live), {key: _only(rows, live) for key, rows in known.items()}
            keep = max(1, round(kept * len(sources) / self._large_batch))  # the last batch of an epoch may be smaller
            lane = micro if self.group is not None else micro * args.world_size + args.process_index
            chosen = colm(tensors, sources, step=step, lane=lane, keep=min(keep, len(sources)), watch=watch, **known)
            reduced.append(self.kept(batch, Selection(live[chosen.indices], chosen.weights)))
            trained += len(chosen.indices)
            if watch:
                watched.append((colm.last, sources, chosen))
        self.rows_of_step = max(1, trained)
        if watched:
            measuring = math.fsum(last.watch_seconds for last, _, _ in watched)
            self._watched = measured.errors(watched) | {
                "select_seconds": now() - started - measuring - refreshing + self._refresh_share,
                "overflows": colm.overflows,
                "kept_rows": trained,
                "drawn_rows": sum(len(sources) for _, sources, _ in watched),
            }
            if self._given is not None:
                rows = [number for batch in batches for number in self.numbers(batch)]
                self._watched |= self._given.facts(rows, step)
            self._collected = 0.0
            self._tables = measured.rows_by_source(watched)
        self._since = now()
        return reduced

    def measured(self, logs: Mapping[str, Any]) -> dict[str, float]:
        """Return the measurements of the last monitored step, for the next log of a loss; empty otherwise.

        Args:
            logs: The values to log.
        """
        seen = self._watched
        if seen is None or "train_seconds" not in seen or "loss" not in logs:
            return {}
        self._watched = None
        if (saved := saved_seconds(seen)) is not None:
            seen["saved_seconds"] = saved
        share = seen["select_seconds"] / max(1e-9, seen["select_seconds"] + seen["train_seconds"])
        return {**seen, "select_share": share}

    def noted(self, history: list[dict[str, Any]]) -> None:
        """Complete the last entry of the log history after a log, and warn once if choosing has no effect.

        Args:
            history: The log history.
        """
        if not history or "match_error" not in history[-1] or not self._tables:
            return
        history[-1] |= self._tables
        self._tables = {}
        if CORESET_METHODS[self.settings.method].control:
            return
        seen = [entry for entry in history if "match_error" in entry]
        if not self._warned and (text := not_better(seen)) is not None:
            self._warned = True
            warn(text)
        if not self._warned_of_cost and (text := costs_more(seen, advice=measured.advice(self.settings))) is not None:
            self._warned_of_cost = True
            history[-1]["costs_more"] = text.removeprefix("coreset: ")
            warn(text)

    def save(self, folder: Path) -> None:
        """Write the history of the choices into a checkpoint.

        Args:
            folder: The folder of the checkpoint.
        """
        mine = self.group is None or self.trainer.args.process_index == 0  # together, all have the same history
        if self._colm is not None and mine:
            files.make_folder(folder)
            with files.atomic_path(folder / self._history_name) as path:
                state = {} if self._given is None else self._given.state_dict()
                save_file({**self._colm.state_dict(), **state}, path)

    def load(self, folder: Path) -> None:
        """Continue from the history in a checkpoint.

        Args:
            folder: The folder of the checkpoint.

        Raises:
            DataError: The checkpoint has no history.
        """
        path = folder / self._history_name
        if not path.is_file():
            raise DataError(f"coreset: {folder} has no {path.name}; it was saved without a coreset or by other ranks")
        self._saved_history = load_file(files.checked(path))

    @property
    def _history_name(self) -> str:
        return f"coreset-{0 if self.group is not None else self.trainer.args.process_index}.safetensors"

    def _check_sizes(self) -> None:
        self._large_batch = self.trainer.args.per_device_train_batch_size
        if self.settings.large_batch not in (None, self._large_batch):
            raise UsageError(
                f"coreset: large_batch is {self.settings.large_batch}, but per_device_train_batch_size, which is the "
                f"large batch here, is {self._large_batch}; omit large_batch"
            )
        self._keep = self.settings.keep if self.settings.keep is not None else max(1, self._large_batch // 2)
        if not 1 <= self._keep <= self._large_batch:
            raise UsageError(
                f"coreset: cannot keep {self._keep} rows of a large batch of {self._large_batch}; keep fewer, or raise "
                "per_device_train_batch_size"
            )

    def _bare_model(self) -> Any:
        """Return the model without the wrappers of DDP and torch.compile."""
        return self.trainer.accelerator.unwrap_model(self.trainer.model, keep_torch_compile=False)

    def _chooser(self) -> CoLM:
        """Return the chooser, made at the first step, when the model is on its device, and again for another model."""
        model = self._bare_model()
        if self._colm is None or self._colm.model is not model:
            settings = self.settings
            small = small_sources(self.counts) if settings.small == "auto" else frozenset(settings.small)
            require_known(small, self.counts)
            self._colm = CoLM(
                model,
                row_losses,
                keep=self._keep,
                small=small,
                seed=self.trainer.args.seed,
                group=self.group,
                **givens.arguments_of(settings),
            )
        if self._saved_history is not None:
            own, kept = givens.split(self._saved_history)
            self._colm.load_state_dict(own)
            if self._colm.wanted is not None:  # as it was in the last step before the checkpoint
                self._aimed = self.trainer.state.global_step - 1
            if self._given is not None:
                self._given.load_state_dict(kept)
            self._saved_history = None
        return self._colm


class _Clock(TrainerCallback):  # type: ignore[misc]
    """Measures the time and the peak memory of a monitored step when the step is done."""

    def __init__(self, choosing: Choosing) -> None:
        self.choosing = choosing

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        seen = self.choosing._watched
        if seen is not None and "train_seconds" not in seen:
            collected, self.choosing._collected = self.choosing._collected, 0.0
            seen["train_seconds"] = now() - self.choosing._since - collected
            seen["select_seconds"] += collected  # by-products are what choosing costs
            seen["peak_bytes"] = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else peak_rss_bytes()


def _only(rows: Any, places: Tensor) -> Any:
    return rows[places] if isinstance(rows, Tensor) else [rows[i] for i in places.tolist()]
