"""Sources of the rows that coresets are chosen from: the ones that rows name, or clusters of their hidden states."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterable, Sequence
from typing import Any

import torch

from datatools import UsageError, cluster_sources, did_you_mean
from pipelines.models.losses import last_states
from pipelines.rows.rows import Rows
from pipelines.runs.messages import warn
from pipelines.runs.progress import progress
from pipelines.runs.seeds import derive_seed
from pipelines.settings.train import CoresetConfig


def require_known(small: Iterable[Hashable], sources: Collection[Hashable]) -> None:
    """Refuse names of small sources that no row has. Raises: UsageError."""
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
        require_known(choose.small, names)
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
        for group, batch in rows.micro_batches(chosen, 4096, model.device):
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
