"""Rows of a batch, chosen: small sources whole, then so many of each other source by a method on their features."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence, Set
from dataclasses import dataclass

import torch
from torch import Tensor

from datatools.colm.small_sources import budgets
from datatools.errors import DataError, UsageError, did_you_mean
from datatools.selection.candidates import Selection
from datatools.subsets.facility_location import facility_location
from datatools.subsets.herding import herding
from datatools.subsets.matching_pursuit import matching_pursuit

METRICS = ("l1", "l2", "cosine")


@dataclass(frozen=True)
class Plan:
    """What must be trained, and how many rows may be chosen out of which.

    kept: int64, rows of small sources, always trained.
    groups: (rows of one large source, how many of them to choose).
    overflow: the small sources alone held more rows than may be kept; `kept` is a draw with quotas by source.
    """

    kept: Tensor
    groups: tuple[tuple[Tensor, int], ...]
    overflow: bool

    def __len__(self) -> int:
        return len(self.kept) + sum(quota for _, quota in self.groups)

    @property
    def free(self) -> bool:
        """Whether there is anything to choose."""
        return any(0 < quota < len(rows) for rows, quota in self.groups)

    def candidates(self) -> Tensor:
        """int64, the rows of all groups, ascending."""
        rows = [rows for rows, _ in self.groups]
        return torch.cat(rows).sort().values if rows else torch.zeros(0, dtype=torch.int64)

    def draw(self, generator: torch.Generator) -> Selection:
        """Random rows with the same kept rows and quotas: the control that every choice has to beat."""
        picks = [rows[torch.randperm(len(rows), generator=generator)[:quota]] for rows, quota in self.groups]
        return Selection(torch.cat([self.kept, *picks]))


def plan(
    sources: Sequence[Hashable],
    keep: int,
    small: Set[Hashable] = frozenset(),
    *,
    per_source: bool = True,
    generator: torch.Generator,
) -> Plan:
    """Which rows of a batch are kept anyway, and how many to choose of each large source.

    Quotas are in proportion to the rows that a source has in this batch (`budgets`); sources are taken in the order of
    their names. per_source=False makes one group of all large sources.
    Raises: UsageError unless 1 <= keep <= n.
    """
    n = len(sources)
    if not 1 <= keep <= n:
        raise UsageError(
            f"coreset: {keep} rows to keep of a batch of {n}; keep at least 1 and at most the batch, "
            "or make the large batch larger (--large-batch)"
        )
    rows: dict[Hashable, list[int]] = {}
    for i, source in enumerate(sources):
        rows.setdefault(source, []).append(i)
    names = sorted(rows, key=lambda source: (str(type(source)), source))
    little = [torch.tensor(rows[name]) for name in names if name in small]
    large = [torch.tensor(rows[name]) for name in names if name not in small]
    if not per_source and large:
        large = [torch.cat(large).sort().values]
    held = sum(map(len, little))
    if held > keep:
        shares = budgets([len(r) for r in little], keep)
        little = [
            r[torch.randperm(len(r), generator=generator)[:share].sort().values]
            for r, share in zip(little, shares, strict=True)
        ]
    kept = torch.cat(little) if little else torch.zeros(0, dtype=torch.int64)
    quotas = budgets([len(r) for r in large], keep - len(kept))
    return Plan(kept.sort().values, tuple(zip(large, quotas, strict=True)), held > keep)


def distances(features: Tensor, metric: str = "l1") -> Tensor:
    """[n, n] float64, zero on the diagonal. Raises: UsageError for an unknown metric."""
    if metric not in METRICS:
        raise UsageError(f"coreset: no metric is called {metric!r}{did_you_mean(metric, METRICS)}")
    rows = features.double()
    if metric == "cosine":
        rows = torch.nn.functional.normalize(rows, dim=1)
        found = 1 - rows @ rows.mT
    else:
        found = torch.cdist(rows, rows, p=1.0 if metric == "l1" else 2.0)
    found = (found + found.mT) / 2
    return found.fill_diagonal_(0).clamp_min(0)


def sparsify(features: Tensor, coordinates: int | None) -> Tensor:
    """The `coordinates` columns with the largest |mean over the rows|; ties go to the lower column; None keeps all.

    Source: CoLM, arXiv 2407.19580, section 4.2; its code takes the absolute value of the mean, as here.
    """
    if coordinates is None or features.shape[1] <= coordinates:
        return features
    importance = features.double().mean(0).abs()
    return features[:, importance.argsort(descending=True, stable=True)[:coordinates].sort().values]


def _medoids(features: Tensor, k: int, metric: str, generator: torch.Generator) -> Selection:
    apart = distances(features, metric)
    return Selection(facility_location(apart.max() - apart, k).indices)


def _matching_pursuit(features: Tensor, k: int, metric: str, generator: torch.Generator) -> Selection:
    return matching_pursuit(features, k)


def _top_norm(features: Tensor, k: int, metric: str, generator: torch.Generator) -> Selection:
    return Selection(features.double().norm(dim=1).argsort(descending=True, stable=True)[:k].cpu())


def _random(features: Tensor, k: int, metric: str, generator: torch.Generator) -> Selection:
    return Selection(torch.randperm(len(features), generator=generator)[:k])


Method = Callable[[Tensor, int, str, torch.Generator], Selection]

WHOLE_BATCH = "herding"
BY_SOURCE: Mapping[str, Method] = {
    "matching_pursuit": _matching_pursuit,
    "facility_location": _medoids,
    "top_norm": _top_norm,
    "random_in_source": _random,
}
"""name -> (features [n, d] of one source, how many, metric, generator) -> `Selection`.

matching_pursuit: weighted rows whose mean is nearest to the source's mean; facility_location: medoids, the published
choice; top_norm: the largest gradients; random_in_source: the control.
"""
CORESET_METHODS = (WHOLE_BATCH, *BY_SOURCE)
"""The names of all methods.

Herding looks at all sources at once: rows by the same quotas, whose mean, kept rows of small sources included, is
nearest to that of the whole batch. Where a source has three rows of which one is kept, there is little to choose within
it, and much among all of them.
"""


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
    if method not in CORESET_METHODS:
        raise UsageError(f"coreset: no method is called {method!r}{did_you_mean(method, CORESET_METHODS)}")
    read = torch.arange(len(features)) if method == WHOLE_BATCH else plan.candidates()
    bad = read[~features[read].isfinite().all(1).cpu()]
    if len(bad):
        raise DataError(
            f"coreset: the features of {rows_called(bad, names)} are not finite ({len(bad)} rows); "
            "is their loss? Lower the learning rate, or look at these rows"
        )
    if method == WHOLE_BATCH:
        return herding(sparsify(features, coordinates), len(plan), kept=plan.kept, groups=plan.groups)
    indices, weights = [plan.kept], [torch.ones(len(plan.kept))]
    for rows, quota in plan.groups:
        if quota == 0:
            continue
        chosen = Selection(torch.arange(len(rows)))
        if quota < len(rows):
            chosen = BY_SOURCE[method](sparsify(features[rows], coordinates), quota, metric, generator)
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


def by_source(sources: Sequence[Hashable], rows: Tensor) -> dict[str, int]:
    """How many of `rows` each source has, by name; sources with none are left out."""
    return dict(sorted(Counter(str(sources[i]) for i in rows.tolist()).items()))
