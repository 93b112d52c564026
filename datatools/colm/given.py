"""The choice among rows whose features are given, where some rows have none."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from datatools.colm.choice import choose_rows
from datatools.colm.quotas import Plan, drawn_budgets
from datatools.selection.candidates import Selection


def choose_given(
    features: Float[Tensor, "n d"], plan: Plan, *, generator: torch.Generator, **settings: Any
) -> Selection:
    """Execute a plan with features of which some are not known.

    Within each source, rows without features are a part of their own: they get the share of the quota that they have of
    the rows, rounded at random, and are drawn at random. So each of them is kept with the probability quota / rows,
    even a single one with a share below 1, and its features become known. The method chooses among the others, whose
    mean it approximates.

    Args:
        features: floating dtype [n, d]; rows with a number that is not finite count as unknown.
        plan: which rows are kept, and how many to choose of each large source.
        generator: source of randomness.
        **settings: other arguments of `choose_rows`.

    Returns:
        The rows: those that are kept anyway first; weights of rows that are kept or drawn at random are 1.

    Example:
        >>> from datatools.colm import plan
        >>> made = plan(["web"] * 4, 2, generator=torch.Generator())
        >>> features = torch.tensor([[0.0], [torch.nan], [torch.nan], [4.0]])
        >>> sorted(choose_given(features, made, method="top_norm", generator=torch.Generator()).indices.tolist())[-1]
        3

    """
    known = features.isfinite().all(1).cpu()
    drawn: list[Tensor] = [plan.kept]
    groups: list[tuple[Tensor, int]] = []
    for rows, quota in plan.groups:
        there, new = rows[known[rows]], rows[~known[rows]]
        of_new, of_there = drawn_budgets([len(new), len(there)], quota, generator=generator)
        drawn.append(new[torch.randperm(len(new), generator=generator)[:of_new]])
        groups.append((there, of_there))
    first = torch.cat(drawn)
    inner = known.nonzero()[:, 0]
    place = torch.full((len(features),), -1)
    place[inner] = torch.arange(len(inner))
    kept = place[plan.kept[known[plan.kept]]]
    sub = Plan(kept, tuple((place[rows], quota) for rows, quota in groups if len(rows)), plan.overflow)
    if len(sub) == len(kept):  # nothing to choose
        return Selection(first)
    chosen = choose_rows(features[inner.to(features.device)], sub, generator=generator, **settings)
    picks = torch.ones(len(chosen.indices), dtype=torch.bool)
    picks[: len(kept)] = False  # those that are kept anyway come first
    indices = torch.cat([first, inner[chosen.indices[picks]]])
    return Selection(indices, weights=torch.cat([torch.ones(len(first)), chosen.weights[picks].float()]))
