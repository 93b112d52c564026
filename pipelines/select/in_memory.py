"""Select rows of an in-memory data set for an in-memory model: `from pipelines import select`.

    chosen = select(model, tokenizer, dataset, target, budget="5%")
    trainer = SFTTrainer(model, train_dataset=chosen.dataset, ...)

It runs the code of `datatools select` on the caller's objects and gives the same numbers. The run uses a temporary
folder unless `out` names one. Afterwards, also after an error, the model with its adapters, gradients, mode and
configuration, the random generators and the data are unchanged.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from datatools import UsageError, files
from pipelines.report.notebook import Report
from pipelines.rows.in_memory import PREFIX, Held, held
from pipelines.rows.session import session
from pipelines.select import run
from pipelines.settings.load import load_config
from pipelines.settings.methods import DEFAULT
from pipelines.settings.methods import method as record
from pipelines.settings.select import SelectConfig

if TYPE_CHECKING:
    import pandas as pd

ARGUMENTS = {
    "model.name": "model",
    "train.paths": "dataset",
    "target": "target",
    "budget": "budget",
    "method": "method",
    "verify": "verify",
    "selector": "selector",
    "train.columns": "columns",
    "target_columns": "target_columns",
    "train.source_key": "source_key",
    "model.chat": "chat",
    "model.max_length": "max_length",
    "out": "out",
    "seed": "seed",
    "overwrite": "overwrite",
}
"""Settings of `datatools select` -> the arguments of `select`; all others are passed in `settings`."""


@dataclass(frozen=True, repr=False)
class SelectedRows:
    """The selected rows, and why they were selected.

    Attributes:
        dataset: The selected rows, of the type that was given, best first; every column is unchanged.
        indices: Their numbers in the data that was given, int64 [k].
        weights: The weight of each, float32 [k]; 1 if the method assigns no weights.
        scores: One row per row that was given, in its order: `id`, `source`, `tokens`, `supervised`, `status` ("ok", or
            why the row has no score), `score`, `rank`, `selected`, `norm`, the `nearest` target row and its
            `nearest_similarity`, and one column `subtask:NAME` per kind of target rows.
        why: One sentence per selected row.
        summary: The content of the run's `summary.json`: settings, cost, sources, warnings.
        folder: The folder of the run, if `out` named one.
    """

    dataset: Any
    indices: NDArray[np.int64]
    weights: NDArray[np.float32]
    scores: pd.DataFrame
    why: list[str]
    summary: Mapping[str, Any] = field(repr=False)
    folder: Path | None
    _page: str = field(repr=False)

    def __len__(self) -> int:
        return len(self.indices)

    def __repr__(self) -> str:
        budget = self.summary["budget"]
        return (
            f"{len(self):,} of {len(self.scores):,} rows selected by {self.summary['method']} "
            f"(budget {budget['asked']}, {budget['tokens']:,} tokens)"
        )

    def report(self) -> Report:
        """Return the report of the run for a notebook: what was selected, from which sources, at what cost."""
        lines = [repr(self)]
        lines += [
            f"  {row['source']}: {row['selected_rows']} of {row['pool_rows']}"
            for row in self.summary["sources"]
            if row["selected_rows"]
        ]
        lines += [f"  warning: {text}" for text in self.summary["warnings"]]
        return Report(self._page, "\n".join(lines))

    def _repr_html_(self) -> str:
        return self.report()._repr_html_()


def select(
    model: Any,
    tokenizer: Any,
    dataset: Any,
    target: Any = None,
    *,
    budget: str | int | float | None = None,
    method: str | None = None,
    verify: bool = False,
    selector: str | None = None,
    columns: Mapping[str, str] | None = None,
    target_columns: Mapping[str, str] | None = None,
    source_key: str | None = None,
    chat: str | None = None,
    max_length: int | None = None,
    seed: int | None = None,
    settings: Mapping[str, Any] | None = None,
    out: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
    verbose: bool = False,
) -> SelectedRows:
    """Select the rows of `dataset` that move `model` towards the rows of `target`.

    Args:
        model: A causal language model of transformers, on the CPU or the first GPU, or a model of peft, whose active
            adapter is merged into a copy, so that the original stays unchanged. None for methods that use no model.
        tokenizer: Its tokenizer (a fast one).
        dataset: The rows to select from: a `datasets.Dataset`, a `pandas.DataFrame`, or a list of mappings, in any
            format of `datatools ls formats`.
        target: A few rows that show what the model should get better at, in the same formats; or, for several targets,
            a mapping from names to such rows (`scores` then has one column each). Methods without a target need none.
        budget: How much to select: "5%", 0.05, 500 rows, or "20000 tokens".
        method: How rows are scored: a name of `datatools ls methods`; by default, "auto".
        verify: Whether to choose by evidence: select by each candidate of the method from one half of the target rows,
            train on it, measure on the other half, and keep the candidate that wins.
        selector: How rows are taken: a name of `datatools ls selectors`.
        columns: Our column names -> those of `dataset`, such as {"prompt": "question", "completion": "answer"}.
        target_columns: The same for `target`, if its columns differ.
        source_key: The column that names a row's source.
        chat: The chat template, if the tokenizer has none: "tulu", or the path of a Jinja file.
        max_length: The longest row in tokens.
        seed: The seed.
        settings: Other settings of `datatools select`, by name: {"lora.rank": 4, "warmup.epochs": 2}.
        out: A folder for the run, as the command line writes it, so that it can be continued and explained. Without it,
            nothing remains on disk.
        overwrite: Whether to move an existing run in `out` aside.
        verbose: Whether to show progress.

    Returns:
        The rows, their scores and a report.

    Raises:
        UsageError: The arguments make no sense.
        DataError: Rows cannot be used; the message names the first ones as `memory:pool:ROW`, counted from 1.
        EnvironmentProblem: The machine cannot do it.
    """
    known = record(method) if method is not None else None
    if model is None and (known is None or "model" in known.needs):
        raise UsageError(f"model is None, and method {method or DEFAULT} needs one; give the model")
    pool = held(dataset, "dataset")
    targets = _targets(target)
    if isinstance(budget, float) and 0 < budget < 1:
        budget = f"{100 * budget:.10g}%"
    values = {
        "budget": budget, "method": method, "verify": verify or None, "selector": selector, "columns": columns,
        "target_columns": target_columns, "source_key": source_key, "chat": chat, "max_length": max_length,
        "seed": seed, "overwrite": overwrite or None,
        "dataset": [f"{PREFIX}pool"], "target": [f"{PREFIX}{name}" for name in targets],
    }  # fmt: skip
    with session(
        model,
        tokenizer,
        {"pool": pool, **targets},
        SelectConfig,
        out=out,
        call=f"pipelines.select(model, tokenizer, dataset of {len(pool):,} rows, target, ...)",
        arguments=ARGUMENTS,
        verbose=verbose,
        trains=known is None or "gradients" in known.needs,
    ) as work:
        flags = work.settings(ARGUMENTS, {**values, "model": work.model, "out": work.folder}, settings)
        config = load_config(SelectConfig, None, flags)
        if config.dry_run:
            raise UsageError("settings: dry_run selects nothing; leave it out")
        folder = run.run(config)
        return _read(folder, pool, None if out is None else folder)


def _targets(target: Any) -> dict[str, Held]:
    """Return the inputs of the target: its rows, or those of each of several targets."""
    if target is None:
        return {}
    if isinstance(target, Mapping) and target and not any(isinstance(rows, str | bytes) for rows in target.values()):
        return {_named(name): held(rows, f"target[{name!r}]") for name, rows in target.items()}
    return {"target": held(target, "target")}


def _named(name: object) -> str:
    if not isinstance(name, str) or not name or "/" in name or name == "pool":
        raise UsageError(
            f"target: {name!r} cannot be the name of a target; use a short text without / (and not 'pool')"
        )
    return name


def _read(folder: Path, pool: Held, kept: Path | None) -> SelectedRows:
    """Return what the run in `folder` has written, as values."""
    import pandas as pd

    table = pq.read_table(folder / "scores.parquet")
    chosen = pq.read_table(folder / "selected.parquet", columns=["_id", "_weight", "_why"]).to_pydict()
    lines = dict(zip(table["_id"].to_pylist(), table["_line"].to_pylist(), strict=True))
    indices = np.asarray([lines[identity] - 1 for identity in chosen["_id"]], dtype=np.int64)
    frame = table.drop_columns(["_file", "_key"]).to_pandas().set_index("_line")
    frame = frame.rename(columns={name: name.removeprefix("_") for name in frame.columns})
    frame = frame.reindex(range(1, len(pool) + 1))
    bad = folder / "bad_rows.jsonl"
    reasons = [] if not bad.is_file() else files.read_bytes(bad).splitlines()
    why = {row["line"]: row["reason"] for row in map(json.loads, reasons) if row["file"] == f"{PREFIX}pool"}
    frame["status"] = [
        why.get(line, "blank") if isinstance(status, float) or status is None else status
        for line, status in zip(frame.index, frame["status"], strict=True)
    ]
    frame["selected"] = frame["selected"].fillna(False).astype(bool)
    frame["rank"] = frame["rank"].astype("Int64")
    for name in ("tokens", "supervised"):
        frame[name] = frame[name].fillna(0).astype("int64")
    frame.index = pd.RangeIndex(len(pool)) if pool.index is None else pool.index
    return SelectedRows(
        dataset=pool.take(indices.tolist()),
        indices=indices,
        weights=np.asarray(chosen["_weight"], dtype=np.float32),
        scores=frame,
        why=chosen["_why"],
        summary=files.read_json(folder / "summary.json"),
        folder=kept,
        _page=files.read_bytes(folder / "report.html").decode(),
    )
