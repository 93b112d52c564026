"""What does the place of a batch do? To its own loss (memorisation) and to the held-out loss (generalisation).

    M[i, j] = loss of batch i at the end when batch i stands at position j, the rest in random order (spec A.9)
    G[i, j] = held-out loss at the end, likewise
    without_i = the same with batch i's step left out (its place is skipped: the others keep their learning rates)

The position effect M[i, j] - mean_j M[i, .] measures recency and forgetting; presence is M[i, .] against without.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from datatools.errors import UsageError
from datatools.order.problem import Diverged, Params

Final = Callable[[Sequence[int | None]], Params]
"""An order, or one with a step left out (None), -> parameters at the end; true (`train`) or estimated."""


@dataclass(frozen=True)
class Map:
    """batches: [B], positions: [P]. memory, held_out: [B, P], means over completions; without_memory, without_held_out:
    [B], with the batch left out; spread: [B, P], standard error of `memory` over completions.
    """

    batches: tuple[int, ...]
    positions: tuple[int, ...]
    memory: Tensor
    held_out: Tensor
    without_memory: Tensor
    without_held_out: Tensor
    spread: Tensor

    @property
    def position_effect(self) -> Tensor:
        """[B, P]: memory less its mean over positions."""
        return self.memory - self.memory.mean(1, keepdim=True)

    @property
    def counterfactual(self) -> Tensor:
        """[B]: by how much the batch's own loss falls for having been trained on at all."""
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
    advance: Callable[[int], object] | None = None,
) -> Map:
    """Move each of `batches` to each of `positions` places, spread over the run, with `completions` random rests.

    The rests are the same for every batch and place; of a batch that epochs repeat, its first turn is moved. It takes
    B x P x completions runs of `final`, and B x completions without the batch.

    Args:
        sequence: the reference order.
        final: an order, or one with steps left out -> parameters at the end.
        train_loss: (parameters, batch) -> the loss of the batch.
        held_out_loss: parameters -> the held-out loss.
        batches: those that are moved; all of them if not given.
        positions: P, the number of places.
        completions: random orders of the rest.
        seed: of the rests.
        advance: called with the number of runs that were made, each time.

    Raises:
        UsageError: for a batch that is not in the sequence, or fewer than 2 positions.
        Diverged: for a run whose loss is not finite.

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
        raise UsageError(f"order: {positions} positions of {steps} steps, {completions} completions; at least 2 and 1")
    spots = tuple(round(i * (steps - 1) / (positions - 1)) for i in range(positions))
    rng = np.random.default_rng(seed)
    rests = [rng.permutation(steps) for _ in range(completions)]
    memory = torch.zeros(len(chosen), positions, completions, dtype=torch.float64)
    held_out = torch.zeros_like(memory)
    without = torch.zeros(len(chosen), 2, completions, dtype=torch.float64)
    for i, batch in enumerate(chosen):
        own = list(sequence).index(batch)
        for r, drawn in enumerate(rests):
            rest = [sequence[place] for place in drawn if place != own]
            for j, spot in enumerate(spots):
                params = final([*rest[:spot], batch, *rest[spot:]])
                memory[i, j, r], held_out[i, j, r] = train_loss(params, batch), held_out_loss(params)
            others = [None if b == batch else b for b in rest]  # all its turns, where epochs repeat it
            dropped = final([*others[: steps // 2], None, *others[steps // 2 :]])
            without[i, 0, r], without[i, 1, r] = train_loss(dropped, batch), held_out_loss(dropped)
            if not all(map(math.isfinite, [*memory[i, :, r], *held_out[i, :, r], *without[i, :, r]])):
                raise Diverged(
                    f"order: training diverges in a random order with batch {batch} moved (its losses: "
                    f"{memory[i, :, r].tolist()}); lower the learning rate"
                )
            if advance is not None:
                advance(positions + 1)
    error = memory.std(2) / completions**0.5 if completions > 1 else torch.zeros(len(chosen), positions)
    means = without.mean(2)
    return Map(chosen, spots, memory.mean(2), held_out.mean(2), means[:, 0], means[:, 1], error)
