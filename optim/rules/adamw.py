"""AdamW: Adam with decoupled weight decay."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from optim.checks import check_flag, check_non_negative, checked_betas
from optim.kernels import adamw as kernel
from optim.kernels.philox import stochastic_round
from optim.optimizer import Optimizer, Params
from optim.rule import State, UpdateRule, correction, zero_moment, zero_step
from optim.sharding import is_sharded


@dataclass(frozen=True, kw_only=True)
class AdamWRule(UpdateRule):
    """u = m^ / (sqrt(v^ + eps_root) + eps), with m^ = m / (1 - b1^t), v^ = v / (1 - b2^t)
    and m <- b1 m + (1 - b1) g, v <- b2 v + (1 - b2) g^2.

    Shapes: elementwise; moments have the parameter's shape.
    State: 8 bytes a parameter (two float32 moments; 12 with amsgrad) and a step count.
    Source: Loshchilov & Hutter 2019, arXiv 1711.05101, algorithm 2; `torch.optim.AdamW`.
    Kernel: `optim.kernels.adamw`, one launch for all tensors of a param group on a GPU (not with amsgrad).
    Differs: the paper has neither `eps_root` nor the four switches.

    - `bias_correction=False`: m^ = m, v^ = v.
    - `eps_before_correction=True`: u = sqrt(1 - b2^t) / (1 - b1^t) m / (sqrt(v + eps_root) + eps), the older order of
      things, in which the effective eps is eps / sqrt(1 - b2^t) (Moonlight's AdamW, and transformers' before it used
      torch's).
    - `amsgrad=True`: v^ is made of the running maximum of v.
    - `stochastic_rounding=True`: bfloat16 parameters are rounded up or down at random, so that steps below half their
      resolution are not lost but right on average (arXiv 1502.02551). The random bits are a function of the step count
      and the element's place in its tensor alone: runs repeat and replicas agree; tensors share them, shards count from
      their own first element. Other dtypes are rounded to nearest, as ever.

    The three gradient features of LESS (arXiv 2402.04333), each applied to the state that a warm-up left behind:

    - paper: the warm-up's own rule, ``AdamWRule(betas=..., eps=...)``;
    - published code: ``AdamWRule(eps=0.0, eps_root=1e-8, bias_correction=False)``, whatever the warm-up ran with;
    - preconditioner only, g / (sqrt(v^) + eps), without the term b1 m that all examples share:
      ``dataclasses.replace(rule, betas=(0.0, rule.betas[1]))``, for at b1 = 0 both m and m^ are the gradient.

    With ``eps = eps_root = 0`` a coordinate that has never had a gradient gives 0/0, as in torch.
    """

    name: ClassVar[str] = "adamw"

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    eps_root: float = 0.0
    bias_correction: bool = True
    amsgrad: bool = False
    eps_before_correction: bool = False
    stochastic_rounding: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "betas", checked_betas("AdamWRule", self.betas))
        check_non_negative("AdamWRule", eps=self.eps, eps_root=self.eps_root)
        check_flag(
            "AdamWRule",
            bias_correction=self.bias_correction,
            amsgrad=self.amsgrad,
            eps_before_correction=self.eps_before_correction,
            stochastic_rounding=self.stochastic_rounding,
        )

    def init(self, param: Tensor) -> State:
        """Zero moments and step count."""
        state = {"step": zero_step(), "exp_avg": zero_moment(param), "exp_avg_sq": zero_moment(param)}
        if self.amsgrad:
            state["max_exp_avg_sq"] = zero_moment(param)
        return state

    def update(self, grad: Tensor, state: State, param: Tensor) -> tuple[Tensor, State]:
        """The direction u of the class docstring, in the moments' dtype."""
        b1, b2 = self.betas
        g = grad.to(state["exp_avg"].dtype)
        t = state["step"] + 1
        m = state["exp_avg"].lerp(g, 1 - b1)
        v = (b2 * state["exp_avg_sq"]).addcmul(g, g, value=1 - b2)
        new = {"step": t, "exp_avg": m, "exp_avg_sq": v}
        if self.amsgrad:
            v = new["max_exp_avg_sq"] = torch.maximum(state["max_exp_avg_sq"], v)
        if self.bias_correction:
            c1, c2 = correction(b1, t), correction(b2, t)
            if self.eps_before_correction:
                m = m * (c2.sqrt() / c1)
            else:
                m, v = m / c1, v / c2
        root = v.sqrt() if self.eps_root == 0 else (v + self.eps_root).sqrt()
        return (m / (root + self.eps)).to(g.dtype), new  # a correction would make a 0-d tensor float64

    def step(self, param: Tensor, grad: Tensor, state: State, *, lr: float | Tensor, weight_decay: float) -> None:
        """`UpdateRule.step`, but for how the new parameter is rounded."""
        self.step_part(param, grad, state, start=0, lr=lr, weight_decay=weight_decay)

    def step_part(
        self, param: Tensor, grad: Tensor, state: State, *, start: int, lr: float | Tensor, weight_decay: float
    ) -> None:
        """`step` of a piece, whose entries are rounded by the bits of their places in the whole."""
        if not (self.stochastic_rounding and param.dtype == torch.bfloat16):
            return super().step(param, grad, state, lr=lr, weight_decay=weight_decay)
        new_param, new_state = self.stepped(param, grad, state, lr=lr, weight_decay=weight_decay or None)
        target, exact = (
            t.to_local() if is_sharded(t) else t  # type: ignore[attr-defined]
            for t in (param, new_param)
        )
        target.copy_(stochastic_round(exact, kernel.rounding_words(target, new_state["step"], start=start)))
        for key, value in new_state.items():
            state[key].copy_(value)

    def step_all(
        self,
        params: Sequence[Tensor],
        grads: Sequence[Tensor],
        states: Sequence[State],
        *,
        lr: float | Tensor,
        weight_decay: float,
    ) -> None:
        """By the kernel, all at once, but for tensors that it does not fit."""
        rows = [(p, g, s["exp_avg"], s["exp_avg_sq"]) for p, g, s in zip(params, grads, states, strict=True)]
        fit = [False] * len(rows) if self.amsgrad else kernel.fitting(rows)
        mine = [i for i, fits in enumerate(fit) if fits]
        if mine:
            torch._foreach_add_([states[i]["step"] for i in mine], 1)
            steps = [int(states[i]["step"]) for i in mine]
            now = {step: self.scalars(step) for step in set(steps)}
            kernel.adamw_step(
                [rows[i] for i in mine],
                [now[step] for step in steps],
                lr=float(lr),
                weight_decay=weight_decay,
                betas=self.betas,
                eps=self.eps,
                eps_root=self.eps_root,
                stochastic_rounding=self.stochastic_rounding,
            )
        for i, fits in enumerate(fit):
            if not fits:
                self.step(params[i], grads[i], states[i], lr=lr, weight_decay=weight_decay)

    def scalars(self, step: int) -> kernel.Scalars:
        """The bias corrections of `update` at this step as factors of m and of v, for kernels."""
        if not self.bias_correction:
            return kernel.Scalars(1.0, 1.0, step)
        c1, c2 = (1 - beta**step for beta in self.betas)
        if self.eps_before_correction:
            return kernel.Scalars(c2**0.5 / c1, 1.0, step)
        return kernel.Scalars(1 / c1, 1 / c2, step)

    @property
    def step_is_update(self) -> bool:
        """Yes, but for stochastic rounding: the kernel is for GPUs."""
        return not self.stochastic_rounding


class AdamW(Optimizer):
    """`Optimizer` running `AdamWRule`; the first arguments as in `torch.optim.AdamW`."""

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        eps_root: float = 0.0,
        bias_correction: bool = True,
        amsgrad: bool = False,
        eps_before_correction: bool = False,
        stochastic_rounding: bool = False,
    ) -> None:
        rule = AdamWRule(
            betas=betas,
            eps=eps,
            eps_root=eps_root,
            bias_correction=bias_correction,
            amsgrad=amsgrad,
            eps_before_correction=eps_before_correction,
            stochastic_rounding=stochastic_rounding,
        )
        super().__init__(params, rule, lr=lr, weight_decay=weight_decay)
