"""Fira: GaLore with the rest of the gradient, scaled."""

from dataclasses import dataclass
from typing import ClassVar

from optim.rules.wrappers.low_rank import LowRank, LowRankOptimizer


@dataclass(frozen=True, kw_only=True)
class FiraRule(LowRank):
    """Fira: GaLore, with what the projection leaves of the gradient beside it, scaled as Adam scales the projection.

    `LowRank` has the formulas and settings.

    State: at most 12 bytes a parameter, (8 q r + 4 p r) / (p q) at rank r, and 4 a matrix.
    Source: Chen et al. 2024, arXiv 2410.01623; xichen-fy/Fira.
    """

    name: ClassVar[str] = "fira"

    form: str = "residual"


class Fira(LowRankOptimizer):
    """Hidden matrices by `FiraRule`, the rest by AdamW; see `LowRank`. The published learning rate is 0.01."""

    rule: ClassVar[type[LowRank]] = FiraRule
