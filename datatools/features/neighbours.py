"""Nearest rows and clusters in a feature space that is read block by block.

Exact search costs n d multiplications per question. faiss's inverted lists answer from a part of the rows, but have to
be built first, which costs as much as about 4 sqrt(n) exact questions: they pay when many rows are asked about, such as
all rows of a large pool, and never for one row or a few target rows. What an approximate answer misses is measured
against exact search and returned with it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Float32, Int64
from numpy.typing import NDArray
from torch import Tensor

from datatools.errors import EnvironmentProblem, UsageError

Blocks = Callable[[], Iterable[Tensor]]
"""Reads the vectors of all rows from the first on, in blocks float32 [b, d]; it is called once per pass."""

FEW_ROWS = 50_000
"""Rows of a pool up to which search is always exact."""

_JUDGED = 100  # questions that are also answered exactly, to measure recall
_PER_LIST = 40  # vectors per inverted list, and per centroid, that k-means is trained on


@dataclass(frozen=True)
class Neighbours:
    """The nearest rows of q questions.

    Attributes:
        indices: int64 [q, k], nearest first.
        similarity: float32 [q, k], inner products.
        recall: The share of the truly nearest rows that are among them, measured on a sample of the questions; 1.0 for
            exact search.
        method: "exact" or "approximate".

    Example:
        >>> rows = torch.tensor([[1.0, 0.0], [0.6, 0.8]])
        >>> found = nearest(lambda: [rows], torch.tensor([[0.0, 1.0]]), 1, rows=2)
        >>> found.similarity, found.recall, found.method
        (tensor([[0.8000]]), 1.0, 'exact')
    """

    indices: Int64[Tensor, "q k"]
    similarity: Float32[Tensor, "q k"]
    recall: float
    method: str


def nearest(
    blocks: Blocks,
    questions: Float[Tensor, "q d"],
    k: int,
    *,
    rows: int,
    method: Literal["auto", "exact", "approximate"] = "auto",
    recall: float = 0.95,
    seed: int = 0,
) -> Neighbours:
    """Find the k rows with the largest inner products with each question.

    Args:
        blocks: The rows to search.
        questions: float32 [q, d].
        k: How many; at most as many as there are rows.
        rows: The number n of rows.
        method: "auto" is exact for up to `FEW_ROWS` rows and for up to 4 sqrt(n) questions, where building inverted
            lists costs more than it saves.
        recall: What approximate search must reach on a sample of the questions: as many lists are looked into.
        seed: Of the lists.

    Cost: exact, one pass over the rows and q n d multiplications; approximate, two passes, and about
        (4 sqrt(n) + q l / 4 sqrt(n)) n d for l lists that are looked into.
    Memory: exact, one block; approximate, all rows in float32.

    Returns:
        The neighbours of each question, those with the largest inner products first. Exact search returns the earlier
        of two equally similar rows first.

    Raises:
        UsageError: k or the number of questions is below 1, or the method is unknown.
        EnvironmentProblem: faiss is not installed, and approximate search was asked for.

    Example:
        >>> rows = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]])
        >>> nearest(lambda: [rows[:2], rows[2:]], torch.tensor([[0.0, 1.0]]), 2, rows=3).indices.tolist()
        [[1, 2]]
    """
    if k < 1 or not len(questions):
        raise UsageError(f"nearest: {k} neighbours of {len(questions)} rows; ask for at least one of each")
    if method not in ("auto", "exact", "approximate"):
        raise UsageError(f"nearest: there is no method {method!r}; choose auto, exact or approximate")
    k = min(k, rows)
    if method == "auto":
        many = rows > FEW_ROWS and len(questions) > 4 * math.isqrt(rows)
        method = "approximate" if many else "exact"
    if method == "exact":
        values, places = _exact(blocks, questions, k)
        return Neighbours(places, values, 1.0, "exact")
    return _by_lists(blocks, questions, k, rows, recall, seed)


def _exact(blocks: Blocks, questions: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """(similarity [q, k], indices [q, k]); of equal similarities the first row wins."""
    values = torch.full((len(questions), 0), 0.0)
    places = torch.zeros((len(questions), 0), dtype=torch.int64)
    start = 0
    for block in blocks():
        here = torch.arange(start, start + len(block)).expand(len(questions), -1)
        values = torch.cat([values, questions.float() @ block.float().T], 1)
        places = torch.cat([places, here], 1)
        order = values.argsort(dim=1, descending=True, stable=True)[:, :k]
        values, places = values.gather(1, order), places.gather(1, order)
        start += len(block)
    return values, places


def _by_lists(blocks: Blocks, questions: Tensor, k: int, rows: int, recall: float, seed: int) -> Neighbours:
    faiss = _faiss()
    lists = max(1, min(4 * math.isqrt(rows), rows // _PER_LIST))
    dim = questions.shape[1]
    index = faiss.IndexIVFFlat(faiss.IndexFlatIP(dim), dim, lists, faiss.METRIC_INNER_PRODUCT)
    index.cp.seed = seed % 2**31
    index.train(_sample(blocks, rows, lists * _PER_LIST))
    for block in blocks():
        index.add(_array(block))
    asked = _array(questions)
    judged = np.linspace(0, len(asked) - 1, min(_JUDGED, len(asked))).round().astype(int)
    truth = _exact(blocks, questions[torch.from_numpy(judged)], k)[1].numpy()
    index.nprobe, found = 1, 0.0
    while True:
        _, places = index.search(asked[judged], k)
        found = float(np.mean([len(set(a) & set(b)) / k for a, b in zip(places, truth, strict=True)]))
        if found >= recall or index.nprobe >= lists:
            break
        index.nprobe = min(lists, 2 * index.nprobe)
    values, places = index.search(asked, k)
    return Neighbours(torch.from_numpy(places), torch.from_numpy(values), found, "approximate")


@dataclass(frozen=True)
class Clusters:
    """Rows in clusters of similar direction.

    Attributes:
        labels: int64 [n], the cluster of each row: that with the nearest centre, by exact search.
        centres: float32 [c, d], of unit length.
        similarity: float32 [n], of each row with its centre.

    Example:
        >>> rows = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
        >>> found = clusters(lambda: [rows], 1, rows=2)
        >>> found.labels, found.centres.shape, found.similarity.shape
        (tensor([0, 0]), torch.Size([1, 2]), torch.Size([2]))
    """

    labels: Int64[Tensor, " n"]
    centres: Float32[Tensor, "c d"]
    similarity: Float32[Tensor, " n"]


def clusters(blocks: Blocks, count: int, *, rows: int, seed: int = 0) -> Clusters:
    """Cluster rows with the spherical k-means of faiss, trained on a sample of 40 rows per cluster.

    Args:
        blocks: The rows.
        count: How many clusters.
        rows: The number n of rows.
        seed: Of the first centres and the sample.

    Cost: 20 passes over the sample, and n c d multiplications; the rows are read twice.

    Returns:
        The cluster of each row, the centres, and the similarity of each row with its centre.

    Raises:
        UsageError: There are fewer rows than clusters, or no cluster.
        EnvironmentProblem: faiss is not installed.

    Example:
        >>> rows = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [0.0, 1.0]])
        >>> labels = clusters(lambda: [rows[:3], rows[3:]], 2, rows=4).labels.tolist()
        >>> labels[0] == labels[2], labels[1] == labels[3], labels[0] == labels[1]
        (True, True, False)
    """
    if not 1 <= count <= rows:
        raise UsageError(f"clusters: {count} clusters of {rows} rows; choose a number from 1 to {rows}")
    faiss = _faiss()
    sample = _sample(blocks, rows, max(count, count * _PER_LIST))
    made = faiss.Kmeans(
        sample.shape[1], count, niter=20, spherical=True, seed=seed % 2**31, min_points_per_centroid=1, verbose=False
    )
    made.train(sample)
    labels, similarity = [], []
    for block in blocks():
        values, places = made.index.search(_array(block), 1)
        labels.append(torch.from_numpy(places[:, 0].copy()))
        similarity.append(torch.from_numpy(values[:, 0].copy()))
    return Clusters(torch.cat(labels), torch.from_numpy(np.asarray(made.centroids)), torch.cat(similarity))


def _sample(blocks: Blocks, rows: int, most: int) -> NDArray[np.float32]:
    """At most so many rows, at even distances."""
    wanted = torch.from_numpy(np.unique(np.linspace(0, rows - 1, min(rows, most)).round().astype(np.int64)))
    parts, start = [], 0
    for block in blocks():
        here = wanted[(wanted >= start) & (wanted < start + len(block))] - start
        parts.append(block[here])
        start += len(block)
    return _array(torch.cat(parts))


def _array(block: Tensor) -> NDArray[np.float32]:
    return np.ascontiguousarray(block.float().cpu().numpy())


def _faiss() -> Any:
    try:
        import faiss
    except ImportError as error:
        raise EnvironmentProblem(
            "clusters and approximate neighbours need faiss, which is not installed; run `pip install faiss-cpu`"
        ) from error
    return faiss
