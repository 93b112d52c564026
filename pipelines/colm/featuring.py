"""Where the features of a step's rows come from, where no pass over the large batch measures them, and target rows."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from datatools import CORESET_FEATURES, CORESET_METHODS, ByProducts, CoLM, FeatureTable, UsageError
from pipelines.colm import given as givens
from pipelines.colm import measured
from pipelines.settings.train import CoresetConfig


class Featuring(ABC):
    """Keeps, refreshes and collects features of rows, and measures the gradient of target rows.

    Args:
        settings: The settings of coresets.
        table: Features of the rows from a store, by row number.
    """

    def __init__(self, settings: CoresetConfig, table: FeatureTable | None = None) -> None:
        self.settings, self._table = settings, table
        self.trainer: Any = None
        self.target: Callable[[int], tuple[dict[str, Tensor], list[int] | None]] | None = None
        """A step -> the batch of target rows, and their lengths."""
        self._given: givens.Given | None = None
        self._seen: ByProducts | None = None
        self._aimed = -1  # the step at which the gradient of target rows was measured
        self._refresh_share = self._collected = 0.0  # seconds a step: of the last refresh, and of by-products

    @abstractmethod
    def large(self, batch: dict[str, Any]) -> tuple[dict[str, Tensor], list[Hashable], dict[str, Any]]:
        """Return what a choice needs of a large batch of n rows.

        Args:
            batch: The batch.

        Returns:
            The tensors of the model's inputs (`input_ids` and `labels`, int64 [n, tokens], and others with n rows);
            the source of each row; and, if they are known, `lengths` and `names` of the rows.
        """

    @abstractmethod
    def numbers(self, batch: dict[str, Any]) -> list[int]:
        """Return the numbers of the rows of a batch.

        Args:
            batch: The batch.
        """

    @abstractmethod
    def everything(self) -> Iterator[dict[str, Any]]:
        """Yield batches of all rows of the training data, for a refresh of their features."""

    @abstractmethod
    def _chooser(self) -> CoLM:
        """Return the chooser for the present model."""

    @contextmanager
    def visiting(self) -> Iterator[ByProducts | None]:
        """Collect by-products of the rows of a training step, which runs inside, where features are made of them.

        Yields:
            The collector, whose `watch` is called for each micro-batch; None if nothing is collected.
        """
        if self._given is None or not self._given.visits:
            yield None
            return
        colm = self._chooser()
        if self._seen is None or self._seen.model is not colm.model:
            self._seen = colm.by_products(givens.by_product(self.settings))
        with self._seen.watching():
            yield self._seen
        numbers, features = self._seen.taken()
        self._collected += self._seen.seconds
        if self.trainer.args.world_size > 1:
            numbers, features = measured.of_all_processes(self.trainer.accelerator, numbers, features)
        if numbers:
            self._given.table.put(numbers, features, step=self.trainer.state.global_step)

    def _refresh(self, colm: CoLM, step: int) -> float:
        """Measure the features of all rows again, if that is due; return the seconds that it took."""
        if self._given is None or not self._given.due(step):
            return 0.0
        started = now()
        self._given.forget_store()
        for batch in self.everything():
            tensors, _, known = self.large(batch)
            features = colm.measured(tensors, known.get("lengths"))
            self._given.table.put(self.numbers(batch), features, step=step)
        self._given.refreshed(step)
        seconds: float = now() - started
        self._refresh_share = seconds / (self.settings.refresh_every or 1)
        return seconds

    def _begin_given(self, numbers: Sequence[int]) -> None:
        """Prepare features that cost no pass, for rows with these numbers; called at the end of `begin`."""
        if CORESET_FEATURES[self.settings.features].free:
            self._given = givens.Given(self.settings, numbers, self._table)

    def _aim(self, colm: CoLM, step: int) -> None:
        """Tell the chooser the learning rate, and the gradient of target rows if it is due."""
        colm.rate = float(self.trainer.optimizer.param_groups[0]["lr"])
        due = step // self.settings.target_every * self.settings.target_every
        if not colm.method.target or (colm.wanted is not None and self._aimed >= due):
            return
        if self.target is None:
            raise UsageError(
                f"coreset: {colm.method.name} compares rows with target rows; name them (--coreset-target FILE)"
            )
        colm.aim(*self.target(step))
        self._aimed = step


def now() -> float:
    """Return the time in seconds, after the GPU has done what it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return perf_counter()


def drawn(rows: int, settings: CoresetConfig, step: int, seed: int) -> list[int]:
    """Return which target rows a step reads: all of them, or as many as are drawn at a time.

    Args:
        rows: The number of target rows.
        settings: The settings of coresets.
        step: The step.
        seed: The seed of the run.
    """
    if rows <= settings.target_rows:
        return list(range(rows))
    generator = torch.Generator().manual_seed((seed * 1_000_003 + step) % 2**63)
    return torch.randperm(rows, generator=generator)[: settings.target_rows].tolist()


def check_loss(args: Any) -> None:
    """Refuse losses of a Trainer that the loss of weighted rows would replace.

    Args:
        args: The arguments of the Trainer.

    Raises:
        UsageError: For label smoothing, and for a `loss_type` of TRL other than the mean over tokens.
    """
    smoothing = getattr(args, "label_smoothing_factor", 0.0) or 0.0
    if smoothing > 0:
        raise UsageError(
            f"coreset: weighted rows have the plain loss, without label_smoothing_factor={smoothing}; set it to 0, or "
            "choose without weights (loss_weighting='token', weights='uniform')"
        )
    kind = getattr(args, "loss_type", None)
    if kind not in (None, "nll", "chunked_nll"):
        raise UsageError(
            f"coreset: weighted rows have the plain loss, and not loss_type={kind!r}; use 'nll', or choose without "
            "weights (loss_weighting='token', weights='uniform')"
        )


def check_target(settings: CoresetConfig, rows: int | None) -> None:
    """Refuse a method that needs target rows without any, and target rows that no method reads.

    Args:
        settings: The settings of coresets.
        rows: The number of target rows; None if there are none.

    Raises:
        UsageError: The two do not fit.
    """
    needs = CORESET_METHODS[settings.method].target
    if needs and not rows:
        raise UsageError(
            f"coreset: {settings.method} compares rows with target rows; name them (--coreset-target FILE), and not "
            "the rows by which the result will be judged"
        )
    if rows and not needs:
        known = ", ".join(name for name, method in CORESET_METHODS.items() if method.target)
        raise UsageError(
            f"coreset: {settings.method} reads no target rows; omit coreset.target, or use one of: {known}"
        )
