"""How many rows of a batch are kept of each source: rows of small sources all, of the others by quotas."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence, Set
from dataclasses import dataclass

import torch
from torch import Tensor

from datatools.errors import UsageError
from datatools.selection.candidates import Selection


@dataclass(frozen=True)
class Plan:
    """What must be trained, and how many rows may be chosen out of which.

    kept: int64, rows of small sources, always trained.
    groups: (rows of one large source, how many of them to choose).
    overflow: the small sources alone held more rows than may be kept; `kept` is a draw with quotas by source.
    """

    kept: Tensor
    groups: tuple[tuple[Tensor, int], ...]
    overflow: bool

    def __len__(self) -> int:
        return len(self.kept) + sum(quota for _, quota in self.groups)

    @property
    def free(self) -> bool:
        """Whether there is anything to choose."""
        return any(0 < quota < len(rows) for rows, quota in self.groups)

    def candidates(self) -> Tensor:
        """int64, the rows of all groups, ascending."""
        rows = [rows for rows, _ in self.groups]
        return torch.cat(rows).sort().values if rows else torch.zeros(0, dtype=torch.int64)

    def draw(self, generator: torch.Generator) -> Selection:
        """Random rows with the same kept rows and quotas: the control that every choice has to beat."""
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
    """Which rows of a batch are kept anyway, and how many to choose of each large source.

    Quotas are in proportion to the rows that a source has in this batch (`budgets`); sources are taken in the order of
    their names. per_source=False makes one group of all large sources.
    Raises: UsageError unless 1 <= keep <= n.
    """
    n = len(sources)
    if not 1 <= keep <= n:
        raise UsageError(
            f"coreset: {keep} rows to keep of a batch of {n}; keep at least 1 and at most the batch, "
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
    """`total` shared out in proportion to `sizes` by largest remainder; ties go to the lower index.

    No share exceeds its size: a quota is at most the size, and a whole number is never rounded up.
    Raises: ValueError unless 0 <= total <= sum(sizes) and no size is negative.
    """
    whole = sum(sizes)
    if min(sizes, default=0) < 0 or not 0 <= total <= whole:
        raise ValueError(f"budgets: {total} of {whole} rows; expected at least 0 and at most as many as there are")
    if whole == 0:
        return [0] * len(sizes)
    shares = [total * size // whole for size in sizes]
    rest = sorted(range(len(sizes)), key=lambda q: (-(total * sizes[q] % whole), q))
    for q in rest[: total - sum(shares)]:
        shares[q] += 1
    return shares


def by_source(sources: Sequence[Hashable], rows: Tensor) -> dict[str, int]:
    """How many of `rows` each source has, by name; sources with none are left out."""
    return dict(sorted(Counter(str(sources[i]) for i in rows.tolist()).items()))
