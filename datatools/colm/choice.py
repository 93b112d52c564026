"""Rows of a batch, chosen: those of small sources, then so many of each other source by a method on their features."""

from __future__ import annotations

from collections.abc import Hashable, Sequence, Set
from typing import Any

import torch
from torch import Tensor

from datatools.colm.quotas import Plan, plan
from datatools.errors import DataError, UsageError, did_you_mean
from datatools.selection.candidates import Selection
from datatools.subsets.facility_location import FACILITY_LOCATION
from datatools.subsets.herding import HERDING
from datatools.subsets.matching_pursuit import MATCHING_PURSUIT
from datatools.subsets.method import CoresetMethod
from datatools.subsets.random_in_source import RANDOM_IN_SOURCE
from datatools.subsets.top_norm import TOP_NORM

CORESET_METHODS: dict[str, CoresetMethod] = {
    method.name: method
    for method in (
        HERDING,
        MATCHING_PURSUIT,
        FACILITY_LOCATION,
        TOP_NORM,
        RANDOM_IN_SOURCE,
    )
}
"""What `coreset.method` can be, by name. A method of your own: `CORESET_METHODS["mine"] = CoresetMethod(...)`."""


def coreset_method(name: str) -> CoresetMethod:
    """The entry of `CORESET_METHODS` with this name. Raises: UsageError, with the name that may have been meant."""
    if name not in CORESET_METHODS:
        raise UsageError(f"coreset: no method is called {name!r}{did_you_mean(name, CORESET_METHODS)}")
    return CORESET_METHODS[name]


def sparsify(features: Tensor, coordinates: int | None) -> Tensor:
    """The `coordinates` columns with the largest |mean over the rows|; ties go to the lower column; None keeps all.

    Source: CoLM, arXiv 2407.19580, section 4.2; its code takes the absolute value of the mean, as here.
    """
    if coordinates is None or features.shape[1] <= coordinates:
        return features
    importance = features.double().mean(0).abs()
    return features[:, importance.argsort(descending=True, stable=True)[:coordinates].sort().values]


def choose_rows(
    features: Tensor,
    plan: Plan,
    *,
    method: str = "herding",
    metric: str = "l1",
    coordinates: int | None = None,
    generator: torch.Generator,
    names: Sequence[object] | None = None,
) -> Selection:
    """The plan carried out: rows of small sources, then each large source's choice in the order in which it was made.

    features: [n, d] of the whole batch; rows of small sources are read by herding alone.
    coordinates: `sparsify` each source's features first.
    names: what errors call each row; None is its place in the batch.
    Raises: UsageError for an unknown method or metric; DataError naming the rows whose features are not finite.
    """
    record = coreset_method(method)
    read = torch.arange(len(features)) if record.scope == "batch" else plan.candidates()
    bad = read[~features[read].isfinite().all(1).cpu()]
    if len(bad):
        raise DataError(
            f"coreset: the features of {rows_called(bad, names)} are not finite ({len(bad)} rows); "
            "is their loss? Lower the learning rate, or look at these rows"
        )
    settings: dict[str, Any] = {"metric": metric, "generator": generator}
    if record.scope == "batch":
        few = sparsify(features, coordinates)
        return record.choose(few, len(plan), kept=plan.kept, groups=plan.groups, **settings)
    indices, weights = [plan.kept], [torch.ones(len(plan.kept))]
    for rows, quota in plan.groups:
        if quota == 0:
            continue
        everything = torch.arange(len(rows))
        chosen = Selection(everything)
        if quota < len(rows):
            few = sparsify(features[rows], coordinates)
            chosen = record.choose(few, quota, kept=everything[:0], groups=[(everything, quota)], **settings)
        indices.append(rows[chosen.indices])
        weights.append(chosen.weights)
    return Selection(torch.cat(indices), weights=torch.cat(weights))


def select_batch(
    features: Tensor,
    sources: Sequence[Hashable],
    budget: int,
    *,
    small_sources: Set[Hashable] = frozenset(),
    metric: str = "l1",
    method: str = "facility_location",
    coordinates: int | None = None,
    generator: torch.Generator,
) -> tuple[Selection, Plan]:
    """`plan` and `choose_rows` in one: `budget` rows of a batch with `features` [n, d], and the plan behind them."""
    made = plan(sources, budget, small_sources, generator=generator)
    chosen = choose_rows(features, made, method=method, metric=metric, coordinates=coordinates, generator=generator)
    return chosen, made


def rows_called(rows: Tensor, names: Sequence[object] | None) -> str:
    """The first five of `rows` in an error: by their names, else by their places in the batch."""
    some = rows[:5].tolist()
    return f"rows {some} of the batch" if names is None else f"rows {', '.join(str(names[i]) for i in some)}"
