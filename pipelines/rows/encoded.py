"""One row as tokens."""

from dataclasses import dataclass

import numpy as np

from datatools import files

IGNORED = -100
"""The label of a token without loss (torch's and transformers' `ignore_index`)."""


@dataclass(frozen=True, slots=True)
class Encoded:
    """One row as tokens."""

    input_ids: list[int]
    labels: list[int]
    """As long as `input_ids`: the id where there is loss, else `IGNORED`. Not shifted: labels[t] is predicted from
    input_ids[:t], so that labels[0] has no effect."""
    cut: int = 0
    """Tokens cut from the end to fit `max_length`; of a very long text, only those of the tokenised part."""
    flags: tuple[str, ...] = ()
    """What the template omits (`chat.Rendered.flags`), and control_token_in_text (only for plain text rows)."""

    @property
    def supervised(self) -> int:
        """The number of tokens with loss."""
        return len(self.labels) - self.labels.count(IGNORED) - (self.labels[:1] not in ([], [IGNORED]))

    @property
    def key(self) -> str:
        """The xxh3-128 of ids and labels (int32, little-endian): equal content has an equal key."""
        return files.digest(np.asarray(self.input_ids + self.labels, dtype="<i4").tobytes())
