"""Quotas: how many rows of a batch are kept of each source. All rows of small sources are kept."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence, Set
from dataclasses import dataclass

import torch
from jaxtyping import Int64
from torch import Tensor

from datatools.errors import UsageError
from datatools.selection.candidates import Selection


@dataclass(frozen=True)
class Plan:
    """The rows of a batch that are always trained on, and how many may be chosen from which others.

    Attributes:
        kept: rows of small sources, always trained on, int64 [m].
        groups: (rows of one large source, int64; number of them to choose) for each large source.
        overflow: whether the small sources alone have more rows than may be kept; `kept` is then drawn by quotas.

    Example:
        >>> made = plan(["code", "web", "web", "web"], 2, {"code"}, generator=torch.Generator())
        >>> made.kept, made.groups
        (tensor([0]), ((tensor([1, 2, 3]), 1),))
        >>> made.free, made.candidates()
        (True, tensor([1, 2, 3]))

    """

    kept: Int64[Tensor, " m"]
    groups: tuple[tuple[Int64[Tensor, " g"], int], ...]
    overflow: bool

    def __len__(self) -> int:
        return len(self.kept) + sum(quota for _, quota in self.groups)

    @property
    def free(self) -> bool:
        """Whether there is a choice: some group with a quota below its size."""
        return any(0 < quota < len(rows) for rows, quota in self.groups)

    def strata(self) -> list[Int64[Tensor, " s"]]:
        """Group the rows of large sources so that, of every group, at least one row is chosen in every draw.

        Sources whose share of the quotas is below 1 have a chosen row in some draws only. They form one group, which
        the smallest other source joins if their shares have a sum below 1. All rows of large sources have the same
        chance, so that those of one group can be weighted alike.

        Returns:
            The rows of each group, int64.

        Example:
            >>> made = plan(["a", "b"] + ["c"] * 6, 4, generator=torch.Generator())
            >>> [rows.tolist() for rows in made.strata()]  # shares of 0.5, 0.5 and 3
            [[0, 1], [2, 3, 4, 5, 6, 7]]

        """
        whole, total = sum(len(rows) for rows, _ in self.groups), sum(quota for _, quota in self.groups)
        groups = sorted((rows for rows, _ in self.groups), key=len)
        few = [rows for rows in groups if total * len(rows) < whole]
        others = groups[len(few) :]
        if few and others and total * sum(map(len, few)) < whole:
            few.append(others.pop(0))
        return ([torch.cat(few)] if few else []) + others

    def candidates(self) -> Int64[Tensor, " c"]:
        """List the rows of all groups.

        Returns:
            int64 [c], ascending.

        """
        rows = [rows for rows, _ in self.groups]
        return torch.cat(rows).sort().values if rows else torch.zeros(0, dtype=torch.int64)

    def draw(self, generator: torch.Generator) -> Selection:
        """Draw random rows with the same kept rows and quotas: the control that every method has to beat.

        Args:
            generator: source of randomness.

        Returns:
            The rows, with weights of 1.

        """
        picks = [rows[torch.randperm(len(rows), generator=generator)[:quota]] for rows, quota in self.groups]
        return Selection(torch.cat([self.kept, *picks]))


def plan(
    sources: Sequence[Hashable],
    keep: int,
    small: Set[Hashable] = frozenset(),
    *,
    per_source: bool = True,
    generator: torch.Generator,
) -> Plan:
    """Decide which rows of a batch are kept anyway, and how many to choose of each large source.

    Quotas are proportional to the number of rows that a source has in this batch. They are rounded at random
    (`drawn_budgets`), so that on average no source has more or fewer rows than its share.

    Args:
        sources: the source of each row [n].
        keep: number of rows to keep.
        small: sources whose rows are all kept.
        per_source: False makes one group of all large sources.
        generator: source of randomness, used if quotas are not whole numbers or the small sources overflow.

    Returns:
        The plan.

    Raises:
        UsageError: unless 1 <= keep <= n.

    Example:
        >>> made = plan(["web"] * 6 + ["maths"] * 2, 4, generator=torch.Generator())
        >>> [quota for rows, quota in made.groups]
        [1, 3]

    """
    n = len(sources)
    if not 1 <= keep <= n:
        raise UsageError(
            f"coreset: cannot keep {keep} rows of a batch of {n}; keep between 1 and {n}, "
            "or make the large batch larger (--large-batch)"
        )
    rows: dict[Hashable, list[int]] = {}
    for i, source in enumerate(sources):
        rows.setdefault(source, []).append(i)
    names = sorted(rows, key=lambda source: (str(type(source)), source))
    little = [torch.tensor(rows[name]) for name in names if name in small]
    large = [torch.tensor(rows[name]) for name in names if name not in small]
    if not per_source and large:
        large = [torch.cat(large).sort().values]
    held = sum(map(len, little))
    if held > keep:
        shares = drawn_budgets([len(r) for r in little], keep, generator=generator)
        little = [
            r[torch.randperm(len(r), generator=generator)[:share].sort().values]
            for r, share in zip(little, shares, strict=True)
        ]
    kept = torch.cat(little) if little else torch.zeros(0, dtype=torch.int64)
    quotas = drawn_budgets([len(r) for r in large], keep - len(kept), generator=generator)
    return Plan(kept.sort().values, tuple(zip(large, quotas, strict=True)), held > keep)


def budgets(sizes: Sequence[int], total: int) -> list[int]:
    """Divide `total` in proportion to `sizes` by the largest-remainder method; ties go to the lower index.

    No share exceeds its size.

    Args:
        sizes: rows per source, none negative.
        total: number of rows to divide.

    Returns:
        Rows for each source; their sum is `total`.

    Raises:
        ValueError: unless 0 <= total <= sum(sizes) and no size is negative.

    Example:
        >>> budgets([5, 3, 2], 5)
        [3, 1, 1]

    """
    whole = sum(sizes)
    if min(sizes, default=0) < 0 or not 0 <= total <= whole:
        raise ValueError(f"budgets: {total} of {whole} rows; expected between 0 and {whole}")
    if whole == 0:
        return [0] * len(sizes)
    shares = [total * size // whole for size in sizes]
    rest = sorted(range(len(sizes)), key=lambda q: (-(total * sizes[q] % whole), q))
    for q in rest[: total - sum(shares)]:
        shares[q] += 1
    return shares


def drawn_budgets(sizes: Sequence[int], total: int, *, generator: torch.Generator) -> list[int]:
    """Divide `total` in proportion to `sizes`; what is no whole number is rounded up or down at random.

    Rounding always up where the remainder is largest (`budgets`) never gives a row to a source whose share is small in
    every batch, nor to the later ones of sources with equal shares. Here, the mean of each number of rows is exactly
    its share. Remainders are drawn by systematic sampling in the order of the sizes, so that sources of similar size
    have the sum of their shares together, rounded once.

    Args:
        sizes: rows per source, none negative.
        total: number of rows to divide.
        generator: source of randomness; not used if all shares are whole numbers.

    Returns:
        Rows for each source, at most its size; their sum is `total`.

    Raises:
        ValueError: unless 0 <= total <= sum(sizes) and no size is negative.

    Source:
        Systematic sampling: Madow 1949.

    Example:
        >>> g = torch.Generator().manual_seed(0)
        >>> draws = [drawn_budgets([1, 15], 8, generator=g) for _ in range(3000)]  # shares of 0.5 and 7.5
        >>> sorted(set(map(tuple, draws))), 1400 < sum(one for one, _ in draws) < 1600
        ([(0, 8), (1, 7)], True)

    """
    budgets(sizes, total)  # refuses what cannot be divided
    whole = max(1, sum(sizes))
    shares = [total * size // whole for size in sizes]
    if sum(shares) == total:
        return shares
    mixed = torch.randperm(len(sizes), generator=generator).tolist()
    mark = int(torch.randint(whole, (1,), generator=generator)) + 1
    reached = 0
    for q in sorted(mixed, key=lambda q: sizes[q]):  # equal sizes in random order
        reached += total * sizes[q] % whole
        if reached >= mark:
            shares[q] += 1
            mark += whole
    return shares


def by_source(sources: Sequence[Hashable], rows: Int64[Tensor, " m"]) -> dict[str, int]:
    """Count rows by source.

    Args:
        sources: the source of each row of the batch.
        rows: positions in the batch, int64 [m].

    Returns:
        Source, as text -> number of rows; sources without rows are omitted.

    """
    return dict(sorted(Counter(str(sources[i]) for i in rows.tolist()).items()))


def kept_by_source(sources: Sequence[Hashable], selection: Selection) -> dict[str, int]:
    """Count the selected rows of each source.

    Args:
        sources: the source of each row of the batch.
        selection: the selected rows.

    Returns:
        Source, as text -> number of rows; sources without selected rows are omitted.

    Example:
        >>> kept_by_source(["web", "code", "web"], Selection(torch.tensor([0, 2])))
        {'web': 2}

    """
    return by_source(sources, selection.indices)
