"""What encoding every row of a pool has shown: lengths, content keys, and faults."""

from collections import Counter
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from datatools.compact import Keys, Names
from pipelines.rows.gather import Columns
from pipelines.rows.index import Pool
from pipelines.rows.row import BadRow


@dataclass(frozen=True)
class Scan:
    """The result of encoding a pool once. Entry i of an array is row i of the pool, zero or "" if the row is not ok."""

    ok: NDArray[np.bool_]
    tokens: NDArray[np.int32]
    """The number of tokens after cutting."""
    supervised: NDArray[np.int32]
    cut: NDArray[np.int32]
    keys: Keys
    bad: list[BadRow]
    """The rows that are not ok, in order."""
    content: Keys
    """What is equal for rows with the same text, whatever the tokenizer (`normal.content_of`)."""
    opening: NDArray[np.uint64]
    """What is equal for rows with the same first turn (`normal.opening_of`)."""
    flags: Counter[str] = field(default_factory=Counter)
    """The number of rows with each flag of `Encoded`."""

    @property
    def status(self) -> Names:
        """For each row "ok", or the reason why it cannot be encoded."""
        found = Names(np.zeros(len(self.ok), np.int32), ["ok"])
        places = np.flatnonzero(~self.ok)
        reasons = Names.of(row.reason for row in self.bad)
        for reason in reasons.names:
            found = found.replaced(places[reasons.where(reason)], reason)
        return found


def scan_of(pool: Pool, columns: Columns) -> Scan:
    """Return what the parts of a pool know about its tokens.

    Args:
        pool: The rows.
        columns: The columns of its parts.
    """
    tokens, supervised, cut = (columns.numbers(name) for name in ("tokens", "supervised", "cut"))
    bad = [pool.bad_row(row, reason, detail) for row, reason, detail in columns.faults]
    return Scan(
        columns.numbers("ok"), tokens, supervised, cut, columns.keys("key"), bad, columns.keys("content"),
        columns.numbers("opening"), columns.encoded,
    )  # fmt: skip
