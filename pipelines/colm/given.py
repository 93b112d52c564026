"""Features of rows that cost no pass over the large batch: from a store, from a refresh, or from the last visit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from datatools import BY_PRODUCTS, CORESET_FEATURES, CORESET_METHODS, FeatureTable, UsageError
from pipelines.runs.messages import warn
from pipelines.settings.train import CoresetConfig

_PREFIX = "given."


def check(settings: CoresetConfig) -> None:
    """Refuse settings of `stored` and `stale` that lack something, contradict each other, or have no effect.

    Args:
        settings: The settings of coresets.

    Raises:
        UsageError: A setting cannot be used.
    """
    kind, reads = CORESET_FEATURES[settings.features], CORESET_METHODS[settings.method].reads
    if CORESET_METHODS[settings.method].target and not kind.free and not kind.exact:
        raise UsageError(f"coreset: {settings.method} compares rows with the gradient of target rows, which "
                         f"{settings.features} features cannot be compared with; use exact or stale")  # fmt: skip
    if by_product(settings) != "gradient" and kind.origin == "visit" and CORESET_METHODS[settings.method].target:
        raise UsageError(f"coreset: {settings.method} reads gradients, not coreset.by_product={settings.by_product}")
    if kind.origin == "store":
        if settings.store is None and settings.refresh_every is None:
            raise UsageError(
                "coreset: stored features need a store (--coreset-store runs/select/features/train-40, which "
                "`datatools select` writes for the same model and rows), or coreset.refresh_every=N, which measures "
                "them here"
            )
        if CORESET_METHODS[settings.method].target and settings.store is not None:
            raise UsageError(
                f"coreset: {settings.method} compares rows with the gradient of target rows, and the features of a "
                "store are of another kind; use stale features, or coreset.refresh_every without a store"
            )
        if reads:
            raise UsageError(f"coreset: {settings.method} reads {reads}, which no store has; use stale features")
    elif settings.store is not None or settings.refresh_every is not None:
        name = "store" if settings.store is not None else "refresh_every"
        raise UsageError(
            f"coreset: only stored features read coreset.{name}; add --coreset-features stored, or omit it"
        )
    if kind.origin != "visit" and (settings.stale_limit is not None or settings.by_product is not None):
        name = "stale_limit" if settings.stale_limit is not None else "by_product"
        raise UsageError(f"coreset: only stale features read coreset.{name}; add --coreset-features stale, or omit it")
    if kind.free and settings.rule == "adam":
        raise UsageError(f"coreset: rule 'adam' needs gradients that are measured at each step, unlike "
                         f"{settings.features} features; use rule 'none'")  # fmt: skip
    if by_product(settings) != "gradient" and settings.by_product is not None and reads not in ("", reading(settings)):
        raise UsageError(f"coreset: {settings.method} reads {reads}, not coreset.by_product={settings.by_product}")
    expected = settings.weights == "expectation" or (settings.weights == "auto" and kind.free)
    if expected and settings.loss_weighting == "token":
        raise UsageError(
            "coreset: weights 'expectation' are weights of rows, which loss_weighting 'token' cannot use; use "
            "coreset.weights=uniform or loss_weighting 'example'"
        )


def by_product(settings: CoresetConfig) -> str:
    """Return what stale features are, a name of `datatools.BY_PRODUCTS`.

    Args:
        settings: The settings of coresets.
    """
    if settings.by_product is not None:
        return settings.by_product
    reads = CORESET_METHODS[settings.method].reads
    return next((name for name, made in BY_PRODUCTS.items() if reads and made.kind == reads), "gradient")


def reading(settings: CoresetConfig) -> str:
    """Return the kind of features that the by-product is, as methods name what they read.

    Args:
        settings: The settings of coresets.
    """
    return BY_PRODUCTS[by_product(settings)].kind


class Given:
    """The features of the rows of a run that are not measured at each step.

    Args:
        settings: The settings of coresets.
        numbers: The row numbers.
        table: Features from a store; None starts without any.
    """

    def __init__(self, settings: CoresetConfig, numbers: Sequence[int], table: FeatureTable | None = None) -> None:
        self.settings, self.stored = settings, table is not None
        self.table = FeatureTable(numbers, settings.stale_limit) if table is None else table
        every = settings.refresh_every
        self._next = None if every is None else every if self.stored else 0  # the step of the next refresh

    @property
    def visits(self) -> bool:
        """Whether features are by-products of training."""
        return CORESET_FEATURES[self.settings.features].origin == "visit"

    def due(self, step: int) -> bool:
        """Return whether the features of all rows are to be measured before a step.

        Args:
            step: The step.
        """
        return self._next is not None and step >= self._next

    def forget_store(self) -> None:
        """Drop features of a store before all are measured: they have another dimension, or are of another kind."""
        if self.stored:
            self.table, self.stored = FeatureTable(self.table.numbers, self.settings.stale_limit), False

    def refreshed(self, step: int) -> None:
        """Note that all features have been measured.

        Args:
            step: The step.
        """
        self._next = step + (self.settings.refresh_every or 1)

    def facts(self, numbers: Sequence[int], step: int) -> dict[str, float]:
        """Return what a monitored step logs: the share of rows with features, and their mean age in steps.

        Args:
            numbers: The rows of the large batch.
            step: The step.
        """
        known = self.table.take(numbers, step=step).isfinite().all(1)
        found = {"known_share": float(known.float().mean())}
        if not self.stored and (ages := self.table.ages(numbers, step=step)):
            found["feature_age"] = sum(ages) / len(ages)
        return found

    def state_dict(self) -> dict[str, Tensor]:
        """Return what a checkpoint keeps; nothing while all features are those of the store."""
        if self.stored:
            return {}
        state = {_PREFIX + name: value for name, value in self.table.state_dict().items()}
        return state | ({} if self._next is None else {_PREFIX + "next": torch.tensor(self._next)})

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Continue from a checkpoint.

        Args:
            state: What `state_dict` returned.

        Raises:
            DataError: The features belong to other rows.
        """
        own = {name.removeprefix(_PREFIX): value for name, value in state.items()}
        if not own:
            return
        if (following := own.pop("next", None)) is not None:
            self._next = int(following)
        self.table.load_state_dict(own)
        self.stored = False


def split(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Split the saved state of a choice into that of `datatools.CoLM` and that of `Given`.

    Args:
        state: Both together.
    """
    given = {name: value for name, value in state.items() if name.startswith(_PREFIX)}
    return {name: value for name, value in state.items() if name not in given}, given


def check_visits(settings: CoresetConfig, *, per_epoch: int, steps: int) -> None:
    """Refuse stale features in a run that never uses them.

    Args:
        settings: The settings of coresets.
        per_epoch: The number of steps in which every row is drawn once.
        steps: The number of steps of the run.

    Raises:
        UsageError: No row comes again, or its features are then too old.
    """
    if steps <= per_epoch:
        raise UsageError(
            f"coreset: stale features of a row are used when it is drawn again, and this run draws each row once "
            f"({steps} steps, {per_epoch} per epoch); train for more epochs, or use stored features "
            "(--coreset-features stored)"
        )
    limit = settings.stale_limit
    if limit is not None and limit < per_epoch:
        raise UsageError(
            f"coreset: a row is drawn every {per_epoch} steps on average, and features older than coreset.stale_limit="
            f"{limit} steps are not used, so that most rows would never have any; raise it to {per_epoch} or more, or "
            "omit it"
        )
    if limit is not None and limit < 2 * per_epoch - 1:
        warn(f"coreset: rows are drawn again after 1 to {2 * per_epoch - 1} steps; those after more than {limit} are "
             "drawn at random (coreset.stale_limit)")  # fmt: skip


def arguments_of(settings: CoresetConfig) -> dict[str, Any]:
    """Return the arguments of `datatools.CoLM`, with the dimension of kept features where features are kept.

    Args:
        settings: The settings of coresets.
    """
    found = settings.arguments()
    if CORESET_FEATURES[settings.features].free:
        found["dim"] = settings.kept_dim
    return found
