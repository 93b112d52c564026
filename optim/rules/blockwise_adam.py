"""Blockwise Adam: one second moment per tensor, or one for all tensors of a param group (AdaSGD)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from optim.checks import check_choice, check_non_negative, checked_betas
from optim.moments import correction, scalar_moment, zero_moment, zero_step
from optim.optimizer import Optimizer, Params
from optim.rule import OfParam, State, UpdateRule
from optim.sharding import is_sharded


@dataclass(frozen=True, kw_only=True)
class BlockwiseAdamRule(UpdateRule):
    """Blockwise Adam: one second moment per tensor or per param group.

        u = m / (1 - b1^t) / (sqrt(v) / sqrt(1 - b2^t) + eps)

    Here m <- b1 m + (1 - b1) g and v <- b2 v + (1 - b2) q, where the scalar q is the mean of g^2 over the block that
    the parameter belongs to.

    Under "group" the update of one tensor needs the gradients of others. `Optimizer` collects them before each step. An
    `UpdateMap` only knows those of the last step, so that its v uses the new gradient of the tensor and the last
    gradients of the others. This is a good approximation, because q has the weight 1 - b2, but not exactly what a step
    would compute. Under "tensor" the map is exact.

    Args:
        betas: (b1, b2), the decay rates of the two moments.
        eps: Added to the denominator.
        block: "tensor" makes every tensor its own block. "group" makes one block of all tensors of the param group that
            have a gradient: a single group for the whole model is AdaSGD, and one group per kind of layer
            (`optim.block_of`) is a compromise between AdaSGD and Adam. For blocks within tensors see `AdamMiniRule`.

    Shapes:
        Any; not elementwise.

    State:
        4 bytes per parameter (a float32 moment), and scalars per tensor: v, a step count, and under "group" the sum of
        squares and the number of elements of the rest of the block.

    Source:
        Xie et al. 2024, arXiv 2410.08198, algorithm 3; mohamad-amin/adam-coordinate-adaptivity, class AdaSGD.

    Differs:
        A group without any gradient is skipped (the published code computes 0/0), and v has the dtype of the moments
        (in the published code it is float32 also for float64). The analysis in the paper has eps under the root and no
        bias correction; this rule follows the code.
    """

    name: ClassVar[str] = "blockwise_adam"
    elementwise: ClassVar[bool] = False

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    block: str = "tensor"

    def __post_init__(self) -> None:
        object.__setattr__(self, "betas", checked_betas("BlockwiseAdamRule", self.betas))
        check_non_negative("BlockwiseAdamRule", eps=self.eps)
        check_choice("BlockwiseAdamRule", ("tensor", "group"), block=self.block)

    def init(self, param: OfParam) -> State:
        """Return zero moments and a zero step count; under "group", the rest of the block is empty."""
        scalars = ("exp_avg_sq", "rest_sq", "rest_numel") if self.block == "group" else ("exp_avg_sq",)
        zeros = {key: scalar_moment(param) for key in scalars}
        return {"step": zero_step(), "exp_avg": zero_moment(param), **zeros}

    def update(self, grad: OfParam, state: State, param: OfParam) -> tuple[OfParam, State]:
        """Return the direction u of the class docstring, in the moments' dtype, and the new state."""
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
        """Under "group", give each tensor the sum of squares and the number of elements of the rest of its block."""
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
        """Whether several tensors share one second moment, as they do under "group"."""
        return self.block == "group"


def _whole(x: Tensor) -> Tensor:
    """Return a DTensor as a plain tensor, with the partial sums of other ranks added; other tensors are unchanged."""
    whole: Tensor = x.full_tensor() if is_sharded(x) else x  # type: ignore[attr-defined]
    return whole


class BlockwiseAdam(Optimizer):
    """Blockwise Adam for all parameters.

    Args:
        params: The model, its parameters (with or without names), or param groups, as for `Optimizer`.
        lr: Learning rate.
        betas, eps, block: See `BlockwiseAdamRule`.
        weight_decay: Decoupled weight decay.

    Example:
        >>> import torch
        >>> from optim import BlockwiseAdam
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Linear(8, 4)
        >>> optimizer = BlockwiseAdam(model.named_parameters(), lr=1e-3)
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
        block: str = "tensor",
    ) -> None:
        rule = BlockwiseAdamRule(betas=betas, eps=eps, block=block)
        super().__init__(params, rule, lr=lr, weight_decay=weight_decay)
