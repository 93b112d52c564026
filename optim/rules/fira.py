"""Fira: GaLore plus the scaled remainder of the gradient."""

from dataclasses import dataclass
from typing import ClassVar

from optim.rules.wrappers.low_rank import LowRank, LowRankOptimizer


@dataclass(frozen=True, kw_only=True)
class FiraRule(LowRank):
    """Fira: GaLore plus the part of the gradient that the projection omits, scaled as Adam scales the projection.

    The formulas are those of `LowRank`.

    Args:
        form: See `LowRank`, as for the inherited settings.

    State:
        At most 12 bytes per parameter, which is (8 q r + 4 p r) / (p q) for rank r, where p is the smaller and q the
        larger side of the matrix. In addition, 4 bytes per matrix.

    Source:
        Chen et al. 2024, arXiv 2410.01623; xichen-fy/Fira.
    """

    name: ClassVar[str] = "fira"

    form: str = "residual"


class Fira(LowRankOptimizer):
    """Fira for hidden matrices and AdamW for the rest. The published learning rate is 0.01.

    Args:
        named_parameters: The model or its named parameters, as for `MatrixOptimizer`.
        lr: Learning rate of the hidden matrices.
        weight_decay: Decoupled weight decay of the hidden matrices.
        options: Fields of `LowRank`, and the keywords of `MatrixOptimizer`.

    Example:
        >>> import torch
        >>> from optim import Fira
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Linear(8, 4)
        >>> optimizer = Fira(model.named_parameters(), lr=1e-3)
        >>> model(torch.ones(2, 8)).square().sum().backward()
        >>> optimizer.step()
        >>> sorted(optimizer.state[model.weight])
        ['basis', 'exp_avg', 'exp_avg_sq', 'limited', 'step']
    """

    rule: ClassVar[type[LowRank]] = FiraRule
