"""Random rows: the baseline that every method has to outperform."""

from pipelines.select.scored import Context, Scored, no_scores
from pipelines.settings.methods import Method

METHOD = Method(
    summary="uniformly at random",
    title="Random rows",
    meaning="Rows drawn at random, every one with the same chance: the baseline that a method has to beat.",
    label="random",
    rows="random rows",
    kind="baseline",
    selector="random",
    cost="nothing",
    limits="knows nothing of model and target",
)


def score(context: Context) -> Scored:
    """Return no scores: rows are drawn uniformly.

    Args:
        context: What is scored.
    """
    return Scored(
        scores=no_scores(context.pool),
        formula={"name": "random", "text": "every usable row has the same chance"},
    )
