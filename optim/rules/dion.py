"""Dion: momentum that is orthonormalised within a low rank by power iteration, with error feedback."""

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from optim.checks import (
    check_counts,
    check_non_negative,
    check_positive_counts,
    check_positive_share,
    check_unit_interval,
)
from optim.kernels.philox import normals
from optim.moments import moment_dtype, zero_step
from optim.param_groups import NamedParams
from optim.rule import OfParam, State
from optim.rules.matrices import MatrixOptimizer, MatrixRule
from optim.sharding import check_whole


@dataclass(frozen=True, kw_only=True)
class DionRule(MatrixRule):
    """Dion: momentum that is orthonormalised within a low rank by power iteration, with error feedback.

        u = sqrt(m / n) P Q^T,  P = orth(B Q'),  R = B^T P,  Q = R / (|R| + eps),  M <- B - (1 - mu) P R^T

    Here B = M + G is the momentum with the new gradient, Q' [n, r] is the Q of the last step, orth is the first factor
    of a QR decomposition, and |R| has the norms of R's columns. For m < n, the matrices are transposed.
    What the rank does not contain stays in M in full, and what it contains decays by mu.

    Args:
        momentum: mu, the factor of the part of B that was stepped.
        rank_fraction: The rank r as a share of the smaller side; it is rounded up.
        rank_multiple_of: r is rounded up to a multiple of this number, within the smaller side.
        power_iters: The number of power iterations per step.
        eps: Added to the norms of the columns.
        seed: The seed of the normally distributed Q of the start.

    Shapes:
        Matrices [m, n]; not elementwise, and not divided into parts of different sizes (`split_sizes`).

    State:
        8 bytes per parameter of a square matrix with `rank_fraction` 1: one float32 buffer, and Q. In general 4 bytes,
        and 4 r per column or row of the shorter side. In addition, a step count.

    Cost:
        8 m n r FLOP per step, and a QR decomposition of max(m, n) x r.

    Source:
        Ahn et al. 2025, arXiv 2504.05295; microsoft/dion.

    Differs:
        - The published code's default is a randomised Cholesky QR, which yields the same P up to signs that cancel.
        - Q starts from Philox's numbers for the seed and not from torch's generators. Equal shapes start equally.
        - Data-parallel workers exchange gradients as usual, and not P and R. For sharded parameters, wrap the optimizer
          in `optim.distributed.OwnerComputes`.
    """

    name: ClassVar[str] = "dion"
    divides: ClassVar[str] = "equal"

    momentum: float = 0.95
    rank_fraction: float = 1.0
    rank_multiple_of: int = 1
    power_iters: int = 1
    eps: float = 1e-8
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_unit_interval("DionRule", momentum=self.momentum)
        check_positive_share("DionRule", rank_fraction=self.rank_fraction)
        check_positive_counts("DionRule", rank_multiple_of=self.rank_multiple_of, power_iters=self.power_iters)
        check_non_negative("DionRule", eps=self.eps)
        check_counts("DionRule", seed=self.seed)

    def state_settings(self) -> dict[str, Any]:
        """Return the setting that only the start of a state reads."""
        return {"seed": self.seed}

    def init(self, param: OfParam) -> State:
        """Return a zero buffer, a zero step count, and a normally distributed Q."""
        self.check_layout(param)
        (stack,) = self.stacks(param)
        count, *sides = stack.shape
        short, rank = min(sides), self.rank(min(sides))
        dtype = moment_dtype(param)
        q = torch.empty((short, rank), dtype=dtype, device=param.device)
        if not param.is_meta:
            q = normals(q.numel(), seed=self.seed, device=param.device).to(dtype).reshape(q.shape)
        return {
            "step": zero_step(),
            "momentum_buffer": torch.zeros(stack.shape, dtype=dtype, device=param.device),
            "basis": q.expand(count, short, rank).clone(),
        }

    def rank(self, side: int) -> int:
        """Return the rank r of matrices whose smaller side is given.

        Args:
            side: The smaller side.

        Returns:
            An integer of at most `side`.
        """
        unit = self.rank_multiple_of
        return min(side, unit * math.ceil(self.rank_fraction * side / unit))

    @property
    def uncodable(self) -> str:
        """Why the state cannot be stored as codes: it contains a basis."""
        return "without a basis, which is no running average and cannot be coded"

    def update(self, grad: OfParam, state: State, param: OfParam) -> tuple[OfParam, State]:
        """Return the direction u of the class docstring, in the buffer's dtype, and the new state.

        Raises:
            TypeError: For sharded tensors.
        """
        check_whole("DionRule", [grad])
        (g,) = self.stacks(grad.to(state["momentum_buffer"].dtype))
        rows, columns = g.shape[-2:]
        b = state["momentum_buffer"] + g
        tall = b if rows >= columns else b.mT
        r = state["basis"]
        for _ in range(self.power_iters):
            p = torch.linalg.qr(tall @ r).Q
            r = tall.mT @ p
        lives = tall.abs().amax((-2, -1), keepdim=True) != 0 if tall.numel() else torch.ones((), dtype=torch.bool)
        p, r = torch.where(lives, p, 0.0), torch.where(lives, r, state["basis"])
        stepped = p @ r.mT
        q = r / (torch.linalg.vector_norm(r, dim=-2, keepdim=True) + self.eps)
        u = p @ q.mT
        if rows < columns:
            stepped, u = stepped.mT, u.mT
        new = {"step": state["step"] + 1, "momentum_buffer": b.sub(stepped, alpha=1 - self.momentum), "basis": q}
        return self.directed([math.sqrt(rows / max(columns, 1)) * u], param.shape), new


class Dion(MatrixOptimizer):
    """Dion for hidden matrices and AdamW for the rest.

    Args:
        named_parameters: The model or its named parameters, as for `MatrixOptimizer`.
        lr: Learning rate of the hidden matrices.
        weight_decay: Decoupled weight decay of the hidden matrices.
        options: Fields of `DionRule`, and the keywords of `MatrixOptimizer`. Without `adamw_lr` the rest uses `lr`,
            which is usually too large for AdamW.

    Example:
        >>> import torch
        >>> from optim import Dion
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Linear(8, 4)
        >>> optimizer = Dion(model.named_parameters(), lr=0.01, adamw_lr=3e-4, rank_fraction=0.5)
        >>> model(torch.ones(2, 8)).square().sum().backward()
        >>> optimizer.step()
        >>> optimizer.state[model.weight]["basis"].shape
        torch.Size([1, 4, 2])
    """

    def __init__(
        self, named_parameters: NamedParams, lr: float | Tensor = 0.01, weight_decay: float = 0.01, **options: Any
    ) -> None:
        super().__init__(named_parameters, DionRule, lr, weight_decay, **({"adamw_betas": (0.9, 0.95)} | options))
