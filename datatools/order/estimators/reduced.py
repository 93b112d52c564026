"""A reduced-order model: training replayed with the Hessians of the batches reduced, to few rows or few directions.

Two forms. With second_moment="own", the default, the rule itself steps all parameters, with the order's own moments,
and only what displacement does to gradients is reduced: to a few rows of each batch where the problem has `samples`
(`moments.precompute` of "rows"), else along k directions. A score is T steps of the rule, with rows also T gradients of
these; the first steps of a fresh Adam, which no frozen preconditioner describes, are right.

With the second moment frozen ("expected" or "anchor") everything happens in k dimensions (spec B.4), thousands of
times faster, and right where the optimizer is warm. In coordinates
x = (theta - anchor) / sqrt(P) gradients and Hessians are g' = sqrt(P) g and H' = sqrt(P) H sqrt(P). With a basis B
[p, k] of {g'_l} and sqrt(P) u, a batch is a vector B^T g'_l and a matrix B^T H'_l B, and a step of an order

    g = g_l + H_l x;   m <- beta m + (1 - beta) g;   x <- x - lr_t m / (1 - beta^t)

costs k^2. The held-out loss is its quadratic model in the same coordinates.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from datatools.errors import EnvironmentProblem, UsageError
from datatools.order.estimators import moments
from datatools.order.estimators.layout import Layout
from datatools.order.estimators.linear import linearised
from datatools.order.estimators.pairwise import Pairwise, Second, expected_second_moment, unclipped, used_anchors
from datatools.order.estimators.question import Question, Settings
from datatools.order.estimators.surrogate import CURVATURE_LIMIT, DRIFT_LIMIT, LIMIT_BYTES, Surrogate
from datatools.order.problem import Cost, Problem
from datatools.order.reference_run import ReferenceRun


@dataclass(frozen=True, eq=False)
class Reduced(Surrogate):
    """What `precompute` leaves: per anchor and batch a vector and a matrix, and a model of the held-out loss.

    gradients: [A, n, k]; matrices: [A, n, k, k]; places: [A, k], where the anchors are; begin, carried: [k].
    segment: int64 [T]; beta, rates, corrections [T]; held_out: (loss, [k], [k, k]) about the reference's end `ends`.
    """

    name: ClassVar[str] = "reduced"
    title: ClassVar[str] = "the rule replayed on stored gradients, and on how those of a few rows change"
    once: ClassVar[str] = "a gradient per batch and anchor, and one of a few rows; without rows 2 k gradients per batch"
    each: ClassVar[str] = "T gradients of the rows; without rows T steps of the rule"
    source: ClassVar[str] = "own"
    limits: ClassVar[Mapping[str, float]] = {"curvature": CURVATURE_LIMIT, "drift": DRIFT_LIMIT}
    keeps_gradients: ClassVar[bool] = True

    gradients: Tensor
    matrices: Tensor
    places: Tensor
    begin: Tensor
    carried: Tensor
    ends: Tensor
    beta: float
    rates: tuple[float, ...]
    corrections: tuple[float, ...]
    positions: tuple[int, ...]
    loss: float
    slope: Tensor
    bend: Tensor

    @classmethod
    def precompute(cls, reference: ReferenceRun, problem: Problem, **options: Any) -> Surrogate:
        """See the function `precompute`."""
        return precompute(reference, problem, **options)

    @classmethod
    def options(cls, question: Question) -> dict[str, Any]:
        """The number of directions, the second moment, and for a frozen one the anchors of `pairwise`."""
        settings = question.settings
        return Pairwise.options(question) | {"k": settings.dimensions, "second_moment": settings.second_moment}

    @classmethod
    def expected(cls, question: Question) -> Cost:
        """Of the form that the settings ask for: with rows, with directions, or frozen."""
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
        """With rows, a gradient of them at every step."""
        rows = not cls.freezes(question.settings) and question.settings.sample_rows
        return super().per_score(question) + (question.steps * question.share if rows else 0.0)

    @classmethod
    def fast(cls, settings: Settings) -> bool:
        """Only with a frozen second moment is a score a matter of k numbers."""
        return cls.freezes(settings)

    @classmethod
    def freezes(cls, settings: Settings) -> bool:
        """As the settings say."""
        return settings.second_moment != "own"

    @classmethod
    def depends_on(cls, question: Question) -> dict[str, Any]:
        """Also on its form, and on what that form reads."""
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
        """The end [R, k] of each order, and the largest ||H x|| / ||g|| of its path [R]."""
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
        """g at the place between the two anchors around t, and H (x - that place); [R, k] each."""
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
        """||H x|| / ||g|| along the path, and the distance from the reference's end as a share of its way."""
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
    """The reduced model of a reference run.

    second_moment: "own", all of the reference's anchors, with the problem's samples, or without any k directions and
    2 k gradients per batch; or frozen: "expected" or "anchor", as in `pairwise.precompute`, from `anchors` anchors. Of
    the frozen ones:

    k: dimensions, at most n + 2: the leading directions of the scaled gradients at the anchors, the held-out gradient,
    and the way the reference went. anchors: as in `pairwise.precompute`.
    Cost: a gradient and k Hessian-vector products per batch and anchor, and k for the held-out loss.
    """
    if k < 1:
        raise UsageError(f"order: a reduced model of {k} dimensions; at least 1")
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
            f"order: reduced keeps {len(chosen)} x {n} gradients of {layout.size:,} numbers while it is made, "
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
    object.__setattr__(made, "ends", ends)  # the model's own end of the reference order: score(reference) is its loss
    return made


def leading(rows: Tensor, must: Tensor, k: int) -> Tensor:
    """[p, <= k] orthonormal: the directions of `must`, then the leading ones of `rows` [m, p] beside them."""
    kept = [row / row.norm() for row in must if float(row.norm()) > 0]
    first = orthonormal(torch.stack(kept[:k]).T)
    rest = rows - (rows @ first) @ first.T
    room = min(k - first.shape[1], len(rows))
    if room <= 0:
        return first
    values, vectors = torch.linalg.eigh((rest @ rest.T).double())
    top = vectors[:, -room:].flip(1)[:, values[-room:].flip(0) > 1e-12 * values[-1].clamp_min(1e-30)]
    return orthonormal(torch.cat([first, rest.T @ top.to(rows.dtype)], 1))


def orthonormal(columns: Tensor) -> Tensor:
    """An orthonormal basis [p, m] of what the columns [p, m] span."""
    q: Tensor = torch.linalg.qr(columns).Q
    return q
