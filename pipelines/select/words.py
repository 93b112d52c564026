"""Counts of the words in the rows of a pool and of its target, for methods that use no model."""

from __future__ import annotations

from typing import Any

import numpy as np

from datatools import DataError
from pipelines.rows.rows import Rows

WORD = r"(?u)\b\w+\b"
"""The pattern of a word: a run of letters, digits and underscores, of any length and alphabet."""


def fitted(vectorizer: Any, pool: Rows, target: Rows, method: str) -> tuple[Any, Any]:
    """Fit one of scikit-learn's vectorizers on pool and target together.

    Args:
        vectorizer: The vectorizer, which receives the texts of whole rows, prompt and answer.
        pool: The pool.
        target: The target.
        method: The method to name in an error.

    Returns:
        Sparse matrices of the usable rows of the pool and of the target.

    Raises:
        DataError: No row contains a word.
    """
    texts, wanted = ([rows.pool[i].whole for i in np.flatnonzero(rows.usable).tolist()] for rows in (pool, target))
    try:
        matrix = vectorizer.fit_transform(texts + wanted)
    except ValueError as error:  # "empty vocabulary": only letters, digits and underscores form words
        raise DataError(
            f"--method {method}: no row of the pool or the target holds a word; use another method"
        ) from error
    return matrix[: len(texts)], matrix[len(texts) :]


def places_of(pool: Rows, rows: Any) -> Any:
    """Return the positions of some pool rows among the usable ones, as an index for numpy.

    Args:
        pool: The pool.
        rows: Usable pool rows; None for all of them.
    """
    return slice(None) if rows is None else np.searchsorted(np.flatnonzero(pool.usable), rows)
