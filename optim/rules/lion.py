"""Lion: the sign of an interpolated momentum."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from optim.checks import checked_betas
from optim.moments import zero_moment, zero_step
from optim.optimizer import Optimizer, Params
from optim.rule import OfParam, State, UpdateRule


@dataclass(frozen=True, kw_only=True)
class LionRule(UpdateRule):
    """Lion: the sign of an interpolated momentum.

        u = sign(b1 m + (1 - b1) g),  then m <- b2 m + (1 - b2) g

    Because sign(0) = 0, coordinates that never had a gradient do not change. The authors recommend a learning rate 3 to
    10 times smaller and a weight decay 3 to 10 times larger than AdamW's, and betas (0.95, 0.98) for language models.
    If the interpolated momentum is as small as rounding errors, rounding determines its sign, and therefore
    trajectories in float32 are sensitive to it.

    Args:
        betas: (b1, b2), the weights of the interpolation and of the momentum.

    Shapes:
        Elementwise. The buffer has the parameter's shape.

    State:
        4 bytes per parameter (one float32 buffer) and a step count, which the update does not use.

    Source:
        Chen et al. 2023, arXiv 2302.06675, algorithm 2; google/automl and lucidrains/lion-pytorch agree bit for bit.

    Differs:
        With `decoupled_weight_decay=True`, lucidrains' code decays by wd lr / lr0; pass ``weight_decay=wd / lr0`` here.
    """

    name: ClassVar[str] = "lion"

    betas: tuple[float, float] = (0.9, 0.99)

    def __post_init__(self) -> None:
        object.__setattr__(self, "betas", checked_betas("LionRule", self.betas))

    def init(self, param: OfParam) -> State:
        """Return a zero buffer and a zero step count."""
        return {"step": zero_step(), "exp_avg": zero_moment(param)}

    def update(self, grad: OfParam, state: State, param: OfParam) -> tuple[OfParam, State]:
        """Return the direction u of the class docstring, -1, 0 or 1 in the buffer's dtype, and the new state."""
        b1, b2 = self.betas
        m = state["exp_avg"]
        g = grad.to(m.dtype)
        direction = (b1 * m).add(g, alpha=1 - b1).sign()
        return direction, {"step": state["step"] + 1, "exp_avg": (b2 * m).add(g, alpha=1 - b2)}


class Lion(Optimizer):
    """Lion for all parameters.

    Args:
        params: The model, its parameters (with or without names), or param groups, as for `Optimizer`.
        lr: Learning rate.
        betas: See `LionRule`.
        weight_decay: Decoupled weight decay.

    Example:
        >>> import torch
        >>> from optim import Lion
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Linear(8, 4)
        >>> optimizer = Lion(model.named_parameters(), lr=1e-3)
        >>> model(torch.ones(2, 8)).square().sum().backward()
        >>> optimizer.step()
        >>> sorted(optimizer.state[model.weight])
        ['exp_avg', 'step']
    """

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, LionRule(betas=betas), lr=lr, weight_decay=weight_decay)
