"""How much to select, as the user writes it. Reading a budget does not import torch."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from datatools.errors import UsageError

if TYPE_CHECKING:
    from datatools.selection.candidates import Candidates

_BUDGET = re.compile(r"([0-9][0-9_]*|[0-9]*\.[0-9]+|[0-9]+\.)\s*([kmb]?)\s*(%?)\s*(tokens?|rows?|)")
_UNIT = {"": 1, "k": 1_000, "m": 1_000_000, "b": 1_000_000_000}
_BUDGET_ADVICE = "write a share ('5%'), a number of rows ('500') or of tokens ('20000 tokens', '2M tokens')"


@dataclass(frozen=True)
class Limit:
    """A budget for a given pool: a number of `rows` or of `tokens`; the other is None."""

    rows: int | None = None
    tokens: int | None = None


@dataclass(frozen=True)
class Budget:
    """How much to select: a share of the pool's rows, a number of rows, or a number of tokens. Made by `parse`."""

    text: str
    share: float | None = None
    rows: int | None = None
    tokens: int | None = None

    @classmethod
    def parse(cls, budget: str | int | float) -> Budget:
        """Read "5%", "500", "500 rows", "2k", "20000 tokens" or "2M tokens" (k, M, B: thousand, million, billion).

        Raises:
            UsageError: for anything else, for zero or less, for more than 100 %, and for "0.05", which may be meant as
                a share or be a typing error.

        >>> Budget.parse("2M tokens").tokens, Budget.parse("5%").share, Budget.parse(500).rows
        (2000000, 0.05, 500)
        """
        text = str(budget).strip()
        match = _BUDGET.fullmatch(text.lower()) if len(text) <= 40 else None
        if match is None:
            raise UsageError(f"budget '{text[:40]}' is not understood; {_BUDGET_ADVICE}")
        number, unit, percent, noun = match.groups()
        value = float(number.replace("_", ""))
        if percent:
            if unit or noun.startswith("token"):
                raise UsageError(f"budget '{text}' is not understood; {_BUDGET_ADVICE}")
            if not 0 < value <= 100:
                raise UsageError(f"budget '{text}' is out of range; a share is above 0% and at most 100%")
            return cls(text, share=value / 100)
        if "." in number and not unit:
            hint = f"'{value * 100:g}%' for a share" if 0 < value <= 1 else f"'{value:.0f}' for a number"
            raise UsageError(f"budget '{text}' is ambiguous: a share or a number? Write {hint}; or: {_BUDGET_ADVICE}")
        # whole numbers exactly, "1.5M" by way of a float
        count = round(value * _UNIT[unit]) if "." in number else int(number.replace("_", "")) * _UNIT[unit]
        if count < 1:
            raise UsageError(f"budget '{text}' selects nothing; {_BUDGET_ADVICE}")
        return cls(text, tokens=count) if noun.startswith("token") else cls(text, rows=count)

    def resolve(self, candidates: Candidates) -> Limit:
        """The limit for this pool.

        A share p of a pool of n rows is floor(p n + 1e-9) rows, where n counts ineligible rows too, but never more
        than the eligible rows.

        Raises:
            UsageError: when nothing can be chosen or when the pool holds less than is asked for.
        """
        n, able = len(candidates), int(candidates.eligible.sum())
        if able == 0:
            raise UsageError(
                f"budget '{self.text}': none of the {n} rows may be selected; check why the pool's rows were skipped"
            )
        if self.tokens is not None:
            sizes = candidates.token_sizes[candidates.eligible.numpy()]
            if self.tokens > sizes.sum():
                raise UsageError(
                    f"budget '{self.text}' is more than the {sizes.sum()} tokens of the {able} eligible "
                    "rows; ask for less, or for '100%'"
                )
            if self.tokens < sizes.min():
                raise UsageError(
                    f"budget '{self.text}' holds no row, the shortest has {sizes.min()} tokens; ask for more"
                )
            return Limit(tokens=self.tokens)
        if self.share is not None:
            k = math.floor(self.share * n + 1e-9)
            if k == 0:
                raise UsageError(
                    f"budget '{self.text}' of {n} rows is less than one row; ask for a number of rows ('1')"
                )
            return Limit(rows=min(k, able))
        assert self.rows is not None
        if self.rows > able:
            raise UsageError(
                f"budget '{self.text}' is more than the {able} eligible of {n} rows; ask for at most {able}"
            )
        return Limit(rows=self.rows)
