"""TACS: the rows whose loss falls most when the model is adapted to the target, as a share of the loss before."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from pipelines.select import drops
from pipelines.select.scored import Context, Scored
from pipelines.settings.methods import Method

METHOD = Method(
    summary="rows whose loss falls by the largest share when the model is adapted to the target (TACS)",
    title="Relative loss drop (TACS)",
    meaning="The model takes a few steps on the target rows; the score is the share of this row's loss that they take "
    "away: 0.01 is one percent of it. Above zero: learning the target helps with this row; no gradient of the pool "
    "takes part.",
    label="relative loss drop",
    rows="rows picked by relative loss drop",
    needs=("target", "model"),
    forward=("pool", "pool"),
    walks=True,
    stored=True,
    cost="two forward passes per row of the pool (one for each further target), and a few steps on the target",
    limits="favours short answers, of which one token carries the whole drop (adaptation.length)",
)


def score(context: Context) -> Scored:
    """Score by (l_0(z) - l_T(z)) / l_0(z), where l_T is the mean loss of the row's answer after T steps on the target.

    Args:
        context: What is scored.

    Source:
        TACS, arXiv 2605.09404. Differs: l_0 is the loss of the model itself, which all targets share; the paper uses
        the loss after the first step. See `adaptation` for the steps.
    """
    return drops.scored(context, name="tacs", relative=True)


def columns(context: Context, rows: Sequence[int] | None = None) -> Tensor:
    """Return one column per adapter, as `Scorer.columns` says.

    Args:
        context: What is scored.
        rows: Pool rows; None for all of them.
    """
    return drops.columns_of(context, rows, relative=True)


def groups(context: Context) -> tuple[list[str], Tensor]:
    """Return the names and groups of the columns, as `Scorer.groups` says.

    Args:
        context: What is scored.
    """
    return drops.groups_of(drops.setup_of(context))


work = drops.work
reuse = drops.reuse
tokens = drops.tokens
