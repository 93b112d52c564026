"""Random rows whose answers are as long as those of a reference selection."""

import numpy as np
import torch

from datatools.errors import UsageError
from datatools.selection.budget import Budget
from datatools.selection.candidates import Candidates, Selection
from datatools.selection.fill import fill
from datatools.selection.random import lottery

BINS, ROWS_PER_BIN = 20, 5  # at most so many bins of at least so many reference rows


def random_length(
    candidates: Candidates,
    budget: Budget,
    *,
    seed: int = 0,
    max_per_source: str | float | None = None,
    reference: Selection | None = None,
) -> Selection:
    """Random rows with the reference's distribution of supervised tokens, to tell "better" from "longer".

    The reference's lengths are cut at their quantiles into `BINS` bins (fewer if it is small or lengths repeat). The
    j-th random row of a bin that holds c reference rows gets the place (j + 1/2) / c, and rows are taken in the order
    of their places: every prefix is distributed like the reference, and a prefix as large as the reference has c rows
    of each bin. Where a bin has no row left, the others continue; rows shorter or longer than all rows of the
    reference come last. Rows of the reference are not excluded. As with `random`, the order of the rows does not
    matter.

    Raises:
        UsageError: without a reference or token counts, or for a budget that the pool cannot fill.
    """
    if reference is None or len(reference) == 0:
        raise UsageError(
            "random_length needs a reference selection whose answer lengths it can match; select rows "
            "with another method first, or use 'random'"
        )
    if candidates.supervised is None:
        raise UsageError("random_length needs the rows' supervised token counts and the candidates have none")
    if int(reference.indices.max()) >= len(candidates) or int(reference.indices.min()) < 0:
        raise UsageError(
            f"random_length: the reference names row {int(reference.indices.max())} of a pool of "
            f"{len(candidates)} rows; it must be a selection from the same pool"
        )
    lengths = candidates.supervised.numpy()
    wanted = lengths[reference.indices.numpy()]
    bins = max(1, min(BINS, len(wanted) // ROWS_PER_BIN))
    edges = np.unique(np.quantile(wanted, np.linspace(0, 1, bins + 1), method="lower"))
    bin_of = np.searchsorted(edges[1:-1], lengths, side="right")  # [edge, next edge), the last bin with its end
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
