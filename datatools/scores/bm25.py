"""BM25: how well a text answers a query, by the words that they share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix


@dataclass(frozen=True)
class Bm25Statistics:
    """What BM25 knows of all documents.

    Attributes:
        documents: Their number N.
        average: The mean number of words of a document.
        holding: int64 [words], the number of documents with each word.

    Example:
        >>> Bm25Statistics(2, 3.0, np.array([1, 1])).documents
        2

    """

    documents: int
    average: float
    holding: NDArray[np.int64]


def bm25(
    documents: csr_matrix,
    queries: csr_matrix,
    *,
    k1: float = 1.2,
    b: float = 0.75,
    rows: Any = None,
    of: Bm25Statistics | None = None,
    lengths: NDArray[np.int64] | None = None,
) -> NDArray[np.float32]:
    """BM25 of documents and queries, as a share of the highest value that a document could reach.

        score(d, q) = sum_{t in q} idf(t) (k1 + 1) f(t, d) / (f(t, d) + k1 (1 - b + b |d| / avgdl))
        idf(t) = ln(1 + (N - n(t) + 1/2) / (n(t) + 1/2))

    Here f(t, d) counts the word t in the document d, |d| is the number of its words and avgdl their mean over all N
    documents, n(t) of which hold t. A word counts once for the query, however often the query holds it.

    Differs: the score is divided by its bound, sum_{t in q} (k1 + 1) idf(t), so that it lies in [0, 1) and long and
    short queries can be compared; the order of documents for one query stays the same. The idf has 1 added inside the
    logarithm (Lucene's form), so that words in more than half of the documents do not count against a document.

    Cost: one sparse product; float32 [n, m] for the result.

    Args:
        documents: Counts of words, [N, words].
        queries: Counts of the same words, [m, words].
        k1: How slowly repetitions of a word saturate; 0 counts a word once.
        b: How strongly long documents are discounted, from 0 (not at all) to 1.
        rows: Which documents are scored, an index of numpy; None is all of them. The statistics are those of all
            documents in every case.
        of: The statistics of all documents, if `documents` are only some of them.
        lengths: int64 [N], the words of each document, if `documents` counts only some of the words.

    Returns:
        float32 [rows, m]; 0 for a query without words.

    Raises:
        ValueError: The matrices have different widths, or k1 or b is out of range.

    Source:
        Robertson & Zaragoza 2009, "The Probabilistic Relevance Framework: BM25 and Beyond", equation 3.15.

    Example:
        >>> from scipy.sparse import csr_matrix
        >>> texts = csr_matrix([[2, 0, 1], [0, 1, 2]])  # how often each of three words occurs
        >>> print(bm25(texts, csr_matrix([[1, 0, 0], [0, 0, 3]])).round(3))
        [[0.625 0.455]
         [0.    0.625]]

    """
    from scipy.sparse import csr_matrix, diags

    if documents.shape[1] != queries.shape[1]:
        raise ValueError(f"bm25: documents over {documents.shape[1]} words but queries over {queries.shape[1]}")
    if not (k1 >= 0 and 0 <= b <= 1):
        raise ValueError(f"bm25: k1={k1} and b={b}; they must be k1 >= 0 and 0 <= b <= 1")
    counts = csr_matrix(documents, dtype=np.float64)
    counts.eliminate_zeros()
    length = np.asarray(counts.sum(1)).ravel() if lengths is None else np.asarray(lengths, np.float64)
    if of is None:
        holding = np.bincount(counts.nonzero()[1], minlength=counts.shape[1])
        of = Bm25Statistics(counts.shape[0], length.mean() if counts.shape[0] else 0.0, holding)
    idf = np.log1p((of.documents - of.holding + 0.5) / (of.holding + 0.5))

    chosen = counts if rows is None else counts[rows]
    mine = length if rows is None else length[rows]
    discount = k1 * (1 - b + b * (mine / of.average if of.average else np.zeros_like(mine)))
    saturated = chosen.copy()
    saturated.data = chosen.data / (chosen.data + np.repeat(discount, np.diff(chosen.indptr)))

    asked = csr_matrix(queries, dtype=np.float64)
    asked.eliminate_zeros()
    asked.data = np.ones_like(asked.data)
    weighted = asked @ diags(idf)
    bound = np.asarray(weighted.sum(1)).ravel()
    scores = (saturated @ weighted.T).toarray() / np.where(bound > 0, bound, 1.0)
    return scores.astype(np.float32)  # type: ignore[no-any-return]
