"""The micro-batcher: groups rows by length into batches of bounded size.

Training, evaluation, features, coresets, orders and diagnoses all split their rows here, so that one rule determines
the memory of a pass and the order of sums.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar, overload

import torch
from jaxtyping import Int64
from torch import Tensor

from datatools.gradients.memory import TokenBudget, is_out_of_memory, release
from datatools.gradients.types import Batch

T = TypeVar("T")


def token_batches(lengths: Sequence[int], budget: int, *, padding: float = 0.125) -> list[list[int]]:
    """Group rows so that the padded tokens of a group (longest row x rows) stay within `budget`.

    Longest rows come first. The groups depend only on (length, index), so that results are reproducible bit by bit. A
    row longer than the budget forms a group of its own.

    Args:
        lengths: tokens of each row [n].
        budget: largest number of tokens per group, including padding.
        padding: largest share of padding in a group: on a CPU, a padding token costs as much as a real one.

    Returns:
        The groups, as indices of rows; each row is in exactly one group.

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
    """Groups of rows, each with its padded batch, which is created at each access and not stored.

    An index returns (indices of rows, their batch), and a slice some of the groups: one of several processes takes
    `[rank::world_size]`.

    Args:
        groups: indices of rows.
        batch_of: indices of rows -> their padded batch.
        lengths: tokens of each row [n], which `each` needs.

    Example:
        >>> batches = MicroBatches([[0, 1], [2]], lambda group: [10 * i for i in group])
        >>> batches[0], len(batches[1:])
        (([0, 1], [0, 10]), 1)

    """

    def __init__(
        self, groups: Sequence[list[int]], batch_of: Callable[[list[int]], T], lengths: Sequence[int] | None = None
    ) -> None:
        self.groups, self._batch_of, self._lengths = groups, batch_of, lengths

    def __len__(self) -> int:
        return len(self.groups)

    @overload
    def __getitem__(self, index: int) -> tuple[list[int], T]: ...

    @overload
    def __getitem__(self, index: slice) -> MicroBatches[T]: ...

    def __getitem__(self, index: int | slice) -> tuple[list[int], T] | MicroBatches[T]:
        if isinstance(index, slice):
            return MicroBatches(self.groups[index], self._batch_of, self._lengths)
        group = self.groups[index]
        return group, self._batch_of(group)

    def each(
        self, work: Callable[[list[int], T], object], budget: TokenBudget, name: Callable[[int], str] = "row {}".format
    ) -> None:
        """Call `work` with each group and its batch; when memory does not suffice, go on with batches half as large.

        The rows that are left are then grouped anew, as with the smaller budget from the start. A row's result depends
        on the other rows of its batch only by rounding, so the last bits are those of the smaller budget.

        Args:
            work: (indices of rows, their batch) -> anything. What it keeps of a batch it keeps at its end, because a
                batch that did not fit is repeated in parts.
            budget: what the groups were made with; it is halved in place.
            name: index of a row -> what errors call it.

        Raises:
            EnvironmentProblem: one row alone does not fit.

        """
        assert self._lengths is not None, "made without lengths"
        left = deque(self.groups)
        while left:
            group = left[0]
            try:
                work(group, self._batch_of(group))
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                if len(group) == 1:
                    raise budget.refuse(name(group[0]), self._lengths[group[0]]) from error
            else:
                left.popleft()
                continue
            release()  # here, where no traceback holds the tensors of the failed pass
            budget.halve(max(self._lengths[i] for i in group) * len(group))
            rows = sorted(i for group in left for i in group)
            groups = token_batches([self._lengths[i] for i in rows], budget.tokens)
            left = deque([rows[i] for i in group] for group in groups)


def micro_batches(lengths: Sequence[int], budget: int, batch_of: Callable[[list[int]], T]) -> MicroBatches[T]:
    """Return the groups of `token_batches`, each with its padded batch.

    Args:
        lengths: tokens of each row [n].
        budget: largest number of tokens per batch, including padding.
        batch_of: indices of rows -> their padded batch.

    Returns:
        (indices of rows, their batch) for each group; batches are created on demand.

    Example:
        >>> rows = ["to be", "or", "not to be"]
        >>> batches = micro_batches([2, 1, 3], 4, lambda group: [rows[i] for i in group])
        >>> list(batches), len(batches[::2])
        ([([2], ['not to be']), ([0], ['to be']), ([1], ['or'])], 2)

    """
    return MicroBatches(token_batches(lengths, budget), batch_of, lengths)


def pieces(
    batch: Batch, lengths: Sequence[int] | None, token_budget: int
) -> Iterator[tuple[Int64[Tensor, " b"], dict[str, Tensor]]]:
    """Split rows that are padded already into micro-batches, and cut off columns that contain only padding.

    Args:
        batch: tensors with n rows, among them `input_ids`, int64 [n, s]; those of shape [n, s] are padded on the right.
        lengths: tokens of each row [n]. None uses the position after the last attended token, or s without an
            `attention_mask`.
        token_budget: largest number of tokens per micro-batch, including padding.

    Yields:
        (rows, int64 [b]; the batch of these rows).

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
