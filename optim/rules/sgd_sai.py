"""SGD-SaI: SGD with momentum whose learning rate is scaled once per tensor."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from optim.checks import check_non_negative, check_unit_interval
from optim.moments import moment_dtype, scalar_moment, zero_moment, zero_step
from optim.optimizer import Optimizer, Params
from optim.rule import OfParam, State, UpdateRule


@dataclass(frozen=True, kw_only=True)
class SGDSaIRule(UpdateRule):
    """SGD-SaI: SGD with momentum and a gain per tensor, which the first gradient determines.

        u = k b,  b <- momentum b + (1 - momentum) g,  k = |g| / (std(g) + eps)

    At the first step b = g. The gain k is computed from the first gradient that is not zero; std is the unbiased
    standard deviation of the tensor's entries.

    Args:
        momentum: The factor of the buffer; 0 gives u = k g.
        eps: Added to the standard deviation.

    Shapes:
        Any. Not elementwise, because the gain depends on the whole tensor. It is about sqrt(number of entries) if the
        entries have a mean of 0, so that large tensors learn faster.

    State:
        4 bytes per parameter (a float32 buffer; 0 with momentum 0), the gain (one scalar per tensor) and a step count.

    Source:
        Xu et al. 2024, arXiv 2412.11768, algorithm 1; sgd-sai 1.0.3.

    Differs:
        The published code fails or diverges in four cases, which are handled here:

        - A single entry, or entries that are all equal, have a standard deviation of 0. The gain is then 1 (in the
          published code it is |g| / eps, about 1e8).
        - A zero gradient does not determine the gain: buffer and gain start at the first gradient that is not zero (in
          the published code the gain remains 0).
        - A momentum of 0 is supported.
        - The gain is part of the state, so that a resumed run does not compute it again.
    """

    name: ClassVar[str] = "sgd_sai"
    elementwise: ClassVar[bool] = False

    momentum: float = 0.9
    eps: float = 1e-8

    def __post_init__(self) -> None:
        check_unit_interval("SGDSaIRule", momentum=self.momentum)
        check_non_negative("SGDSaIRule", eps=self.eps)

    def state_settings(self) -> dict[str, Any]:
        """Return the setting that only the start of a state reads."""
        return {"eps": self.eps}

    def init(self, param: OfParam) -> State:
        """Return a zero step count, a gain of 0 ("not determined yet"), and a zero buffer if there is momentum."""
        buffer = {"momentum_buffer": zero_moment(param)} if self.momentum else {}
        return {"step": zero_step(), "gain": scalar_moment(param)} | buffer

    def update(self, grad: OfParam, state: State, param: OfParam) -> tuple[OfParam, State]:
        """Return the direction u of the class docstring, in the moments' dtype, and the new state."""
        g = grad.to(moment_dtype(param))
        unmeasured = state["gain"] == 0
        gain = torch.where(unmeasured, self._gain(g), state["gain"])
        new = {"step": state["step"] + 1, "gain": gain}
        if self.momentum == 0:
            return gain * g, new
        b = state["momentum_buffer"]
        b = new["momentum_buffer"] = torch.where(unmeasured, g, self.momentum * b + (1 - self.momentum) * g)
        return gain * b, new

    def _gain(self, g: Tensor) -> Tensor:
        """Return |g| / (std(g) + eps); 1 if all entries are equal, and 0 if all of them are zero."""
        norm = g.square().sum().sqrt()
        if g.numel() < 2:
            return (norm > 0).to(g.dtype)
        std = ((g - g.mean()).square().sum() / (g.numel() - 1)).sqrt()
        alike = std <= 4 * torch.finfo(g.dtype).eps * norm  # such a deviation is due to rounding
        return torch.where(norm > 0, torch.where(alike, 1.0, norm / (std + self.eps)), 0.0)


class SGDSaI(Optimizer):
    """SGD-SaI for all parameters; the arguments are those of the published code.

    Args:
        params: The model, its parameters (with or without names), or param groups, as for `Optimizer`.
        lr: Learning rate.
        momentum, eps: See `SGDSaIRule`.
        weight_decay: Decoupled weight decay.

    Example:
        >>> import torch
        >>> from optim import SGDSaI
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Linear(8, 4)
        >>> optimizer = SGDSaI(model.named_parameters(), lr=1e-3)
        >>> model(torch.ones(2, 8)).square().sum().backward()
        >>> optimizer.step()
        >>> sorted(optimizer.state[model.weight])
        ['gain', 'momentum_buffer', 'step']
    """

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-2,
        momentum: float = 0.9,
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
    ) -> None:
        super().__init__(params, SGDSaIRule(momentum=momentum, eps=eps), lr=lr, weight_decay=weight_decay)
