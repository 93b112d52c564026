"""How much to select, as the user writes it. Parsing a budget does not import torch."""

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
    """A budget for a given pool, in rows or in tokens.

    Attributes:
        rows: number of rows; None for a token budget.
        tokens: number of tokens; None for a row budget.

    """

    rows: int | None = None
    tokens: int | None = None


@dataclass(frozen=True)
class Budget:
    """How much to select: a share of the pool's rows, a number of rows, or a number of tokens; `parse` creates one.

    Attributes:
        text: the budget as the user wrote it.
        share: share of the pool's rows, above 0 and at most 1.
        rows: number of rows.
        tokens: number of tokens. Exactly one of share, rows and tokens is set.

    Example:
        >>> Budget.parse("5%")
        Budget(text='5%', share=0.05, rows=None, tokens=None)

    """

    text: str
    share: float | None = None
    rows: int | None = None
    tokens: int | None = None

    @classmethod
    def parse(cls, budget: str | int | float) -> Budget:
        """Parse "5%", "500", "500 rows", "2k", "20000 tokens" or "2M tokens" (k, M, B: thousand, million, billion).

        Args:
            budget: the text, or a number of rows.

        Returns:
            The budget.

        Raises:
            UsageError: for any other text, zero or less, more than 100 %, and "0.05", which is ambiguous.

        Example:
            >>> Budget.parse("2M tokens").tokens, Budget.parse("5%").share, Budget.parse(500).rows
            (2000000, 0.05, 500)

        """
        text = str(budget).strip()
        match = _BUDGET.fullmatch(text.lower()) if len(text) <= 40 else None
        if match is None:
            raise UsageError(f"cannot parse budget '{text[:40]}'; {_BUDGET_ADVICE}")
        number, unit, percent, noun = match.groups()
        value = float(number.replace("_", ""))
        if percent:
            if unit or noun.startswith("token"):
                raise UsageError(f"cannot parse budget '{text}'; {_BUDGET_ADVICE}")
            if not 0 < value <= 100:
                raise UsageError(f"budget '{text}' is out of range; a share is above 0% and at most 100%")
            return cls(text, share=value / 100)
        if "." in number and not unit:
            hint = f"'{value * 100:g}%' for a share" if 0 < value <= 1 else f"'{value:.0f}' for a number"
            raise UsageError(f"budget '{text}' is ambiguous: a share or a number? Write {hint}; or: {_BUDGET_ADVICE}")
        # whole numbers are exact, "1.5M" is computed as a float
        count = round(value * _UNIT[unit]) if "." in number else int(number.replace("_", "")) * _UNIT[unit]
        if count < 1:
            raise UsageError(f"budget '{text}' selects nothing; {_BUDGET_ADVICE}")
        return cls(text, tokens=count) if noun.startswith("token") else cls(text, rows=count)

    def resolve(self, candidates: Candidates) -> Limit:
        """Compute the limit for a pool.

        A share p of a pool of n rows is floor(p n + 1e-9) rows, where n includes ineligible rows, but never more than
        the eligible rows.

        Args:
            candidates: the pool.

        Returns:
            The limit, in rows or in tokens.

        Raises:
            UsageError: if nothing can be chosen, or the budget exceeds the pool.

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
                    f"budget '{self.text}' exceeds the {sizes.sum()} tokens of the {able} eligible "
                    "rows; ask for less, or for '100%'"
                )
            if self.tokens < sizes.min():
                raise UsageError(
                    f"budget '{self.text}' fits no row; the shortest has {sizes.min()} tokens; ask for more"
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
            raise UsageError(f"budget '{self.text}' exceeds the {able} eligible of {n} rows; ask for at most {able}")
        return Limit(rows=self.rows)
