"""Which sources are small, and clusters as sources for rows that have none."""

from collections.abc import Hashable, Mapping
from typing import TypeVar

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from datatools.errors import UsageError

Source = TypeVar("Source", bound=Hashable)


def small_sources(counts: Mapping[Source, int]) -> frozenset[Source]:
    """Find the sources with fewer rows than the average source.

    Args:
        counts: source -> rows in the whole training set, not in a batch.

    Returns:
        The small sources: those with fewer than |V| / c rows, for |V| rows from c sources.

    Source:
        CoLM, arXiv 2407.19580, section 4.1.

    Example:
        >>> small_sources({"code": 40, "web": 5_000})
        frozenset({'code'})

    """
    total = sum(counts.values())
    return frozenset(source for source, count in counts.items() if count * len(counts) < total)


def cluster_sources(vectors: Float[Tensor, "n d"], clusters: int, *, seed: int) -> Int64[Tensor, " n"]:
    """Create sources for rows that have none: k-means clusters of vectors such as mean hidden states.

    Vectors are scaled to unit length first. The same vectors and seed give the same clusters.

    Args:
        vectors: floating dtype [n, d].
        clusters: number of clusters.
        seed: seed of k-means.

    Returns:
        The cluster of each row, int64 [n].

    Raises:
        UsageError: unless 1 <= clusters <= n.

    Source:
        CoLM, arXiv 2407.19580, section 5 (SuperGLUE).

    Differs:
        The paper clusters again four times during training; here clusters are computed once.

    Example:
        >>> found = cluster_sources(torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0]]), 2, seed=0)
        >>> bool(found[0] == found[1]), bool(found[0] == found[2])
        (True, False)

    """
    from sklearn.cluster import KMeans

    if not 1 <= clusters <= len(vectors):
        raise UsageError(f"clusters={clusters} for {len(vectors)} rows; expected between 1 and {len(vectors)}")
    rows = torch.nn.functional.normalize(vectors.double(), dim=1).cpu().numpy()
    found = KMeans(clusters, n_init=4, random_state=seed % 2**32).fit(rows)
    return torch.from_numpy(found.labels_.astype(np.int64))
