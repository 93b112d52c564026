"""LAMB: Adam with steps proportional to the norm of each tensor."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from optim.checks import check_flag, check_non_negative, checked_betas
from optim.moments import correction, scalar_setting, zero_moment, zero_step
from optim.optimizer import Optimizer, Params
from optim.rule import OfParam, State, UpdateRule


@dataclass(frozen=True, kw_only=True)
class LAMBRule(UpdateRule):
    """LAMB: Adam with steps proportional to the norm of each tensor, for large batches.

        u = r a,  a = m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps) + weight_decay p,  r = |p| / |a|

    Here m and v are Adam's moments, and r is 1 if one of the norms is 0. Weight decay is part of u.

    Args:
        betas: (b1, b2), the decay rates of the two moments.
        eps: Added to the denominator.
        bias_correction: Whether m and v are divided by 1 - b^t.
        always_adapt: Whether r is also used without weight decay, as in the paper. Otherwise, parameters without weight
            decay (biases, norms) have Adam's step, as in apex and timm.
        trust_clip: Whether r is limited to 1 (LAMBC).

    Shapes:
        Any. Not elementwise, because of the norms over the tensor.

    State:
        8 bytes per parameter (two float32 moments), a step count, and the weight decay.

    Source:
        You et al. 2019, arXiv 1904.00962, algorithm 2; timm.optim.Lamb.

    Differs:
        timm and apex also clip the gradients of the whole model to a norm of 1, which is left to the training loop.
    """

    name: ClassVar[str] = "lamb"
    elementwise: ClassVar[bool] = False

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-6
    bias_correction: bool = True
    always_adapt: bool = True
    trust_clip: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "betas", checked_betas("LAMBRule", self.betas))
        check_non_negative("LAMBRule", eps=self.eps)
        flags = ("bias_correction", "always_adapt", "trust_clip")
        check_flag("LAMBRule", **{key: getattr(self, key) for key in flags})

    def init(self, param: OfParam) -> State:
        """Return zero moments, a zero step count, and the weight decay, which steps set."""
        moments = {"exp_avg": zero_moment(param), "exp_avg_sq": zero_moment(param)}
        return {"step": zero_step(), "weight_decay": scalar_setting(param)} | moments

    @property
    def reads(self) -> frozenset[str]:
        """The weight decay, which is part of the norm of the step."""
        return frozenset({"weight_decay"})

    def update(self, grad: OfParam, state: State, param: OfParam) -> tuple[OfParam, State]:
        """Return the direction u of the class docstring, in the moments' dtype, and the new state."""
        b1, b2 = self.betas
        g = grad.to(state["exp_avg"].dtype)
        t, decay, p = state["step"] + 1, state["weight_decay"], param.to(g.dtype)
        m = state["exp_avg"].lerp(g, 1 - b1)
        v = (b2 * state["exp_avg_sq"]).addcmul(g, g, value=1 - b2)
        c1, c2 = (correction(b1, t), correction(b2, t)) if self.bias_correction else (1.0, 1.0)
        a = (m / c1 / ((v / c2).sqrt() + self.eps)).to(g.dtype) + decay * p
        ratio = trust_ratio(p.square().sum().sqrt(), a.square().sum().sqrt())
        if self.trust_clip:
            ratio = ratio.clamp(max=1.0)
        if not self.always_adapt:
            ratio = torch.where((decay > 0).to(ratio.device), ratio, 1.0)
        return ratio * a, {"step": t, "weight_decay": decay, "exp_avg": m, "exp_avg_sq": v}


def trust_ratio(norm: Tensor, of_step: Tensor, factor: float = 1.0) -> Tensor:
    """Return factor norm / of_step, or 1 if one of the two norms is 0.

    Args:
        norm: The norm of the parameter, a scalar.
        of_step: The norm of the step, a scalar.
        factor: A factor of the ratio.

    Returns:
        A scalar.
    """
    there = (norm > 0) & (of_step > 0)
    return torch.where(there, factor * norm / torch.where(there, of_step, 1.0), 1.0)


class LAMB(Optimizer):
    """LAMB for all parameters.

    Args:
        params: The model, its parameters (with or without names), or param groups, as for `Optimizer`.
        lr: Learning rate.
        betas, eps, bias_correction, always_adapt, trust_clip: See `LAMBRule`.
        weight_decay: Weight decay, which is part of the direction.

    Example:
        >>> import torch
        >>> from optim import LAMB
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Linear(8, 4)
        >>> optimizer = LAMB(model.named_parameters(), lr=1e-3)
        >>> model(torch.ones(2, 8)).square().sum().backward()
        >>> optimizer.step()
        >>> sorted(optimizer.state[model.weight])
        ['exp_avg', 'exp_avg_sq', 'step', 'weight_decay']
    """

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 1e-2,
        *,
        bias_correction: bool = True,
        always_adapt: bool = True,
        trust_clip: bool = False,
    ) -> None:
        super().__init__(
            params,
            LAMBRule(
                betas=betas, eps=eps, bias_correction=bias_correction, always_adapt=always_adapt, trust_clip=trust_clip
            ),
            lr=lr,
            weight_decay=weight_decay,
        )
