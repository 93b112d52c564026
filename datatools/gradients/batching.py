"""The one micro-batcher: rows grouped by length into batches of bounded size, and the batches made of them.

Training, evaluation, features, coresets, orders and diagnoses all split their rows here, so that one rule decides how
much memory a pass takes, and in which order sums are made.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar, overload

import torch
from torch import Tensor

from datatools.gradients.types import Batch

T = TypeVar("T")


def token_batches(lengths: Sequence[int], budget: int, *, padding: float = 0.125) -> list[list[int]]:
    """Indices of rows, grouped so that the padded tokens of a group (longest row x rows) stay within `budget`.

    Longest rows come first. The order is fixed by (length, index), so the groups, and with them every bit of a result,
    do not depend on anything else. A row longer than the budget is a group of its own.

    Args:
        lengths: Tokens of each row.
        budget: The most padded tokens of a group.
        padding: A group is also closed before more than this share of it would be padding: on a CPU, a padded token
            costs as much as a real one.

    Returns:
        The groups; each row is in exactly one of them.

    Example:
        >>> token_batches([3, 8, 8, 2, 3], budget=16)
        [[1, 2], [0, 4, 3]]
    """
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    batches: list[list[int]] = []
    real = 0  # tokens in the last batch
    for i in order:
        if batches:
            area = lengths[batches[-1][0]] * (len(batches[-1]) + 1)
            if area <= budget and area - real - lengths[i] <= padding * area:
                batches[-1].append(i)
                real += lengths[i]
                continue
        batches.append([i])
        real = lengths[i]
    return batches


class MicroBatches(Sequence[tuple[list[int], T]]):
    """Groups of rows, each with its padded batch, which is made anew whenever it is asked for and kept nowhere.

    An index gives (indices of rows, their batch), and a slice gives some of the groups: one of several processes takes
    `[rank::world_size]`.

    Args:
        groups: Indices of rows.
        batch_of: Indices of rows -> their padded batch.
    """

    def __init__(self, groups: Sequence[list[int]], batch_of: Callable[[list[int]], T]) -> None:
        self.groups, self._batch_of = groups, batch_of

    def __len__(self) -> int:
        return len(self.groups)

    @overload
    def __getitem__(self, index: int) -> tuple[list[int], T]: ...

    @overload
    def __getitem__(self, index: slice) -> MicroBatches[T]: ...

    def __getitem__(self, index: int | slice) -> tuple[list[int], T] | MicroBatches[T]:
        if isinstance(index, slice):
            return MicroBatches(self.groups[index], self._batch_of)
        group = self.groups[index]
        return group, self._batch_of(group)


def micro_batches(lengths: Sequence[int], budget: int, batch_of: Callable[[list[int]], T]) -> MicroBatches[T]:
    """Return the groups of `token_batches`, each with its padded batch.

    Args:
        lengths: Tokens of each row.
        budget: The most padded tokens of a batch.
        batch_of: Indices of rows -> their padded batch.

    Returns:
        (indices of rows, their batch) for each group; a batch is made when it is asked for.

    Example:
        >>> rows = ["to be", "or", "not to be"]
        >>> batches = micro_batches([2, 1, 3], 4, lambda group: [rows[i] for i in group])
        >>> list(batches), len(batches[::2])
        ([([2], ['not to be']), ([0], ['to be']), ([1], ['or'])], 2)
    """
    return MicroBatches(token_batches(lengths, budget), batch_of)


def pieces(
    batch: Batch, lengths: Sequence[int] | None, token_budget: int
) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
    """The micro-batches of rows that are padded already: columns that only hold padding are cut off.

    Args:
        batch: Tensors with n rows, among them `input_ids`, int64 [n, s]; those of shape [n, s] are padded on the right.
        lengths: Tokens of each row. None: the place after the last attended token, or s without an `attention_mask`.
        token_budget: The most padded tokens of a micro-batch.

    Yields:
        (rows int64 [b], the batch of these rows).

    Example:
        >>> ids = torch.tensor([[5, 6, 0], [7, 8, 9]])
        >>> [(rows.tolist(), part["input_ids"].tolist()) for rows, part in pieces({"input_ids": ids}, [2, 3], 3)]
        [([1], [[7, 8, 9]]), ([0], [[5, 6]])]
    """
    n, width = batch["input_ids"].shape
    if lengths is None:
        mask = batch.get("attention_mask")
        if mask is None or mask.ndim != 2:
            lengths = [width] * n
        else:
            lengths = (width - mask.flip(1).to(torch.int64).argmax(1)).tolist()
    sizes = lengths

    def cut(group: list[int]) -> dict[str, Tensor]:
        rows, longest = torch.tensor(group), max(sizes[i] for i in group)
        return {
            key: tensor[rows.to(tensor.device)][:, :longest]
            if tensor.ndim == 2 and tensor.shape[1] == width
            else tensor[rows.to(tensor.device)]
            for key, tensor in batch.items()
        }

    for group, part in micro_batches(sizes, token_budget, cut):
        yield torch.tensor(group), part
