"""Random rows whose answers are as long as those of a reference selection."""

import numpy as np
import torch

from datatools.errors import UsageError
from datatools.selection.budget import Budget
from datatools.selection.candidates import Candidates, Selection
from datatools.selection.fill import fill
from datatools.selection.random import lottery

BINS, ROWS_PER_BIN = 20, 5  # largest number of bins, smallest number of reference rows per bin


def random_length(
    candidates: Candidates,
    budget: Budget,
    *,
    seed: int = 0,
    max_per_source: str | float | None = None,
    reference: Selection | None = None,
) -> Selection:
    """Choose random rows with the reference's distribution of supervised tokens, to separate "better" from "longer".

    The reference's lengths are split at their quantiles into `BINS` bins (fewer if the reference is small or lengths
    repeat). The j-th random row of a bin with c reference rows gets position (j + 1/2) / c, and rows are taken in the
    order of their positions: every prefix has the distribution of the reference, and a prefix of the reference's size
    has c rows of each bin. When a bin has no rows left, the others continue; rows shorter or longer than all rows of
    the reference come last. Rows of the reference are not excluded. As for `random`, the order of the rows does not
    matter.

    Args:
        candidates: the rows, with `supervised`.
        budget: how much to choose.
        seed: seed of the order.
        max_per_source: cap per source, see `fill`.
        reference: a selection from the same rows.

    Returns:
        The selection.

    Raises:
        UsageError: without a reference or token counts, or if the pool cannot fill the budget.

    Example:
        >>> pool = Candidates(keys=["a", "b", "c", "d"], supervised=[1, 9, 1, 9])
        >>> chosen = random_length(pool, Budget.parse(1), reference=Selection(torch.tensor([1])))
        >>> pool.supervised[chosen.indices]
        tensor([9])

    """
    if reference is None or len(reference) == 0:
        raise UsageError(
            "random_length needs a reference selection whose answer lengths it can match; select rows "
            "with another method first, or use 'random'"
        )
    if candidates.supervised is None:
        raise UsageError(
            "random_length needs the rows' supervised token counts, which the candidates lack; pass `supervised`"
        )
    if int(reference.indices.max()) >= len(candidates) or int(reference.indices.min()) < 0:
        raise UsageError(
            f"random_length: the reference contains row {int(reference.indices.max())} of a pool of "
            f"{len(candidates)} rows; it must be a selection from the same pool"
        )
    lengths = candidates.supervised.numpy()
    wanted = lengths[reference.indices.numpy()]
    bins = max(1, min(BINS, len(wanted) // ROWS_PER_BIN))
    edges = np.unique(np.quantile(wanted, np.linspace(0, 1, bins + 1), method="lower"))
    bin_of = np.searchsorted(edges[1:-1], lengths, side="right")  # [edge, next edge); the last bin includes its end
    share = np.bincount(bin_of[reference.indices.numpy()], minlength=len(edges))
    outside = np.maximum(edges[0] - lengths, 0) + np.maximum(lengths - edges[-1], 0)  # tokens beyond the reference

    order = candidates.order(-lottery(candidates, seed, "random_length"))
    place = np.empty(len(candidates))
    drawn = np.zeros(len(edges), dtype=np.int64)
    for row in order.tolist():
        b = bin_of[row]
        if outside[row]:
            place[row] = len(candidates) + 1.0 + outside[row]
        else:
            place[row] = (drawn[b] + 0.5) / share[b]
            drawn[b] += 1
    order = order[np.argsort(place[order], kind="stable")]  # equal places stay in random order
    chosen = fill(order, candidates, budget, max_per_source)
    return Selection(
        torch.tensor(chosen, dtype=torch.int64),
        scores=candidates.scores,
        why=[f"random with the reference's answer lengths, seed {seed}"] * len(chosen),
    )
