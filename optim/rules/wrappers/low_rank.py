"""States of a low-rank gradient: a rule that runs on a projection of each matrix's gradient."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from optim.checks import check_choice, check_counts, check_flag, check_non_negative, check_positive_counts
from optim.kernels.philox import normals
from optim.moments import correction, moment_dtype, scalar_moment
from optim.param_groups import NamedParams
from optim.rule import OfParam, State, UpdateRule
from optim.rules.adamw import AdamWRule
from optim.rules.conda import CondaRule
from optim.rules.matrices import MatrixOptimizer
from optim.sharding import is_sharded

_CHOICES = {
    "proj_type": ("std", "reverse_std", "left", "right"),
    "projection": ("svd", "random"),
    "form": ("project", "residual", "scale"),
    "scale_type": ("channel", "tensor"),
}
_NORM_EPS = 1e-8
INNER = AdamWRule(eps=1e-6, bias_correction=False)
"""The published codes' inner rule. Its bias is corrected by `LowRank.correct_bias`, at the end of the update."""


@dataclass(frozen=True, kw_only=True)
class LowRank(UpdateRule):
    """A rule that runs on a low-rank projection of each matrix's gradient (GaLore, Fira, APOLLO).

        u = c U

    Here R are the r coordinates of the gradient in a basis P of its rows or columns, N is the inner rule's direction
    for R, and back(N) is N in the parameter's shape. The factor is c = sqrt(1 - b2^t) / (1 - b1^t) with the betas of
    the inner rule, or c = 1 without `correct_bias`. When the basis changes, the inner rule's moments are not
    transformed, as in the published codes.

    Args:
        inner: The rule that runs on R.
        form: "project" (GaLore): U = scale back(N). "residual" (Fira): U = scale back(N) + limit((G - scale back(R))
            s). "scale" (APOLLO): U = sqrt(scale) limit(G s). Here s is |N| / (|R| + 1e-8) per row or column that is not
            projected.
        scale: The factor in U.
        scale_type: "channel" for one s per row or column as above, "tensor" for one s for the whole tensor.
        rank: The rank r, which is limited to the smaller side.
        proj_type: The side that is projected: "std" for the smaller one (the columns if both are equal), "reverse_std"
            for the larger one, "left" for the rows, "right" for the columns.
        projection: "svd" uses the first r singular vectors of the gradient of every `update_proj_gap`-th step and
            stores them in the state. Only `step` renews them, an `UpdateMap` never does, and before the first step they
            are the first r coordinates. "random" uses normally distributed entries divided by sqrt(r), which are drawn
            anew every `update_proj_gap` steps and not stored: they are a function of `seed`, the parameter's number and
            the number of draws.
        update_proj_gap: The number of steps from one basis to the next.
        seed: The seed of random bases.
        limiter: The largest factor by which limit(S) lets |S| grow per step; 0 for no limit.
        limiter_reset: Whether a step with |S| = 0 is ignored. Otherwise, as in the published codes, the limiter never
            recovers from a zero gradient: the norm that it compares with is then 0, so that the next S is cut to about
            1e-8 and may grow by 1 % per step. It then takes 1850 steps to reach 100, during which the parameter does
            not change under APOLLO, and Fira has no residual.
        scale_front: Whether APOLLO's sqrt(scale) is applied before the limiter instead of after it.
        exact_residual: Whether Fira's residual is that of the paper, (G - back(R)) s. In the published code, which is
            the default, the share 1 - scale of the gradient in the subspace is added a second time, without momentum.
        correct_bias: Whether c corrects the bias of the moments.

    Shapes:
        Tensors with two or more dimensions, treated as [dim 0, rest]. Not elementwise.

    Source:
        Zhao et al. 2024, arXiv 2403.03507 (GaLore); Chen et al. 2024, arXiv 2410.01623 (Fira); Zhu et al. 2024, arXiv
        2412.05270 (APOLLO), and their codes.

    Differs:
        - `limiter_reset`.
        - The largest entry of each singular vector is positive, so that results after a new basis do not depend on the
          signs that the SVD returns.
        - Random bases are drawn by Philox and not by torch's generators.
        - Weight decay is that of `Optimizer`, where the published codes decay after the update (equal with ``lr (1 - lr
          wd)`` and ``wd / (1 - lr wd)``).
        - GaLore's projection of both sides ("full") does not exist here.

    Example:
        >>> from optim import AdamWRule, LowRank
        >>> rule = LowRank(inner=AdamWRule(bias_correction=False), rank=2)
        >>> state = rule.init(torch.empty(8, 6))
        >>> tuple(state["exp_avg"].shape)
        (8, 2)
    """

    name: ClassVar[str] = "low_rank"
    elementwise: ClassVar[bool] = False

    inner: UpdateRule = INNER
    rank: int = 128
    update_proj_gap: int = 200
    proj_type: str = "std"
    projection: str = "svd"
    form: str = "project"
    scale: float = 0.25
    scale_type: str = "channel"
    scale_front: bool = False
    exact_residual: bool = False
    limiter: float = 1.01
    limiter_reset: bool = True
    correct_bias: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        called = type(self).__name__
        if not isinstance(self.inner, UpdateRule) or isinstance(self.inner, LowRank | CondaRule):
            raise ValueError(
                f"{called}: inner = {self.inner!r}; it must be a rule such as AdamWRule(), without its own basis"
            )
        if self.inner.reads:
            raise ValueError(
                f"{called}: inner = {self.inner!r}; it reads {' and '.join(sorted(self.inner.reads))} of its group or "
                "the weights themselves, which are not available in a subspace"
            )
        for key, choices in _CHOICES.items():
            check_choice(called, choices, **{key: getattr(self, key)})
        check_positive_counts(called, rank=self.rank, update_proj_gap=self.update_proj_gap)
        check_counts(called, seed=self.seed)
        check_non_negative(called, scale=self.scale, limiter=self.limiter)
        if 0 < self.limiter < 1:
            raise ValueError(f"{called}: limiter = {self.limiter!r}; it must be at least 1, or 0 for none")
        flags = ("scale_front", "exact_residual", "limiter_reset", "correct_bias")
        check_flag(called, **{key: getattr(self, key) for key in flags})
        if self.correct_bias and (_found(self.inner, "betas") is None or _found(self.inner, "bias_correction")):
            raise ValueError(
                f"{called}: correct_bias=True needs an inner rule that has betas and does not correct its bias itself, "
                f"such as {INNER!r}; the inner rule is {self.inner!r}"
            )

    def init(self, param: OfParam) -> State:
        """Return the inner rule's state for the projected gradient, the basis, and the limiter's norm.

        A random basis is not stored, but the parameter's number by which it is drawn.

        Raises:
            ValueError: For a vector or scalar, and for a sharded parameter.
        """
        if param.ndim < 2:
            raise ValueError(
                f"{type(self).__name__}: a parameter of shape {tuple(param.shape)} is not a matrix; use another rule "
                f"for it (create({self.name!r}, model.named_parameters(), ...) puts it in an AdamW group)"
            )
        if is_sharded(param):
            raise ValueError(
                f"{type(self).__name__}: a parameter is sharded, but its subspace can only be computed from the whole "
                "matrix; use a rule that steps shards, such as AdamW"
            )
        rows, columns, side, rank = self._sides(param)
        low = (rank, columns) if side == "left" else (rows, rank)
        state = dict(self.inner.init(param.new_empty(low)))
        if self.projection == "svd":
            length = rows if side == "left" else columns
            state["basis"] = torch.eye(length, rank, dtype=moment_dtype(param), device=param.device)
        else:
            state["number"] = torch.zeros((), dtype=torch.float32, device="cpu")
        if self.form != "project" and self.limiter:
            state["limited"] = scalar_moment(param)
        return state

    def share(self, grads: Sequence[Tensor], states: Sequence[State], group: Sequence[State]) -> None:
        """Compute the bases that are due, number new parameters, and share what the inner rule shares.

        Only `step` does this. Parameters share their numbering, so that each of a group draws a different basis.
        """
        last = max((float(state["number"]) for state in group if "number" in state), default=0.0)
        for grad, state in zip(grads, states, strict=True):
            if self.projection == "svd" and float(state["step"]) % self.update_proj_gap == 0:
                state["basis"].copy_(self._singular_vectors(grad, state["basis"]))
            elif self.projection == "random" and state["number"] == 0:
                last += 1
                state["number"].fill_(last)
        self.inner.share(grads, states, group)

    @property
    def uncodable(self) -> str:
        """Why the state cannot be stored as codes: it contains a basis, if that is stored."""
        if self.projection == "random":
            return self.inner.uncodable
        return (
            "without a basis of singular vectors, which is not a running average and cannot be coded; "
            "quantise the rule inside LowRank instead: LowRank(inner=AdamW8bitRule(...))"
        )

    @property
    def coupled(self) -> bool:
        """Whether tensors share something: they share the numbers of drawn bases, and what the inner rule shares."""
        return self.projection == "random" or self.inner.coupled

    def update(self, grad: OfParam, state: State, param: OfParam) -> tuple[OfParam, State]:
        """Return the direction u of the class docstring, in the moments' dtype, and the new state with its basis."""
        dtype = moment_dtype(param)
        rows, columns, side, rank = self._sides(param)
        g = grad.to(dtype).reshape(rows, columns)
        basis = self._basis(state, rows if side == "left" else columns, rank, g)
        left = side == "left"
        r = basis.mT @ g if left else g @ basis
        own = {key: value for key, value in state.items() if key not in ("basis", "number", "limited")}
        n, new = self.inner.update(r, own, r)
        n = n.to(dtype)
        state = {key: new.get(key, value) for key, value in state.items()}

        def back(x: Tensor, onto: Tensor | None = None) -> Tensor:
            factors = (basis, x) if left else (x, basis.mT)
            return torch.mm(*factors) if onto is None else torch.addmm(onto, *factors)

        factor = torch.ones((), dtype=dtype, device=g.device)
        if self.correct_bias:
            b1, b2 = _found(self.inner, "betas")
            factor = (correction(b2, state["step"]).sqrt() / correction(b1, state["step"])).to(dtype).to(g.device)
        if self.form == "project":  # scalars multiply the smaller tensor
            return back(self.scale * factor * n).reshape(param.shape), state
        axis = None if self.scale_type == "tensor" else (0,) if left else (1,)
        s = _norm(n, axis) / (_norm(r, axis) + _NORM_EPS)
        rest = g
        if self.form == "residual":
            rest = back(-1.0 * r if self.exact_residual else -self.scale * r, onto=g)
        else:
            s = s * math.sqrt(self.scale) if self.scale_front else s
            factor = factor if self.scale_front else math.sqrt(self.scale) * factor
        if self.limiter:
            norm = _norm(_norm(rest, axis) * s, None)  # the norm of rest s, without computing rest s
            share, state["limited"] = self._limit(norm, state["limited"], state["step"])
            s = s * share
        u = rest * (s * factor)
        if self.form == "residual":
            u = back(self.scale * factor * n, onto=u)
        return u.reshape(param.shape), state

    def _limit(self, norm: Tensor, stored: Tensor, step: Tensor) -> tuple[Tensor, Tensor]:
        """Return the factor by which the limiter scales S with this norm, and the norm to compare the next S with.

        `stored` is the norm from the last step, or 0 if there was none.
        """
        first = stored == 0 if self.limiter_reset else (step == 1).to(norm.device)
        cut = torch.where(first, 1.0, (norm / (stored + _NORM_EPS)).clamp(min=self.limiter) / self.limiter)
        after = norm / cut
        return 1 / cut, torch.where(norm == 0, stored, after) if self.limiter_reset else after

    def _sides(self, param: Tensor) -> tuple[int, int, str, int]:
        """Return the rows and columns of the parameter as a matrix, the projected side, and the rank."""
        rows, columns = param.shape[0], math.prod(param.shape[1:])
        smaller = "right" if rows >= columns else "left"
        side = {"std": smaller, "reverse_std": "left" if smaller == "right" else "right"}.get(
            self.proj_type, self.proj_type
        )
        return rows, columns, side, min(self.rank, rows, columns)

    def _basis(self, state: State, length: int, rank: int, like: Tensor) -> Tensor:
        """Return P [length, r] in the dtype of `like`, from the state or drawn."""
        if self.projection == "svd":
            return state["basis"].to(like.dtype)
        stream = state["number"].to(torch.int64) * 65536 + (state["step"] // self.update_proj_gap).to(torch.int64)
        drawn = normals(length * rank, seed=self.seed, stream=stream, device=like.device)
        return drawn.to(like.dtype).reshape(length, rank) / math.sqrt(max(rank, 1))

    def _singular_vectors(self, grad: Tensor, basis: Tensor) -> Tensor:
        """Return the first r left or right singular vectors of a gradient as columns, with fixed signs."""
        if basis.numel() == 0:
            return basis
        u, _, vt = torch.linalg.svd(grad.to(basis.dtype).reshape(grad.shape[0], -1), full_matrices=False)
        vectors: Tensor = (u if self._sides(grad)[2] == "left" else vt.mT)[:, : basis.shape[1]]
        largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
        return vectors * torch.where(largest < 0, -1.0, 1.0)


def _found(rule: UpdateRule, key: str) -> Any:
    """Return a field of the rule or, if it does not have that field, of the rule inside it; None if there is none."""
    while not hasattr(rule, key):
        inside = getattr(rule, "inner", None)
        if not isinstance(inside, UpdateRule):
            return None
        rule = inside
    return getattr(rule, key)


def _norm(x: Tensor, axis: tuple[int, ...] | None) -> Tensor:
    return x.square().sum(axis, keepdim=True).sqrt() if axis is not None else x.square().sum().sqrt()


class LowRankOptimizer(MatrixOptimizer):
    """A low-rank rule for hidden matrices and AdamW for the rest, as param groups of one `Optimizer`.

    Args:
        named_parameters: The model or its named parameters, as for `MatrixOptimizer`.
        lr: Learning rate of the hidden matrices.
        betas, eps: The settings of the inner rule.
        weight_decay: Decoupled weight decay of the hidden matrices.
        options: Other fields of the rule, and the keywords of `MatrixOptimizer`; `adamw_eps` is 1e-6 by default.

    Attributes:
        rule: The class of the rule.
    """

    rule: ClassVar[type[LowRank]]

    def __init__(
        self,
        named_parameters: NamedParams,
        lr: float | Tensor = 1e-2,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        **options: Any,
    ) -> None:
        usual: dict[str, Any] = {
            "betas": betas, "eps": eps, "adamw_eps": 1e-6, "adamw_eps_before_correction": True
        }  # fmt: skip
        super().__init__(named_parameters, self.rule, lr, weight_decay, **(usual | options))
