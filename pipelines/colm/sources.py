"""Sources of the rows from which coresets are chosen: those that rows name, or clusters of their hidden states."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterable, Sequence
from typing import Any

import torch

from datatools import UsageError, cluster_sources, did_you_mean
from pipelines.models.losses import last_states
from pipelines.rows.rows import Rows
from pipelines.runs.memory import token_budget
from pipelines.runs.messages import warn
from pipelines.runs.progress import progress
from pipelines.runs.seeds import derive_seed
from pipelines.settings.train import CoresetConfig


def require_known(small: Iterable[Hashable], sources: Collection[Hashable]) -> None:
    """Refuse names of small sources that no row has.

    Args:
        small: The names of small sources.
        sources: The sources of the rows.

    Raises:
        UsageError: A name is unknown.
    """
    if unknown := sorted(str(name) for name in small if name not in sources):
        raise UsageError(
            f"coreset: no row has the small source {unknown[0]!r}{did_you_mean(unknown[0], map(str, sources))}"
        )


def require_sources(choose: CoresetConfig, rows: Rows, chosen: Sequence[int], *, key: str) -> None:
    """Refuse rows if none names its source, unless they will be clustered or no source is small.

    Args:
        choose: The settings of coresets.
        rows: The rows.
        chosen: The numbers of the rows to train on.
        key: The column of `--source-key`.

    Raises:
        UsageError: No row names its source.
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
            "--source-key, make sources with --set coreset.clusters=8, or use one source with "
            "--set coreset.small=[]"
        )
    if nameless:
        warn(f"coreset: {nameless} of {len(rows.pool)} rows have no column {key!r}; their source is their file's name")
    if len(names) == 1:
        warn(f"coreset: all rows belong to the source {names.pop()!r}, which is not small; rows are chosen among all")


def clusters_of(model: Any, rows: Rows, chosen: Sequence[int], clusters: int, *, seed: int) -> list[str]:
    """Return sources made by clustering the mean last hidden state of each used row; "" for rows that are not used.

    Args:
        model: The model.
        rows: The rows.
        chosen: The numbers of the rows to train on.
        clusters: The number of clusters.
        seed: The seed of the run.

    Raises:
        UsageError: There are more clusters than rows.
    """
    if clusters > len(chosen):
        raise UsageError(
            f"coreset: cannot make {clusters} clusters of {len(chosen)} rows; make fewer (--set coreset.clusters=N)"
        )
    means: dict[int, torch.Tensor] = {}
    lengths = [int(rows.scan.tokens[row]) for row in chosen]
    with torch.inference_mode(), progress("clustering", len(chosen), "rows") as bar:

        def keep(group: list[int], batch: dict[str, torch.Tensor]) -> None:
            hidden = last_states(model, batch["input_ids"]).float().cpu()
            for place, i in enumerate(group):  # padding is on the right and has no effect
                means[i] = hidden[place, : lengths[i]].mean(0)
            bar.advance(len(group))

        rows.each_batch(keep, chosen, token_budget(4096, "clustering", ""), model.device)
    names, width = [""] * len(rows.pool), len(str(clusters - 1))
    found = torch.stack([means[i] for i in range(len(chosen))])
    numbers = cluster_sources(found, clusters, seed=derive_seed(seed, "clusters")).tolist()
    for row, c in zip(chosen, numbers, strict=True):
        names[row] = f"cluster {c:0{width}d}"
    return names
