"""AdamW: Adam with decoupled weight decay."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from optim.checks import check_flag, check_non_negative, checked_betas
from optim.kernels import adamw as kernel
from optim.kernels.philox import stochastic_round
from optim.moments import correction, zero_moment, zero_step
from optim.optimizer import Optimizer, Params
from optim.rule import OfParam, State, UpdateRule
from optim.sharding import is_sharded


@dataclass(frozen=True, kw_only=True)
class AdamWRule(UpdateRule):
    """AdamW: Adam with decoupled weight decay, which `Optimizer` adds to the direction.

        u = m^ / (sqrt(v^ + eps_root) + eps),  m^ = m / (1 - b1^t),  v^ = v / (1 - b2^t)

    Here m <- b1 m + (1 - b1) g and v <- b2 v + (1 - b2) g^2.

    LESS (arXiv 2402.04333) has three kinds of gradient features, each computed with the state after a warm-up:

    - paper: the warm-up's own rule, ``AdamWRule(betas=..., eps=...)``;
    - published code: ``AdamWRule(eps=0.0, eps_root=1e-8, bias_correction=False)``, whatever rule the warm-up used;
    - preconditioner only, g / (sqrt(v^) + eps), without the term b1 m, which is the same for all examples:
      ``dataclasses.replace(rule, betas=(0.0, rule.betas[1]))``, because for b1 = 0 both m and m^ equal the gradient.

    Args:
        betas: (b1, b2), the decay rates of the two moments.
        eps: Added to the square root. With ``eps = eps_root = 0`` a coordinate that has never had a gradient gives 0/0,
            as in torch.
        eps_root: Added under the square root.
        bias_correction: Whether m and v are divided by 1 - b^t; without it m^ = m and v^ = v.
        amsgrad: Whether v^ is computed from the running maximum of v.
        eps_before_correction: Whether u = sqrt(1 - b2^t) / (1 - b1^t) m / (sqrt(v + eps_root) + eps), the older order
            of operations, with an effective eps of eps / sqrt(1 - b2^t) (Moonlight's AdamW, and that of transformers
            before it used torch's).
        stochastic_rounding: Whether bfloat16 parameters are rounded up or down at random, so that steps below half of
            their resolution take effect on average instead of being lost (arXiv 1502.02551). The random bits depend
            only on the step count and on the element's position in its tensor, so that runs repeat and replicas agree.
            All tensors share the same bits, and the positions in a shard are counted from its own first element. Other
            dtypes are always rounded to nearest.

    Shapes:
        Elementwise. The moments have the parameter's shape.

    State:
        8 bytes per parameter (two float32 moments; 12 with amsgrad) and a step count.

    Source:
        Loshchilov & Hutter 2019, arXiv 1711.05101, algorithm 2; `torch.optim.AdamW`.

    Differs:
        The paper has neither `eps_root` nor the four switches.

    Note:
        `optim.kernels.adamw` steps all tensors of a param group in one launch on a GPU (not with amsgrad).
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

    def init(self, param: OfParam) -> State:
        """Return zero moments and a zero step count."""
        state = {"step": zero_step(), "exp_avg": zero_moment(param), "exp_avg_sq": zero_moment(param)}
        if self.amsgrad:
            state["max_exp_avg_sq"] = zero_moment(param)
        return state

    def update(self, grad: OfParam, state: State, param: OfParam) -> tuple[OfParam, State]:
        """Return the direction u of the class docstring, in the moments' dtype, and the new state."""
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
        """Step as `UpdateRule.step` does, except for the rounding of the new parameter."""
        self.step_part(param, grad, state, start=0, lr=lr, weight_decay=weight_decay)

    def step_part(
        self, param: Tensor, grad: Tensor, state: State, *, start: int, lr: float | Tensor, weight_decay: float
    ) -> None:
        """Step one piece of a tensor; the random bits are those of the entries' positions in the whole tensor."""
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
        """Step all parameters at once with the kernel, and those that it does not support one by one."""
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
        """Return the bias corrections of `update` at a step as factors of m and of v, for kernels.

        Args:
            step: The number of the step, from 1.

        Returns:
            The factors and the step.
        """
        if not self.bias_correction:
            return kernel.Scalars(1.0, 1.0, step)
        c1, c2 = (1 - beta**step for beta in self.betas)
        if self.eps_before_correction:
            return kernel.Scalars(c2**0.5 / c1, 1.0, step)
        return kernel.Scalars(1 / c1, 1 / c2, step)

    @property
    def step_is_update(self) -> bool:
        """Whether the step is compiled: it always is, except with stochastic rounding, whose kernel is for GPUs."""
        return not self.stochastic_rounding


class AdamW(Optimizer):
    """AdamW for all parameters; the first arguments are those of `torch.optim.AdamW`.

    Args:
        params: The model, its parameters (with or without names), or param groups, as for `Optimizer`.
        lr: Learning rate.
        betas, eps: See `AdamWRule`.
        weight_decay: Decoupled weight decay.
        eps_root, bias_correction, amsgrad, eps_before_correction, stochastic_rounding: See `AdamWRule`.

    Example:
        >>> import torch
        >>> from optim import AdamW
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Linear(8, 4)
        >>> optimizer = AdamW(model.named_parameters(), lr=1e-3)
        >>> model(torch.ones(2, 8)).square().sum().backward()
        >>> optimizer.step()
        >>> sorted(optimizer.state[model.weight])
        ['exp_avg', 'exp_avg_sq', 'step']
    """

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
