"""TF-IDF: the similarity of words, without a model."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from datatools import DataError
from pipelines.rows.rows import Rows
from pipelines.select.scored import Context, Scored, from_similarity
from pipelines.select.scorer import Asked
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
    """Cosine of TF-IDF vectors (words and word pairs, sublinear counts) of whole rows, prompt and answer."""
    with context.run.stage("scores"):
        similarity = word_similarity(context.pool, context.wanted)
    text = "cosine of TF-IDF vectors of pool row and target rows; no model is used"
    return from_similarity(context, similarity, formula={"name": "tfidf", "text": text})


def nearest(asked: Asked) -> Tensor:
    """The row of `word_similarity` for the pool row that was asked about."""
    others = np.flatnonzero(asked.pool.usable).tolist()
    return word_similarity(asked.pool, asked.target)[others.index(asked.index)]


def word_similarity(pool: Rows, target: Rows) -> Tensor:
    """float32 [usable pool rows, usable target rows]: cosines of TF-IDF vectors.

    Source: scikit-learn's TfidfVectorizer, fitted on pool and target together.

    Raises:
        DataError: if no row holds a word.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer

    texts, wanted = ([rows.pool[i].whole for i in np.flatnonzero(rows.usable).tolist()] for rows in (pool, target))
    vectorizer = TfidfVectorizer(sublinear_tf=True, ngram_range=(1, 2), dtype=np.float32, token_pattern=r"(?u)\b\w+\b")
    try:
        matrix = vectorizer.fit_transform(texts + wanted)
    except ValueError as error:  # "empty vocabulary": letters and digits make words, nothing else does
        raise DataError("--method tfidf: no row of the pool or the target holds a word; use another method") from error
    similarity = (matrix[: len(texts)] @ matrix[len(texts) :].T).toarray()
    return torch.from_numpy(np.asarray(similarity, dtype=np.float32))
