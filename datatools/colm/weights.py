"""Weights of chosen rows that correct the expectation: each source counts as much as in the large batch."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Sequence

import torch

from datatools.selection.candidates import Selection


def correct_expectation(chosen: Selection, groups: Sequence[Hashable], *, bound: float) -> Selection:
    """Weight chosen rows so that every group has the share of the sum that it has in the large batch.

    The weighted mean sum_S w_i x_i / k is then the stratified estimate of the mean over the large batch: it is unbiased
    wherever the rows of a group are drawn with the probabilities that their own weights state, and no group of rows
    counts more because it is kept whole. Groups without a chosen row are left out, and the others scaled up.

    Args:
        chosen: k rows, with the weights that the method gave them.
        groups: the group of each row of the large batch [n], such as its source.
        bound: largest weight. Larger ones are cut, which biases the mean towards 0, so that no row
            decides it alone.

    Returns:
        The same rows with their weights, float32 [k].

    Source:
        Stratified importance sampling; bounded weights: Ionides 2008, Truncated Importance Sampling.

    Example:
        >>> kept = Selection(torch.tensor([0, 1]))  # one of one row, and one of three
        >>> correct_expectation(kept, ["code", "web", "web", "web"], bound=4).weights
        tensor([0.5000, 1.5000])

    """
    n, k = len(groups), len(chosen)
    there: dict[Hashable, int] = defaultdict(int)
    for group in groups:
        there[group] += 1
    own = [groups[i] for i in chosen.indices.tolist()]
    held: dict[Hashable, float] = defaultdict(float)
    for group, weight in zip(own, chosen.weights.tolist(), strict=True):
        held[group] += weight
    scale = {group: there[group] / n * k / total if total > 0 else 0.0 for group, total in held.items()}
    weights = chosen.weights.double() * torch.tensor([scale[group] for group in own], dtype=torch.float64)
    total = float(weights.sum())
    if total > 0:
        weights *= k / total
    return Selection(chosen.indices, weights=weights.clamp_max(bound).float())
