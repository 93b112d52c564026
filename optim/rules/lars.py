"""LARS: SGD with momentum and steps proportional to the norm of each tensor."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from optim.checks import check_flag, check_non_negative, check_unit_interval
from optim.moments import moment_dtype, scalar_setting, zero_moment, zero_step
from optim.optimizer import Optimizer, Params
from optim.rule import OfParam, State, UpdateRule


@dataclass(frozen=True, kw_only=True)
class LARSRule(UpdateRule):
    """LARS: SGD with momentum and steps proportional to the norm of each tensor, for large batches.

        u = b,  b <- momentum b + r (g + weight_decay p),  r = trust_coeff |p| / (|g| + weight_decay |p| + eps)

    With `nesterov`, u = r (g + weight_decay p) + momentum b. If one of the norms is 0, r is 1. Weight decay is part of
    u.

    Args:
        momentum: The decay rate of b.
        nesterov: Whether to use Nesterov momentum.
        trust_coeff: The factor of r.
        eps: Added to the denominator of r.
        always_adapt: Whether r is also used without weight decay, as in the paper. Otherwise, parameters without weight
            decay (biases, norms) have the step of SGD, as in timm.

    Shapes:
        Any. Not elementwise, because of the norms over the tensor.

    State:
        4 bytes per parameter (one float32 buffer; 0 without momentum), a step count, and the weight decay.

    Source:
        You et al. 2017, arXiv 1708.03888; timm.optim.Lars.
    """

    name: ClassVar[str] = "lars"
    elementwise: ClassVar[bool] = False

    momentum: float = 0.9
    nesterov: bool = False
    trust_coeff: float = 0.001
    eps: float = 1e-8
    always_adapt: bool = True

    def __post_init__(self) -> None:
        check_unit_interval("LARSRule", momentum=self.momentum)
        check_non_negative("LARSRule", trust_coeff=self.trust_coeff, eps=self.eps)
        check_flag("LARSRule", nesterov=self.nesterov, always_adapt=self.always_adapt)
        if self.nesterov and self.momentum == 0:
            raise ValueError("LARSRule: nesterov = True needs a momentum above 0")

    def init(self, param: OfParam) -> State:
        """Return a zero buffer (if there is momentum), a zero step count, and the weight decay, which steps set."""
        state = {"step": zero_step(), "weight_decay": scalar_setting(param)}
        return state | ({"momentum_buffer": zero_moment(param)} if self.momentum > 0 else {})

    @property
    def reads(self) -> frozenset[str]:
        """The weight decay, which is part of the ratio."""
        return frozenset({"weight_decay"})

    def update(self, grad: OfParam, state: State, param: OfParam) -> tuple[OfParam, State]:
        """Return the direction u of the class docstring, in the buffer's dtype, and the new state."""
        dtype = moment_dtype(param)
        g, p, decay = grad.to(dtype), param.to(dtype), state["weight_decay"]
        size, slope = p.square().sum().sqrt(), g.square().sum().sqrt()
        ratio = self.trust_coeff * size / (slope + decay * size + (self.eps or 1e-38))
        adapts = (size > 0) & (slope > 0)
        if not self.always_adapt:
            adapts = adapts & (decay > 0).to(adapts.device)
        h = torch.where(adapts, ratio, 1.0) * (g + decay * p)
        new = {"step": state["step"] + 1, "weight_decay": decay}
        if self.momentum > 0:
            buffer = new["momentum_buffer"] = self.momentum * state["momentum_buffer"] + h
            h = h.add(buffer, alpha=self.momentum) if self.nesterov else buffer
        return h, new


class LARS(Optimizer):
    """LARS for all parameters; the first arguments are those of timm.optim.Lars.

    Args:
        params: The model, its parameters (with or without names), or param groups, as for `Optimizer`.
        lr: Learning rate.
        momentum, nesterov, trust_coeff, eps, always_adapt: See `LARSRule`.
        weight_decay: Weight decay, which is part of the direction.

    Example:
        >>> import torch
        >>> from optim import LARS
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Linear(8, 4)
        >>> optimizer = LARS(model.named_parameters(), lr=1e-3)
        >>> model(torch.ones(2, 8)).square().sum().backward()
        >>> optimizer.step()
        >>> sorted(optimizer.state[model.weight])
        ['momentum_buffer', 'step', 'weight_decay']
    """

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1.0,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        *,
        nesterov: bool = False,
        trust_coeff: float = 0.001,
        eps: float = 1e-8,
        always_adapt: bool = True,
    ) -> None:
        super().__init__(
            params,
            LARSRule(momentum=momentum, nesterov=nesterov, trust_coeff=trust_coeff, eps=eps, always_adapt=always_adapt),
            lr=lr,
            weight_decay=weight_decay,
        )
