"""One row in tokens."""

from dataclasses import dataclass

import numpy as np

from datatools import files

IGNORED = -100
"""The label of a token without loss (torch's and transformers' `ignore_index`)."""


@dataclass(frozen=True, slots=True)
class Encoded:
    """One row in tokens."""

    input_ids: list[int]
    labels: list[int]
    """As long as `input_ids`: the id where there is loss, `IGNORED` elsewhere. Not shifted: labels[t] is predicted from
    input_ids[:t], so labels[0] never counts."""
    cut: int = 0
    """Tokens dropped from the end to fit `max_length`; of a very long text, of as much of it as was tokenised."""
    flags: tuple[str, ...] = ()
    """What the template leaves out (`chat.Rendered.flags`), and control_token_in_text (plain text rows only)."""

    @property
    def supervised(self) -> int:
        """How many tokens carry loss."""
        return sum(label != IGNORED for label in self.labels[1:])

    @property
    def key(self) -> str:
        """xxh3-128 of ids and labels (int32, little-endian): equal content has an equal key."""
        return files.digest(np.asarray([self.input_ids, self.labels], dtype="<i4").tobytes())
