"""auto: from coarse to fine, so that gradients are computed for the most promising rows only.

From top to bottom: words choose a shortlist; a short warm-up gives one checkpoint; there, the optimizer's updates of
the shortlist are compared with the gradients of the target rows, without the directions that the updates of all rows
share; and the target rows take turns choosing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from math import ceil
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from datatools import Budget, DataError, fuse, round_robin_order
from pipelines.runs.messages import warn
from pipelines.select.scored import Context, Scored, candidates, common_rows, from_similarity
from pipelines.select.scorer import Asked, Work, scorer
from pipelines.settings.methods import Method
from pipelines.settings.select import SelectConfig

METHOD = Method(
    summary="words choose a shortlist, gradients rank it; target rows take turns",
    title="auto (words, then gradients)",
    meaning="The score of a row on the shortlist is 1 plus its rank, as a share of the shortlist, mainly by the "
    "agreement of the update that it would cause with the gradients of the target rows; any other row scores between 0 "
    "and 1, by words alone. Target rows choose in turn, each by its own ranks; the score is their mean.",
    label="auto",
    needs=("target", "model", "gradients"),
    selector="round_robin",
    stored=True,
    nearest="target rows it helps most",
    measure="cosine, of gradients on the shortlist and of words elsewhere",
    cost="a warm-up run, then forward and backward of about a quarter of the rows, at one checkpoint",
    limits="a row that shares no words with any target row is not looked at closely",
)

WORDS, GRADIENTS = ("tfidf", "bm25"), "less"
"""The methods of the two stages."""

COMMON = 10
"""The default number of common directions to remove; 5 to 20 of a sample of 64 to 200 rows give similar selections."""

PRIOR = 0.5
"""The weight of words on the shortlist; that of gradients is 1."""

SPARE, FEWEST = 3, 256
"""The minimum size of the shortlist: rows per row of the budget, and rows in total, if the pool has that many."""


def score(context: Context) -> Scored:
    """Shortlist by words, then rank the shortlist by gradients, for one target row after another.

    With r_s(i, j) the rank of row i for target row j by the similarity s, as a share of the rows that are ranked:
    first_ij = (r_tfidf + r_bm25) / 2 over the pool, and on the shortlist the score is
    1 + (w r_first + r_less) / (w + 1) with w = 1/2. r_less ranks by the cosine of `less` at one checkpoint, without
    common directions.

    Args:
        context: What is scored.

    Source:
        Cascades of rankers (Wang et al. 2011, SIGIR); TF-IDF, BM25, LESS (arXiv 2402.04333) and turns between target
        rows (arXiv 2602.14696) as in their own files. The removal of common directions and this combination are the
        project's own.
    """
    usable = np.flatnonzero(context.pool.usable)
    words = _words(context)
    places = _shortlist(context, words)
    at = torch.from_numpy(places)
    cosines = _columns(context, GRADIENTS, usable[places].tolist())
    good = torch.ones(len(usable), dtype=torch.bool)
    good[at] = cosines.isfinite().all(1)
    signals = [*((one[at], weight) for one, weight in words), (cosines, 1.0)]
    fused = torch.zeros(len(usable), cosines.shape[1])
    for one, _ in words:
        fused += one
    fused[at] = 1 + fuse([one for one, _ in signals], [weight for _, weight in signals])
    text = _in_words(context, len(places), len(usable), bool(words))
    tokens = round(sum(_work(context, len(places)).whole.values()))
    return from_similarity(
        context, fused.nan_to_num(0.0), formula={"name": "auto", "text": text}, good=good, tokens=tokens
    )


def _in_words(context: Context, looked_at: int, rows: int, with_words: bool) -> str:
    """Return the formula of the score, with the number of rows on the shortlist."""
    rank = (
        "rank by the cosine of the optimizer's update with each target gradient, without the mean and the "
        f"{_at_stage(context.config, GRADIENTS).common} main directions of all updates"
    )
    if not with_words:
        return f"1 + the {rank}; no row holds a word, so that this ranks all {rows:,} rows"
    return (
        f"mean rank by TF-IDF and BM25; on {looked_at:,} of {rows:,} rows, 1 + the mean of this (weight {PRIOR:g}) and "
        f"the {rank}"
    )


def _words(context: Context) -> list[tuple[Tensor, float]]:
    """Return the mean rank by words and its weight on the shortlist; nothing if the rows contain no words.

    The ranks are float32 [usable pool rows, usable target rows].
    """
    with context.run.stage("words"):
        try:
            return [(fuse([_columns(context, name) for name in WORDS]), PRIOR)]
        except DataError:
            warn("auto: no row holds a word, so that words choose no shortlist: gradients of all rows are computed")
            return []


def _columns(context: Context, name: str, rows: Sequence[int] | None = None) -> Tensor:
    """Return float32 [rows, usable target rows] by one method, by default for all usable rows of the pool."""
    asked = np.flatnonzero(context.pool.usable).tolist() if rows is None else rows
    columns = scorer(name).columns
    assert columns is not None
    return columns(replace(context, config=_at_stage(context.config, name)), asked)


def _shortlist(context: Context, words: Sequence[tuple[Tensor, float]]) -> NDArray[np.int64]:
    """Return the positions, among usable pool rows, of those whose gradients are computed: target rows take turns."""
    if not words:
        return np.arange(int(context.pool.usable.sum()))
    return np.sort(round_robin_order(words[0][0])[: _length(context)])


def _length(context: Context) -> int:
    """Return the number of rows on the shortlist."""
    rows = context.pool
    n, budget = int(rows.usable.sum()), Budget.parse(context.config.budget).resolve(candidates(rows))
    mean = rows.tokens() / max(1, n)
    wanted = budget.rows if budget.rows is not None else ceil((budget.tokens or 0) / max(1.0, mean))
    return min(n, max(ceil(context.config.shortlist * n), SPARE * wanted, FEWEST))


def _at_stage(config: SelectConfig, name: str) -> SelectConfig:
    """Return the settings for the method of one stage: by default, gradients are taken at one checkpoint."""
    features, common = config.features, COMMON if config.common is None else config.common
    if features.checkpoints is None and config.warmup.checkpoints is None:
        features = features.model_copy(update={"checkpoints": "last"})
    return config.model_copy(update={"method": name, "features": features, "common": common})


def work(context: Context) -> Work:
    """Return the tokens of the warm-up and of the gradients of the shortlist, the sample and the target rows.

    Args:
        context: What is scored.
    """
    return _work(context, _length(context))


def _work(context: Context, looked_at: int) -> Work:
    """Return `work` for a shortlist of this many rows."""
    found = scorer(GRADIENTS).work(replace(context, config=_at_stage(context.config, GRADIENTS)))
    rows, sample = len(context.pool.unique()), len(common_rows(context.pool, context.config.seed))
    share = min(1.0, looked_at / max(1, rows))
    share += (1 - share) * min(1.0, sample / max(1, rows))  # a part of the sample is on the shortlist
    parts: dict[str, float] = {}
    left: dict[str, float] = {}
    for label, tokens in found.whole.items():
        parts[label] = tokens * (share if label.startswith("gradients of the pool") else 1.0)
        left[label] = max(0.0, parts[label] - (tokens - found.left[label]))
    return Work(parts, left, round(share * found.bytes))


def check(config: SelectConfig) -> None:
    """Check the settings for the methods of both stages.

    Args:
        config: The settings.

    Raises:
        UsageError: One of the methods cannot work with them.
    """
    for name in (*WORDS, GRADIENTS):
        scorer(name).check(_at_stage(config, name))


def reuse(config: SelectConfig) -> list[str]:
    """Return the flags with which another selection uses the features of the shortlist.

    Args:
        config: The settings of the finished run.
    """
    return scorer(GRADIENTS).reuse(_at_stage(config, GRADIENTS))


def nearest(asked: Asked) -> Tensor:
    """Return cosines of gradients, float32 [m], for a row on the shortlist, and of words for any other row.

    Args:
        asked: The question.

    Raises:
        DataError: The row cannot be compared by words either.
    """
    for name in (GRADIENTS, WORDS[0]):
        found: Callable[[Asked], Tensor] | None = scorer(name).nearest
        assert found is not None
        try:
            return found(replace(asked, config=_at_stage(asked.config, name)))
        except DataError:
            if name == WORDS[0]:
                raise
    raise AssertionError


def layers(asked: Asked, rows: list[int]) -> list[dict[str, Any]]:
    """Return the share of each layer, as the method of the gradients does.

    Args:
        asked: The question.
        rows: Target rows.
    """
    return scorer(GRADIENTS).layers(replace(asked, config=_at_stage(asked.config, GRADIENTS)), rows)
