"""PSGD Kron: the gradient between two triangular factors that are fitted to whiten it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from optim.checks import (
    check_choice,
    check_counts,
    check_flag,
    check_positive,
    check_positive_share,
    check_share,
    check_unit_interval,
)
from optim.kernels.philox import normals
from optim.moments import correction, moment_dtype, zero_step
from optim.param_groups import NamedParams
from optim.rule import OfParam, State
from optim.rules.matrices import MatrixOptimizer, MatrixRule
from optim.sharding import check_whole

DIAGONALS = ("none", "largest", "all")
_BALANCED = 100  # steps from one balancing of the two factors to the next
_DAMPING = math.sqrt(torch.finfo(torch.float32).eps)
_DEAD = 1e-15  # the largest entry of h below which its factors are kept


@dataclass(frozen=True, kw_only=True)
class KronRule(MatrixRule):
    """PSGD Kron: the gradient between two triangular factors that are fitted to whiten it.

        u = min(1, 1.1 / rms(w)) w,  w = Q_L^T Q_L m Q_R^T Q_R

    Here m is the average of the gradients with decay rate b, corrected for its bias. A fit changes each factor Q by

        Q <- Q - `precond_lr` triu(A A^T - B B^T) Q / |A A^T + B B^T|,  A = Q_L h Q_R^T,  B = Q_L^-T V Q_R^-1

    (on the right side with A^T A and B^T B), where h is m with a little of the noise V added, V is normally distributed
    and drawn anew for each fit, and |.| is an estimate of the spectral norm from below. A diagonal factor is a vector
    that uses the diagonals alone, and the largest one in the place of |.|.

    `Optimizer.step` fits the factors, with the gradient that is about to be stepped; an `UpdateMap` uses those of the
    last step. Before the first fit they are multiples of the identity.

    Args:
        momentum: b, the decay rate of the average.
        update_probability: The share of steps that fit the factors, which are equally spaced. None starts at 1 for 500
            steps and then decreases exponentially to 0.03, which it reaches after 4000 steps.
        precond_lr: The step size of the fits.
        precond_init_scale: The product of both factors at the start is this multiple of the identity.
        max_size_triangular: Sides longer than this have diagonal factors.
        diagonal: Which sides have diagonal factors in addition: "none", the "largest" (the second one if both are
            equal), or "all".
        fit_momentum: Whether the factors are fitted to m. Otherwise they are fitted to the gradient.
        seed: The seed of the noise.

    Shapes:
        Matrices [m, n]; not elementwise, and not divided into parts of different sizes (`split_sizes`).

    State:
        12 bytes per parameter of a square matrix (one float32 average, and a matrix per side). In general 4 bytes, and
        4 a^2 for each side a with a triangular factor, or 4 a. In addition, a step count and the steps since a fit.

    Cost:
        4 m n (m + n) FLOP per step; for each fit about 4 m n (m + n) + 4 (m^3 + n^3) more.

    Source:
        Li 2015, arXiv 1512.04202; Li 2022, arXiv 2211.04422; evanatyourservice/kron_torch.

    Differs:
        - The published code also adds its noise to the gradient that is stepped; here it is only part of the fit.
        - The noise is drawn by Philox from the seed and the step, and not by torch's generators.
        - AdamW steps vectors, for which the published code has a diagonal factor. Tensors with more dimensions are
          treated as [dim 0, rest].
        - A matrix whose h has no entry above 1e-15 is not fitted. By the published formula its factors grow with every
          fit, so that those of a layer without gradients overflow when gradients return.
        - Both factors are balanced every 100 steps, and not at random once in 100 fits. This does not change u.
    """

    name: ClassVar[str] = "kron"
    divides: ClassVar[str] = "equal"

    momentum: float = 0.9
    update_probability: float | None = None
    precond_lr: float = 0.1
    precond_init_scale: float = 1.0
    max_size_triangular: int = 8192
    diagonal: str = "none"
    fit_momentum: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_unit_interval("KronRule", momentum=self.momentum)
        if self.update_probability is not None:
            check_positive_share("KronRule", update_probability=self.update_probability)
        check_share("KronRule", precond_lr=self.precond_lr)
        check_positive("KronRule", precond_init_scale=self.precond_init_scale)
        check_counts("KronRule", max_size_triangular=self.max_size_triangular, seed=self.seed)
        check_choice("KronRule", DIAGONALS, diagonal=self.diagonal)
        check_flag("KronRule", fit_momentum=self.fit_momentum)

    def state_settings(self) -> dict[str, Any]:
        """Return the setting that only the start of a state reads."""
        return {"precond_init_scale": self.precond_init_scale}

    def init(self, param: OfParam) -> State:
        """Return a zero average, zero counts, and multiples of the identity as factors."""
        self.check_layout(param)
        (stack,) = self.stacks(param)
        kind: dict[str, Any] = {"dtype": moment_dtype(param), "device": param.device}
        state: State = {"step": zero_step(), "since_fit": zero_step(), "exp_avg": torch.zeros(stack.shape, **kind)}
        sides = stack.shape[-2:]
        largest = 0 if sides[0] > sides[1] else 1
        for i, (side, size) in enumerate(zip(("left", "right"), sides, strict=True)):
            short = size == 1 or size > self.max_size_triangular
            if short or self.diagonal == "all" or (self.diagonal == "largest" and i == largest):
                factor = torch.ones((len(stack), size), **kind)
            else:
                factor = torch.eye(size, **kind).expand(len(stack), size, size).clone()
            state[f"factor_{side}"] = math.sqrt(self.precond_init_scale) * factor
        return state

    def probability(self, step: int) -> float:
        """Return the share of steps that fit the factors around a step.

        Args:
            step: The number of steps before this one.

        Returns:
            A number above 0, of at most 1.
        """
        if self.update_probability is not None:
            return self.update_probability
        return min(1.0, max(0.03, math.exp(-0.001 * (step - 500))))

    def share(self, grads: Sequence[Tensor], states: Sequence[State], group: Sequence[State]) -> None:
        """Fit the factors of the tensors whose turn it is; tensors do not share anything.

        Raises:
            TypeError: For sharded tensors.
        """
        check_whole("KronRule", grads)
        for grad, state in zip(grads, states, strict=True):
            step = int(state["step"])
            state["since_fit"] += 1
            if float(state["since_fit"]) >= 1 / self.probability(step):
                state["since_fit"].zero_()
                if grad.numel():
                    self._fit(grad, state, step)
            if step % _BALANCED == _BALANCED - 1 and grad.numel():
                left, right = (state[f"factor_{side}"] for side in ("left", "right"))
                ratio = (_largest(right) / _largest(left)).sqrt()
                left.mul_(_fitting(ratio, left))
                right.div_(_fitting(ratio, right))

    @property
    def coupled(self) -> bool:
        """Whether tensors share something: they do not, because `share` fits each pair of factors separately."""
        return False

    @property
    def uncodable(self) -> str:
        """Why the state cannot be stored as codes: it contains factors."""
        return "without triangular factors, which are no running averages and cannot be coded"

    def update(self, grad: OfParam, state: State, param: OfParam) -> tuple[OfParam, State]:
        """Return the direction u of the class docstring, in the average's dtype, and the new state."""
        (g,) = self.stacks(grad.to(state["exp_avg"].dtype))
        t = state["step"] + 1
        average, m = self._average(g, state, t)
        w = m
        for _ in range(2):
            w = _times(w, state["factor_left"], state["factor_right"], transposed=_ == 1)
        rms = w.square().mean((-2, -1), keepdim=True).sqrt()
        u = w * (1.1 / (rms + 1e-12)).clamp(max=1.0)
        return self.directed([u], param.shape), state | {"step": t, "exp_avg": average}

    def _average(self, g: Tensor, state: State, step: Tensor) -> tuple[Tensor, Tensor]:
        """Return the average after the gradient g [k, m, n], and without its bias."""
        average = state["exp_avg"].lerp(g, 1 - self.momentum)
        return average, average / correction(self.momentum, step).to(g.dtype)

    def _fit(self, grad: Tensor, state: State, step: int) -> None:
        """Change the factors as the class docstring says."""
        (g,) = self.stacks(grad.to(state["exp_avg"].dtype))
        h = self._average(g, state, state["step"] + 1)[1] if self.fit_momentum else g
        lives = h.abs().amax((-2, -1)) > _DEAD
        noise = normals(h.numel(), seed=self.seed, stream=step, device=h.device).to(h.dtype).reshape(h.shape)
        h = h + _DAMPING * h.abs().mean((-2, -1), keepdim=True) * noise
        left, right = state["factor_left"], state["factor_right"]
        a = _times(h, left, right)
        b = _solved(_solved(noise.mT, left).mT, right)
        for q, x, y in ((left, a, b), (right, a.mT, b.mT)):
            if q.ndim == 2:
                ours, theirs = x.square().sum(-1), y.square().sum(-1)
                change = (ours - theirs) * q / (ours + theirs).amax(-1, keepdim=True).clamp(min=_tiny(q))
            else:
                ours, theirs = x @ x.mT, y @ y.mT
                change = (ours - theirs).triu() / _spectral_norm(ours + theirs).clamp(min=_tiny(q)) @ q
            q.sub_(torch.where(_fitting(lives, q), change, 0.0), alpha=self.precond_lr)


def _tiny(x: Tensor) -> float:
    return torch.finfo(x.dtype).tiny


def _times(x: Tensor, left: Tensor, right: Tensor, *, transposed: bool = False) -> Tensor:
    """Return Q_L x Q_R^T, or Q_L^T x Q_R, for x [k, m, n]; a diagonal factor is [k, m]."""
    if left.ndim == 2:
        x = left.unsqueeze(-1) * x
    else:
        x = (left.mT if transposed else left) @ x
    if right.ndim == 2:
        return x * right.unsqueeze(-2)
    return x @ (right if transposed else right.mT)


def _solved(x: Tensor, q: Tensor) -> Tensor:
    """Return x Q^-1 for x [k, m, n]."""
    if q.ndim == 2:
        return x / q.unsqueeze(-2)
    found: Tensor = torch.linalg.solve_triangular(q, x, upper=True, left=False)
    return found


def _spectral_norm(x: Tensor) -> Tensor:
    """Return an estimate [k, 1, 1] from below of the spectral norms of symmetric matrices x [k, m, m]."""
    largest = x.abs().amax((-2, -1), keepdim=True)
    x = x / largest
    longest = x.square().sum(-2).argmax(-1)
    v = torch.take_along_dim(x, longest[:, None, None], -1).mT @ x
    norm = (x @ (v / torch.linalg.vector_norm(v, dim=-1, keepdim=True)).mT).square().sum((-2, -1), keepdim=True).sqrt()
    return torch.where(largest > 0, norm * largest, largest)


def _largest(q: Tensor) -> Tensor:
    """Return the largest absolute entry of each factor, [k]."""
    return q.abs().flatten(1).amax(1)


def _fitting(x: Tensor, q: Tensor) -> Tensor:
    """Return x [k] in a shape that multiplies the factors q."""
    return x.reshape(-1, *[1] * (q.ndim - 1))


class Kron(MatrixOptimizer):
    """PSGD Kron for hidden matrices and AdamW for the rest, with equal learning rates unless given.

    Args:
        named_parameters: The model or its named parameters, as for `MatrixOptimizer`.
        lr: Learning rate of the hidden matrices; about a third of AdamW's.
        weight_decay: Decoupled weight decay of the hidden matrices.
        options: Fields of `KronRule`, and the keywords of `MatrixOptimizer`.

    Example:
        >>> import torch
        >>> from optim import Kron
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Linear(8, 4)
        >>> optimizer = Kron(model.named_parameters(), lr=3e-4)
        >>> model(torch.ones(2, 8)).square().sum().backward()
        >>> optimizer.step()
        >>> sorted(optimizer.state[model.weight])
        ['exp_avg', 'factor_left', 'factor_right', 'since_fit', 'step']
    """

    def __init__(
        self, named_parameters: NamedParams, lr: float | Tensor = 3e-4, weight_decay: float = 0.0, **options: Any
    ) -> None:
        super().__init__(named_parameters, KronRule, lr, weight_decay, **options)
