"""GaLore: Adam on a projection of each gradient by its first singular vectors."""

from dataclasses import dataclass
from typing import ClassVar

from optim.rules.wrappers.low_rank import LowRank, LowRankOptimizer


@dataclass(frozen=True, kw_only=True)
class GaLoreRule(LowRank):
    """GaLore: Adam in the space of each gradient's first singular vectors.

    `LowRank` has the formulas and settings.

    State: at most 12 bytes a parameter, (8 q r + 4 p r) / (p q) at rank r, p the smaller side of the matrix, q the
    larger.
    Source: Zhao et al. 2024, arXiv 2403.03507; jiaweizzhao/GaLore.
    """

    name: ClassVar[str] = "galore"


class GaLore(LowRankOptimizer):
    """Hidden matrices by `GaLoreRule`, the rest by AdamW; see `LowRank`. The published learning rate is 0.01."""

    rule: ClassVar[type[LowRank]] = GaLoreRule
