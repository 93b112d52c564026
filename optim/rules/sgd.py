"""SGD: the gradient itself, or its heavy-ball or Nesterov momentum."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from optim.checks import check_flag, check_non_negative, check_share, check_unit_interval
from optim.moments import moment_dtype, with_l2, zero_moment, zero_step
from optim.optimizer import Optimizer, Params
from optim.rule import OfParam, State, UpdateRule


@dataclass(frozen=True, kw_only=True)
class SGDRule(UpdateRule):
    """SGD: the gradient, or its heavy-ball or Nesterov momentum.

        u = b, or u = g + momentum b with nesterov,  b <- momentum b + (1 - dampening) g

    At the first step b = g. With momentum 0 the direction is the gradient in the moments' dtype, u = g; LESS uses such
    plain gradients for target rows.

    Args:
        momentum: The factor of the buffer.
        dampening: The share of the gradient that is not added to the buffer.
        nesterov: Whether to use Nesterov momentum.
        l2: The factor of p in the term l2 p that is first added to the gradient (torch's form of weight decay).

    Shapes:
        Elementwise. The buffer has the parameter's shape.

    State:
        4 bytes per parameter (a float32 buffer; 0 with momentum 0) and a step count.

    Source:
        `torch.optim.SGD`; Sutskever et al. 2013 for this form of Nesterov momentum.

    Differs:
        Weight decay is decoupled. torch adds it to the gradient (`l2`), which is only the same with momentum 0.
    """

    name: ClassVar[str] = "sgd"

    momentum: float = 0.0
    dampening: float = 0.0
    nesterov: bool = False
    l2: float = 0.0

    def __post_init__(self) -> None:
        check_unit_interval("SGDRule", momentum=self.momentum)
        check_flag("SGDRule", nesterov=self.nesterov)
        check_share("SGDRule", dampening=self.dampening)
        check_non_negative("SGDRule", l2=self.l2)
        if self.nesterov and (self.momentum == 0 or self.dampening != 0):
            raise ValueError("SGDRule: nesterov=True needs a momentum above 0 and dampening 0")

    def init(self, param: OfParam) -> State:
        """Return a zero step count, and a zero buffer if there is momentum."""
        return {"step": zero_step()} | ({"momentum_buffer": zero_moment(param)} if self.momentum else {})

    def update(self, grad: OfParam, state: State, param: OfParam) -> tuple[OfParam, State]:
        """Return the direction u of the class docstring, in the moments' dtype, and the new state."""
        g = with_l2(grad.to(moment_dtype(param)), param, self.l2)
        new = {"step": state["step"] + 1}
        if self.momentum == 0:
            return g, new
        later = (state["step"] > 0).double()  # the first gradient is not dampened, as in torch
        share = (1 - self.dampening * later).to(g.dtype)
        b = new["momentum_buffer"] = self.momentum * state["momentum_buffer"] + share * g
        return (g + self.momentum * b if self.nesterov else b), new


class SGD(Optimizer):
    """SGD for all parameters; the arguments are those of `torch.optim.SGD`, with decoupled weight decay.

    Args:
        params: The model, its parameters (with or without names), or param groups, as for `Optimizer`.
        lr: Learning rate.
        momentum, dampening, nesterov, l2: See `SGDRule`.
        weight_decay: Decoupled weight decay.

    Example:
        >>> import torch
        >>> from optim import SGD
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Linear(8, 4)
        >>> optimizer = SGD(model.named_parameters(), lr=1e-3)
        >>> model(torch.ones(2, 8)).square().sum().backward()
        >>> optimizer.step()
        >>> sorted(optimizer.state[model.weight])
        ['step']
    """

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        *,
        l2: float = 0.0,
    ) -> None:
        rule = SGDRule(momentum=momentum, dampening=dampening, nesterov=nesterov, l2=l2)
        super().__init__(params, rule, lr=lr, weight_decay=weight_decay)
