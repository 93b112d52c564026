"""APOLLO: the gradient, scaled as Adam would scale a random projection of it."""

from dataclasses import dataclass
from typing import ClassVar

from optim.rules.wrappers.low_rank import LowRank, LowRankOptimizer


@dataclass(frozen=True, kw_only=True)
class ApolloRule(LowRank):
    """APOLLO: the gradient, with each row or column scaled as Adam would scale a random projection of it.

    The formulas are those of `LowRank`. APOLLO-Mini is ``rank=1, scale=128.0, scale_type="tensor"``.

    Args:
        projection, form, scale: See `LowRank`, as for the inherited settings.

    State:
        At most 8 bytes per parameter, which is 8 r / p for rank r, where p is the smaller side of the matrix. In
        addition, 8 bytes per matrix.

    Source:
        Zhu et al. 2024, arXiv 2412.05270; zhuhanqing/APOLLO.
    """

    name: ClassVar[str] = "apollo"

    projection: str = "random"
    form: str = "scale"
    scale: float = 1.0


class Apollo(LowRankOptimizer):
    """APOLLO for hidden matrices and AdamW for the rest. The published learning rate is 0.01.

    Args:
        named_parameters: The model or its named parameters, as for `MatrixOptimizer`.
        lr: Learning rate of the hidden matrices.
        weight_decay: Decoupled weight decay of the hidden matrices.
        options: Fields of `LowRank`, and the keywords of `MatrixOptimizer`.

    Example:
        >>> import torch
        >>> from optim import Apollo
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Linear(8, 4)
        >>> optimizer = Apollo(model.named_parameters(), lr=1e-3)
        >>> model(torch.ones(2, 8)).square().sum().backward()
        >>> optimizer.step()
        >>> sorted(optimizer.state[model.weight])
        ['exp_avg', 'exp_avg_sq', 'limited', 'number', 'step']
    """

    rule: ClassVar[type[LowRank]] = ApolloRule
