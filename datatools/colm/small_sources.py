"""Which sources are small, how many rows each of the others may keep, and sources for rows that have none."""

from collections.abc import Hashable, Mapping
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from datatools.errors import UsageError

Source = TypeVar("Source", bound=Hashable)


def small_sources(counts: Mapping[Source, int]) -> frozenset[Source]:
    """The sources with fewer rows than the average source: fewer than |V| / c of |V| rows from c sources.

    counts: rows of each source in the whole training set, not in a batch.
    Source: CoLM, arXiv 2407.19580, section 4.1.
    """
    total = sum(counts.values())
    return frozenset(source for source, count in counts.items() if count * len(counts) < total)


def cluster_sources(vectors: Tensor, clusters: int, *, seed: int) -> Tensor:
    """Sources for rows that carry none: int64 [n], k-means clusters of `vectors` [n, d], such as mean hidden states.

    Vectors are scaled to unit length first. The same vectors and seed give the same clusters.
    Source: CoLM, arXiv 2407.19580, section 5 (SuperGLUE).
    Differs: the paper clusters again four times while training; here the clusters stay.
    Raises: UsageError unless 1 <= clusters <= n.
    """
    from sklearn.cluster import KMeans

    if not 1 <= clusters <= len(vectors):
        raise UsageError(f"clusters={clusters} of {len(vectors)} rows; expected between 1 and {len(vectors)}")
    rows = torch.nn.functional.normalize(vectors.double(), dim=1).cpu().numpy()
    found = KMeans(clusters, n_init=4, random_state=seed % 2**32).fit(rows)
    return torch.from_numpy(found.labels_.astype(np.int64))
