"""Coresets of the rows of `datatools train`: the `choose` of its Trainer, and what its settings and report say."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from datatools import CORESET_METHODS, Selection, UsageError, not_better, small_sources
from pipelines.colm.choosing import MONITORED, Choosing
from pipelines.models.losses import collate
from pipelines.runs.messages import warn
from pipelines.settings.parts import TrainingConfig
from pipelines.settings.train import CoresetConfig


class Coresets(Choosing):
    """The `choose` of `datatools train`: batches hold row numbers and encoded rows.

    Several processes all hold the same batch: each makes a part of the passes over it, and all make the same choice.

    Args:
        settings: How many rows are kept, and how they are chosen.
        source_of: The source of a row by its number; None is one source for all.
    """

    def __init__(self, settings: CoresetConfig, source_of: Callable[[int], Hashable] | None = None) -> None:
        super().__init__(settings)
        self.source_of = source_of or (lambda row: "")

    @property
    def group(self) -> ProcessGroup | None:
        """All processes."""
        return torch.distributed.group.WORLD if self.trainer.args.world_size > 1 else None

    def begin(self, trainer: Any) -> None:
        """Attach to the Trainer, and count the rows of each source."""
        super().begin(trainer)
        self.counts = Counter(self.source_of(row) for row in trainer.train_dataset.rows)

    def large(self, batch: dict[str, Any]) -> tuple[dict[str, Tensor], list[Hashable], dict[str, Any]]:
        """The padded rows, their sources, and their lengths and names."""
        device, name_of = self.trainer.args.device, self.trainer.name_of
        tensors = {key: tensor.to(device) for key, tensor in collate(batch["items"]).items()}
        known = {"lengths": [len(ids) for ids, _ in batch["items"]], "names": [name_of(r) for r in batch["rows"]]}
        return tensors, [self.source_of(row) for row in batch["rows"]], known

    def kept(self, batch: dict[str, Any], chosen: Selection) -> dict[str, Any]:
        """The chosen rows, with their weights unless every token counts the same."""
        order = chosen.indices.argsort()
        kept = chosen.indices[order].tolist()
        weights = {} if self.settings.loss_weighting == "token" else {"weights": chosen.weights[order]}
        return {key: [batch[key][i] for i in kept] for key in ("rows", "items")} | weights


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


def monitored(entries: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What was measured of the choices, by step: of log entries those of monitored steps, without other keys."""
    kept = ("step", *MONITORED)
    return [{key: e[key] for key in kept if key in e} for e in entries if "match_error" in e]


def facts(choose: CoresetConfig, sources: Sequence[Hashable], seen: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What the report says beside the metrics: settings, sizes of sources, and whether choosing was in vain."""
    counts = Counter(sources)
    small = small_sources(counts) if choose.small == "auto" else frozenset(choose.small)
    return {
        "settings": choose.model_dump(mode="json"),
        "sources": {str(name): counts[name] for name in sorted(counts, key=str)},
        "small": sorted(map(str, small)),
        "memory": "gpu" if torch.cuda.is_available() else "process",  # of what `peak_bytes` is the peak
        "warning": None if CORESET_METHODS[choose.method].control else not_better(seen),
    }
