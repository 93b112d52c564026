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

    Quotas are proportional to the number of rows that a source has in this batch (`budgets`). Sources are processed in
    the order of their names.

    Args:
        sources: the source of each row [n].
        keep: number of rows to keep.
        small: sources whose rows are all kept.
        per_source: False makes one group of all large sources.
        generator: source of randomness, used if the small sources overflow.

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
        shares = budgets([len(r) for r in little], keep)
        little = [
            r[torch.randperm(len(r), generator=generator)[:share].sort().values]
            for r, share in zip(little, shares, strict=True)
        ]
    kept = torch.cat(little) if little else torch.zeros(0, dtype=torch.int64)
    quotas = budgets([len(r) for r in large], keep - len(kept))
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
