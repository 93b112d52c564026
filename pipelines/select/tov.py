"""ToV: the rows whose loss falls most when the model is adapted to the target, by the difference of losses."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from pipelines.select import drops
from pipelines.select.scored import Context, Scored
from pipelines.settings.methods import Method

METHOD = Method(
    summary="rows whose loss falls when the model is adapted to the target (ToV)",
    title="Loss drop (ToV)",
    meaning="The model takes a few steps on the target rows; the score is how far the loss of this row's answer falls "
    "along them. Above zero: learning the target helps with this row, so the two have something in common; no gradient "
    "of the pool takes part.",
    label="loss drop",
    rows="rows picked by loss drop",
    needs=("target", "model"),
    forward=("pool", "pool"),
    walks=True,
    stored=True,
    cost="two forward passes per row of the pool (one for each further target), and a few steps on the target",
    limits="favours rows with a high loss to lose; answer length decides much (adaptation.length)",
)


def score(context: Context) -> Scored:
    """Score by l_0(z) - l_T(z), where l_T is the mean loss of the row's answer after T steps on the target.

    Args:
        context: What is scored.

    Source:
        ToV, arXiv 2510.00386. Differs: the paper adds the drops from several checkpoints of a warm-up on the pool, each
        adapted for one epoch; here, the only start is the model itself, and the adaptation is that of `tacs`.
    """
    return drops.scored(context, name="tov", relative=False)


def columns(context: Context, rows: Sequence[int] | None = None) -> Tensor:
    """Return one column per adapter, as `Scorer.columns` says.

    Args:
        context: What is scored.
        rows: Pool rows; None for all of them.
    """
    return drops.columns_of(context, rows, relative=False)


def groups(context: Context) -> tuple[list[str], Tensor]:
    """Return the names and groups of the columns, as `Scorer.groups` says.

    Args:
        context: What is scored.
    """
    return drops.groups_of(drops.setup_of(context))


work = drops.work
reuse = drops.reuse
tokens = drops.tokens
