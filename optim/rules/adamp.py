"""AdamP: Adam that does not increase the norm of scale-invariant weights."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from optim.checks import check_flag, check_non_negative, checked_betas
from optim.moments import correction, scalar_moment, zero_moment, zero_step
from optim.optimizer import Optimizer, Params
from optim.radial import remove_radial
from optim.rule import OfParam, State, UpdateRule


@dataclass(frozen=True, kw_only=True)
class AdamPRule(UpdateRule):
    """AdamP: Adam that removes the radial part of the step for weights whose scale has no effect.

        u = P(m / c1 / (sqrt(v) / sqrt(c2) + eps)),  c1 = 1 - b1^t,  c2 = 1 - b2^t

    Here m <- b1 m + (1 - b1) g and v <- b2 v + (1 - b2) g^2. P removes the part along the weights if the gradient is
    almost orthogonal to them (`optim.radial.remove_radial`); weight decay then acts with `wd_ratio` of its strength.
    One row that is not orthogonal (|cos| >= delta / sqrt(row length)) disables the projection by rows for the whole
    tensor, and the whole tensor is tested instead. A zero gradient counts as orthogonal.

    Args:
        betas: (b1, b2), the decay rates of the two moments.
        eps: Added to the denominator.
        delta: The threshold of the cosine between gradient and weights.
        wd_ratio: The share of weight decay that remains after a projection.
        nesterov: Whether m is replaced by b1 m + (1 - b1) g, with the new m.

    Shapes:
        Tensors with two or more dimensions are treated as [dim 0, rest]; vectors and scalars get plain Adam. Not
        elementwise, because the projection depends on norms and inner products of rows and of the whole tensor.

    State:
        8 bytes per parameter (two float32 moments), a step count, and the share of weight decay of the last update.

    Source:
        Heo et al. 2020, arXiv 2006.08217; clovaai/AdamP (adamp 0.3.0).

    Differs:
        Tensors without elements are left unchanged, where the published code fails.
    """

    name: ClassVar[str] = "adamp"
    elementwise: ClassVar[bool] = False

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    delta: float = 0.1
    wd_ratio: float = 0.1
    nesterov: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "betas", checked_betas("AdamPRule", self.betas))
        check_non_negative("AdamPRule", eps=self.eps, delta=self.delta, wd_ratio=self.wd_ratio)
        check_flag("AdamPRule", nesterov=self.nesterov)

    def init(self, param: OfParam) -> State:
        """Return zero moments, a zero step count, and full weight decay."""
        return {
            "step": zero_step(),
            "exp_avg": zero_moment(param),
            "exp_avg_sq": zero_moment(param),
            "decay_share": scalar_moment(param, 1.0),
        }

    def update(self, grad: OfParam, state: State, param: OfParam) -> tuple[OfParam, State]:
        """Return the direction u of the class docstring, in the moments' dtype, and the new state."""
        b1, b2 = self.betas
        dtype = state["exp_avg"].dtype
        g = grad.to(dtype)
        t = state["step"] + 1
        m = state["exp_avg"].lerp(g, 1 - b1)
        v = (b2 * state["exp_avg_sq"]).addcmul(g, g, value=1 - b2)
        ahead = m.lerp(g, 1 - b1) if self.nesterov else m
        root = correction(b2, t).sqrt()  # as a factor of eps, it saves two of three divisions per element
        adam = ahead * (root / correction(b1, t)) / (v.sqrt() + self.eps * root)
        direction, removed = remove_radial(adam.to(dtype), g, param.to(dtype), delta=self.delta, eps=self.eps)
        share = 1 - (1 - self.wd_ratio) * removed.to(dtype)
        return direction, {"step": t, "exp_avg": m, "exp_avg_sq": v, "decay_share": share}

    def decay(self, direction: OfParam, state: State, param: OfParam) -> OfParam:
        """Return the parameter, or `wd_ratio` times the parameter after a projection."""
        return state["decay_share"] * param


class AdamP(Optimizer):
    """AdamP for all parameters; the arguments are those of clovaai/AdamP.

    Args:
        params: The model, its parameters (with or without names), or param groups, as for `Optimizer`.
        lr: Learning rate.
        betas, eps: See `AdamPRule`.
        weight_decay: Decoupled weight decay.
        delta, wd_ratio, nesterov: See `AdamPRule`.

    Example:
        >>> import torch
        >>> from optim import AdamP
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Linear(8, 4)
        >>> optimizer = AdamP(model.named_parameters(), lr=1e-3)
        >>> model(torch.ones(2, 8)).square().sum().backward()
        >>> optimizer.step()
        >>> sorted(optimizer.state[model.weight])
        ['decay_share', 'exp_avg', 'exp_avg_sq', 'step']
    """

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        delta: float = 0.1,
        wd_ratio: float = 0.1,
        nesterov: bool = False,
    ) -> None:
        rule = AdamPRule(betas=betas, eps=eps, delta=delta, wd_ratio=wd_ratio, nesterov=nesterov)
        super().__init__(params, rule, lr=lr, weight_decay=weight_decay)
