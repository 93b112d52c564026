"""The loss of each row's answer, computed once per model and kept with the features, for all methods and targets.

A store holds one number per row: the mean cross-entropy over the tokens of its answer. `rds` also fills the store of
the unadapted model, from the pass that computes hidden states; a store of an adapted model is named after its adapter.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from datatools import GradientFeatures
from pipelines.engines.units import taken
from pipelines.models.losses import row_losses
from pipelines.rows.rows import Rows
from pipelines.runs.memory import token_budget
from pipelines.runs.progress import progress
from pipelines.select.scored import Context, unique_among
from pipelines.select.stores import FEATURE_VERSION, filling, job_of, open_store


def folder_of(context: Context, kind: str, adapter: str = "") -> Path:
    """Return the folder of a store of losses.

    Args:
        context: What is scored.
        kind: "pool" or "target".
        adapter: The digest of an adapter; empty for the model as it is.
    """
    return context.features_folder / (f"losses-{kind}-{adapter}" if adapter else f"losses-{kind}")


def open_losses(
    context: Context,
    kind: str,
    rows: Rows,
    planned: Mapping[str, int],
    *,
    adapter: str = "",
    rows_per_unit: int | None = None,
) -> GradientFeatures:
    """Return the store of losses, planned for some rows; the caller computes what is missing in it.

    Args:
        context: What is scored.
        kind: "pool" or "target".
        rows: The pool or the target.
        planned: Content key -> row, of the rows that are needed.
        adapter: The digest of an adapter; empty for the model as it is.
        rows_per_unit: The number of rows per unit of the store; None for the default.
    """
    loaded = context.model()
    meta: dict[str, Any] = {
        "format": FEATURE_VERSION,
        "model": dict(loaded.digests),
        "encoding": rows.encoder.fingerprint(),
        "feature": "mean loss of the answer",
        "precision": str(loaded.model.dtype),
    }
    if adapter:
        meta["adapter"] = adapter
    return open_store(
        context,
        folder_of(context, kind, adapter),
        planned,
        among=rows.unique(),
        meta=meta,
        dim=1,
        dtype="float32",
        rows_per_unit=rows_per_unit,
    )


def losses(
    context: Context, kind: str, rows: Rows, chosen: Sequence[int], *, module: Any = None, adapter: str = ""
) -> Tensor:
    """Return the mean loss of usable rows; only those that are not kept yet go through the model.

    Args:
        context: What is scored.
        kind: "pool" or "target".
        rows: The pool or the target.
        chosen: Usable rows of it.
        module: The adapted model; None for the model as it is.
        adapter: The digest of the adapter that `module` has.

    Returns:
        float32 [chosen]; NaN where the loss is not finite.
    """
    module = context.model().model if module is None else module
    label = f"losses of the {kind}" + (" after adaptation" if adapter else "")
    with filling(folder_of(context, kind, adapter)):
        store = open_losses(context, kind, rows, unique_among(rows, chosen), adapter=adapter)
        unique, missing = rows.unique(), store.missing_units()

        def tokens_in(unit: int) -> int:
            return sum(int(rows.scan.tokens[unique[key]]) for key in store.unit_keys(unit))

        todo = sum(map(tokens_in, missing))
        with progress(label, todo, "tokens") as bar, torch.no_grad():  # not inference_mode: the model may train next
            budget = token_budget(context.config.features.token_budget, label)
            for unit in taken(job_of(store, bar, tokens_in)):
                of_unit = [unique[key] for key in store.unit_keys(unit)]
                values = torch.zeros(len(of_unit))

                def keep(group: list[int], batch: Any, of: list[int] = of_unit, values: Tensor = values) -> None:
                    values[torch.tensor(group)] = row_losses(module, batch).float().cpu()
                    bar.advance(sum(int(rows.scan.tokens[of[i]]) for i in group))

                rows.each_batch(keep, of_unit, budget, module.device)
                write(store, unit, values)
    return read(store, [rows.keys[i] for i in chosen])


def write(store: GradientFeatures, unit: int, values: Tensor) -> None:
    """Write the losses of a unit; the stored norm of a row is its loss, bit for bit.

    Args:
        store: The store.
        unit: The number of the unit.
        values: The losses, float32 [n].
    """
    status = ["ok" if ok else "nonfinite" for ok in values.isfinite().tolist()]
    store.write_unit(unit, values.nan_to_num(0.0, 0.0, 0.0)[:, None], status)


def read(store: GradientFeatures, keys: Sequence[str]) -> Tensor:
    """Return the losses of rows that the store holds, float32 [keys]; NaN where a loss is not finite.

    Args:
        store: The store.
        keys: The content keys of the rows.
    """
    held = store.rows()
    place = {key: i for i, key in enumerate(held.keys)}
    at = [place[key] for key in keys]
    found = held.norms[torch.tensor(at, dtype=torch.int64)].clone()
    found[torch.tensor([held.status[i] == "nonfinite" for i in at], dtype=torch.bool)] = float("nan")
    return found


class ByProduct:
    """Losses that another pass computes on the side; they are written as soon as a unit of their store is complete."""

    def __init__(self, store: GradientFeatures) -> None:
        self._store = store
        self._missing = store.missing_units()
        self._known: dict[str, float] = {}

    def add(self, keys: Sequence[str], values: Tensor) -> None:
        """Add the losses of some rows.

        Args:
            keys: Their content keys.
            values: Their losses, float32 [keys].
        """
        self._known.update(zip(keys, values.tolist(), strict=True))
        for unit in list(self._missing):
            wanted = self._store.unit_keys(unit)
            if all(key in self._known for key in wanted):
                write(self._store, unit, torch.tensor([self._known.pop(key) for key in wanted]))
                self._missing.remove(unit)
