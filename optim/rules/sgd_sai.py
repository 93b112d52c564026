"""SGD-SaI: momentum SGD whose learning rate is scaled, tensor by tensor, once and for all."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from optim.checks import check_non_negative, check_unit_interval
from optim.optimizer import Optimizer, Params
from optim.rule import State, UpdateRule, moment_dtype, scalar_moment, zero_moment, zero_step


@dataclass(frozen=True, kw_only=True)
class SGDSaIRule(UpdateRule):
    """u = k b, with b <- momentum b + (1 - momentum) g, b = g at first, and the gain k = |g| / (std(g) + eps) of the
    first gradient that is not zero; std is the unbiased deviation of the tensor's entries.

    Shapes: any; the gain is of the whole tensor, so not elementwise. It is about sqrt(number of entries) where they
    have no common mean, so large tensors learn faster.
    State: 4 bytes a parameter (a float32 buffer), none at momentum 0; the gain (one scalar a tensor) and a step count.
    Source: Xu et al. 2024, arXiv 2412.11768, algorithm 1; sgd-sai 1.0.3.
    Differs: four cases in which the published code fails or runs away.

    - One entry, or entries all alike, have no deviation: the gain is 1 (published: |g| / eps, about 1e8).
    - A zero gradient is not measured: buffer and gain start at the first other one (published: gain 0 for ever).
    - momentum 0 works: u = k g.
    - The gain is part of the state: a resumed run does not measure again.
    """

    name: ClassVar[str] = "sgd_sai"
    elementwise: ClassVar[bool] = False

    momentum: float = 0.9
    eps: float = 1e-8

    def __post_init__(self) -> None:
        check_unit_interval("SGDSaIRule", momentum=self.momentum)
        check_non_negative("SGDSaIRule", eps=self.eps)

    def init(self, param: Tensor) -> State:
        """A step count, gain 0 for "not measured yet", and a zero buffer if there is momentum."""
        buffer = {"momentum_buffer": zero_moment(param)} if self.momentum else {}
        return {"step": zero_step(), "gain": scalar_moment(param)} | buffer

    def update(self, grad: Tensor, state: State, param: Tensor) -> tuple[Tensor, State]:
        """The direction u of the class docstring, in the moments' dtype."""
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
        """|g| / (std(g) + eps): 1 where the entries do not differ, 0 where all are zero."""
        norm = g.square().sum().sqrt()
        if g.numel() < 2:
            return (norm > 0).to(g.dtype)
        std = ((g - g.mean()).square().sum() / (g.numel() - 1)).sqrt()
        alike = std <= 4 * torch.finfo(g.dtype).eps * norm  # rounding, not deviation
        return torch.where(norm > 0, torch.where(alike, 1.0, norm / (std + self.eps)), 0.0)


class SGDSaI(Optimizer):
    """`Optimizer` running `SGDSaIRule`; arguments as in the published code."""

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-2,
        momentum: float = 0.9,
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
    ) -> None:
        super().__init__(params, SGDSaIRule(momentum=momentum, eps=eps), lr=lr, weight_decay=weight_decay)
