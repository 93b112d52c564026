"""Which source first? The Lie-bracket tournament over sources, from gradients and Hessian-vector products of each.

For plain gradient descent, training on source A and then on B instead of the other way round changes the held-out loss
by lr^2 sigma(A, B), where

    sigma(A, B) = <g_E, H_B g_A - H_A g_B> = <H_B g_E, g_A> - <H_A g_E, g_B>

is the Lie bracket of the two updates. By the symmetry of H, one product H g_E per source gives all pairs, and sorting
the sources by their row sums gives the order.

Here the bracket is that of the optimizer (`brackets`): with u the held-out gradient, a source moves the weights along
V_A and answers to a change of its gradient by the transposed derivative w_A of that move along u, so that

    Q[A, B] = <H_B w_B, V_A>,   margin(A, B) = n_A n_B (K (Q[A, B] - Q[B, A]) + slope_B - slope_A)

where n_A is the number of steps on A and K the mean kernel of the momentum. AdamW and SGD have V = P g and w = P u with
exact momentum (`Linear`). For other rules both come from the rule itself, stepped on the mean gradient. The slopes are
the effect of a position by itself: the last gradients have moved the weights less, because momentum still holds them.

Several minibatches per source give error bars (a jackknife over them), and several anchors of a recorded run follow
gradients that change while training.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float64
from torch import Tensor

from datatools.errors import UsageError, did_you_mean
from datatools.order.estimators.brackets import Brackets, brackets
from datatools.order.estimators.expansion import expansion
from datatools.order.estimators.pairwise import Pairwise
from datatools.order.problem import Cost, Problem
from datatools.order.reference_run import ReferenceRun


@dataclass(frozen=True)
class Tournament:
    """Predicted effects of the order of sources; lower losses are better.

    Args:
        names: the S sources.
        steps: number of steps of each source.
        raw: inner products of the minibatches, from which everything else is computed.
        constant: held-out loss at the end of the reference run, or at the start without one.
        measured: whether `constant` is the loss of the reference order.
        cost: cost of the computation.

    Example:
        >>> from datatools.order.example import example_run
        >>> problem, reference = example_run()
        >>> found = tournament(problem, reference, {"a": [0, 1], "b": [2, 3]}, anchors=1)
        >>> sorted(found.order()), found.cost.hvps
        (['a', 'b'], 4)

    """

    names: tuple[str, ...]
    steps: tuple[int, ...]
    raw: Brackets
    constant: float
    measured: bool
    cost: Cost

    @cached_property
    def expansion(self) -> Pairwise:
        """The expansion whose batches are the sources; a sequence has the number of a source at each step."""
        return self._expansion(None)

    @cached_property
    def _leaving_out(self) -> list[tuple[float, Pairwise]]:
        """Jackknife: (weight, the expansion without one minibatch); empty if a source has only one."""
        counts = [self.raw.owner.count(source) for source in range(len(self.names))]
        if min(counts) < 2:
            return []
        shares = [(counts[source] - 1) / counts[source] for source in self.raw.owner]
        return [(share, self._expansion(left)) for left, share in enumerate(shares)]

    def _expansion(self, left_out: int | None) -> Pairwise:
        raw = self.raw
        mean = torch.zeros(len(self.names), len(raw.owner), dtype=torch.float64)
        for replicate, source in enumerate(raw.owner):
            mean[source, replicate] = float(replicate != left_out)
        mean /= mean.sum(1, keepdim=True)
        position, kernel, segment = expansion(
            raw.moved,
            raw.carried,
            raw.positions,
            raw.first @ mean.T,
            mean @ raw.products @ mean.T,
            raw.offsets @ mean.T,
            raw.carried_terms @ mean.T,
            raw.sequence,
        )
        position = raw.position_effects(position, mean)
        made = Pairwise(tuple(raw.sequence), self.cost, 0.0, position, kernel, mean @ raw.products @ mean.T, segment)
        shift = made.score(raw.sequence) if self.measured else 0.0
        return replace(made, constant=self.constant - shift)

    def margins(self) -> tuple[Float64[Tensor, "S S"], Float64[Tensor, "S S"]]:
        """Compute the predicted loss of i before j minus that of j before i, and its standard error.

        Returns:
            Margins and errors, float64 [S, S]; errors are nan if a source has one minibatch.

        """
        return self._with_error(self._margins)

    def _margins(self, made: Pairwise) -> Tensor:
        count = torch.tensor(self.steps, dtype=torch.float64)
        return made.matrix() * count[:, None] * count

    def scores(self) -> tuple[Float64[Tensor, " S"], Float64[Tensor, " S"]]:
        """Compute how much being early costs each source: row sums of the margins per step; the lowest goes first.

        Returns:
            Scores and standard errors, float64 [S]; errors are nan if a source has one minibatch.

        """
        return self._with_error(self._row_sums)

    def _row_sums(self, made: Pairwise) -> Tensor:
        return self._margins(made).sum(1) / torch.tensor(self.steps, dtype=torch.float64)

    def _with_error(self, of: Any) -> tuple[Tensor, Tensor]:
        value: Tensor = of(self.expansion)
        if not self._leaving_out:
            return value, torch.full_like(value, math.nan)
        found = torch.stack([of(made) for _, made in self._leaving_out])
        total = torch.zeros_like(value)
        shares = torch.tensor([share for share, _ in self._leaving_out], dtype=torch.float64)
        for source in range(len(self.names)):
            mine = torch.tensor([owner == source for owner in self.raw.owner])
            away = found[mine] - found[mine].mean(0)
            total += (away.square() * shares[mine].view(-1, *[1] * value.dim())).sum(0)
        return value, total.sqrt()

    def order(self) -> list[str]:
        """Return the sources, the one that should come first at the front.

        Returns:
            Their names.

        """
        scores, _ = self.scores()
        return [self.names[i] for i in sorted(range(len(self.names)), key=lambda i: (float(scores[i]), i))]

    def blocks(self, order: Sequence[str]) -> list[int]:
        """Return the source number of each step when sources are trained on one after the other.

        Args:
            order: the sources.

        Returns:
            A number per step.

        Raises:
            UsageError: if it is not a permutation of the sources.

        """
        known = {name: number for number, name in enumerate(self.names)}
        for name in order:
            if name not in known:
                raise UsageError(f"order: there is no source {name!r}{did_you_mean(name, known)}")
        if sorted(order) != sorted(self.names):
            left = next((name for name in self.names if name not in order), "")
            raise UsageError(
                f"order: {len(order)} sources, expected each of {len(self.names)} once; {left!r} is missing"
            )
        return [known[name] for name in order for _ in range(self.steps[known[name]])]

    def difference(self, order: Sequence[int], other: Sequence[int]) -> tuple[float, float]:
        """Predict the loss of one sequence of source numbers minus that of another, and its standard error.

        Args:
            order: source number of each step.
            other: the same numbers in another sequence.

        Returns:
            The difference, and its error, which is nan if a source has one minibatch.

        """
        value, error = self._with_error(lambda made: self._effect(made, order) - self._effect(made, other))
        return float(value), float(error)

    def predicted(self, sequence: Sequence[int]) -> float:
        """Predict the held-out loss of a sequence from the margins of its pairs of steps.

        Half the margin of two sources is lost or gained for the pairs of their steps in each order, so that blocks in
        all orders average to the same level; that level is taken from the expansion of the reference's sequence.

        Args:
            sequence: source number of each step.

        Returns:
            The loss.

        """
        level = self.expansion.score(self.raw.sequence) - float(self._effect(self.expansion, self.raw.sequence))
        return level + float(self._effect(self.expansion, sequence))

    def _effect(self, made: Pairwise, sequence: Sequence[int]) -> Tensor:
        """Sum half the margins over pairs of steps, 0-d."""
        steps = torch.nn.functional.one_hot(torch.tensor(list(sequence)), len(self.names)).double()
        before = steps.cumsum(0) - steps
        return (made.matrix() * (before.T @ steps)).sum() / 2

    def as_dict(self) -> dict[str, Any]:
        """Convert to plain values for JSON.

        Returns:
            Values that `from_dict` reads.

        """
        raw = {key: value.tolist() if isinstance(value, Tensor) else value for key, value in asdict(self.raw).items()}
        return {
            "names": list(self.names),
            "steps": list(self.steps),
            "raw": raw,
            "constant": self.constant,
            "measured": self.measured,
            "cost": asdict(self.cost),
        }

    @classmethod
    def from_dict(cls, saved: Mapping[str, Any]) -> Tournament:
        """Restore a tournament; the inverse of `as_dict`.

        Args:
            saved: result of `as_dict`.

        Returns:
            The tournament.

        """
        return cls(
            tuple(saved["names"]),
            tuple(saved["steps"]),
            Brackets.from_dict(saved["raw"]),
            saved["constant"],
            saved["measured"],
            Cost(**saved["cost"]),
        )


def tournament(
    problem: Problem,
    reference: ReferenceRun,
    sources: Mapping[str, Sequence[int]],
    *,
    replicates: int | None = None,
    anchors: int | None = None,
) -> Tournament:
    """Compare sources by the brackets of their updates.

    Cost: a gradient and a Hessian-vector product per minibatch and anchor, and the held-out gradient.
    Memory: the gradients and products of all minibatches, at one anchor at a time.

    Args:
        problem: the batches and their loss.
        reference: a recorded run, or only its start (a `ReferenceRun` with one anchor). Its sequence says how many
            steps each source has.
        sources: source -> numbers of its batches.
        replicates: number of batches of each source from which gradients are taken, at most those that it has; two or
            more give error bars; None all.
        anchors: number of the reference's anchors to use, spread over the run; 1 is the start, None all.

    Returns:
        The tournament.

    Raises:
        UsageError: if there are fewer than two sources, the run has fewer steps than sources, a source has no step, a
            step has no source, or the rule's steps do not depend on the size of gradients.

    Source:
        arXiv 2606.24993 for plain gradient descent at a shared start.

    Example:
        >>> from datatools.order.example import example_run
        >>> problem, reference = example_run()
        >>> margins, errors = tournament(problem, reference, {"a": [0, 1], "b": [2, 3]}).margins()
        >>> bool(margins[0, 1] == -margins[1, 0]), bool((errors >= 0).all())
        (True, True)

    """
    check_sources(sources, reference.sequence)
    before = (problem.cost.gradients, problem.cost.hvps)
    of = {batch: number for number, batches in enumerate(sources.values()) for batch in batches}
    labels = [of[batch] for batch in reference.sequence]
    used = [list(dict.fromkeys(batches))[:replicates] for batches in sources.values()]
    owner = [number for number, batches in enumerate(used) for _ in batches]
    raw = brackets(problem, reference, owner, [batch for batches in used for batch in batches], labels, anchors)
    return Tournament(
        tuple(sources),
        tuple(labels.count(number) for number in range(len(sources))),
        raw,
        problem.held_out_loss(reference.end.params),
        reference.end.position > 0,
        Cost(problem.cost.gradients - before[0], problem.cost.hvps - before[1]),
    )


def check_sources(sources: Mapping[str, Sequence[int]], sequence: Sequence[int]) -> None:
    """Refuse sources between which no order can be planned.

    Args:
        sources: source -> numbers of its batches.
        sequence: the batch of each step.

    Raises:
        UsageError: if there are fewer than two sources, there are fewer steps than sources, a source has no step, or a
            step has no source or two.

    """
    if len(sources) < 2:
        named = f"only the source {next(iter(sources))!r}" if sources else "no source"
        raise UsageError(f"order: there is {named}; an order of sources needs at least two")
    if len(sequence) < len(sources):
        raise UsageError(
            f"order: a budget of {len(sequence)} steps is below the {len(sources)} sources "
            f"({', '.join(list(sources)[:8])}{', ...' if len(sources) > 8 else ''}); every source needs a step"
        )
    of = [batch for batches in sources.values() for batch in set(batches)]
    for name, batches in sources.items():
        if not set(batches) & set(sequence):
            raise UsageError(f"order: no step of the run trains on the source {name!r}; add a batch of it, or omit it")
    for batch in sequence:
        if of.count(batch) != 1:
            raise UsageError(f"order: batch {batch} belongs to {of.count(batch)} of the sources; expected one")
