"""auto: from coarse to fine, so that gradients are computed for the most promising rows only.

From top to bottom: words and the length of answers choose a shortlist; a short warm-up gives one checkpoint; there, the
optimizer's updates of the shortlist are compared with the gradients of the target rows; and rows are taken so that
every target row is covered, by gradients and words.
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
    summary="words and answer lengths choose a shortlist, gradients and words rank it; every target row is covered",
    title="auto (words, then gradients)",
    meaning="The score of a row on the shortlist says how well the update that it would cause agrees with the "
    "gradients of the target rows, plus how alike the words are: 2 is average, 0 is no agreement. Any other row scores "
    "below -1, by its words and the length of its answer. Rows are taken so that every target row is covered.",
    label="auto",
    needs=("target", "model", "gradients"),
    selector="coverage",
    passes=0.25,
    candidates=("fusion", "words alone", "gradients alone"),
    stored=True,
    nearest="target rows it helps most",
    measure="cosine, of gradients on the shortlist and of words elsewhere",
    cost="a warm-up run, then forward and backward of about a quarter of the rows, at one checkpoint",
    limits="a row whose words and answer length are unlike every target row's is not looked at closely",
)

WORDS, GRADIENTS = ("tfidf", "bm25"), "less"
"""The methods of the two stages."""

LENGTHS = 2
"""The weight of the answer's length in the choice of the shortlist; that of each method of words is 1."""

SPARE, FEWEST = 3, 256
"""The minimum size of the shortlist: rows per row of the budget, and rows in total, if the pool has that many."""

HALVES = 1.5
"""With `verify`, the rows on any of the three shortlists, as a multiple of one."""


def score(context: Context) -> Scored:
    """Shortlist by words and answer lengths, then compare gradients and words on the shortlist.

    With r_s(i, j) the rank of row i for target row j by the similarity s, as a share of all rows, and a the number of
    supervised tokens: first_ij = (r_tfidf + r_bm25 + 2 r_length) / 4, s_length = -|log(1 + a_i) - log(1 + a_j)|.
    Target rows take turns to choose the shortlist by it. On the shortlist,
    s_ij = max(0, cos_ij) / mean(max(0, cos)) + tfidf_ij / mean(tfidf), where cos is the cosine of `less` at one
    checkpoint and the means are over rows of the shortlist and target rows; elsewhere s_ij = first_ij - 2. The selector
    `coverage` takes rows by s.

    Args:
        context: What is scored.

    Source:
        Cascades of rankers (Wang et al. 2011, SIGIR); TF-IDF, BM25 and LESS (arXiv 2402.04333) as in their own files;
        the coverage of target rows as in `datatools.selection.coverage`. The use of answer lengths and this
        combination are the project's own.
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
                return [_columns(self.context, name, self.usable.tolist()) for name in WORDS]
            except DataError:
                warn("auto: no row holds a word, so that words choose no shortlist: gradients of all rows are computed")
                return []

    @cached_property
    def first(self) -> Tensor | None:
        """The mean rank by words and answer lengths, float32 [n, usable target rows]; None without words."""
        if not self.by_words:
            return None
        own, theirs = (
            np.log1p(rows.scan.supervised[rows.usable].astype(np.float64))
            for rows in (self.context.pool, self.context.wanted)
        )
        lengths = torch.from_numpy(-np.abs(own[:, None] - theirs[None])).float()
        return fuse([*self.by_words, lengths], [*(1 for _ in WORDS), LENGTHS])

    @cached_property
    def shortlist(self) -> Tensor:
        """The positions, among usable rows, of those whose gradients are computed: target rows take turns."""
        if self.first is None:
            return torch.arange(len(self.usable))
        return torch.from_numpy(np.sort(round_robin_order(self.first)[: _length(self.context)]))

    @cached_property
    def cosines(self) -> Tensor:
        """The cosines of gradients on the shortlist, float32 [rows, usable target rows]."""
        return _columns(self.context, GRADIENTS, self.usable[self.shortlist.numpy()].tolist())

    def scored(self, on_it: Tensor, text: str) -> Scored:
        """Return scores from the similarities on the shortlist; elsewhere, they are those of the first stage, minus 2.

        Args:
            on_it: float32 [rows on the shortlist, usable target rows]; a row with a NaN has no score.
            text: The formula on the shortlist.
        """
        good = torch.ones(len(self.usable), dtype=torch.bool)
        good[self.shortlist] = on_it.isfinite().all(1)
        elsewhere = torch.zeros(len(self.usable), on_it.shape[1]) if self.first is None else self.first - 2
        whole = elsewhere.index_copy(0, self.shortlist, on_it).nan_to_num(0.0)
        if self.first is not None:
            places = f"{len(self.shortlist):,} of {len(self.usable):,} rows"
            text = f"on {places}, {text}; elsewhere, the mean rank by TF-IDF, BM25 and answer length, minus 2"
        formula = {"name": self.context.config.method, "text": text}
        return from_similarity(self.context, whole, formula=formula, good=good, tokens=self.tokens())

    def tokens(self) -> int:
        """Return the tokens of the warm-up and of all gradients that are in the stores."""
        config = _at_stage(self.context.config, GRADIENTS)
        found = scorer(GRADIENTS).work(replace(self.context, config=config))
        return round(sum(found.whole.values()) - sum(found.left.values()))


def _fusion(stages: Stages) -> Scored:
    """Score as `score` describes."""
    text = "the cosine of the optimizer's update with each target gradient"
    if not stages.by_words:
        return stages.scored(_by_its_mean(stages.cosines), f"{text}, divided by its mean; no row holds a word")
    found = _by_its_mean(stages.cosines) + _by_its_mean(stages.by_words[0][stages.shortlist])
    return stages.scored(found, f"{text}, plus the cosine of TF-IDF vectors, each divided by its mean")


def _by_its_mean(similarity: Tensor) -> Tensor:
    """Return max(0, s) / mean(max(0, s)), of the shape of s; NaN stays and is not in the mean."""
    held = similarity.clamp(min=0)
    mean = held.nanmean()
    return held / mean if mean > 0 else held


def _words_alone(stages: Stages) -> Scored | None:
    """Score by the first of `WORDS`; None if the rows contain no words."""
    if not stages.by_words:
        return None
    text = "cosine of TF-IDF vectors of pool row and target row"
    formula = {"name": stages.context.config.method, "text": text}
    return from_similarity(stages.context, stages.by_words[0], formula=formula, tokens=stages.tokens())


def _gradients_alone(stages: Stages) -> Scored:
    """Score the shortlist by its cosines as they are, and the other rows below it, as in the first stage."""
    return stages.scored(stages.cosines, "the cosine of the optimizer's update with each target gradient")


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
                selector="round_robin",
            ),
            _words_alone,
        ),
        "gradients alone": Candidate(
            replace(
                gradients,
                title="auto, gradients alone (LESS on a shortlist)",
                meaning=f"{gradients.meaning} A row that is not on the shortlist scores below -1, by its words and "
                "the length of its answer.",
            ),
            _gradients_alone,
        ),
    }


shared = Stages


def _columns(context: Context, name: str, rows: Sequence[int]) -> Tensor:
    """Return float32 [rows, usable target rows] by the method of one stage."""
    columns = scorer(name).columns
    assert columns is not None
    return columns(replace(context, config=_at_stage(context.config, name)), rows)


def _length(context: Context) -> int:
    """Return the number of rows on the shortlist."""
    rows = context.pool
    n, budget = int(rows.usable.sum()), Budget.parse(context.config.budget).resolve(scored.candidates(rows))
    mean = rows.tokens() / max(1, n)
    wanted = budget.rows if budget.rows is not None else ceil((budget.tokens or 0) / max(1.0, mean))
    return min(n, max(ceil(context.config.shortlist * n), SPARE * wanted, FEWEST))


def _at_stage(config: SelectConfig, name: str) -> SelectConfig:
    """Return the settings for the method of one stage: by default, gradients are taken at one checkpoint."""
    features = config.features
    if features.checkpoints is None and config.warmup.checkpoints is None:
        features = features.model_copy(update={"checkpoints": "last"})
    return config.model_copy(update={"method": name, "features": features})


def work(context: Context) -> Work:
    """Return the tokens of the warm-up and of the gradients of the shortlist, the sample and the target rows.

    With `verify`, the shortlists of the two halves of the target count too; that they are half as long again together
    is an estimate.

    Args:
        context: What is scored.
    """
    config = _at_stage(context.config, GRADIENTS)
    found = scorer(GRADIENTS).work(replace(context, config=config))
    rows = len(context.pool.unique())
    sample = 0 if config.common is None else len(common_rows(context.pool, config.seed))
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
        scorer(name).check(_at_stage(config, name))


def reuse(config: SelectConfig) -> list[str]:
    """Return the flags with which another selection uses the features of the shortlist.

    Args:
        config: The settings of the finished run.
    """
    return scorer(GRADIENTS).reuse(_at_stage(config, GRADIENTS))


def nearest(asked: Asked) -> Tensor:
    """Return cosines of gradients, float32 [m], for a row on the shortlist, and of words for any other row.

    The candidate "words alone" compares by words, as it scores.

    Args:
        asked: The question.

    Raises:
        DataError: The row cannot be compared by words either.
    """
    for name in STANDS_ON.get(asked.candidate, (GRADIENTS, WORDS[0])):
        found: Callable[[Asked], Tensor] | None = scorer(name).nearest
        assert found is not None
        try:
            return found(replace(asked, config=_at_stage(asked.config, name)))
        except DataError:
            if name == WORDS[0]:
                raise
    raise AssertionError


STANDS_ON = {"words alone": (WORDS[0],)}
"""Candidate -> the methods that `explain` compares with; any other compares gradients, and words without gradients."""


def spaces(config: SelectConfig, folder: Path) -> list[Space]:
    """Return the features of the shortlist, as the method of the gradients does.

    Args:
        config: The settings of the finished run.
        folder: The folder of the run.
    """
    found = scorer(GRADIENTS).spaces
    assert found is not None
    return found(_at_stage(config, GRADIENTS), folder)


def layers(asked: Asked, rows: list[int]) -> list[dict[str, Any]]:
    """Return the share of each layer, as the method of the gradients does; none where words alone were kept.

    Args:
        asked: The question.
        rows: Target rows.
    """
    if GRADIENTS not in STANDS_ON.get(asked.candidate, (GRADIENTS,)):
        return []
    return scorer(GRADIENTS).layers(replace(asked, config=_at_stage(asked.config, GRADIENTS)), rows)
