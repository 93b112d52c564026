"""TF-IDF: the similarity of words, without a model."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from pipelines.rows.rows import Rows
from pipelines.select.scored import Context, Scored, from_similarity, spread, usable_among
from pipelines.select.scorer import Asked
from pipelines.select.words import WORD, fitted, places_of
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
        scikit-learn's TfidfVectorizer, fitted on pool and target together.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer

    vectorizer = TfidfVectorizer(sublinear_tf=True, ngram_range=(1, 2), dtype=np.float32, token_pattern=WORD)
    texts, wanted = fitted(vectorizer, pool, target, "tfidf")
    similarity = (texts[places_of(pool, rows)] @ wanted.T).toarray()
    return torch.from_numpy(np.asarray(similarity, dtype=np.float32))
