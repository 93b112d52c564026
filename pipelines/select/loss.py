"""Loss: the rows that the model finds hardest."""

from __future__ import annotations

import numpy as np

from pipelines.select.losses import folder_of, losses
from pipelines.select.scored import Context, Scored, no_scores
from pipelines.select.scorer import Work
from pipelines.select.stores import tokens_of
from pipelines.settings.methods import Method
from pipelines.settings.select import SelectConfig

METHOD = Method(
    summary="rows on which the model's loss is highest",
    title="Model loss",
    meaning="The score is the model's own mean loss on the row's answer: the rows that it finds hardest come first; "
    "the target rows take no part.",
    label="model loss",
    needs=("model",),
    forward=("pool",),
    stored=True,
    cost="one forward pass per row of the pool",
    limits="does not look at the target; noise has a high loss, too",
)


def score(context: Context) -> Scored:
    """Score rows by the model's own mean loss on their answers: the hardest rows come first.

    Args:
        context: What is scored.

    Source:
        The perplexity baseline of Yin & Rush 2024, arXiv 2410.16208 ("top" variant).
    """
    pool = context.pool
    chosen = np.flatnonzero(pool.usable).tolist()
    scores = no_scores(pool)
    with context.run.stage("losses"):
        scores[chosen] = losses(context, "pool", pool, chosen)
    status = {i: "nonfinite" for i in chosen if not scores[i].isfinite()}
    return Scored(
        scores=scores,
        status=status,
        tokens=pool.tokens(),
        formula={"name": "loss", "text": "mean loss of the row's own answer tokens"},
    )


def work(context: Context) -> Work:
    """Return the tokens of the rows, and of those whose losses are not kept yet.

    Args:
        context: What is scored.
    """
    whole, left = tokens_of(context.pool, folder_of(context, "pool"))
    return Work({"losses of the pool": whole}, {"losses of the pool": left})


def reuse(config: SelectConfig) -> list[str]:
    """Return the flags with which another selection uses the losses of this run.

    Args:
        config: The settings of the finished run.
    """
    return [f"--set features.folder={config.features.folder or config.out / 'features'}"]
