"""The rows of a data set in memory that stand for all of it: `from pipelines.colm import coreset`.

    few = coreset(model, tokenizer, dataset, keep=16, large_batch=32, source_key="dataset")
    few.dataset, few.weights

It is the choice that `datatools train --coreset` makes at each step, with the model as it is and nothing trained in
between: the rows are shuffled into large batches, and CoLM keeps a few of each. Where weights move, use the Trainer's
`CoresetMixin`, which chooses again at each step.
"""

from __future__ import annotations

import html
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from datatools import CORESET_FEATURES, CORESET_METHODS, CoLM, FeatureTable, UsageError, files, small_sources
from pipelines.colm import stored
from pipelines.colm.choosing import RARELY, check
from pipelines.colm.given import arguments_of
from pipelines.colm.sources import clusters_of, require_known, require_sources
from pipelines.models import load as models
from pipelines.models.losses import row_losses
from pipelines.report.notebook import Report
from pipelines.rows.in_memory import PREFIX, held
from pipelines.rows.prepare import prepare
from pipelines.rows.session import session
from pipelines.runs.progress import progress
from pipelines.runs.seeds import derive_seed
from pipelines.settings.load import load_config
from pipelines.settings.train import TrainConfig

if TYPE_CHECKING:
    import pandas as pd

ARGUMENTS = {
    "model.name": "model",
    "data.paths": "dataset",
    "data.columns": "columns",
    "data.source_key": "source_key",
    "model.chat": "chat",
    "model.max_length": "max_length",
    "seed": "seed",
    "coreset.keep": "keep",
    "coreset.large_batch": "large_batch",
    "coreset.method": "method",
}
"""Settings of `datatools train` -> the arguments of `coreset`; the others of `coreset` are given by `settings`."""


@dataclass(frozen=True, repr=False)
class CoresetRows:
    """The rows that stand for all.

    Attributes:
        dataset: The kept rows, of the type that was given, large batch after large batch.
        indices: Their numbers in the data that was given, int64 [k].
        weights: How much each counts, float32 [k]; 1 but for methods that weigh rows.
        scores: One row per row that was given: `id`, `source`, `status`, its large `batch`, whether it was `kept`, and
            its `weight`.
        errors: For each large batch that is measured (error of the kept rows' mean gradient, that of random rows with
            the same quotas), relative to the length of the whole batch's gradient.
    """

    dataset: Any
    indices: NDArray[np.int64]
    weights: NDArray[np.float32]
    scores: pd.DataFrame
    errors: list[tuple[float, float]] = field(repr=False)

    def __len__(self) -> int:
        return len(self.indices)

    def __repr__(self) -> str:
        if not self.errors:
            return f"{len(self):,} of {len(self.scores):,} rows kept"
        ours, chance = (float(np.mean([pair[i] for pair in self.errors])) for i in (0, 1))
        return (
            f"{len(self):,} of {len(self.scores):,} rows kept; error of their mean gradient {ours:.3f}, of random rows "
            f"with the same quotas {chance:.3f}"
        )

    def report(self) -> Report:
        """What was kept of each source, and the errors batch by batch, as a page that a notebook shows."""
        held, all_rows = Counter(self.scores["source"][self.scores["kept"]]), Counter(self.scores["source"].dropna())
        lines = [repr(self), *(f"  {name}: {held[name]} of {count}" for name, count in all_rows.most_common())]
        cells = "".join(
            f"<tr><td>{number}</td><td>{ours:.4f}</td><td>{chance:.4f}</td></tr>"
            for number, (ours, chance) in enumerate(self.errors, start=1)
        )
        table = f"<table><tr><th>large batch</th><th>kept rows</th><th>random rows</th></tr>{cells}</table>"
        said = html.escape("\n".join(lines))
        return Report(
            f"<!doctype html><meta charset=utf-8><title>Coreset</title><pre>{said}</pre>{table}", "\n".join(lines)
        )

    def _repr_html_(self) -> str:
        return self.report()._repr_html_()


def coreset(
    model: Any,
    tokenizer: Any,
    dataset: Any,
    *,
    keep: int,
    large_batch: int | None = None,
    method: str | None = None,
    columns: Mapping[str, str] | None = None,
    source_key: str | None = None,
    chat: str | None = None,
    max_length: int | None = None,
    seed: int | None = None,
    settings: Mapping[str, Any] | None = None,
    verbose: bool = False,
) -> CoresetRows:
    """Keep `keep` rows of each large batch of `dataset`, whose mean gradient is close to that of the whole batch.

    Args:
        model: See `pipelines.select.in_memory.select`; so are the others that are not named here.
        tokenizer: Its tokenizer.
        dataset: The rows.
        keep: How many rows are kept of each large batch.
        large_batch: Rows of a large batch; twice `keep` by default. The last one may be smaller, and the same share of
            it is kept.
        method: How rows are chosen: a name of `datatools ls coresets`.
        columns: Our names of columns -> those of `dataset`.
        source_key: The column that names a row's source: sources below the average size are kept whole.
        chat: The chat template.
        max_length: The longest row in tokens.
        seed: Of the shuffle and the choice.
        settings: Other settings of `datatools train`, such as {"coreset.features": "probes"}.
        verbose: Show progress.

    Returns:
        The rows, their weights, and how well they stand for all.

    Raises:
        UsageError: Arguments make no sense.
        DataError: Rows cannot be used.
    """
    import pandas as pd

    data = held(dataset, "dataset")
    given = {
        "keep": keep, "large_batch": large_batch, "method": method, "columns": columns, "source_key": source_key,
        "chat": chat, "max_length": max_length, "seed": seed, "dataset": [f"{PREFIX}data"],
    }  # fmt: skip
    with (
        session(
            model, tokenizer, {"data": data}, TrainConfig, out=None, call="pipelines.colm.coreset", arguments=ARGUMENTS,
            verbose=verbose, trains=False,
        ) as work,
        files.scratch_folder() as scratch,
    ):  # fmt: skip
        flags = work.settings(ARGUMENTS, {**given, "model": work.model}, settings)
        config = load_config(TrainConfig, None, flags)
        choose = config.coreset
        if choose is None or choose.keep is None:
            raise UsageError(f"keep is {keep}; expected the number of rows to keep of each large batch")
        check(choose)
        if choose.keep_schedule is not None:
            raise UsageError(
                "coreset.keep_schedule goes over the steps of a training run, and nothing is trained here; omit it"
            )
        if CORESET_METHODS[choose.method].target:
            raise UsageError(f"{choose.method} compares rows with target rows, which only `datatools train` and "
                             "CoresetMixin read; use another method")  # fmt: skip
        kind = CORESET_FEATURES[choose.features]
        if kind.origin == "visit":
            raise UsageError(
                f"{choose.features} features are by-products of training, and nothing is trained here; use stored or "
                "exact features"
            )
        loaded = models.load(config.model)
        rows = prepare(
            config.data, config.model, loaded.tokenizer, cache=Path(scratch), label="data", limits=loaded.limits
        )
        usable = np.flatnonzero(rows.usable).tolist()
        require_sources(choose, rows, usable, key=config.data.source_key)
        seed_ = derive_seed(config.seed, "coreset")
        sources = list(rows.pool.sources)
        if choose.clusters is not None:
            sources = clusters_of(loaded.model, rows, usable, choose.clusters, seed=seed_)
        counts = Counter(sources[row] for row in usable)
        small = small_sources(counts) if choose.small == "auto" else frozenset(choose.small)
        require_known(small, counts)
        table: FeatureTable | None = None
        if choose.store is not None:
            keys = {row: rows.keys[row] for row in usable}
            table = stored.read(choose, keys, model=loaded.digests, where=rows.pool.where, seed=seed_,
                                encoding=rows.encoder.fingerprint())  # fmt: skip
        elif kind.free:
            raise UsageError("stored features need a store here, because the model does not change: set coreset.store")
        chooser = CoLM(loaded.model, row_losses, keep=choose.keep, small=small, seed=seed_, **arguments_of(choose))
        width = choose.large_batch or 2 * choose.keep
        order = np.random.Generator(np.random.Philox(seed_)).permutation(usable).tolist()
        kept: list[tuple[int, float]] = []
        batch_of: dict[int, int] = {}
        errors: list[tuple[float, float]] = []
        with progress("choosing", len(order), "rows") as bar:
            for step, start in enumerate(range(0, len(order), width)):
                part = order[start : start + width]
                batch_of |= dict.fromkeys(part, step + 1)
                found = chooser(
                    rows.batch(part, loaded.model.device),
                    [sources[row] for row in part],
                    step=step,
                    keep=max(1, round(choose.keep * len(part) / width)),
                    lengths=[int(rows.scan.tokens[row]) for row in part],
                    names=[rows.pool.where(row) for row in part],
                    given=None if table is None else table.take(part, step=0),
                    watch=table is None or step % (choose.monitor_every * RARELY) == 0,
                )
                kept += [(part[i], w) for i, w in zip(found.indices.tolist(), found.weights.tolist(), strict=True)]
                last = chooser.last
                if last is not None and last.match_error is not None and last.match_error_random is not None:
                    errors.append((last.match_error, last.match_error_random))
                bar.advance(len(part))
        weight = dict(kept)
        frame = pd.DataFrame(
            {
                "id": list(rows.pool.ids),
                "source": sources,
                "status": list(rows.status),
                "batch": pd.array([batch_of.get(row) for row in range(len(rows))], dtype="Int64"),
                "kept": [row in weight for row in range(len(rows))],
                "weight": [weight.get(row, 0.0) for row in range(len(rows))],
            },
            index=[rows.pool.line(row) for row in range(len(rows))],
        ).reindex(range(1, len(data) + 1))
        frame["kept"] = frame["kept"].fillna(False).astype(bool)
        frame["status"] = frame["status"].fillna("unreadable")
        frame.index = pd.RangeIndex(len(data)) if data.index is None else data.index
        indices = np.asarray([rows.pool.line(row) - 1 for row, _ in kept], dtype=np.int64)
        weights = torch.tensor([value for _, value in kept]).numpy().astype(np.float32)
        return CoresetRows(data.take(indices.tolist()), indices, weights, frame, errors)
