"""Several similarities of the same rows to the same target rows become one, by rank."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Float32
from torch import Tensor

from datatools import large
from datatools.errors import UsageError
from datatools.stats import ranks


def fuse(signals: Sequence[Float[Tensor, "n m"]], weights: Sequence[float] | None = None) -> Float32[Tensor, "n m"]:
    """Average the ranks that several similarities give to a row, target row by target row.

    fused_ij = sum_s w_s rank_i(signal_s[:, j]) / n_j, w = weights / sum(weights), where n_j rows have a rank and the
    best row has rank n_j. Ranks need no common scale: a cosine of words and one of gradients count alike. Because
    each column is ranked by itself, every target row has the same say.

    Args:
        signals: floating dtype [n, m] each, higher is better; nan where a row has no value.
        weights: one per signal, at least 0; by default all are equal.

    Returns:
        float32 [n, m] between 0 and 1; nan where a signal with a weight is nan.

    Raises:
        UsageError: if there are no signals, their shapes differ, or weights are negative or all 0.

    Source:
        Borda's count; the mean rank is the simplest of the fusions that Cormack et al. 2009 (SIGIR) compare.

    Example:
        >>> words, gradients = torch.tensor([[0.1], [0.9], [0.8]]), torch.tensor([[0.02], [0.01], [0.03]])
        >>> fuse([words, gradients]).mul(6).round().tolist()
        [[3.0], [4.0], [5.0]]

    """
    if not signals:
        raise UsageError("fuse: there is no signal; give at least one similarity")
    given = [1.0] * len(signals) if weights is None else list(weights)
    if len(given) != len(signals) or min(given) < 0 or not 0 < sum(given) < float("inf"):
        raise UsageError(f"fuse: weights {given} of {len(signals)} signals; give one per signal, at least 0, not all 0")
    shape = signals[0].shape
    fused = large.table(*shape)
    for signal, weight in zip(signals, given, strict=True):
        if signal.shape != shape:
            raise UsageError(f"fuse: signals of shapes {tuple(shape)} and {tuple(signal.shape)}; they must be alike")
        if weight:
            _add_shares(fused, signal, weight / sum(given))
    return fused


def _add_shares(fused: Tensor, signal: Tensor, weight: float) -> None:
    """Add weight times the rank of each row in its column, as a share of the rows with a value; NaN stays NaN.

    Columns of a matrix that is too large for memory are read some at a time, so that each pass over it serves many.
    """
    n, m = signal.shape
    step = max(1, min(m, large.LARGE // (4 * max(1, n))))
    for first in range(0, m, step):
        columns = torch.empty(min(step, m - first), n)
        for rows in large.blocks(signal):
            columns[:, rows] = signal[rows, first : first + step].T.float()
        for column in columns:
            there = ~column.isnan()
            place = torch.from_numpy(ranks(column[there].numpy())).float()
            column[there] = place / max(1, len(place))
        for rows in large.blocks(fused):
            fused[rows, first : first + step] += weight * columns[:, rows].T
