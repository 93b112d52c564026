"""Groups as units: domains or difficulty bins, whose effects on each other are measured and not derived (spec B.5).

    W[i, j] = held-out loss after (block i, then block j) from the reference's start,  i != j
    score(order of groups) = mean over its pairs i before j of W[i, j]

This takes G (G - 1) short runs of the real optimizer, without a Hessian and without linearization, and includes Adam
and its schedule. The run of a block uses the learning rates of the first positions. The sum over pairs ranks orders;
it is calibrated to losses only by its mean, so use the ranking and not the number.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float64, Int64
from torch import Tensor

from datatools.errors import UsageError
from datatools.order.estimators.question import Question, Settings
from datatools.order.estimators.surrogate import Surrogate
from datatools.order.problem import Cost, Problem
from datatools.order.recipe import train
from datatools.order.reference_run import ReferenceRun
from datatools.order.search import exact_order


@dataclass(frozen=True, eq=False)
class Groups(Surrogate):
    """The estimate of `precompute`: the measured effects of groups on each other.

    Attributes:
        groups: the group of each batch, int64 [n].
        measured: W, float64 [G, G]; the diagonal is not used.
        constant: added to all scores, so that the reference order gets its true loss.

    """

    name: ClassVar[str] = "groups"
    title: ClassVar[str] = "blocks of domains, whose effect on each other is measured"
    once: ClassVar[str] = "G (G - 1) short runs"
    each: ClassVar[str] = "T G numbers"
    source: ClassVar[str] = "own"
    limits: ClassVar[Mapping[str, float]] = {"mixing": 0.2}
    """`mixing` is the distance of an order from the measured blocks: 0 for blocks, about 1 for a random order."""
    by_source: ClassVar[bool] = True

    groups: Int64[Tensor, " n"]
    measured: Float64[Tensor, "G G"]
    constant: float

    @classmethod
    def precompute(cls, reference: ReferenceRun, problem: Problem, **options: Any) -> Groups:
        """Call the function `precompute`."""
        return precompute(reference, problem, **options)

    @classmethod
    def options(cls, question: Question) -> dict[str, Any]:
        """Return the sources as groups."""
        names = sorted(set(question.sources))
        return {"groups": [names.index(source) for source in question.sources]}

    @classmethod
    def expected(cls, question: Question) -> Cost:
        """Count two blocks for every ordered pair of sources."""
        names = set(question.sources)
        block = min(list(question.sources).count(name) for name in names)
        return Cost(gradients=len(names) * (len(names) - 1) * 2 * block, bytes=8 * question.parameters)

    @classmethod
    def fast(cls, settings: Settings) -> bool:
        """Return True: a score is a sum of numbers."""
        return True

    @classmethod
    def depends_on(cls, question: Question) -> dict[str, Any]:
        """Return nothing: it depends on no setting of its own."""
        return {}

    @classmethod
    def check(cls, question: Question) -> None:
        """Refuse fewer than two sources."""
        if len(set(question.sources)) < 2:
            raise UsageError(
                "estimator groups: all batches are from one source, so there is nothing to order; use another estimator"
            )

    def _scores(self, sequences: Tensor) -> Tensor:
        return self.constant + self._pairs(self.groups[sequences])

    def _pairs(self, labels: Tensor) -> Tensor:
        """Average W over pairs of positions in different groups: groups by position [R, T] -> [R]."""
        count, before = len(self.measured), torch.zeros(len(labels), len(self.measured), dtype=torch.float64)
        total = torch.zeros(len(labels), dtype=torch.float64)
        pairs = torch.zeros_like(total)
        effect = self.measured.clone().fill_diagonal_(0)
        off = 1 - torch.eye(count, dtype=torch.float64)
        for t in range(labels.shape[1]):
            group = labels[:, t]
            total += (before * effect[:, group].T).sum(1)
            pairs += (before * off[:, group].T).sum(1)
            before[torch.arange(len(labels)), group] += 1
        return total / pairs.clamp_min(1)

    def trust(self, sequence: Sequence[int]) -> dict[str, float]:
        """Return the share of adjacent positions with different groups, in excess of that of the measured blocks."""
        self.score(sequence)
        labels = self.groups[list(sequence)]
        changes = int((labels[1:] != labels[:-1]).sum())
        return {"mixing": (changes - len(self.measured) + 1) / max(1, len(labels) - len(self.measured))}

    def best(self) -> tuple[int, ...]:
        """Find the order whose groups are in the best sequence of blocks (exact for at most 12 groups).

        Returns:
            A permutation of the reference's sequence.

        """
        order, _ = exact_order((self.measured - self.measured.T).fill_diagonal_(0) / 2)
        return tuple(b for group in order for b in self.sequence if int(self.groups[b]) == group)


def precompute(
    reference: ReferenceRun,
    problem: Problem,
    *,
    groups: Sequence[int],
    block: int | None = None,
) -> Groups:
    """Measure every ordered pair of groups.

    Cost: G (G - 1) runs of 2 block steps, and as many evaluations.

    Args:
        reference: the recorded run.
        problem: the batches and their loss.
        groups: the group of each batch, 0..G-1.
        block: batches of a group per run; None uses the size of the smallest group.

    Returns:
        The estimate.

    Raises:
        UsageError: if there are fewer than two groups, or labels do not match the batches.

    """
    count = max(groups, default=-1) + 1
    members = [[b for b in dict.fromkeys(reference.sequence) if groups[b] == g] for g in range(count)]
    if len(groups) != len(problem.batches) or count < 2 or not all(members):
        raise UsageError(
            f"order: {len(groups)} group labels for {len(problem.batches)} batches in {count} groups; expected one per "
            "batch, from 0 to G - 1, with at least two groups and none empty"
        )
    size = min(map(len, members)) if block is None else block
    size = min(size, len(reference.sequence) // 2)
    if size < 1:
        raise UsageError(f"order: block={block} batches; it must be at least 1")
    before = problem.cost.gradients
    start = reference.start
    measured = torch.zeros(count, count, dtype=torch.float64)
    for i in range(count):
        for j in range(count):
            if i != j:
                blocks = [*members[i][:size], *members[j][:size]]
                params, _ = train(problem, reference.recipe, blocks, start.params, start.states)
                measured[i, j] = problem.held_out_loss(params)
    cost = Cost(
        gradients=problem.cost.gradients - before,
        forwards=count * (count - 1) * len(problem.validation),
        bytes=2 * sum(p.numel() * p.element_size() for p in start.params.values()),
    )
    made = Groups(reference.sequence, cost, torch.tensor(list(groups)), measured, 0.0)
    shift = problem.held_out_loss(reference.end.params) - made.score(reference.sequence)
    return Groups(reference.sequence, cost, made.groups, measured, shift)
