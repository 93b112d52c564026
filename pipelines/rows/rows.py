"""Rows that are ready for use: their pool, their tokens, and which of them are usable."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from datatools import MicroBatches, TokenBudget, micro_batches
from datatools.compact import Keys, Labels, Names
from pipelines.models.losses import collate
from pipelines.rows.encode import Encoder
from pipelines.rows.index import Pool
from pipelines.rows.row import BadRow
from pipelines.rows.scan import Scan
from pipelines.rows.tokens import Tokens


@dataclass
class Rows:
    """A pool, the result of encoding it, and which rows are usable."""

    pool: Pool
    scan: Scan
    encoder: Encoder
    bad: list[BadRow]
    status: Names
    """For each row: "ok", "duplicate", or the reason why it cannot be encoded."""
    twins: dict[int, int] = field(default_factory=dict)
    """A duplicate -> the row that is kept instead."""
    kept: Tokens | None = None
    """The tokens of all rows on disk; with None, a row is encoded whenever it is needed."""

    def __len__(self) -> int:
        return len(self.pool)

    @property
    def usable(self) -> NDArray[np.bool_]:
        """bool [n], the rows with status "ok"."""
        return self.status.where("ok")

    @property
    def keys(self) -> Keys:
        """The content hash of each row; "" for rows that could not be encoded."""
        return self.scan.keys

    def item(self, index: int) -> tuple[list[int], list[int]]:
        """Return (input_ids, labels) of a row: the kept tokens, or encoded again if these are damaged or missing.

        Args:
            index: The number of the row.

        Raises:
            RowError: The row cannot be encoded.
        """
        encoded = self.kept.row(index) if self.kept is not None else None
        if encoded is None:
            encoded = self.encoder(self.pool[index])
        return encoded.input_ids, encoded.labels

    @cached_property
    def rank(self) -> NDArray[np.int64]:
        """The rank of each row by content, then id, int64 [n]; it breaks ties."""
        found = np.empty(len(self), np.int64)
        found[self.labels.order()] = np.arange(len(self))
        return found

    @property
    def labels(self) -> Labels:
        """Content key and id of each row, which tell rows apart."""
        return Labels(self.keys, self.pool.ids)

    def longest_first(self) -> NDArray[np.int64]:
        """The usable rows, longest first, ties by content, int64."""
        rows = np.flatnonzero(self.usable)
        first, last = self.keys.halves(rows)
        return rows[np.lexsort((last, first, -self.scan.tokens[rows].astype(np.int64)))]

    def unique_rows(self) -> NDArray[np.int64]:
        """One usable row of each content, longest rows first, int64: what must be computed once."""
        rows = self.longest_first()
        first, last = self.keys.halves(rows)  # equal contents are equally long, so that they are neighbours
        new = np.ones(len(rows), np.bool_)
        new[1:] = (first[1:] != first[:-1]) | (last[1:] != last[:-1])
        return rows[new]

    def unique(self) -> dict[str, int]:
        """Return content hash -> one usable row that has it, in the order of `unique_rows`."""
        return {self.keys[row]: row for row in self.unique_rows().tolist()}

    def batch(self, indices: Sequence[int], device: torch.device | str = "cpu") -> dict[str, Tensor]:
        """Return the padded batch of some rows.

        Args:
            indices: The rows.
            device: The device of the batch.
        """
        return {name: t.to(device) for name, t in collate([self.item(index) for index in indices]).items()}

    def micro_batches(
        self, indices: Sequence[int], budget: int, device: torch.device | str = "cpu"
    ) -> MicroBatches[dict[str, Tensor]]:
        """Return some rows in padded batches of at most `budget` tokens, longest rows first.

        Args:
            indices: The rows.
            budget: The maximum number of padded tokens of a batch; see `datatools.token_batches`.
            device: The device of the batches.

        Returns:
            (positions in `indices`, the batch of these rows) per batch; a batch is made when it is asked for.
        """
        lengths = [int(self.scan.tokens[index]) for index in indices]

        def batch_of(group: list[int]) -> dict[str, Tensor]:
            return self.batch([indices[i] for i in group], device)

        return micro_batches(lengths, budget, batch_of)

    def each_batch(
        self,
        work: Callable[[list[int], dict[str, Tensor]], object],
        indices: Sequence[int],
        budget: TokenBudget,
        device: torch.device | str = "cpu",
    ) -> None:
        """Do some work on rows in padded batches, smaller ones when memory does not suffice (`MicroBatches.each`).

        Args:
            work: (positions in `indices`, the batch of these rows) -> anything.
            indices: The rows.
            budget: The padded tokens of a batch.
            device: The device of the batches.

        Raises:
            EnvironmentProblem: One row alone does not fit into memory.
        """
        batches = self.micro_batches(indices, budget.tokens, device)
        batches.each(work, budget, lambda i: self.pool.where(indices[i]))

    def tokens(self, where: NDArray[np.bool_] | None = None) -> int:
        """Return the number of tokens of the usable rows.

        Args:
            where: bool [n], the rows to count instead.
        """
        mask = self.usable if where is None else where
        return int(self.scan.tokens[mask].sum())
