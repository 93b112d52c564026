"""APOLLO: the gradient, scaled by what Adam does to a random projection of it."""

from dataclasses import dataclass
from typing import ClassVar

from optim.rules.wrappers.low_rank import LowRank, LowRankOptimizer


@dataclass(frozen=True, kw_only=True)
class ApolloRule(LowRank):
    """APOLLO: the gradient itself, each row or column scaled as Adam would scale a random projection of it.

    `LowRank` has the formulas and settings; APOLLO-Mini is ``rank=1, scale=128.0, scale_type="tensor"``.

    State: at most 8 bytes a parameter, 8 r / p at rank r, p the smaller side of the matrix, and 8 a matrix.
    Source: Zhu et al. 2024, arXiv 2412.05270; zhuhanqing/APOLLO.
    """

    name: ClassVar[str] = "apollo"

    projection: str = "random"
    form: str = "scale"
    scale: float = 1.0


class Apollo(LowRankOptimizer):
    """Hidden matrices by `ApolloRule`, the rest by AdamW; see `LowRank`. The published learning rate is 0.01."""

    rule: ClassVar[type[LowRank]] = ApolloRule
