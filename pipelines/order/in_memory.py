"""Orders of a data set that is in memory, for a model that is in memory: `from pipelines import order`.

    found = order(model, tokenizer, dataset, validation, batches=16)
    found.dataset  # the rows in the proposed order, batch after batch

It is `datatools order` on what the caller holds: the same code, in a folder that is thrown away unless `out` names one.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from datatools import Order, files
from pipelines.order import run
from pipelines.report.notebook import Report
from pipelines.rows.in_memory import PREFIX, Held, held
from pipelines.rows.read import read_pool
from pipelines.rows.session import session
from pipelines.settings.load import load_config
from pipelines.settings.order import OrderConfig

if TYPE_CHECKING:
    import pandas as pd

ARGUMENTS = {
    "model.name": "model",
    "data.paths": "dataset",
    "validation": "validation",
    "task": "task",
    "batches": "batches",
    "training.batch_size": "batch_size",
    "training.learning_rate": "learning_rate",
    "data.columns": "columns",
    "validation_columns": "validation_columns",
    "data.source_key": "source_key",
    "model.chat": "chat",
    "model.max_length": "max_length",
    "out": "out",
    "seed": "seed",
    "overwrite": "overwrite",
}
"""Settings of `datatools order` -> the arguments of `order`; all others are given by `settings`."""

_RESULTS = {"search": "search.json", "estimate": "estimates.json", "validate": "validation.json", "map": "map.json"}
_PROPOSING = {"search": "search.json", "plan": "plan.json", "curricula": "curricula.json"}
"""The tasks that propose an order, and their results."""


@dataclass(frozen=True, repr=False)
class OrderedRows:
    """What a task of `datatools order` found.

    Attributes:
        dataset: The rows in the proposed order of their batches, of the type that was given; None unless an order was
            searched.
        batches: The numbers of the rows of each step in that order; of the reference run where none was searched.
        scores: The orders that a search compared, best estimate first: `name`, `estimated`, `judged`, `true`;
            None for other tasks.
        result: What the task wrote, such as `search.json`; empty for `record`.
        folder: The folder of the run, if `out` named one.
    """

    dataset: Any
    batches: list[list[int]]
    scores: pd.DataFrame | None
    result: Mapping[str, Any] = field(repr=False)
    folder: Path | None
    _page: str = field(repr=False)

    def __len__(self) -> int:
        return len(self.batches)

    def __repr__(self) -> str:
        if "proposed" not in self.result:
            return f"{len(self):,} batches in the order of the reference run"
        by = self.result.get("estimator")
        return f"{len(self):,} batches in the order {self.result['proposed']!r}{f', by {by}' if by else ''}"

    def report(self) -> Report:
        """The report of the run, which a notebook shows."""
        return Report(self._page, repr(self))

    def _repr_html_(self) -> str:
        return self.report()._repr_html_()


def order(
    model: Any,
    tokenizer: Any,
    dataset: Any,
    validation: Any = None,
    *,
    task: str = "search",
    batches: int | None = None,
    batch_size: int | None = None,
    learning_rate: float | None = None,
    columns: Mapping[str, str] | None = None,
    validation_columns: Mapping[str, str] | None = None,
    source_key: str | None = None,
    chat: str | None = None,
    max_length: int | None = None,
    seed: int | None = None,
    settings: Mapping[str, Any] | None = None,
    out: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
    verbose: bool = False,
) -> OrderedRows:
    """Find the order of batches of `dataset` after which `model` would do best on `validation`.

    Args:
        model: As for `pipelines.select.in_memory.select`, in float32; no weight of it is trained in place.
        tokenizer: Its tokenizer.
        dataset: The rows to train on.
        validation: Held-out rows whose loss is predicted; without them some of `dataset` are held out.
        task: search, plan, curricula, estimate, validate, map or record: see `datatools order --help`.
        batches: How many batches are drawn.
        batch_size: Rows per batch.
        learning_rate: That of the run whose order is studied.
        columns: Our names of columns -> those of `dataset`.
        validation_columns: The same for `validation`, where they differ.
        source_key: The column that names a row's source.
        chat: The chat template.
        max_length: The longest row in tokens.
        seed: The seed.
        settings: Other settings of `datatools order`, such as {"estimators": ["pairwise"], "retrain": 0}.
        out: A folder that keeps the run; its tasks share one reference run.
        overwrite: Move a run that is in `out` aside.
        verbose: Show progress.

    Returns:
        The proposed order, the estimates and a report.

    Raises:
        UsageError: Arguments make no sense.
        DataError: Rows cannot be used.
        EnvironmentProblem: What does not fit.
    """
    data = held(dataset, "dataset")
    rows = {"data": data}
    if validation is not None:
        rows["validation"] = held(validation, "validation")
    given = {
        "task": task, "batches": batches, "batch_size": batch_size, "learning_rate": learning_rate, "columns": columns,
        "validation_columns": validation_columns, "source_key": source_key, "chat": chat, "max_length": max_length,
        "seed": seed, "overwrite": overwrite or None, "dataset": [f"{PREFIX}data"],
        "validation": None if validation is None else [f"{PREFIX}validation"],
    }  # fmt: skip
    with session(
        model, tokenizer, rows, OrderConfig, out=out, call="pipelines.order(model, tokenizer, dataset, ...)",
        arguments=ARGUMENTS, verbose=verbose,
    ) as work:  # fmt: skip
        flags = work.settings(ARGUMENTS, {**given, "model": work.model, "out": work.folder}, settings)
        config = load_config(OrderConfig, None, flags)
        folder = run.run(config)
        return _read(config, folder, data, None if out is None else folder)


def _read(config: OrderConfig, folder: Path, data: Held, kept: Path | None) -> OrderedRows:
    """What the run in `folder` has written, as values."""
    import pandas as pd

    searched = config.task in _PROPOSING
    found = Order.load(folder / ("order.npz" if searched else "reference.npz"))
    pool, _ = read_pool(
        config.data.paths,
        on_bad_row="skip",
        source_key=config.data.source_key,
        cache=folder / "inputs",
        columns=config.data.columns,
        preference=config.data.preference,
    )
    place = {identity: pool.line(row) - 1 for row, identity in enumerate(pool.ids)}
    steps = [[place[str(identity)] for identity in found.batches[batch]] for batch in found.sequence]
    name = (_RESULTS | _PROPOSING).get(config.task)
    result: dict[str, Any] = {} if name is None else files.read_json(folder / name)
    scores = None
    if searched:
        scores = pd.DataFrame(result["rows"])
        scores = scores[[c for c in ("name", "estimated", "judged", "true", "sequence") if c in scores]]
    return OrderedRows(
        dataset=data.take([row for step in steps for row in step]) if searched else None,
        batches=steps,
        scores=scores,
        result=result,
        folder=kept,
        _page=files.read_bytes(folder / "report.html").decode(),
    )
