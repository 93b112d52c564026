"""The run that warnings and progress belong to: the innermost one that is open in this context.

Messages come from deep inside rows, models and training, which take no run; a context variable finds it for them. A
thread starts without one.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Protocol

from pipelines.runs.ahead import Ahead
from pipelines.settings.base import Json


class Listener(Protocol):
    """What a run does with what happens in it."""

    ahead: Ahead | None

    def warned(self, text: str) -> None:
        """Keep a warning."""

    def expect(self, parts: Mapping[str, float]) -> None:
        """Take the estimated seconds of each part."""

    def report_progress(self, *, state: str, doing: Json = None, eta_seconds: float | None = None) -> None:
        """Take how far a loop is."""


_run: ContextVar[Listener | None] = ContextVar("run", default=None)
_folder: ContextVar[Path | None] = ContextVar("folder", default=None)


def run() -> Listener | None:
    """The run that is open, or None."""
    return _run.get()


@contextmanager
def listening(to: Listener) -> Iterator[None]:
    """Make `to` the run that messages belong to."""
    token = _run.set(to)
    try:
        yield
    finally:
        _run.reset(token)


def last_folder() -> Path | None:
    """The folder that a run of this command last opened, also after that run has ended; None before the first."""
    return _folder.get()


def opened(folder: Path | None) -> None:
    """Note that a run opened `folder`; None when a command begins."""
    _folder.set(folder)
