"""Coresets of the rows of `datatools train`: the `choose` of its Trainer, and facts for settings and report."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from datatools import (
    CORESET_FEATURES,
    CORESET_METHODS,
    FeatureTable,
    Selection,
    UsageError,
    costs_more,
    not_better,
    small_sources,
)
from pipelines.colm.choosing import MONITORED, Choosing
from pipelines.colm.featuring import check_target, drawn
from pipelines.colm.given import check_visits
from pipelines.colm.measured import advice
from pipelines.models.losses import collate
from pipelines.runs.messages import warn
from pipelines.settings.parts import TrainingConfig
from pipelines.settings.train import CoresetConfig


class Coresets(Choosing):
    """The `choose` of `datatools train`: batches have row numbers and encoded rows.

    Several processes all have the same batch: each does a part of the passes over it, and all make the same choice.

    Args:
        settings: How many rows are kept, and how they are chosen.
        source_of: A row's number -> its source; None is one source for all.
        table: Features of the rows from a store, if `stored` features have one.
        target: Encoded target rows, for methods that compare rows with them.
    """

    def __init__(
        self,
        settings: CoresetConfig,
        source_of: Callable[[int], Hashable] | None = None,
        table: FeatureTable | None = None,
        target: Sequence[tuple[list[int], list[int]]] = (),
    ) -> None:
        super().__init__(settings, table)
        self._target_items = target
        self.source_of = source_of or (lambda row: "")

    @property
    def group(self) -> ProcessGroup | None:
        """All processes."""
        return torch.distributed.group.WORLD if self.trainer.args.world_size > 1 else None

    def begin(self, trainer: Any) -> None:
        """Attach to the Trainer, and count the rows of each source.

        Args:
            trainer: The Trainer.
        """
        super().begin(trainer)
        self.counts = Counter(self.source_of(row) for row in trainer.train_dataset.rows)
        check_target(self.settings, len(self._target_items))
        if self._target_items:
            self.target = self._targets
        self._begin_given(trainer.train_dataset.rows)

    def _targets(self, step: int) -> tuple[dict[str, Tensor], list[int] | None]:
        picks = drawn(len(self._target_items), self.settings, step, self.trainer.args.seed)
        items = [self._target_items[i] for i in picks]
        device = self.trainer.args.device
        return {k: v.to(device) for k, v in collate(items).items()}, [len(ids) for ids, _ in items]

    def numbers(self, batch: dict[str, Any]) -> list[int]:
        """Return the numbers of the rows of a batch.

        Args:
            batch: The batch.
        """
        return list(batch["rows"])

    def everything(self) -> Iterator[dict[str, Any]]:
        """Yield batches of all rows of the training data."""
        data = self.trainer.train_dataset
        for start in range(0, len(data), self._large_batch):
            items = [data[i] for i in range(start, min(start + self._large_batch, len(data)))]
            yield {"rows": [item["row"] for item in items], "items": [item["item"] for item in items]}

    def large(self, batch: dict[str, Any]) -> tuple[dict[str, Tensor], list[Hashable], dict[str, Any]]:
        """Return the padded rows, their sources, and their lengths and names.

        Args:
            batch: The batch.
        """
        device, name_of = self.trainer.args.device, self.trainer.name_of
        tensors = {key: tensor.to(device) for key, tensor in collate(batch["items"]).items()}
        known = {"lengths": [len(ids) for ids, _ in batch["items"]], "names": [name_of(r) for r in batch["rows"]]}
        return tensors, [self.source_of(row) for row in batch["rows"]], known

    def kept(self, batch: dict[str, Any], chosen: Selection) -> dict[str, Any]:
        """Return the chosen rows, with their weights unless every token has the same weight.

        Args:
            batch: The batch.
            chosen: The choice.
        """
        order = chosen.indices.argsort()
        kept = chosen.indices[order].tolist()
        weights = {} if self.settings.loss_weighting == "token" else {"weights": chosen.weights[order]}
        return {key: [batch[key][i] for i in kept] for key in ("rows", "items")} | weights


def resolve(recipe: TrainingConfig, choose: CoresetConfig, rows: int) -> tuple[TrainingConfig, CoresetConfig]:
    """Return the recipe with large batches, and the settings with both sizes.

    Args:
        recipe: The recipe.
        choose: The settings of coresets.
        rows: The number of rows of the data.

    Raises:
        UsageError: Sizes do not fit each other or the number of rows.
    """
    keep, large = choose.sizes(recipe.batch_size)
    if rows < keep:
        raise UsageError(f"coreset: cannot keep {keep} rows per step, because the data has {rows}; keep fewer (--keep)")
    if rows < large:
        warn(f"coreset: a large batch has {large} rows but the data only {rows}; every step uses all of them")
    if CORESET_FEATURES[choose.features].origin == "visit":
        if recipe.gradient == "zo":
            raise UsageError(
                "coreset: stale features are by-products of back-propagation, which --gradient zo does not do; use "
                "stored features, or probes"
            )
        per_epoch = -(-rows // large)
        steps = per_epoch * recipe.epochs if recipe.max_steps is None else recipe.max_steps
        check_visits(choose, per_epoch=per_epoch, steps=min(steps, per_epoch * recipe.epochs))
    return recipe.model_copy(update={"batch_size": large}), choose.model_copy(
        update={"keep": keep, "large_batch": large}
    )


def monitored(entries: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the measurements of the choices per step: the monitored log entries, without other keys.

    Args:
        entries: The log entries.
    """
    kept = ("step", *MONITORED)
    return [{key: e[key] for key in kept if key in e} for e in entries if "match_error" in e]


def facts(choose: CoresetConfig, sources: Sequence[Hashable], seen: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return what the report needs besides the metrics: settings, sizes of sources, and whether choosing had an effect.

    Args:
        choose: The settings of coresets.
        sources: The source of each row.
        seen: The monitored entries.
    """
    counts = Counter(sources)
    small = small_sources(counts) if choose.small == "auto" else frozenset(choose.small)
    return {
        "settings": choose.model_dump(mode="json"),
        "sources": {str(name): counts[name] for name in sorted(counts, key=str)},
        "small": sorted(map(str, small)),
        "memory": "gpu" if torch.cuda.is_available() else "process",  # what `peak_bytes` measures
        "warning": None if CORESET_METHODS[choose.method].control else not_better(seen),
        "costs_more": None if CORESET_METHODS[choose.method].control else costs_more(seen, advice=advice(choose)),
    }
