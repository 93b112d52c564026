"""Loss: the rows that the model finds hardest."""

from __future__ import annotations

import numpy as np
import torch

from pipelines.models.losses import row_losses
from pipelines.runs.progress import progress
from pipelines.select.scored import Context, Scored, no_scores
from pipelines.select.scorer import Work
from pipelines.settings.methods import Method

METHOD = Method(
    summary="rows on which the model's loss is highest",
    title="Model loss",
    meaning="The score is the model's own mean loss on the row's answer: the rows that it finds hardest come first; "
    "the target rows take no part.",
    label="model loss",
    needs=("model",),
    forward=("pool",),
    cost="one forward pass per row of the pool",
    limits="does not look at the target; noise has a high loss, too",
)


def score(context: Context) -> Scored:
    """The row's own mean loss under the model: the rows that it finds hardest come first.

    Source: the perplexity baseline of Yin & Rush 2024, arXiv 2410.16208 ("top" variant).
    """
    loaded = context.model()
    pool = context.pool
    chosen = np.flatnonzero(pool.usable).tolist()
    lengths = [int(pool.scan.tokens[i]) for i in chosen]
    scores = no_scores(pool)
    with (
        context.run.stage("losses"),
        progress("losses of the pool", sum(lengths), "tokens") as bar,
        torch.inference_mode(),
    ):
        budget = context.config.features.token_budget
        for group, batch in pool.micro_batches(chosen, budget, loaded.model.device):
            values = row_losses(loaded.model, batch)
            scores[torch.tensor([chosen[i] for i in group])] = values.float().cpu()
            bar.advance(sum(lengths[i] for i in group))
    status = {i: "nonfinite" for i in chosen if not scores[i].isfinite()}
    return Scored(
        scores=scores,
        status=status,
        tokens=sum(lengths),
        formula={"name": "loss", "text": "mean loss of the row's own answer tokens"},
    )


def work(context: Context) -> Work:
    """All tokens of the pool: losses are not kept."""
    tokens = {"losses of the pool": float(context.pool.tokens())}
    return Work(tokens, tokens)
