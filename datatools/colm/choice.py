"""The choice of rows from a batch: all rows of small sources, and a quota of each other source, chosen by features."""

from __future__ import annotations

from collections.abc import Hashable, Sequence, Set
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from datatools.colm.quotas import Plan, plan
from datatools.errors import DataError, UsageError, did_you_mean
from datatools.selection.candidates import Selection
from datatools.subsets.facility_location import FACILITY_LOCATION
from datatools.subsets.greats import GREATS
from datatools.subsets.herding import HERDING
from datatools.subsets.importance import IMPORTANCE
from datatools.subsets.matching_pursuit import MATCHING_PURSUIT
from datatools.subsets.method import CoresetMethod
from datatools.subsets.opus import OPUS
from datatools.subsets.partition_sel import PARTITION_SEL
from datatools.subsets.random_in_source import RANDOM_IN_SOURCE
from datatools.subsets.top_norm import TOP_NORM
from datatools.subsets.uds import UDS

CORESET_METHODS: dict[str, CoresetMethod] = {
    method.name: method
    for method in (
        HERDING,
        MATCHING_PURSUIT,
        FACILITY_LOCATION,
        IMPORTANCE,
        UDS,
        GREATS,
        PARTITION_SEL,
        OPUS,
        TOP_NORM,
        RANDOM_IN_SOURCE,
    )
}
"""Values of `coreset.method`, by name. To add a method of your own: `CORESET_METHODS["mine"] = CoresetMethod(...)`."""


def coreset_method(name: str) -> CoresetMethod:
    """Look up an entry of `CORESET_METHODS`.

    Args:
        name: its name.

    Returns:
        The method.

    Raises:
        UsageError: if there is no such method; the message suggests a similar name.

    Example:
        >>> coreset_method("herding").title
        'rows whose mean gradient is closest to that of the large batch, with a quota for each source'

    """
    if name not in CORESET_METHODS:
        raise UsageError(f"coreset: no method is called {name!r}{did_you_mean(name, CORESET_METHODS)}")
    return CORESET_METHODS[name]


def sparsify(features: Float[Tensor, "n d"], coordinates: int | None) -> Float[Tensor, "n c"]:
    """Keep the columns with the largest |mean over the rows|; ties go to the lower column.

    Args:
        features: floating dtype [n, d].
        coordinates: number of columns to keep; None keeps all.

    Returns:
        [n, c], where c is `coordinates` or, if smaller, d; columns keep their order.

    Source:
        CoLM, arXiv 2407.19580, section 4.2; its code takes the absolute value of the mean, as this function does.

    Example:
        >>> sparsify(torch.tensor([[1.0, 0.0, -5.0], [2.0, 0.1, -5.0]]), 2)
        tensor([[ 1., -5.],
                [ 2., -5.]])

    """
    if coordinates is None or features.shape[1] <= coordinates:
        return features
    importance = features.double().mean(0).abs()
    return features[:, importance.argsort(descending=True, stable=True)[:coordinates].sort().values]


def choose_rows(
    features: Float[Tensor, "n d"],
    plan: Plan,
    *,
    method: str = "herding",
    metric: str = "l1",
    coordinates: int | None = None,
    generator: torch.Generator,
    names: Sequence[object] | None = None,
    wanted: Float[Tensor, " d"] | None = None,
    rate: float = 1.0,
    memory: Float[Tensor, "m d"] | None = None,
) -> Selection:
    """Execute a plan: keep the rows of small sources, and choose the planned number of rows from each large source.

    Args:
        features: floating dtype [n, d], features of the whole batch; only methods that see the whole batch, such as
            herding, read those of rows from small sources.
        plan: which rows are kept, and how many to choose of each large source.
        method: a name of `CORESET_METHODS`.
        metric: a name of `METRICS`, for methods that compare rows.
        coordinates: `sparsify` the features of each source to this number of columns first; None keeps all.
        generator: source of randomness.
        names: names of the rows [n] for error messages; None uses their positions in the batch.
        wanted: the mean gradient of target rows in the space of the features, floating dtype [d], for methods that
            need it.
        rate: the learning rate, for methods that need it.
        memory: features of rows that were chosen lately, floating dtype [m, d], for methods that need them.

    Returns:
        The rows: those that are kept, then those chosen from each large source in the order of the choice. Where all
        rows of a source are kept, or none, for every source, weights are 1.

    Raises:
        UsageError: if the method or metric is unknown, or the method needs target rows, has a choice to make, and
            `wanted` is None.
        DataError: if features are not finite; the message names the rows.

    Example:
        >>> made = plan(["code", "web", "web", "web"], 2, {"code"}, generator=torch.Generator())
        >>> features = torch.tensor([[0.0], [1.0], [2.0], [9.0]])
        >>> choose_rows(features, made, method="facility_location", generator=torch.Generator()).indices
        tensor([0, 2])

    """
    record = coreset_method(method)
    read = torch.arange(len(features)) if record.scope == "batch" else plan.candidates()
    bad = read[~features[read].isfinite().all(1).cpu()]
    if len(bad):
        raise DataError(
            f"coreset: the features of {rows_called(bad, names)} are not finite ({len(bad)} rows); "
            "check whether their loss is finite, lower the learning rate, or inspect these rows"
        )
    if not plan.free:  # no method has a choice, and what is kept whole is not weighted
        return Selection(torch.cat([plan.kept, *(rows[:quota] for rows, quota in plan.groups)]))
    if record.target and wanted is None:
        raise UsageError(f"coreset: {method} compares rows with target rows, and there are none; give them "
                         "(--coreset-target FILE; CoLM.aim)")  # fmt: skip
    memory = features[:0] if memory is None else memory
    wanted = features.new_zeros(features.shape[1]) if wanted is None else wanted
    settings: dict[str, Any] = {
        "metric": metric, "generator": generator, "wanted": wanted, "rate": rate, "memory": memory,
    }  # fmt: skip
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
    features: Float[Tensor, "n d"],
    sources: Sequence[Hashable],
    budget: int,
    *,
    small_sources: Set[Hashable] = frozenset(),
    metric: str = "l1",
    method: str = "facility_location",
    coordinates: int | None = None,
    wanted: Float[Tensor, " d"] | None = None,
    rate: float = 1.0,
    memory: Float[Tensor, "m d"] | None = None,
    generator: torch.Generator,
) -> tuple[Selection, Plan]:
    """Choose `budget` rows of a batch: `plan` followed by `choose_rows`.

    Args:
        features: floating dtype [n, d], one row per row of the batch.
        sources: the source of each row [n].
        budget: number of rows to choose.
        small_sources: sources whose rows are all kept.
        metric: a name of `METRICS`, for methods that compare rows.
        method: a name of `CORESET_METHODS`.
        coordinates: `sparsify` the features of each source to this number of columns first; None keeps all.
        wanted: see `choose_rows`.
        rate: see `choose_rows`.
        memory: see `choose_rows`.
        generator: source of randomness.

    Returns:
        The chosen rows with their weights, and the plan.

    Raises:
        UsageError: if the method or metric is unknown, or `budget` is not between 1 and n.
        DataError: if features are not finite.

    Example:
        >>> features = torch.tensor([[0.0], [0.1], [5.0], [5.1], [5.2]])
        >>> selection, made = select_batch(features, ["web"] * 5, 2, generator=torch.Generator())
        >>> selection.indices.tolist(), selection.weights.tolist()
        ([2, 0], [1.0, 1.0])

    """
    made = plan(sources, budget, small_sources, generator=generator)
    chosen = choose_rows(
        features, made, method=method, metric=metric, coordinates=coordinates, generator=generator, wanted=wanted,
        rate=rate, memory=memory,
    )  # fmt: skip
    return chosen, made


def rows_called(rows: Int64[Tensor, " m"], names: Sequence[object] | None) -> str:
    """Name the first five of some rows for an error message.

    Args:
        rows: positions in the batch, int64 [m].
        names: names of all rows of the batch; None uses their positions.

    Returns:
        Such as "rows [3, 5] of the batch".

    """
    some = rows[:5].tolist()
    return f"rows {some} of the batch" if names is None else f"rows {', '.join(str(names[i]) for i in some)}"
