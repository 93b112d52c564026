"""SinkGD: the gradient with rows and columns normalised in turn, without state; and similar normalisations."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from optim.checks import check_counts, check_non_negative
from optim.linalg import NORMS, multi_normalised
from optim.moments import moment_dtype
from optim.param_groups import NamedParams
from optim.rule import OfParam, State
from optim.rules.matrices import MatrixOptimizer, MatrixRule


@dataclass(frozen=True, kw_only=True)
class SinkGDRule(MatrixRule):
    """SinkGD: the gradient after alternating normalisations, without state.

        u = alpha X

    Here X is the gradient after `rounds` rounds of `norms` (`optim.linalg.multi_normalised`). A zero row stays zero. In
    a matrix with a single row or column, entries become +-1. Steps do not shrink near an optimum, so that the learning
    rate has to decrease.

    Args:
        norms: The normalisations of a round, in their order. The default, ("row", "column"), is SinkGD: five times,
            rows are scaled to an l2 norm of sqrt(n), and then columns to sqrt(m). Other norms ("spectral", "sign") and
            orders give the general scheme (MNGD).
        rounds: The number of rounds.
        alpha: A factor of the direction.

    Shapes:
        Matrices [m, n]; not elementwise.

    State:
        0 bytes per parameter, and a step count.

    Source:
        Scetbon et al. 2025, arXiv 2502.06742.

    Differs:
        `alpha` scales the update but not weight decay, which is not part of the method.
    """

    name: ClassVar[str] = "sinkgd"

    alpha: float = 0.05
    rounds: int = 5
    norms: tuple[str, ...] = ("row", "column")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_non_negative("SinkGDRule", alpha=self.alpha)
        check_counts("SinkGDRule", rounds=self.rounds)
        norms = self.norms
        if isinstance(norms, str) or not isinstance(norms, Sequence) or not norms or not set(norms) <= set(NORMS):
            raise ValueError(f"SinkGDRule: norms = {norms!r}; expected some of {', '.join(NORMS)}")
        object.__setattr__(self, "norms", tuple(norms))

    def update(self, grad: OfParam, state: State, param: OfParam) -> tuple[OfParam, State]:
        """Return the direction u of the class docstring and the new state.

        The direction is in float32, or in the parameter's dtype if that is larger.
        """
        stacks = self.stacks(grad.to(moment_dtype(param)))
        stacks = [multi_normalised(x, norms=self.norms, rounds=self.rounds) for x in stacks]
        return self.directed([self.alpha * x for x in stacks], grad.shape), {"step": state["step"] + 1}


class SinkGD(MatrixOptimizer):
    """SinkGD for hidden matrices, at `alpha` times the learning rate, and AdamW for the rest.

    Args:
        named_parameters: The model or its named parameters, as for `MatrixOptimizer`.
        lr: Learning rate of the hidden matrices.
        weight_decay: Decoupled weight decay of the hidden matrices.
        options: Fields of `SinkGDRule`, and the keywords of `MatrixOptimizer`.

    Example:
        >>> import torch
        >>> from optim import SinkGD
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Linear(8, 4)
        >>> optimizer = SinkGD(model.named_parameters(), lr=1e-3)
        >>> model(torch.ones(2, 8)).square().sum().backward()
        >>> optimizer.step()
        >>> sorted(optimizer.state[model.weight])
        ['step']
    """

    def __init__(
        self,
        named_parameters: NamedParams,
        lr: float | Tensor = 0.02,
        weight_decay: float = 0.0,
        **options: Any,
    ) -> None:
        super().__init__(named_parameters, SinkGDRule, lr, weight_decay, **options)
