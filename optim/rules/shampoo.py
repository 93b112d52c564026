"""Shampoo: the gradient between inverse roots of the averages of G G^T and G^T G, block by block, with grafting."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from optim.checks import (
    check_choice,
    check_non_negative,
    check_positive,
    check_positive_counts,
    check_share,
    check_unit_interval,
)
from optim.moments import correction, moment_dtype, zero_step
from optim.param_groups import NamedParams
from optim.rule import OfParam, State
from optim.rules.matrices import MatrixOptimizer, MatrixRule
from optim.sharding import check_whole

GRAFTINGS = ("adam", "adagrad", "sgd", "none")


@dataclass(frozen=True, kw_only=True)
class ShampooRule(MatrixRule):
    """Shampoo: the gradient between inverse roots of the averages of G G^T and G^T G, block by block, with grafting.

        u = |a| / |s| s,  s = L^(-1/4) m R^(-1/4)

    Here m is the average of the gradients with decay rate b1, corrected for its bias. L and R are averages of G G^T and
    G^T G with decay rate b2, divided by 1 - b2^t, with `epsilon` added to the diagonal; if b2 is 1 they are sums. The
    step of the grafting method for the same m is a, so that u has the norm of a in each block. A matrix is divided into
    blocks of at most `max_preconditioner_dim` rows and columns, each of which has its own L and R.

    The inverse roots are computed every `precondition_frequency` steps, with the gradient that is about to be stepped.
    Only `Optimizer.step` computes them; an `UpdateMap` uses those of the last step. Until the step
    `start_preconditioning_step`, u is a.

    Args:
        betas: (b1, b2), the decay rates of m and of the factors; b2 may be 1.
        epsilon: Added to the diagonal of the factors.
        max_preconditioner_dim: The largest side of a block.
        precondition_frequency: The number of steps from one inverse root to the next.
        start_preconditioning_step: The first step that uses inverse roots; None for `precondition_frequency`.
        grafting: The method that determines the norm: "adam" (m / (sqrt(v / (1 - b^t)) + eps), where b is
            `grafting_beta2`), "adagrad" (with the sum of squares instead of their average), "sgd" (m), or "none" for
            u = s.
        grafting_beta2, grafting_epsilon: The values b and eps of the grafting method.

    Shapes:
        Matrices [m, n]; not elementwise, and not divided into parts of different sizes (`split_sizes`).

    State:
        24 bytes per parameter of a square matrix in one block (m, v, and two matrices per side) and a step count. In
        general 8 bytes (4 if `grafting` is "sgd" or "none"), and 8 a^2 for each side a of a block.

    Cost:
        An eigendecomposition of both factors every `precondition_frequency` steps, and 4 m n (m + n) FLOP per step.

    Source:
        Gupta et al. 2018, arXiv 1802.09568; Shi et al. 2023, arXiv 2309.06497; facebookresearch/optimizers
        (DistributedShampoo, with eigendecompositions, decoupled weight decay, and no averages of the iterates).

    Differs:
        AdamW steps vectors, for which the published code has one factor. Convolutions are matrices [dim 0, rest].
    """

    name: ClassVar[str] = "shampoo"
    divides: ClassVar[str] = "equal"

    betas: tuple[float, float] = (0.9, 0.999)
    epsilon: float = 1e-12
    max_preconditioner_dim: int = 1024
    precondition_frequency: int = 10
    start_preconditioning_step: int | None = None
    grafting: str = "adam"
    grafting_beta2: float = 0.999
    grafting_epsilon: float = 1e-8

    def __post_init__(self) -> None:
        super().__post_init__()
        called = "ShampooRule"
        if not isinstance(self.betas, Sequence) or isinstance(self.betas, str) or len(self.betas) != 2:
            raise ValueError(f"{called}: betas = {self.betas!r}; expected two numbers, such as (0.9, 0.999)")
        check_share(called, **{"betas[1]": self.betas[1]})
        check_unit_interval(called, **{"betas[0]": self.betas[0]}, grafting_beta2=self.grafting_beta2)
        object.__setattr__(self, "betas", tuple(map(float, self.betas)))
        check_positive(called, epsilon=self.epsilon)
        check_non_negative(called, grafting_epsilon=self.grafting_epsilon)
        counts = {key: getattr(self, key) for key in ("max_preconditioner_dim", "precondition_frequency")}
        if self.start_preconditioning_step is not None:
            counts["start_preconditioning_step"] = self.start_preconditioning_step
        check_positive_counts(called, **counts)
        check_choice(called, GRAFTINGS, grafting=self.grafting)

    def init(self, param: OfParam) -> State:
        """Return zero averages and factors, a zero step count, and identities as inverse roots."""
        self.check_layout(param)
        (stack,) = self.stacks(param)
        kind: dict[str, Any] = {"dtype": moment_dtype(param), "device": param.device}
        state: State = {"step": zero_step(), "exp_avg": torch.zeros(stack.shape, **kind)}
        if self.grafting in ("adam", "adagrad"):
            state["exp_avg_sq"] = torch.zeros(stack.shape, **kind)
        for i, _, block in self._blocks(stack):
            for side, size in zip(("left", "right"), block.shape[-2:], strict=True):
                state[f"factor_{side}_{i}"] = torch.zeros((len(stack), size, size), **kind)
                state[f"root_{side}_{i}"] = torch.eye(size, **kind).expand(len(stack), size, size).clone()
        return state

    @property
    def start(self) -> int:
        """The first step that uses inverse roots."""
        chosen = self.start_preconditioning_step
        return self.precondition_frequency if chosen is None else chosen

    def share(self, grads: Sequence[Tensor], states: Sequence[State], group: Sequence[State]) -> None:
        """Compute the inverse roots that are due; tensors do not share anything.

        Raises:
            TypeError: For sharded tensors.
        """
        check_whole("ShampooRule", grads)
        for grad, state in zip(grads, states, strict=True):
            t = int(state["step"]) + 1
            if t != self.start and (t < self.start or t % self.precondition_frequency):
                continue
            (g,) = self.stacks(grad.to(state["exp_avg"].dtype))
            unbiased = 1.0 if self.betas[1] == 1 else 1 - self.betas[1] ** t
            for key, factor in self._factors(g, state).items():
                if factor.numel():
                    values, vectors = torch.linalg.eigh(
                        factor / unbiased
                        + self.epsilon * torch.eye(factor.shape[-1], dtype=factor.dtype, device=factor.device)
                    )
                    values = values + (self.epsilon - values.amin(-1, keepdim=True)).clamp(min=0)
                    root = (vectors * values.pow(-0.25).unsqueeze(-2)) @ vectors.mT
                    state[key.replace("factor", "root")].copy_(root)

    @property
    def coupled(self) -> bool:
        """Whether tensors share something: they do not, because `share` computes each root separately."""
        return False

    @property
    def uncodable(self) -> str:
        """Why the state cannot be stored as codes: it contains inverse roots."""
        return "without inverse roots, which are no running averages and cannot be coded"

    def update(self, grad: OfParam, state: State, param: OfParam) -> tuple[OfParam, State]:
        """Return the direction u of the class docstring, in the averages' dtype, and the new state."""
        b1 = self.betas[0]
        dtype = state["exp_avg"].dtype
        (g,) = self.stacks(grad.to(dtype))
        t = state["step"] + 1
        average = state["exp_avg"].lerp(g, 1 - b1)
        m = average / correction(b1, t).to(dtype)
        new = state | self._factors(g, state) | {"step": t, "exp_avg": average}
        a = m
        if self.grafting in ("adam", "adagrad"):
            b = self.grafting_beta2 if self.grafting == "adam" else 1.0
            v = new["exp_avg_sq"] = b * state["exp_avg_sq"] + (1 - b if b < 1 else 1.0) * (g * g)
            a = m / ((v / correction(b, t).to(dtype) if b < 1 else v).sqrt() + self.grafting_epsilon)
        early = (t < self.start).to(g.device)
        rows: list[list[Tensor]] = []
        for i, (row, column), block in self._blocks(m):
            s = state[f"root_left_{i}"] @ block @ state[f"root_right_{i}"]
            if self.grafting != "none":
                of_block = a[..., row, column]
                s = s * (_norm(of_block) / (_norm(s) + 1e-16))
                s = torch.where(early, of_block, s)
            rows.append([]) if column.start == 0 else None
            rows[-1].append(s)
        u = torch.cat([torch.cat(blocks, -1) for blocks in rows], -2) if rows else m
        return self.directed([u], param.shape), new

    def _factors(self, g: Tensor, state: State) -> State:
        """Return the factors after the gradient g [k, m, n]."""
        b2 = self.betas[1]
        weight = 1.0 if b2 == 1 else 1 - b2
        found: State = {}
        for i, _, block in self._blocks(g):
            for side, x in (("left", block), ("right", block.mT)):
                found[f"factor_{side}_{i}"] = b2 * state[f"factor_{side}_{i}"] + weight * (x @ x.mT)
        return found

    def _blocks(self, x: Tensor) -> Iterator[tuple[int, tuple[slice, slice], Tensor]]:
        """Yield the number, the rows and columns, and the entries of each block of x [k, m, n], row by row."""
        size = self.max_preconditioner_dim
        number = 0
        for top in range(0, x.shape[-2], size):
            for left in range(0, x.shape[-1], size):
                place = slice(top, top + size), slice(left, left + size)
                yield number, place, x[..., place[0], place[1]]
                number += 1


def _norm(x: Tensor) -> Tensor:
    return x.square().sum((-2, -1), keepdim=True).sqrt()


class Shampoo(MatrixOptimizer):
    """Shampoo for hidden matrices and AdamW for the rest, with equal learning rates unless given.

    Args:
        named_parameters: The model or its named parameters, as for `MatrixOptimizer`.
        lr: Learning rate of the hidden matrices.
        weight_decay: Decoupled weight decay of the hidden matrices.
        options: Fields of `ShampooRule`, and the keywords of `MatrixOptimizer`.

    Example:
        >>> import torch
        >>> from optim import Shampoo
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Linear(8, 4)
        >>> optimizer = Shampoo(model.named_parameters(), lr=1e-3)
        >>> model(torch.ones(2, 8)).square().sum().backward()
        >>> optimizer.step()
        >>> sorted(optimizer.state[model.weight])[:4]
        ['exp_avg', 'exp_avg_sq', 'factor_left_0', 'factor_right_0']
    """

    def __init__(
        self, named_parameters: NamedParams, lr: float | Tensor = 1e-3, weight_decay: float = 0.0, **options: Any
    ) -> None:
        super().__init__(named_parameters, ShampooRule, lr, weight_decay, **options)
