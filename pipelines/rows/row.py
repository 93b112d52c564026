"""One row of instruction data, a row that cannot be used, and the error that carries such rows."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from datatools import DataError
from pipelines.rows.formats.contents import text_of
from pipelines.rows.formats.shape import Message


@dataclass(frozen=True, slots=True)
class Row:
    """One row. A conversation has `messages`, plain text has `text`, and a plain pair has `prompt` and `completion`."""

    id: str
    """Unique in the pool: the row's own id, or `<file stem>:<line>`; a repeated id has `#2`, `#3`, ... appended."""
    source: str
    """The row's `dataset` (or the column `source_key`), else its `source`, else the stem of its file."""
    file: str
    line: int
    """The line of the file, counted from 1; for a table or a JSON array, the number of the row."""
    raw: bytes
    """The line as it stands in the file without its "\\n" (a "\\r" before it stays); a table's row as JSON."""
    messages: tuple[Message, ...] = ()
    text: str | None = None
    subtask: str | None = None
    prompt: str | None = None
    completion: str | None = None
    masked: frozenset[int] = frozenset()
    """Positions in `messages` of assistant turns that are only context, without loss."""
    flags: tuple[str, ...] = ()
    """Peculiarities of the row; see `pipelines.rows.formats.Shape`."""
    tools: tuple[Any, ...] = ()
    """Definitions of tools for the template; see `pipelines.rows.formats.Shape`."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Variables for the template; see `pipelines.rows.formats.Shape`."""

    @property
    def turns(self) -> tuple[tuple[str, str], ...]:
        """(role, text) of each turn, whatever the format of the row; plain text is one turn with the role "text".

        All code that reads a row as text uses this: TF-IDF, duplicates, reports.
        """
        if self.messages:
            return tuple((turn["role"], text_of(turn)) for turn in self.messages)
        if self.text is not None:
            return (("text", self.text),)
        return (("user", self.prompt or ""), ("assistant", self.completion or ""))

    @property
    def whole(self) -> str:
        """The text of all turns, separated by line breaks."""
        return "\n".join(text for _, text in self.turns)

    @property
    def question(self) -> str:
        """The text before the last answer, for display; "" for plain text."""
        return "\n\n".join(text for _, text in self.turns[: self._last()])

    @property
    def answer(self) -> str:
        """The last assistant turn, the completion, or the plain text."""
        return self.turns[self._last()][1]

    def shown(self, limit: int | None = None) -> dict[str, str]:
        """Return the row as reports show it: `prompt` and `answer`.

        Args:
            limit: The maximum number of characters of each; None is no limit.
        """
        return {"prompt": _cut(self.question, limit), "answer": _cut(self.answer, limit)}

    def _last(self) -> int:
        return max(k for k, (role, _) in enumerate(self.turns) if role in ("assistant", "text"))


@dataclass(frozen=True, slots=True)
class BadRow:
    """A row that cannot be used, and its place."""

    file: str
    line: int
    byte_offset: int
    """The offset of the line's first byte in its file; for a table, in the JSONL copy. -1 if there is none."""
    reason: str
    """A short code: truncated_json, unknown_role, empty_answer, ..."""
    detail: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.reason} ({self.detail})"


class Refused(DataError):
    """Rows that cannot be used, under a policy that leaves none out.

    Args:
        what: How many there are, and which are the first; without a full stop.
        rows: All of them.
        advice: What to do about it.
    """

    def __init__(self, what: str, rows: Sequence[BadRow], advice: str) -> None:
        super().__init__(f"{what}. {advice}")
        self.what, self.rows = what, rows


def _cut(text: str, limit: int | None) -> str:
    return text if limit is None or len(text) <= limit else text[: limit - 1] + "…"
