"""SignSGD: the sign of the gradient, or of its momentum (Signum)."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from optim.checks import check_unit_interval
from optim.moments import moment_dtype, zero_moment, zero_step
from optim.optimizer import Optimizer, Params
from optim.rule import OfParam, State, UpdateRule


@dataclass(frozen=True, kw_only=True)
class SignSGDRule(UpdateRule):
    """SignSGD with momentum (Signum): the sign of the averaged gradient.

        u = sign(m),  m <- momentum m + (1 - momentum) g

    Here sign(0) = 0. If m is as small as rounding errors, rounding determines its sign, and therefore trajectories in
    float32 are sensitive to it.

    Args:
        momentum: The decay rate of m. 0 is signSGD, which stores no average.

    Shapes:
        Elementwise. The average has the parameter's shape.

    State:
        4 bytes per parameter (one float32 average; 0 without momentum) and a step count, which the update does not use.

    Source:
        Bernstein et al. 2018, arXiv 1802.04434, algorithms 1 and 2; pytorch-optimizer's SignSGD.
    """

    name: ClassVar[str] = "signsgd"

    momentum: float = 0.9

    def __post_init__(self) -> None:
        check_unit_interval("SignSGDRule", momentum=self.momentum)

    def init(self, param: OfParam) -> State:
        """Return a zero average (if there is momentum) and a zero step count."""
        return {"step": zero_step()} | ({"momentum_buffer": zero_moment(param)} if self.momentum > 0 else {})

    def update(self, grad: OfParam, state: State, param: OfParam) -> tuple[OfParam, State]:
        """Return the direction u of the class docstring, -1, 0 or 1 in the average's dtype, and the new state."""
        m = grad.to(moment_dtype(param))
        new = {"step": state["step"] + 1}
        if self.momentum > 0:
            m = new["momentum_buffer"] = state["momentum_buffer"].lerp(m, 1 - self.momentum)
        return m.sign(), new


class SignSGD(Optimizer):
    """SignSGD with momentum for all parameters.

    Args:
        params: The model, its parameters (with or without names), or param groups, as for `Optimizer`.
        lr: Learning rate.
        momentum: See `SignSGDRule`.
        weight_decay: Decoupled weight decay.

    Example:
        >>> import torch
        >>> from optim import SignSGD
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Linear(8, 4)
        >>> optimizer = SignSGD(model.named_parameters(), lr=1e-3)
        >>> model(torch.ones(2, 8)).square().sum().backward()
        >>> optimizer.step()
        >>> sorted(optimizer.state[model.weight])
        ['momentum_buffer', 'step']
    """

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, SignSGDRule(momentum=momentum), lr=lr, weight_decay=weight_decay)
