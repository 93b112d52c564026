"""Measuring the features of rows: passes over a batch in pieces, shared by processes, projected."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from typing import Any

import torch
import xxhash
from jaxtyping import Float
from torch import Tensor, nn
from torch.distributed import ProcessGroup, all_reduce

from datatools.colm.by_products import BY_PRODUCTS, ByProducts
from datatools.colm.exact import EXACT
from datatools.colm.feature import FeatureKind
from datatools.colm.history import History
from datatools.colm.last_layer import LastLayer
from datatools.colm.replay import evaluating
from datatools.errors import DataError
from datatools.gradients import Batch, Loss, pieces
from datatools.projectors import PROJECTORS

_NAME = "features"


class Measuring:
    """What `CoLM` measures of a model, row by row.

    Attributes:
        model: the model, without wrappers.
        losses: (model, batch) -> the mean loss of each row.
        target: the matrix whose gradients are read.
        history: the rule from gradients to features.
        probes: number of random directions.
        eps: step of finite differences.
        dim: largest dimension of a feature; None is no limit.
        token_budget: tokens per forward pass.
        seed: seed of all draws.
        group: processes that hold the same batch.
        wanted: mean gradient of target rows, float32 [d], set by `aim`.

    """

    model: nn.Module
    losses: Loss
    target: LastLayer
    history: History
    probes: int
    eps: float
    dim: int | None
    token_budget: int
    seed: int
    group: ProcessGroup | None
    wanted: Float[Tensor, " d"] | None

    def _measure(
        self,
        kind: FeatureKind,
        batch: Batch,
        rows: Tensor,
        lengths: Sequence[int] | None,
        step: int,
        lane: int,
        *,
        project: bool,
    ) -> Tensor:
        """Measure features of `rows`: [len(rows), *shape] of the kind, or [len(rows), dim] if `project` is set."""
        fixed = kind.one_direction or not self.history.plain  # a history needs the same directions at every step
        generator = self._generator("probes", 0 if fixed else step, 0 if fixed else lane)
        directions = torch.randn(kind.directions(self.probes), *self.target.shape, generator=generator)
        directions = directions.to(self.target.parameter.device)
        flat = self.target.numel if self.dim is None else min(self.dim, self.target.numel)
        shape = (flat,) if project else kind.measured(self.target, self.probes)
        found = torch.zeros(len(rows), *shape, device=directions.device)
        with evaluating(self.model):
            for places, piece in self._pieces(batch, rows, lengths):
                part = kind.measure(self.model, self.losses, piece, self.target, directions, eps=self.eps)
                found[places.to(found.device)] = self._project(part) if project else part
        found = self._of_all(found)
        return found[:, :, None] * directions if kind.one_direction else found

    def measured(self, batch: Batch, lengths: Sequence[int] | None = None) -> Float[Tensor, "n d"]:
        """Measure exact gradients of all rows of a batch, for a table of features that later steps read.

        Args:
            batch: inputs of n rows.
            lengths: tokens of each row [n]; None reads the attention mask.

        Returns:
            float32 [n, d], projected to `dim` numbers if they have more.

        """
        return self._measure(EXACT, batch, torch.arange(len(batch["input_ids"])), lengths, 0, 0, project=True)

    def aim(self, batch: Batch, lengths: Sequence[int] | None = None) -> None:
        """Measure the mean gradient of target rows, for the next calls of a method that compares rows with them.

        Args:
            batch: inputs of the target rows.
            lengths: tokens of each row; None reads the attention mask.

        Raises:
            DataError: if it is not finite.

        """
        wanted = self.measured(batch, lengths).mean(0)
        if not bool(wanted.isfinite().all()):
            raise DataError(
                "coreset: the mean gradient of the target rows is not finite; check whether each of them has a "
                "supervised token and a finite loss, or lower the learning rate"
            )
        self.wanted = wanted

    def by_products(self, kind: str) -> ByProducts:
        """Create the collector of features while rows are trained on, in the same space as `measured`.

        Args:
            kind: a name of `BY_PRODUCTS`.

        Returns:
            The collector.

        """
        return BY_PRODUCTS[kind](self.model, self.target, self._project)

    def _pieces(self, batch: Batch, rows: Tensor, lengths: Sequence[int] | None) -> Any:
        """Yield the positions and the rows of each micro-batch that this process passes through the model."""
        some = {key: tensor[rows.to(tensor.device)] for key, tensor in batch.items()}
        found = pieces(some, None if lengths is None else [lengths[i] for i in rows.tolist()], self.token_budget)
        return found if self.group is None else islice(found, self.group.rank(), None, self.group.size())

    def _of_all(self, found: Tensor) -> Tensor:
        """Sum over processes: each row is zero in all processes but one, so the sum is exact and the same in all."""
        if self.group is not None:
            all_reduce(found, group=self.group)
        return found

    def _project(self, grads: Tensor) -> Tensor:
        """Flatten gradients [n, *shape] to [n, d], projected if they have more than `dim` numbers."""
        if self.dim is None or grads[0].numel() <= self.dim:
            return grads.reshape(len(grads), -1)
        sketch = PROJECTORS["sjlt"].of({_NAME: grads.shape[1:]}, dim=self.dim, seed=self.seed)
        return sketch.project({_NAME: grads})

    def _generator(self, purpose: str, step: int, lane: int) -> torch.Generator:
        """Create a generator from the seed, the purpose, the step and the lane."""
        ticket = f"coreset\0{purpose}\0{self.seed}\0{step}\0{lane}"
        return torch.Generator().manual_seed(xxhash.xxh3_64_intdigest(ticket.encode()) >> 1)
