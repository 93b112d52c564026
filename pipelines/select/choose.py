"""From scores to the chosen rows: by the selector, the budget and the caps of a run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from datatools import SELECTORS, Budget, Candidates, DataError, Selection, UsageError, select
from pipelines.runs.seeds import derive_seed
from pipelines.select import targets
from pipelines.select.scored import Context, Scored, candidates
from pipelines.settings.methods import known


def choose(context: Context, scored: Scored) -> Selection:
    """Return the selection by this run's scores, selector, budget and caps.

    Args:
        context: What was scored.
        scored: The scores.

    Raises:
        UsageError: The selector needs similarities that the method does not keep.
        DataError: The selector needs scores and no row has one.
    """
    config = context.config
    if config.targets.share != "no":
        return targets.choose(context, scored)
    options: dict[str, Any] = {"seed": derive_seed(config.seed, "selection"), "max_per_source": config.max_per_source}
    name = config.selector or (scored.record or known(config.method)).selector
    rows = candidates(context.pool, scored, context.target if SELECTORS[name].similarity else None)
    if SELECTORS[name].reference:
        return _like_the_target(name, rows, _target_lengths(context), config.budget, **options)
    if SELECTORS[name].similarity and rows.similarity is None:
        raise UsageError(
            f"--selector {name} chooses by the similarity to each target row, and --method {config.method} keeps no "
            "similarity to each of them; leave the selector out, or use a method that does, such as tfidf, rds or less"
        )
    if SELECTORS[name].scores and not scored.scores.isfinite().any():
        raise DataError("no row of the pool has a finite score; see the statuses in scores.parquet")
    return select(name, rows, config.budget, **options)


def _target_lengths(context: Context) -> Sequence[int]:
    target = context.wanted
    return [int(n) for n in target.scan.supervised[target.usable]]


def _like_the_target(
    name: str, candidates: Candidates, lengths: Sequence[int], budget: str, **options: Any
) -> Selection:
    """Select by a selector with a reference: target rows with these answer lengths, which need not be in the pool."""
    assert candidates.supervised is not None and candidates.tokens is not None
    n, m = len(candidates), len(lengths)
    # the selector matches rows among its candidates, so the wanted lengths are added as rows that are not eligible
    wider = Candidates(
        keys=[*candidates.keys, *(f"~{i}" for i in range(m))],
        sources=[*candidates.sources, *([""] * m)],
        tokens=torch.cat([candidates.tokens, torch.ones(m, dtype=torch.int64)]),
        supervised=torch.cat([candidates.supervised, torch.tensor(lengths, dtype=torch.int64)]),
        eligible=torch.cat([candidates.eligible, torch.zeros(m, dtype=torch.bool)]),
    )
    resolved = Budget.parse(budget).resolve(candidates)  # a share of the pool, not of the pool and the target
    asked = f"{resolved.rows}" if resolved.rows is not None else f"{resolved.tokens} tokens"
    return select(name, wider, asked, reference=Selection(torch.arange(n, n + m)), **options)
