"""The current run: the innermost open run of this context, which receives warnings and progress.

Messages come from deep inside rows, models and training, whose functions do not take a run as an argument. A context
variable finds the run for them. A new thread starts without a run.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any, Protocol

from pipelines.runs.ahead import Ahead
from pipelines.settings.base import Json


class Listener(Protocol):
    """The methods by which a run receives what happens in it."""

    ahead: Ahead | None
    provenance: dict[str, Any]

    def accepts(self, group: str) -> bool:
        """Return whether facts of a group may differ from those that the run began with.

        Args:
            group: The name of the group.
        """

    def warned(self, text: str) -> None:
        """Keep a warning.

        Args:
            text: The text of the warning.
        """

    def event(self, kind: str, /, **fields: Json) -> None:
        """Append a line to the events of the run.

        Args:
            kind: The kind of event.
            **fields: Further values of the event.
        """

    def expect(self, parts: Mapping[str, float]) -> None:
        """Take the estimated duration of each part.

        Args:
            parts: Seconds, by the label of the part's progress.
        """

    def report_progress(self, *, state: str, doing: Json = None, eta_seconds: float | None = None) -> None:
        """Take the progress of a loop.

        Args:
            state: The state of the run, such as "running".
            doing: The progress as plain values, for progress.json.
            eta_seconds: Estimated seconds until the end of the run; None if unknown.
        """


_run: ContextVar[Listener | None] = ContextVar("run", default=None)
_folder: ContextVar[Path | None] = ContextVar("folder", default=None)


def run() -> Listener | None:
    """Return the open run, or None."""
    return _run.get()


@contextmanager
def listening(to: Listener) -> Iterator[None]:
    """Make a run the receiver of messages inside the `with` block.

    Args:
        to: The run.
    """
    token = _run.set(to)
    try:
        yield
    finally:
        _run.reset(token)


def last_folder() -> Path | None:
    """Return the folder that this command last opened for a run; None before the first run.

    The value stays after the run has ended.
    """
    return _folder.get()


def opened(folder: Path | None) -> None:
    """Record the folder that a run has opened.

    Args:
        folder: The folder; None when a command begins.
    """
    _folder.set(folder)
