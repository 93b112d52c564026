"""`datatools neighbours`: the nearest rows to a row of a finished run, and how much of the pool a selection covers."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor

from datatools import DataError, GradientFeatures, UsageError, clusters, nearest
from pipelines.models import load as models
from pipelines.report.page import damaged
from pipelines.rows.prepare import prepare, target_data
from pipelines.rows.rows import Rows
from pipelines.runs import run_files
from pipelines.runs.messages import say
from pipelines.runs.seeds import derive_seed
from pipelines.select import objectives
from pipelines.select.explain import row_named
from pipelines.select.scorer import Space, scorer
from pipelines.settings import trust
from pipelines.settings.explain import NeighboursConfig
from pipelines.settings.load import load_config
from pipelines.settings.select import SelectConfig
from pipelines.texts import visible

_BLOCK = 2048


def run(config: NeighboursConfig) -> dict[str, Any]:
    """Print and return the nearest rows of the pool and of the target, or, without a row, what the selection covers.

    The search uses the space in which the method compared rows, from the features that the run has kept: for LESS, the
    updates of the pool's rows and the gradients of the target's at all checkpoints, weighted as in the score.

    Args:
        config: The settings.

    Raises:
        UsageError: The run or the row does not exist, or the method keeps no features.
        DataError: The data or the features of the run have changed.
        EnvironmentProblem: faiss is not installed, and clusters were requested.
    """
    folder = config.folder.parent if config.folder.name == "selected.jsonl" else config.folder
    if not (folder / "run.yaml").is_file():
        raise UsageError(f"{folder}: holds no run (no run.yaml); give the folder of a selection")
    run_files.refuse_special(folder)
    if text := run_files.note(folder):
        say(text)
    flags = {"out": folder, "model.trust_remote_code": config.trust_remote_code or None}
    made_by = load_config(SelectConfig, folder / "run.yaml", flags, wanted=[trust.CODE])
    spaces = scorer(made_by.method).spaces
    if spaces is None:
        raise UsageError(
            f"{folder}: --method {made_by.method} keeps no features to search in; select with a method that does, such "
            "as rds or less"
        )
    loaded = models.load(made_by.model, tokenizer_only=True)
    read: dict[str, Any] = {"cache": folder / "inputs", "limits": loaded.limits}
    pool = prepare(made_by.train, made_by.model, loaded.tokenizer, label="pool", **read)
    wanted = target_data(made_by.train, made_by.target, made_by.target_columns)
    target = prepare(wanted, made_by.model, loaded.tokenizer, label="target", **read)
    found = spaces(made_by, folder)
    if gone := [store for space in found for store in (space.pool, space.target) if not store.is_dir()]:
        raise DataError(f"{gone[0]}: the run's features are gone; run the same selection again")
    world = _World(made_by, pool, target, found)
    if config.row is not None:
        result = _of_row(config, world, row_named(config.row, pool))
    else:
        result = _coverage(config, world, folder)
    _show(result, Console())
    return result


class _World:
    """The rows of a run in the space in which its method compares them."""

    def __init__(self, config: SelectConfig, pool: Rows, target: Rows, spaces: Sequence[Space]) -> None:
        self.config, self.pool, self.target = config, pool, target
        self._pool = [(math.sqrt(space.weight), GradientFeatures.open(space.pool)) for space in spaces]
        self._target = [(math.sqrt(space.weight), GradientFeatures.open(space.target)) for space in spaces]
        held = self._pool[0][1].rows()
        good = {key for key, status in zip(held.keys, held.status, strict=True) if status == "ok"}
        for _, store in self._pool[1:]:
            held = store.rows()
            good &= {key for key, status in zip(held.keys, held.status, strict=True) if status == "ok"}
        first: dict[str, int] = {}
        for row in np.flatnonzero(pool.usable).tolist():
            if pool.keys[row] in good:
                first.setdefault(pool.keys[row], row)
        self.rows = list(first.values())
        """The rows of the pool that have features, one per content."""
        self.targets = np.flatnonzero(target.usable).tolist()

    def vectors(self, rows: Sequence[int]) -> Tensor:
        """Return unit vectors of rows of the pool, float32 [k, d]."""
        return torch.cat([root * store.take([self.pool.keys[row] for row in rows]) for root, store in self._pool], 1)

    def wanted(self) -> Tensor:
        """Return unit vectors of the usable rows of the target, float32 [m, d]."""
        keys = objectives.keys(self.config, self.target)
        return torch.cat([root * store.take(keys) for root, store in self._target], 1)

    def blocks(self) -> Iterator[Tensor]:
        """Yield the vectors of all of `rows`, block by block."""
        for start in range(0, len(self.rows), _BLOCK):
            yield self.vectors(self.rows[start : start + _BLOCK])

    def pool_row(self, row: int, similarity: float) -> dict[str, Any]:
        """Return what is shown of a row of the pool."""
        held = self.pool.pool[row]
        return {"id": held.id, "source": held.source, "where": self.pool.pool.where(row), "similarity": similarity,
                **held.shown()}  # fmt: skip

    def target_row(self, place: int, similarity: float) -> dict[str, Any]:
        """Return what is shown of a usable row of the target."""
        held = self.target.pool[self.targets[place]]
        return {"id": held.id, "subtask": held.subtask, "where": self.target.pool.where(self.targets[place]),
                "similarity": similarity, **held.shown()}  # fmt: skip


def _of_row(config: NeighboursConfig, world: _World, row: int) -> dict[str, Any]:
    """Return the nearest rows to one row of the pool, without the row itself."""
    key = world.pool.keys[row]
    if not any(world.pool.keys[other] == key for other in world.rows):
        status = world.pool.status[row]
        why = f"{world.config.method} computed none for it" if status == "ok" else status
        raise DataError(f"{world.pool.pool.where(row)}: this row has no features ({why})")
    mine = next(other for other in world.rows if world.pool.keys[other] == key)
    vector = world.vectors([mine])
    near = nearest(world.blocks, vector, config.nearest + 1, rows=len(world.rows))
    wanted = (world.wanted() @ vector[0]).sort(descending=True, stable=True)
    held = [
        world.pool_row(world.rows[place], value)
        for place, value in zip(near.indices[0].tolist(), near.similarity[0].tolist(), strict=True)
        if world.rows[place] != mine
    ]
    return {
        "row": world.pool_row(row, 1.0),
        "method": world.config.method,
        "pool": held[: config.nearest],
        "target": [
            world.target_row(place, value)
            for place, value in zip(wanted.indices.tolist(), wanted.values.tolist(), strict=True)
        ][: config.nearest],
        "rows": len(world.rows),
        "of": len(world.pool.unique()),
        "search": {"method": near.method, "recall": near.recall},
    }


def _coverage(config: NeighboursConfig, world: _World, folder: Path) -> dict[str, Any]:
    """Return the nearest pool rows to each target row, and how many clusters of the pool the selection reaches."""
    near = nearest(world.blocks, world.wanted(), config.nearest, rows=len(world.rows))
    n = len(world.rows)
    count = config.clusters if config.clusters is not None else max(1, min(256, math.isqrt(n)))
    made = clusters(world.blocks, count, rows=n, seed=derive_seed(world.config.seed, "clusters"))
    path = folder / "scores.parquet"
    if not path.is_file():
        raise UsageError(f"{folder}: there are no scores yet; run `datatools select` again with the same settings")
    with damaged(path, "run the same selection again to write it anew"):
        table = pq.read_table(path, columns=["_key", "_selected"])
        taken = {
            key for key, chosen in zip(*(table[c].to_pylist() for c in ("_key", "_selected")), strict=True) if chosen
        }
    chosen = [place for place, row in enumerate(world.rows) if world.pool.keys[row] in taken]
    sizes = Counter(made.labels.tolist())
    served = Counter(made.labels[chosen].tolist())
    by_target = (world.wanted() @ made.centres.T).argmax(1)
    return {
        "method": world.config.method,
        "rows": n,
        "of": len(world.pool.unique()),
        "targets": [
            {
                **world.target_row(place, 1.0),
                "nearest": [
                    world.pool_row(world.rows[index], value) for index, value in zip(indices, values, strict=True)
                ],
            }
            for place, (indices, values) in enumerate(zip(near.indices.tolist(), near.similarity.tolist(), strict=True))
        ],
        "search": {"method": near.method, "recall": near.recall},
        "clusters": {
            "count": count,
            "with_rows": len(sizes),
            "selected": len(served),
            "random": _expected(list(sizes.values()), n, len(chosen)),
            "target": len(set(by_target.tolist())),
            "target_selected": len(set(by_target.tolist()) & set(served)),
            "chosen_rows": len(chosen),
            "largest_share": max(served.values(), default=0) / max(1, len(chosen)),
        },
    }


def _expected(sizes: Sequence[int], n: int, k: int) -> float:
    """Return how many clusters of these sizes k of n rows reach on average if they are drawn at random."""

    def missed(size: int) -> float:
        if n - size < k:
            return 0.0
        return math.exp(
            math.lgamma(n - size + 1) - math.lgamma(n - size - k + 1) - math.lgamma(n + 1) + math.lgamma(n - k + 1)
        )

    return sum(1 - missed(size) for size in sizes)


# ------------------------------------------------------------------------------------------------------------ printing


def _show(found: dict[str, Any], console: Console) -> None:
    if "row" in found:
        row = found["row"]
        console.print(Text(f"{visible(row['where'])}  {visible(row['source'])}  {visible(row['id'])}", style="bold"))
        console.print(Text(_short(row["prompt"], 400), style="dim"))
        console.print(Text(_short(row["answer"], 400)))
        _searched(console, found)
        _table(console, "nearest rows of the pool", found["pool"])
        _table(console, "nearest rows of the target", found["target"])
        return
    _searched(console, found)
    for target in found["targets"]:
        _table(console, f"nearest rows of the pool to target row {visible(target['id'])}", target["nearest"])
    how = found["search"]
    if how["method"] != "exact":
        console.print(f"approximate search: {how['recall']:.1%} of the nearest rows are found (measured on a sample)")
    held = found["clusters"]
    console.print(
        f"{held['chosen_rows']:,} chosen rows reach {held['selected']:,} of {held['with_rows']:,} clusters of the pool "
        f"({held['random']:.1f} if drawn at random), and {held['target_selected']:,} of the {held['target']:,} nearest "
        f"to the target; the fullest has {held['largest_share']:.0%} of them"
    )


def _searched(console: Console, found: dict[str, Any]) -> None:
    """Say so if some rows of the pool have no features, as with a method that computes them for a shortlist."""
    if found["rows"] < found["of"]:
        text = f"searched: the {found['rows']:,} of {found['of']:,} rows that have features ({found['method']})"
        console.print(Text(text, style="dim"))


def _table(console: Console, title: str, rows: Sequence[dict[str, Any]]) -> None:
    table = Table(title=title, box=box.SIMPLE_HEAD, min_width=min(80, console.width), title_justify="left")
    table.add_column("cosine", justify="right")
    table.add_column("row")
    table.add_column("text", ratio=1)
    for row in rows:
        table.add_row(
            f"{row['similarity']:+.4f}", Text(visible(row["id"])), Text(_short(row["prompt"] or row["answer"], 120))
        )
    console.print(table)


def _short(text: str, limit: int) -> str:
    shown = visible(text, keep="\n")
    return shown if len(shown) <= limit else shown[: limit - 1] + "…"
