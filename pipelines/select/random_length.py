"""Random rows whose answers are as long as those of the target: distinguishes "better" from "longer"."""

from pipelines.select.scored import Context, Scored, no_scores
from pipelines.settings.methods import Method

METHOD = Method(
    summary="at random, with answers as long as those of the target rows",
    title="Length-matched random rows",
    meaning="Rows drawn at random so that their answers are as long as those of the target: what choosing by length "
    "alone would bring.",
    label="random, same lengths",
    rows="random rows of the same lengths",
    kind="baseline",
    matches_length=True,
    selector="random_length",
    cost="nothing",
    limits="looks only at how long answers are",
)


def score(context: Context) -> Scored:
    """Return no scores: rows are drawn with the answer lengths of the target rows (in an audit, of the selection).

    Args:
        context: What is scored.
    """
    return Scored(
        scores=no_scores(context.pool),
        formula={"name": "random-length", "text": "rows at random, answers as long as those of the target rows"},
    )
