"""GaLore: Adam on a projection of each gradient onto its first singular vectors."""

from dataclasses import dataclass
from typing import ClassVar

from optim.rules.wrappers.low_rank import LowRank, LowRankOptimizer


@dataclass(frozen=True, kw_only=True)
class GaLoreRule(LowRank):
    """GaLore: Adam in the space of each gradient's first singular vectors.

    The formulas and settings are those of `LowRank`.

    State:
        At most 12 bytes per parameter, which is (8 q r + 4 p r) / (p q) for rank r, where p is the smaller and q the
        larger side of the matrix.

    Source:
        Zhao et al. 2024, arXiv 2403.03507; jiaweizzhao/GaLore.
    """

    name: ClassVar[str] = "galore"


class GaLore(LowRankOptimizer):
    """GaLore for hidden matrices and AdamW for the rest. The published learning rate is 0.01.

    Args:
        named_parameters: The model or its named parameters, as for `MatrixOptimizer`.
        lr: Learning rate of the hidden matrices.
        weight_decay: Decoupled weight decay of the hidden matrices.
        options: Fields of `LowRank`, and the keywords of `MatrixOptimizer`.

    Example:
        >>> import torch
        >>> from optim import GaLore
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Linear(8, 4)
        >>> optimizer = GaLore(model.named_parameters(), lr=1e-3)
        >>> model(torch.ones(2, 8)).square().sum().backward()
        >>> optimizer.step()
        >>> sorted(optimizer.state[model.weight])
        ['basis', 'exp_avg', 'exp_avg_sq', 'step']
    """

    rule: ClassVar[type[LowRank]] = GaLoreRule
