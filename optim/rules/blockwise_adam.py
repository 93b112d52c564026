"""Blockwise Adam: one second moment a tensor, or one for all tensors of a param group (AdaSGD)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from optim.checks import check_non_negative, checked_betas
from optim.optimizer import Optimizer, Params
from optim.rule import State, UpdateRule, correction, scalar_moment, zero_moment, zero_step
from optim.sharding import is_sharded


@dataclass(frozen=True, kw_only=True)
class BlockwiseAdamRule(UpdateRule):
    """u = m / (1 - b1^t) / (sqrt(v) / sqrt(1 - b2^t) + eps), with m <- b1 m + (1 - b1) g, v <- b2 v + (1 - b2) q;
    the scalar q is the mean of g^2 over the block that the parameter belongs to.

    - `block`: "tensor", every tensor by itself, or "group", all tensors of the param group that have a gradient: one
      group for the whole model is AdaSGD, a group for each kind of layer (`optim.param_groups.block_of`) stands
      between it and Adam. For blocks within tensors see `AdamMiniRule`.

    Shapes: any; not elementwise.
    State: 4 bytes a parameter (a float32 moment); scalars: v, with "group" the rest of the block's sum of squares and
    count, and a step count of the tensor's own.
    Source: Xie et al. 2024, arXiv 2410.08198, algorithm 3; mohamad-amin/adam-coordinate-adaptivity, class AdaSGD.
    Differs: a group without any gradient is skipped (published: 0/0); v has the moments' dtype (published: float32
    also for float64). The paper's analysis has eps inside the root and no correction; this is its code.

    Under "group" the update of one tensor needs the gradients of others. `Optimizer` brings them together before each
    step; an `UpdateMap` knows only those of the last step, so there v moves with the new gradient of the tensor and
    the last ones of the rest: near, as q has the weight 1 - b2, but not what a step would do. "tensor" is exact.
    """

    name: ClassVar[str] = "blockwise_adam"
    elementwise: ClassVar[bool] = False

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    block: str = "tensor"

    def __post_init__(self) -> None:
        object.__setattr__(self, "betas", checked_betas("BlockwiseAdamRule", self.betas))
        check_non_negative("BlockwiseAdamRule", eps=self.eps)
        if self.block not in ("tensor", "group"):
            raise ValueError(f"BlockwiseAdamRule: block = {self.block!r}; it must be 'tensor' or 'group'")

    def init(self, param: Tensor) -> State:
        """Zero moments and step count, and with "group" no other tensors."""
        scalars = ("exp_avg_sq", "rest_sq", "rest_numel") if self.block == "group" else ("exp_avg_sq",)
        zeros = {key: scalar_moment(param) for key in scalars}
        return {"step": zero_step(), "exp_avg": zero_moment(param), **zeros}

    def update(self, grad: Tensor, state: State, param: Tensor) -> tuple[Tensor, State]:
        """The direction u of the class docstring, in the moments' dtype."""
        b1, b2 = self.betas
        g = grad.to(state["exp_avg"].dtype)
        t = state["step"] + 1
        new = dict(state)
        total, count = g.square().sum(), g.numel()
        if self.block == "group":
            q = (total + state["rest_sq"]) / (count + state["rest_numel"]).clamp_min(1)
        else:
            q = total / max(count, 1)
        m = state["exp_avg"].lerp(g, 1 - b1)
        v = b2 * state["exp_avg_sq"] + (1 - b2) * q
        new |= {"step": t, "exp_avg": m, "exp_avg_sq": v}
        c1, c2 = correction(b1, t).to(m.dtype), correction(b2, t).to(m.dtype)
        return m / c1 / ((v / c2).sqrt() + self.eps), new

    def share(self, grads: Sequence[Tensor], states: Sequence[State], group: Sequence[State]) -> None:
        """With "group": each tensor learns the sum of squares and the count of all others that have a gradient."""
        if self.block != "group":
            return
        dtypes = [state["rest_sq"].dtype for state in states]
        squares = [_whole(grad.detach().to(dtype).square().sum()) for grad, dtype in zip(grads, dtypes, strict=True)]
        total = torch.stack([square.double().to(squares[0].device) for square in squares]).sum()
        count = sum(grad.numel() for grad in grads)
        for grad, square, state in zip(grads, squares, states, strict=True):
            state["rest_sq"].copy_((total - square.double().to(total.device)).clamp_min(0))
            state["rest_numel"].fill_(count - grad.numel())

    @property
    def coupled(self) -> bool:
        """With "group" one second moment belongs to several tensors."""
        return self.block == "group"


def _whole(x: Tensor) -> Tensor:
    """A sharded tensor (DTensor) as a plain one, its parts on other ranks added; any other as it is."""
    whole: Tensor = x.full_tensor() if is_sharded(x) else x  # type: ignore[attr-defined]
    return whole


class BlockwiseAdam(Optimizer):
    """`Optimizer` running `BlockwiseAdamRule`."""

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        block: str = "tensor",
    ) -> None:
        rule = BlockwiseAdamRule(betas=betas, eps=eps, block=block)
        super().__init__(params, rule, lr=lr, weight_decay=weight_decay)
