"""BM25: each target row is a query, and the rows of the pool are the documents that answer it; without a model."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from datatools import Bm25Statistics as Statistics
from datatools import bm25, large
from pipelines.rows.rows import Rows
from pipelines.select.scored import Context, Scored, from_similarity, spread, usable_among
from pipelines.select.scorer import Asked
from pipelines.select.words import Counted, asked_of
from pipelines.settings.methods import Method
from pipelines.settings.select import SelectConfig

METHOD = Method(
    summary="words shared with the target rows, weighted by how rare they are (BM25)",
    title="Text search (BM25)",
    meaning="The score says how well the row answers the target rows as search queries (BM25): rare words that both "
    "hold count most, repetitions and long rows count less; 1 would be the best that any row can reach. No model takes "
    "part.",
    label="text search",
    rows="rows picked by text search",
    needs=("target",),
    kind="similarity",
    nearest="target rows that it answers best",
    measure="share of the highest BM25",
    cost="seconds, without a model",
    limits="knows words, not what they mean; favours rows that repeat the target's rare words",
)


def score(context: Context) -> Scored:
    """Score whole rows, prompt and answer, by BM25 for each target row.

    Args:
        context: What is scored.

    Source:
        `datatools.bm25`. Differs: the words of a whole target row are the query, so a query is long.
    """
    config = context.config.bm25
    with context.run.stage("scores"):
        similarity = answers(context.pool, context.wanted, context.config)
    text = f"BM25 (k1={config.k1:g}, b={config.b:g}) of pool row for target rows as queries; no model is used"
    return from_similarity(context, similarity, formula={"name": "bm25", "text": text})


def columns(context: Context, rows: Sequence[int] | None = None) -> Tensor:
    """Return one column per target row, as `Scorer.columns` says; words are always counted over the whole pool.

    Args:
        context: What is scored.
        rows: Pool rows; None for all of them.
    """
    chosen, places, n = usable_among(context.pool, rows)
    return spread(answers(context.pool, context.wanted, context.config, chosen), places, n)


def nearest(asked: Asked) -> Tensor:
    """Return the row of `answers`, float32 [m], for the pool row in question.

    Args:
        asked: The question.
    """
    return answers(asked.pool, asked.target, asked.config, [asked.index])[0]


def answers(pool: Rows, target: Rows, config: SelectConfig, rows: Sequence[int] | None = None) -> Tensor:
    """Return BM25 of pool rows for target rows.

    Args:
        pool: The documents; their statistics are those of all usable rows.
        target: The queries.
        config: The settings; its `bm25` holds k1 and b.
        rows: Usable rows of the pool; None for all of them.

    Returns:
        float32 [rows, usable target rows].

    Raises:
        DataError: No row contains a word.
    """
    from scipy.sparse import vstack

    places = None if rows is None else np.searchsorted(np.flatnonzero(pool.usable), rows)
    asked_rows = int(pool.usable.sum()) if places is None else len(places)
    found = large.table(asked_rows, int(target.usable.sum()), None if pool.kept is None else pool.kept.folder)
    in_order = None if places is None else np.argsort(places, kind="stable")
    done, how = 0, config.bm25
    with Counted(pool, target, "bm25", pairs=False, every=False) as counted:
        vocabulary = counted.vocabulary
        queries = vstack([vocabulary.matrix(block, block.count) for block in counted.target])
        holding = vocabulary.rows_with(counted.frequencies)
        statistics = Statistics(len(counted.lengths), float(counted.lengths.mean()), holding)
        for block in counted.blocks():
            asked = asked_of(block, None if places is None or in_order is None else places[in_order])
            if len(asked):
                texts = vocabulary.matrix(block, block.count)[asked]
                at = slice(done, done + len(asked)) if in_order is None else in_order[done : done + len(asked)]
                found[at] = torch.from_numpy(
                    bm25(texts, queries, k1=how.k1, b=how.b, of=statistics, lengths=block.lengths[asked])
                )
                done += len(asked)
                large.release(found)
    return found
