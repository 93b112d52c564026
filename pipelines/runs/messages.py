"""Messages of a command on stderr: news, warnings and progress bars. Only the process that leads prints."""

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from typing import Any

from pipelines import texts
from pipelines.runs import current
from pipelines.runs.workers import leads
from pipelines.texts import visible

_quiet: ContextVar[bool] = ContextVar("quiet", default=False)
_bars: ContextVar["Bars | None"] = ContextVar("bars", default=None)


@contextmanager
def quietly(quiet: bool = True) -> Iterator[None]:
    """Show only warnings and errors inside the `with` block.

    Args:
        quiet: Whether to be quiet. The earlier state is restored at the end of the block.
    """
    before = _quiet.set(quiet)
    try:
        yield
    finally:
        _quiet.reset(before)


def quiet() -> bool:
    """Return whether only warnings and errors are shown."""
    return _quiet.get()


def say(text: str) -> None:
    """Print one line of news on stderr, from the process that leads, unless the command is quiet.

    Args:
        text: The line.
    """
    if not quiet() and leads():
        _print(text)


def warn(text: str) -> None:
    """Print a warning on stderr, from the process that leads, even when quiet. The open run keeps it as an event.

    Args:
        text: The text without "warning: ".
    """
    if leads():
        _print(f"warning: {text}")
        if (run := current.run()) is not None:
            run.warned(text)


@contextmanager
def library_warnings() -> Iterator[None]:
    """Turn warnings of per-sample gradients (a slower method was needed) into warnings of the run."""
    with warnings.catch_warnings():
        warnings.filterwarnings("always", message="per-sample gradients")
        warnings.showwarning = lambda message, *_, **__: warn(str(message))
        yield


def duration(seconds: float) -> str:
    """Return a duration as text with plain spaces, for logs.

    Args:
        seconds: The duration.

    Example:
        >>> duration(42.3), duration(150)
        ('42 s', '2 min 30 s')
    """
    return texts.duration(seconds).replace(texts.NBSP, " ")


def _print(text: str) -> None:
    shown = visible(text, keep="\n")
    if (bars := _bars.get()) is not None:
        bars.display.console.print(shown, markup=False, highlight=False, soft_wrap=True)
    else:
        with suppress(BrokenPipeError):
            print(shown, file=sys.stderr, flush=True)


class Bars:
    """The display that nested progress bars share on a terminal. It stops with its last bar."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self.display = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[detail]}", markup=False),
            TimeRemainingColumn(compact=True),
            console=Console(stderr=True),
            transient=True,
        )
        self.display.start()
        self._open = 0

    @classmethod
    def shared(cls) -> "Bars":
        """Return the display of this context; a new one is made if there is none."""
        bars = _bars.get()
        if bars is None:
            bars = cls()
            _bars.set(bars)
        return bars

    def add(self, description: str, total: int | None, done: int) -> Any:
        """Show a bar and return its number.

        Args:
            description: The text before the bar.
            total: The number of units; None if unknown.
            done: The number of finished units.
        """
        self._open += 1
        return self.display.add_task(visible(description), total=total, completed=done, detail="")

    def update(self, bar: Any, done: int, detail: str) -> None:
        """Move a bar.

        Args:
            bar: The number of the bar.
            done: The number of finished units.
            detail: The text after the bar.
        """
        self.display.update(bar, completed=done, detail=detail)

    def remove(self, bar: Any) -> None:
        """Remove a bar. The display stops with the last one.

        Args:
            bar: The number of the bar.
        """
        self.display.remove_task(bar)
        self._open -= 1
        if self._open == 0:
            self.display.stop()
            _bars.set(None)
