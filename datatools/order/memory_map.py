"""The effect of a batch's position on its own loss (memorization) and on the held-out loss (generalization).

    M[i, j] = loss of batch i at the end if batch i is at position j and the rest in random order (spec A.9)
    G[i, j] = held-out loss at the end, in the same runs
    without_i = the same without batch i's step (its position is skipped: the others keep their learning rates)

The position effect M[i, j] - mean_j M[i, .] measures recency and forgetting; the effect of presence is the difference
of M[i, .] and without_i. With the losses of single rows, the same runs say which rows are memorized and forgotten.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Float64
from torch import Tensor

from datatools.errors import UsageError
from datatools.order.problem import Diverged, Params

Final = Callable[[Sequence[int | None]], Params]
"""An order, in which None skips a step -> parameters at the end; true (`train`) or estimated."""


@dataclass(frozen=True)
class Map:
    """The result of `memory_map`, as means over completions.

    Attributes:
        batches: [B], the batches that were moved.
        positions: [P], the positions that they were moved to.
        memory: float64 [B, P], the loss of the batch.
        held_out: float64 [B, P], the held-out loss.
        without_memory: float64 [B], the loss of the batch when it is not trained on.
        without_held_out: float64 [B], the held-out loss when the batch is not trained on.
        spread: [B, P], standard error of `memory` over completions.
        rows: for each batch, float64 [P + 1, completions, rows of the batch], the losses of its rows at each position
            and, last, when it is not trained on; empty if they were not asked for.

    Example:
        >>> found = Map((0,), (0, 3), *torch.ones(4, 1, 2, dtype=torch.float64)[:2], *torch.ones(2, 1).double(), None)
        >>> found.position_effect.tolist()
        [[0.0, 0.0]]

    """

    batches: tuple[int, ...]
    positions: tuple[int, ...]
    memory: Float64[Tensor, "B P"]
    held_out: Float64[Tensor, "B P"]
    without_memory: Float64[Tensor, " B"]
    without_held_out: Float64[Tensor, " B"]
    spread: Float[Tensor, "B P"]
    rows: tuple[Float64[Tensor, "Q C n"], ...] = ()

    @property
    def position_effect(self) -> Float64[Tensor, "B P"]:
        """`memory` minus its mean over positions, float64 [B, P]."""
        return self.memory - self.memory.mean(1, keepdim=True)

    @property
    def counterfactual(self) -> Float64[Tensor, " B"]:
        """The decrease of each batch's own loss that is due to training on it at all, float64 [B]."""
        return self.without_memory - self.memory.mean(1)


def memory_map(
    sequence: Sequence[int],
    final: Final,
    train_loss: Callable[[Params, int], float],
    held_out_loss: Callable[[Params], float],
    *,
    batches: Sequence[int] | None = None,
    positions: int = 4,
    completions: int = 8,
    seed: int = 0,
    row_losses: Callable[[Params, int], Sequence[float]] | None = None,
    advance: Callable[[int], object] | None = None,
) -> Map:
    """Move each batch to each of several positions, spread over the run, with random orders of the rest.

    The rests are the same for every batch and position. If epochs repeat a batch, its first occurrence is moved. This
    takes B x P x completions runs of `final`, and B x completions without the batch.

    Args:
        sequence: the reference order.
        final: an order, in which None skips a step -> parameters at the end.
        train_loss: (parameters, batch) -> the loss of the batch.
        held_out_loss: parameters -> the held-out loss.
        batches: the B batches to move; None moves all.
        positions: P, the number of positions.
        completions: number of random orders of the rest.
        seed: seed of the rests.
        row_losses: (parameters, batch) -> the loss of each row of the batch, for `Map.rows`.
        advance: called with the number of runs after each group of runs.

    Returns:
        The losses.

    Raises:
        UsageError: if a batch is not in the sequence, or there are fewer than 2 positions.
        Diverged: if the loss of a run is not finite.

    Example:
        >>> from datatools.order import train
        >>> from datatools.order.example import example_run
        >>> problem, reference = example_run()
        >>> def final(order):
        ...     return train(problem, reference.recipe, order, reference.start.params)[0]
        >>> found = memory_map((0, 1, 2, 3), final, problem.train_loss, problem.held_out_loss, completions=2)
        >>> tuple(found.memory.shape)
        (4, 4)

    """
    steps = len(sequence)
    chosen = tuple(dict.fromkeys(sequence)) if batches is None else tuple(batches)
    unknown = [b for b in chosen if b not in sequence]
    if unknown:
        raise UsageError(f"order: batch {unknown[0]} is not in the reference's sequence")
    if not 2 <= positions <= steps or completions < 1:
        raise UsageError(
            f"order: {positions} positions of {steps} steps with {completions} completions; give 2 to {steps} "
            "positions and at least 1 completion"
        )
    spots = tuple(round(i * (steps - 1) / (positions - 1)) for i in range(positions))
    rng = np.random.default_rng(seed)
    rests = [rng.permutation(steps) for _ in range(completions)]
    memory = torch.zeros(len(chosen), positions, completions, dtype=torch.float64)
    held_out = torch.zeros_like(memory)
    without = torch.zeros(len(chosen), 2, completions, dtype=torch.float64)
    rows: list[Tensor] = []
    for i, batch in enumerate(chosen):
        own = list(sequence).index(batch)
        seen: list[Sequence[float]] = []
        for r, drawn in enumerate(rests):
            rest = [sequence[place] for place in drawn if place != own]
            for j, spot in enumerate(spots):
                params = final([*rest[:spot], batch, *rest[spot:]])
                memory[i, j, r], held_out[i, j, r] = train_loss(params, batch), held_out_loss(params)
                seen += [] if row_losses is None else [row_losses(params, batch)]
            others = [None if b == batch else b for b in rest]  # all its occurrences, if epochs repeat it
            dropped = final([*others[: steps // 2], None, *others[steps // 2 :]])
            without[i, 0, r], without[i, 1, r] = train_loss(dropped, batch), held_out_loss(dropped)
            seen += [] if row_losses is None else [row_losses(dropped, batch)]
            if not all(map(math.isfinite, [*memory[i, :, r], *held_out[i, :, r], *without[i, :, r]])):
                raise Diverged(
                    f"order: training diverges in a random order with batch {batch} moved (its losses: "
                    f"{memory[i, :, r].tolist()}); lower the learning rate"
                )
            if advance is not None:
                advance(positions + 1)
        if seen:
            by_run = torch.tensor(seen, dtype=torch.float64).view(completions, positions + 1, -1)
            rows.append(by_run.transpose(0, 1).contiguous())
    error = memory.std(2) / completions**0.5 if completions > 1 else torch.zeros(len(chosen), positions)
    means = without.mean(2)
    return Map(chosen, spots, memory.mean(2), held_out.mean(2), means[:, 0], means[:, 1], error, tuple(rows))
