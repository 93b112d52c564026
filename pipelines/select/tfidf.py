"""TF-IDF: the similarity of words, without a model."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from datatools import large
from pipelines.rows.rows import Rows
from pipelines.select.scored import Context, Scored, from_similarity, spread, usable_among
from pipelines.select.scorer import Asked
from pipelines.select.words import Block, Counted, Frequencies, asked_of
from pipelines.settings.methods import Method

METHOD = Method(
    summary="similarity of words with the target rows",
    title="Text similarity (TF-IDF)",
    meaning="The score is a cosine between word counts (TF-IDF) of the row and of the target rows: how alike the texts "
    "are; no model takes part.",
    label="text similarity",
    rows="rows picked by text similarity",
    needs=("target",),
    kind="similarity",
    measure="cosine, Text similarity (TF-IDF)",
    cost="seconds, without a model",
    limits="knows words and word pairs, not what they mean",
)


def score(context: Context) -> Scored:
    """Score whole rows, prompt and answer, by the cosine of TF-IDF vectors (words and word pairs, sublinear counts).

    Args:
        context: What is scored.
    """
    with context.run.stage("scores"):
        similarity = word_similarity(context.pool, context.wanted)
    text = "cosine of TF-IDF vectors of pool row and target rows; no model is used"
    return from_similarity(context, similarity, formula={"name": "tfidf", "text": text})


def columns(context: Context, rows: Sequence[int] | None = None) -> Tensor:
    """Return one column per target row, as `Scorer.columns` says; words are always counted over the whole pool.

    Args:
        context: What is scored.
        rows: Pool rows; None for all of them.
    """
    chosen, places, n = usable_among(context.pool, rows)
    return spread(word_similarity(context.pool, context.wanted, chosen), places, n)


def nearest(asked: Asked) -> Tensor:
    """Return the row of `word_similarity`, float32 [m], for the pool row in question.

    Args:
        asked: The question.
    """
    return word_similarity(asked.pool, asked.target, [asked.index])[0]


def word_similarity(pool: Rows, target: Rows, rows: Sequence[int] | None = None) -> Tensor:
    """Return cosines of TF-IDF vectors of pool rows and target rows.

    Args:
        pool: The pool.
        target: The target.
        rows: Usable rows of the pool; None for all of them.

    Returns:
        float32 [rows, usable target rows].

    Raises:
        DataError: No row contains a word.

    Source:
        scikit-learn's TfidfVectorizer, fitted on pool and target together; the result is the same.
    """
    from scipy.sparse import vstack

    places = None if rows is None else np.searchsorted(np.flatnonzero(pool.usable), rows)
    asked_rows = int(pool.usable.sum()) if places is None else len(places)
    found = large.table(asked_rows, int(target.usable.sum()), None if pool.kept is None else pool.kept.folder)
    in_order = None if places is None else np.argsort(places, kind="stable")
    done = 0
    with Counted(pool, target, "tfidf", pairs=True, every=True) as counted:
        frequencies = counted.frequencies
        for block in counted.target:
            frequencies.add(block.term)
        frequencies.settle()
        weights = _Weights(frequencies, len(counted.lengths) + int(target.usable.sum()))
        wanted = vstack([counted.vocabulary.matrix(block, weights.of(block)) for block in counted.target]).T.tocsr()
        for block in counted.blocks():
            asked = asked_of(block, None if places is None or in_order is None else places[in_order])
            if len(asked):
                rows_of = counted.vocabulary.matrix(block, weights.of(block))[asked]
                at = slice(done, done + len(asked)) if in_order is None else in_order[done : done + len(asked)]
                found[at] = torch.from_numpy((rows_of @ wanted).toarray())
                done += len(asked)
                large.release(found)
    return found


class _Weights:
    """TF-IDF of the terms of rows: (1 + ln count) (1 + ln((1 + n) / (1 + rows with the term))), rows of length 1."""

    def __init__(self, frequencies: Frequencies, n: int) -> None:
        self._frequencies = frequencies
        counts = frequencies.counts.astype(np.float32) + np.float32(1)
        self._idf = np.log(np.full_like(counts, n + 1) / counts) + np.float32(1)

    def of(self, block: Block) -> NDArray[np.float32]:
        """Return the weight of each term of a block, float32 [z], in the steps and precision of scikit-learn."""
        values = np.log(block.count.astype(np.float32)) + np.float32(1)
        values *= self._idf[np.searchsorted(self._frequencies.terms, block.term)]
        squares = np.bincount(block.row, weights=values * values, minlength=len(block.lengths))
        return (values / np.sqrt(squares)[block.row]).astype(np.float32)
