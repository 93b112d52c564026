"""auto: from coarse to fine, so that gradients are computed for the most promising rows only.

From top to bottom: words choose a shortlist; a short warm-up gives one checkpoint; there, the optimizer's updates of
the shortlist are compared with the gradients of the target rows, without the directions that the updates of all rows
share; and the target rows take turns choosing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from datatools import Budget, DataError, fuse, round_robin_order
from pipelines.runs.messages import warn
from pipelines.select import scored
from pipelines.select.scored import Context, Scored, common_rows, from_similarity
from pipelines.select.scorer import Asked, Candidate, Space, Work, scorer
from pipelines.settings.methods import Method, known
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
    candidates=("fusion", "words alone", "gradients alone"),
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

HALVES = 1.5
"""With `verify`, the rows on any of the three shortlists, as a multiple of one."""


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
    return _fusion(Stages(context))


class Stages:
    """What the fusion and the candidates beside it compute for one target, each part once.

    Attributes:
        context: What is scored.
        usable: The usable rows of the pool, int64 [n].
    """

    def __init__(self, context: Context) -> None:
        """Begin; nothing is computed before it is needed.

        Args:
            context: What is scored.
        """
        self.context, self.usable = context, np.flatnonzero(context.pool.usable)

    @cached_property
    def by_words(self) -> list[Tensor]:
        """The similarities by each of `WORDS`, float32 [n, usable target rows]; empty if the rows contain no words."""
        with self.context.run.stage("words"):
            try:
                return [_columns(self.context, name, self.usable.tolist(), COMMON) for name in WORDS]
            except DataError:
                warn("auto: no row holds a word, so that words choose no shortlist: gradients of all rows are computed")
                return []

    @cached_property
    def first(self) -> list[tuple[Tensor, float]]:
        """The mean rank by words and its weight on the shortlist; empty if the rows contain no words."""
        return [(fuse(self.by_words), PRIOR)] if self.by_words else []

    @cached_property
    def shortlist(self) -> Tensor:
        """The positions, among usable rows, of those whose gradients are computed: target rows take turns by words."""
        if not self.first:
            return torch.arange(len(self.usable))
        return torch.from_numpy(np.sort(round_robin_order(self.first[0][0])[: _length(self.context)]))

    def cosines(self, common: int | None) -> Tensor:
        """Return the cosines of gradients on the shortlist, float32 [rows, usable target rows].

        Args:
            common: How many common directions are removed; None removes nothing.
        """
        return _columns(self.context, GRADIENTS, self.usable[self.shortlist.numpy()].tolist(), common)

    def scored(self, elsewhere: Tensor, on_it: Tensor, text: str) -> Scored:
        """Return scores from the similarities on the shortlist and elsewhere.

        Args:
            elsewhere: float32 [n, usable target rows]; the rows on the shortlist are not used.
            on_it: float32 [rows on the shortlist, usable target rows]; a row with a NaN has no score.
            text: The formula.
        """
        good = torch.ones(len(self.usable), dtype=torch.bool)
        good[self.shortlist] = on_it.isfinite().all(1)
        whole = elsewhere.index_copy(0, self.shortlist, on_it).nan_to_num(0.0)
        formula = {"name": self.context.config.method, "text": text}
        return from_similarity(self.context, whole, formula=formula, good=good, tokens=self.tokens())

    def elsewhere(self, columns: int) -> Tensor:
        """Return the mean rank by words of all rows, float32 [n, columns]; 0 if the rows contain no words.

        Args:
            columns: The number of usable target rows.
        """
        return self.first[0][0] if self.first else torch.zeros(len(self.usable), columns)

    def places(self) -> str:
        """Return how many rows are on the shortlist, in words."""
        return f"{len(self.shortlist):,} of {len(self.usable):,} rows"

    def tokens(self) -> int:
        """Return the tokens of the warm-up and of all gradients that are in the stores."""
        config = _at_stage(self.context.config, GRADIENTS, COMMON)
        found = scorer(GRADIENTS).work(replace(self.context, config=config))
        return round(sum(found.whole.values()) - sum(found.left.values()))


def _fusion(stages: Stages) -> Scored:
    """Score as `score` describes."""
    common = _common(stages.context.config)
    cosines = stages.cosines(common)
    signals = [*((one[stages.shortlist], weight) for one, weight in stages.first), (cosines, 1.0)]
    fused = 1 + fuse([one for one, _ in signals], [weight for _, weight in signals])
    rank = (
        "rank by the cosine of the optimizer's update with each target gradient, without the mean and the "
        f"{common} main directions of all updates"
    )
    text = (
        f"mean rank by TF-IDF and BM25; on {stages.places()}, 1 + the mean of this (weight {PRIOR:g}) and the {rank}"
        if stages.first
        else f"1 + the {rank}; no row holds a word, so that this ranks all {len(stages.usable):,} rows"
    )
    return stages.scored(stages.elsewhere(cosines.shape[1]), fused, text)


def _words_alone(stages: Stages) -> Scored | None:
    """Score by the first of `WORDS`; None if the rows contain no words."""
    if not stages.by_words:
        return None
    text = "cosine of TF-IDF vectors of pool row and target row"
    formula = {"name": stages.context.config.method, "text": text}
    return from_similarity(stages.context, stages.by_words[0], formula=formula, tokens=stages.tokens())


def _gradients_alone(stages: Stages) -> Scored:
    """Score the shortlist by its cosines as they are, and the other rows below it, by words."""
    cosines = stages.cosines(None)
    text = f"on {stages.places()}, cosine of the optimizer's update with each target gradient" + (
        "; elsewhere, the mean rank by TF-IDF and BM25, minus 2" if stages.first else ""
    )
    return stages.scored(stages.elsewhere(cosines.shape[1]) - 2, cosines, text)


def candidates() -> dict[str, Candidate]:
    """Return the table of the selections that `verify` compares, the fusion first."""
    words, gradients = known(WORDS[0]), known(GRADIENTS)
    return {
        "fusion": Candidate(METHOD, _fusion),
        "words alone": Candidate(
            replace(
                words,
                title="auto, words alone (TF-IDF)",
                meaning=f"{words.meaning} Target rows choose in turn, each by its own cosines.",
                selector=METHOD.selector,
            ),
            _words_alone,
        ),
        "gradients alone": Candidate(
            replace(
                gradients,
                title="auto, gradients alone (LESS on a shortlist)",
                meaning=f"{gradients.meaning} A row that is not on the shortlist scores below -1, by words alone.",
            ),
            _gradients_alone,
        ),
    }


shared = Stages


def _columns(context: Context, name: str, rows: Sequence[int], common: int | None) -> Tensor:
    """Return float32 [rows, usable target rows] by the method of one stage."""
    columns = scorer(name).columns
    assert columns is not None
    return columns(replace(context, config=_at_stage(context.config, name, common)), rows)


def _length(context: Context) -> int:
    """Return the number of rows on the shortlist."""
    rows = context.pool
    n, budget = int(rows.usable.sum()), Budget.parse(context.config.budget).resolve(scored.candidates(rows))
    mean = rows.tokens() / max(1, n)
    wanted = budget.rows if budget.rows is not None else ceil((budget.tokens or 0) / max(1.0, mean))
    return min(n, max(ceil(context.config.shortlist * n), SPARE * wanted, FEWEST))


def _common(config: SelectConfig) -> int:
    """Return the number of common directions that are removed for the fusion."""
    return COMMON if config.common is None else config.common


def _at_stage(config: SelectConfig, name: str, common: int | None) -> SelectConfig:
    """Return the settings for the method of one stage: by default, gradients are taken at one checkpoint."""
    features = config.features
    if features.checkpoints is None and config.warmup.checkpoints is None:
        features = features.model_copy(update={"checkpoints": "last"})
    return config.model_copy(update={"method": name, "features": features, "common": common})


def work(context: Context) -> Work:
    """Return the tokens of the warm-up and of the gradients of the shortlist, the sample and the target rows.

    With `verify`, the shortlists of the two halves of the target count too; that they are half as long again together
    is an estimate.

    Args:
        context: What is scored.
    """
    config = _at_stage(context.config, GRADIENTS, COMMON)
    found = scorer(GRADIENTS).work(replace(context, config=config))
    rows, sample = len(context.pool.unique()), len(common_rows(context.pool, context.config.seed))
    length = _length(context) * (HALVES if context.config.verify else 1)
    share = min(1.0, length / max(1, rows))
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
        scorer(name).check(_at_stage(config, name, COMMON))


def reuse(config: SelectConfig) -> list[str]:
    """Return the flags with which another selection uses the features of the shortlist.

    Args:
        config: The settings of the finished run.
    """
    return scorer(GRADIENTS).reuse(_at_stage(config, GRADIENTS, COMMON))


def nearest(asked: Asked) -> Tensor:
    """Return cosines of gradients, float32 [m], for a row on the shortlist, and of words for any other row.

    A candidate that was kept compares as it scores: by words alone, or by gradients as they are.

    Args:
        asked: The question.

    Raises:
        DataError: The row cannot be compared by words either.
    """
    for name, common in STANDS_ON.get(asked.candidate, ((GRADIENTS, _common(asked.config)), (WORDS[0], None))):
        found: Callable[[Asked], Tensor] | None = scorer(name).nearest
        assert found is not None
        try:
            return found(replace(asked, config=_at_stage(asked.config, name, common)))
        except DataError:
            if name == WORDS[0]:
                raise
    raise AssertionError


STANDS_ON = {
    "words alone": ((WORDS[0], None),),
    "gradients alone": ((GRADIENTS, None), (WORDS[0], None)),
}
"""Candidate -> the methods that `explain` compares with, and the common directions that are removed."""


def spaces(config: SelectConfig, folder: Path) -> list[Space]:
    """Return the features of the shortlist, as the method of the gradients does.

    Args:
        config: The settings of the finished run.
        folder: The folder of the run.
    """
    found = scorer(GRADIENTS).spaces
    assert found is not None
    return found(_at_stage(config, GRADIENTS, COMMON), folder)


def layers(asked: Asked, rows: list[int]) -> list[dict[str, Any]]:
    """Return the share of each layer, as the method of the gradients does; none where words alone were kept.

    Args:
        asked: The question.
        rows: Target rows.
    """
    methods = [name for name, _ in STANDS_ON.get(asked.candidate, ((GRADIENTS, None),))]
    if GRADIENTS not in methods:
        return []
    return scorer(GRADIENTS).layers(replace(asked, config=_at_stage(asked.config, GRADIENTS, COMMON)), rows)
