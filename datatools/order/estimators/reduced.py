"""A reduced-order model: training is replayed with the Hessians of batches reduced to few rows or few directions.

There are two forms. With second_moment="own", the default, the rule itself steps all parameters with the order's own
moments, and only the effect of displacement on gradients is reduced: to a few rows of each batch if the problem has
`samples` (`moments.precompute` with "rows"), else to k directions. A score takes T steps of the rule, with rows also T
of their gradients; the first steps of a new Adam, which no frozen preconditioner describes, are correct.

With a frozen second moment ("expected" or "anchor"), everything is computed in k dimensions (spec B.4), which is
thousands of times faster, and correct if the optimizer is warmed up. In coordinates x = (theta - anchor) / sqrt(P),
gradients and Hessians are g' = sqrt(P) g and H' = sqrt(P) H sqrt(P). With a basis B [p, k] of {g'_l} and sqrt(P) u, a
batch is a vector B^T g'_l and a matrix B^T H'_l B, and a step of an order

    g = g_l + H_l x;   m <- beta m + (1 - beta) g;   x <- x - lr_t m / (1 - beta^t)

costs k^2. The held-out loss is its quadratic model in the same coordinates.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from datatools.errors import EnvironmentProblem, UsageError
from datatools.order.estimators import moments
from datatools.order.estimators.expansion import expected_second_moment, unclipped, used_anchors
from datatools.order.estimators.layout import Layout
from datatools.order.estimators.linear import linearised
from datatools.order.estimators.pairwise import Pairwise, Second
from datatools.order.estimators.question import Question, Settings
from datatools.order.estimators.surrogate import CURVATURE_LIMIT, DRIFT_LIMIT, LIMIT_BYTES, Surrogate
from datatools.order.problem import Cost, Problem
from datatools.order.reference_run import ReferenceRun


@dataclass(frozen=True, eq=False)
class Reduced(Surrogate):
    """The estimate of a frozen `precompute`: a vector and a matrix per anchor and batch, and a model of the loss.

    Attributes:
        gradients: float64 [A, n, k].
        matrices: reduced Hessians, float64 [A, n, k, k].
        places: coordinates of the anchors, float64 [A, k].
        begin: coordinates of the start, float64 [k].
        carried: first moment before the first step, float64 [k].
        ends: coordinates of the model's own end of the reference order, float64 [k].
        beta: decay of the first moment.
        rates: learning rates by position.
        corrections: divisors of the first moment by position.
        positions: positions of the anchors.
        loss: held-out loss at the reference's end.
        slope: its gradient there, float64 [k].
        bend: its Hessian there, float64 [k, k].

    """

    name: ClassVar[str] = "reduced"
    title: ClassVar[str] = "the rule replayed on stored gradients, and on how those of a few rows change"
    once: ClassVar[str] = "a gradient per batch and anchor, and one of a few rows; without rows 2 k gradients per batch"
    each: ClassVar[str] = "T gradients of the rows; without rows T steps of the rule"
    source: ClassVar[str] = "own"
    limits: ClassVar[Mapping[str, float]] = {"curvature": CURVATURE_LIMIT, "drift": DRIFT_LIMIT}
    keeps_gradients: ClassVar[bool] = True

    gradients: Float64[Tensor, "A n k"]
    matrices: Float64[Tensor, "A n k k"]
    places: Float64[Tensor, "A k"]
    begin: Float64[Tensor, " k"]
    carried: Float64[Tensor, " k"]
    ends: Float64[Tensor, " k"]
    beta: float
    rates: tuple[float, ...]
    corrections: tuple[float, ...]
    positions: tuple[int, ...]
    loss: float
    slope: Float64[Tensor, " k"]
    bend: Float64[Tensor, "k k"]

    @classmethod
    def precompute(cls, reference: ReferenceRun, problem: Problem, **options: Any) -> Surrogate:
        """Call the function `precompute`."""
        return precompute(reference, problem, **options)

    @classmethod
    def options(cls, question: Question) -> dict[str, Any]:
        """Return the number of directions, the second moment, and for a frozen one the anchors of `pairwise`."""
        settings = question.settings
        return Pairwise.options(question) | {"k": settings.dimensions, "second_moment": settings.second_moment}

    @classmethod
    def expected(cls, question: Question) -> Cost:
        """Return the cost of the form that the settings choose: with rows, with directions, or frozen."""
        settings, n, held, numbers = question.settings, question.batches, question.held_out, question.parameters
        anchors, k = settings.anchors, settings.dimensions
        if not cls.freezes(settings) and settings.sample_rows:
            gradients = anchors * n * (1 + question.share) + question.steps * question.share + held
            return Cost(gradients=gradients, bytes=8 * anchors * n * numbers)
        if not cls.freezes(settings):
            return Cost(gradients=(anchors + 2 * k) * n + held, bytes=4 * (anchors + k) * n * numbers)
        a = min(settings.pairwise_anchors, anchors)
        k = min(k, a * n + 3)
        return Cost(gradients=a * n + held, hvps=k * (a * n + held), bytes=4 * (a * n + k) * numbers)

    @classmethod
    def per_score(cls, question: Question) -> float:
        """Count, with rows, one of their gradients at every step."""
        rows = not cls.freezes(question.settings) and question.settings.sample_rows
        return super().per_score(question) + (question.steps * question.share if rows else 0.0)

    @classmethod
    def fast(cls, settings: Settings) -> bool:
        """Return whether the second moment is frozen: then a score depends on k numbers per step."""
        return cls.freezes(settings)

    @classmethod
    def freezes(cls, settings: Settings) -> bool:
        """Return whether the settings freeze the second moment."""
        return settings.second_moment != "own"

    @classmethod
    def depends_on(cls, question: Question) -> dict[str, Any]:
        """Add the form of the estimate, and the settings that it reads."""
        settings, frozen = question.settings, cls.freezes(question.settings)
        rows = min(settings.sample_rows, question.batch_size)
        known = Pairwise.depends_on(question) if frozen else super().depends_on(question)
        known |= {"second_moment": settings.second_moment, "rows": None if frozen else rows}
        return known | {"k": None if not frozen and rows else settings.dimensions}

    def _scores(self, sequences: Tensor) -> Tensor:
        x, _ = self._run(sequences)
        away = x - self.ends
        return self.loss + away @ self.slope + 0.5 * ((away @ self.bend) * away).sum(1)

    def _run(self, sequences: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the end [R, k] of each order, and the largest ||H x|| / ||g|| on its path [R]."""
        x = self.begin.expand(len(sequences), -1).clone()
        m = self.carried.expand(len(sequences), -1).clone()
        worst = torch.zeros(len(sequences), dtype=x.dtype)
        for t in range(sequences.shape[1]):
            grad, change = self._gradient(t, sequences[:, t], x)
            worst = torch.maximum(worst, change.norm(dim=1) / grad.norm(dim=1).clamp_min(1e-30))
            m = self.beta * m + (1 - self.beta) * (grad + change)
            x = x - self.rates[t] / self.corrections[t] * m
        return x, worst

    def _gradient(self, t: int, batch: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """Compute g interpolated between the two anchors around t, and H (x - their interpolation); [R, k] each."""
        right = next((i for i, p in enumerate(self.positions) if p >= t), len(self.positions) - 1)
        left, share = right, 0.0
        if self.positions[right] > t and right > 0:
            left = right - 1
            share = (t - self.positions[left]) / (self.positions[right] - self.positions[left])
        grad = torch.lerp(self.gradients[left, batch], self.gradients[right, batch], share)
        place = torch.lerp(self.places[left], self.places[right], share)
        matrix = torch.lerp(self.matrices[left, batch], self.matrices[right, batch], share)
        return grad, torch.einsum("rij,rj->ri", matrix, x - place)

    def trust(self, sequence: Sequence[int]) -> dict[str, float]:
        """Return ||H x|| / ||g|| on the path, and the distance from the reference's end relative to its path length."""
        x, worst = self._run(torch.tensor([list(sequence)]))
        gone = float((self.ends - self.begin).norm())
        return {"curvature": float(worst[0]), "drift": float((x[0] - self.ends).norm()) / max(gone, 1e-30)}


def precompute(
    reference: ReferenceRun,
    problem: Problem,
    *,
    k: int = 8,
    anchors: int | None = 1,
    second_moment: Second | Literal["own"] = "own",
    limit_bytes: int = LIMIT_BYTES,
) -> Surrogate:
    """Compute the estimate from a reference run.

    Cost with a frozen second moment: a gradient and k Hessian-vector products per batch and anchor, and k for the
    held-out loss.

    Args:
        reference: the recorded run.
        problem: the batches and their loss.
        k: number of dimensions, at most n + 2: the leading directions of the scaled gradients at the anchors, the
            held-out gradient, and the displacement of the reference run.
        anchors: as in `pairwise.precompute`; for a frozen second moment only.
        second_moment: "own" uses all of the reference's anchors, with the problem's samples, or without them k
            directions and 2 k gradients per batch; "expected" and "anchor" freeze it, as in `pairwise.precompute`.
        limit_bytes: largest size of stored gradients, in bytes.

    Returns:
        The estimate.

    Raises:
        UsageError: if an option is invalid, or the rule's moments are not linear where they must be.
        EnvironmentProblem: if stored gradients exceed `limit_bytes`.

    """
    if k < 1:
        raise UsageError(f"order: a reduced model of {k} dimensions; use at least 1")
    if second_moment == "own":
        if problem.samples is not None:
            return moments.precompute(reference, problem, hessian="rows", limit_bytes=limit_bytes)
        return moments.precompute(reference, problem, directions=k, limit_bytes=limit_bytes)
    n = len(problem.batches)
    chosen = used_anchors(reference, anchors)
    layout = Layout.of(reference.start.params)
    dtype = next(iter(reference.start.params.values())).dtype
    need = len(chosen) * n * layout.size * dtype.itemsize
    if need > limit_bytes:
        raise EnvironmentProblem(
            f"order: reduced needs {len(chosen)} x {n} gradients of {layout.size:,} numbers while it is computed, "
            f"{need / 2**30:.1f} GiB; more than {limit_bytes / 2**30:.1f}: use one anchor, adapters, or pairwise"
        )
    before = (problem.cost.gradients, problem.cost.hvps)
    begin = layout.vector(reference.start.params)
    grads = begin.new_empty(len(chosen), n, layout.size)
    factors = torch.ones(len(chosen), n, dtype=torch.float64)
    for a, anchor in enumerate(chosen):
        for b in range(n):
            raw = problem.gradient(anchor.params, b)
            factors[a, b] = reference.recipe.clip_factor(raw)
            grads[a, b] = layout.vector(raw) * float(factors[a, b])
    middle = len(chosen) // 2
    v = None
    if second_moment == "expected":
        v = expected_second_moment(reference, layout, grads[middle])
    filtered = linearised(reference, layout, chosen[middle].position, v)
    root = filtered.preconditioner.to(dtype).sqrt()
    u = layout.vector(problem.held_out_gradient(reference.end.params))
    end = layout.vector(reference.end.params)

    def coordinates(difference: Tensor) -> Tensor:
        return difference / root

    scaled = root * grads
    must = torch.stack([root * u, coordinates(end - begin), root * filtered.carried.to(root)])
    basis = leading(scaled.reshape(-1, layout.size), must, k)  # [p, k]
    k = basis.shape[1]
    lifted = root[:, None] * basis  # a step in x, as a step in theta

    def matrix(product: Callable[[Tensor], Tensor], symmetric: bool = True) -> Tensor:
        curved = torch.stack([product(lifted[:, j].contiguous()) for j in range(k)])
        dense = (lifted.T @ curved.T).double().cpu()  # [i, j] = <B_i, H' B_j>
        return (dense + dense.T) / 2 if symmetric else dense

    def of_batch(a: int, b: int) -> Tensor:
        factor = float(factors[a, b])

        def product(vector: Tensor) -> Tensor:
            curved = layout.vector(problem.hvp(chosen[a].params, b, layout.tensors(vector)))
            return factor * unclipped(curved, grads[a, b], factor)

        return matrix(product, symmetric=factor == 1.0)

    matrices = torch.stack([torch.stack([of_batch(a, b) for b in range(n)]) for a in range(len(chosen))])
    held_out = matrix(lambda v: layout.vector(problem.held_out_hvp(reference.end.params, layout.tensors(v))))
    origin = layout.vector(chosen[middle].params)

    def place(vector: Tensor) -> Tensor:
        return (basis.T @ coordinates(vector - origin)).double().cpu()

    steps = range(len(reference.sequence))
    cost = Cost(
        gradients=problem.cost.gradients - before[0],
        hvps=problem.cost.hvps - before[1],
        bytes=need + basis.numel() * dtype.itemsize,
    )
    made = Reduced(
        reference.sequence,
        cost,
        (scaled @ basis).double().cpu(),
        matrices,
        torch.stack([place(layout.vector(a.params)) for a in chosen]),
        place(begin),
        (basis.T @ (root * filtered.carried.to(root))).double().cpu(),
        torch.zeros(k, dtype=torch.float64),
        filtered.beta,
        reference.recipe.rates,
        tuple(filtered.correction(t) for t in steps),
        tuple(a.position for a in chosen),
        problem.held_out_loss(reference.end.params),
        (lifted.T @ u).double().cpu(),
        held_out,
    )
    ends = made._run(torch.tensor([list(reference.sequence)]))[0][0]
    object.__setattr__(made, "ends", ends)  # the model's own end, so that the reference order gets its true loss
    return made


def leading(rows: Float[Tensor, "m p"], must: Float[Tensor, "j p"], k: int) -> Float[Tensor, "p d"]:
    """Build an orthonormal basis of given directions and the leading directions of some rows.

    Args:
        rows: floating dtype [m, p].
        must: directions to include first, floating dtype [j, p].
        k: largest number of directions.

    Returns:
        [p, d] with d <= k.

    """
    kept = [row / row.norm() for row in must if float(row.norm()) > 0]
    first = orthonormal(torch.stack(kept[:k]).T)
    rest = rows - (rows @ first) @ first.T
    room = min(k - first.shape[1], len(rows))
    if room <= 0:
        return first
    values, vectors = torch.linalg.eigh((rest @ rest.T).double())
    top = vectors[:, -room:].flip(1)[:, values[-room:].flip(0) > 1e-12 * values[-1].clamp_min(1e-30)]
    return orthonormal(torch.cat([first, rest.T @ top.to(rows.dtype)], 1))


def orthonormal(columns: Float[Tensor, "p m"]) -> Float[Tensor, "p d"]:
    """Build an orthonormal basis of the span of some columns.

    Args:
        columns: floating dtype [p, m].

    Returns:
        [p, d] with d = min(p, m).

    """
    q: Tensor = torch.linalg.qr(columns).Q
    return q
