"""AdaBelief: Adam with a second moment of the gradient's distance from its running mean."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from optim.checks import check_flag, check_non_negative, checked_betas
from optim.moments import correction, zero_moment, zero_step
from optim.optimizer import Optimizer, Params
from optim.rule import OfParam, State, UpdateRule


@dataclass(frozen=True, kw_only=True)
class AdaBeliefRule(UpdateRule):
    """AdaBelief: Adam whose second moment measures how far the gradient is from its running mean.

    With m <- b1 m + (1 - b1) g, s <- b2 s + (1 - b2) (g - m)^2 + eps, c1 = 1 - b1^t and c2 = 1 - b2^t, the direction is

    - u = m / c1 / (sqrt(s) / sqrt(c2) + eps) with `rectify=False`, as in the paper;
    - u = R m / c1 / (sqrt(s) + eps) with `rectify=True` while r >= 5, where r = r' - 2 t b2^t / c2, r' = 2 / (1 - b2) -
      1 and R^2 = c2 (r - 4) (r - 2) r' / ((r' - 4) (r' - 2) r). Before that, u = m / c1 with `degenerated_to_sgd`, and
      u = 0 without it.

    Args:
        betas: (b1, b2), the decay rates of the two moments.
        eps: Added to s at every step, where it accumulates to eps / (1 - b2). It corresponds to about the square of
            Adam's eps: use 1e-16 for transformers, and 1e-8 where SGD works better than Adam.
        rectify: Whether to use the rectified step.
        degenerated_to_sgd: Whether the first steps under `rectify` are SGD with momentum. With b2 = 0.999 these are
            five steps of size lr |g|, not lr.
        amsgrad: Whether s is replaced by its running maximum. It has no effect under `rectify`, as in the published
            code.
        l2: The factor of p in the term l2 p that is added to the gradient (`weight_decouple=False` of the published
            code), so that it becomes part of the direction.
        fixed_decay: Whether weight decay sets p <- (1 - wd) p before the step, independent of the learning rate,
            instead of (1 - lr wd) p.

    Shapes:
        Elementwise. The moments have the parameter's shape.

    State:
        8 bytes per parameter (two float32 moments; 12 with amsgrad unless rectify) and a step count.

    Source:
        Zhuang et al. 2020, arXiv 2010.07468, algorithm 2, and its published code (adabelief-pytorch 0.2.1, whose
        defaults are used here; version 0.0.5 had eps 1e-8 and no rectification). Rectification: Liu et al., arXiv
        1908.03265.

    Differs:
        The paper has neither rectification nor decoupled decay. The switches of the published code are fields here, so
        that they survive a checkpoint, and gradients are never written to.

    Note:
        Gradients that do not change drive s down to rounding errors, which causes large steps.
    """

    name: ClassVar[str] = "adabelief"

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-16
    amsgrad: bool = False
    rectify: bool = True
    degenerated_to_sgd: bool = True
    l2: float = 0.0
    fixed_decay: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "betas", checked_betas("AdaBeliefRule", self.betas))
        check_non_negative("AdaBeliefRule", eps=self.eps, l2=self.l2)
        check_flag(
            "AdaBeliefRule",
            amsgrad=self.amsgrad,
            rectify=self.rectify,
            degenerated_to_sgd=self.degenerated_to_sgd,
            fixed_decay=self.fixed_decay,
        )

    def init(self, param: OfParam) -> State:
        """Return zero moments and a zero step count."""
        state = {"step": zero_step(), "exp_avg": zero_moment(param), "exp_avg_var": zero_moment(param)}
        if self.amsgrad and not self.rectify:
            state["max_exp_avg_var"] = zero_moment(param)
        return state

    def update(self, grad: OfParam, state: State, param: OfParam) -> tuple[OfParam, State]:
        """Return the direction u of the class docstring, in the moments' dtype, and the new state."""
        b1, b2 = self.betas
        g = grad.to(state["exp_avg"].dtype)
        if self.l2 != 0:
            g = g + self.l2 * param.to(g.dtype)
        t = state["step"] + 1
        c1, c2 = correction(b1, t), correction(b2, t)
        m = state["exp_avg"].lerp(g, 1 - b1)
        s = (b2 * state["exp_avg_var"]).addcmul(g - m, g - m, value=1 - b2) + self.eps
        new = {"step": t, "exp_avg": m, "exp_avg_var": s}
        if self.rectify:
            longest = 2 / (1 - b2) - 1
            r = longest - 2 * t.double() * (1 - c2) / c2
            size = (c2 * (r - 4) * (r - 2) * longest / ((longest - 4) * (longest - 2) * r)).sqrt() / c1
            early = m / c1 if self.degenerated_to_sgd else torch.zeros_like(m)
            direction = torch.where(r >= 5, size * m / (s.sqrt() + self.eps), early)
        else:
            if self.amsgrad:
                s = new["max_exp_avg_var"] = torch.maximum(state["max_exp_avg_var"], s)
            direction = m / c1 / (s.sqrt() / c2.sqrt() + self.eps)
        return direction.to(g.dtype), new

    def stepped(
        self,
        param: Tensor,
        grad: Tensor,
        state: State,
        *,
        lr: float | Tensor,
        weight_decay: float | Tensor | None,
        out: Tensor | None = None,
    ) -> tuple[Tensor, State]:
        """Return what `UpdateRule.stepped` returns, except for weight decay under `fixed_decay`."""
        if not self.fixed_decay or weight_decay is None:
            return super().stepped(param, grad, state, lr=lr, weight_decay=weight_decay, out=out)
        direction, new_state = self.update(grad, state, param)
        work = param.to(direction.dtype)
        return work - weight_decay * work - lr * direction, new_state


class AdaBelief(Optimizer):
    """AdaBelief for all parameters; the first arguments are those of adabelief-pytorch.

    Args:
        params: The model, its parameters (with or without names), or param groups, as for `Optimizer`.
        lr: Learning rate.
        betas, eps, amsgrad: See `AdaBeliefRule`.
        weight_decay: Decoupled weight decay.
        rectify, degenerated_to_sgd, l2, fixed_decay: See `AdaBeliefRule`.

    Example:
        >>> import torch
        >>> from optim import AdaBelief
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Linear(8, 4)
        >>> optimizer = AdaBelief(model.named_parameters(), lr=1e-3)
        >>> model(torch.ones(2, 8)).square().sum().backward()
        >>> optimizer.step()
        >>> sorted(optimizer.state[model.weight])
        ['exp_avg', 'exp_avg_var', 'step']
    """

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-16,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        *,
        rectify: bool = True,
        degenerated_to_sgd: bool = True,
        l2: float = 0.0,
        fixed_decay: bool = False,
    ) -> None:
        rule = AdaBeliefRule(
            betas=betas,
            eps=eps,
            amsgrad=amsgrad,
            rectify=rectify,
            degenerated_to_sgd=degenerated_to_sgd,
            l2=l2,
            fixed_decay=fixed_decay,
        )
        super().__init__(params, rule, lr=lr, weight_decay=weight_decay)
