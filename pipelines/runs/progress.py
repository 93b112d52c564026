"""Progress of a loop: a bar on a terminal, otherwise one line every 30 seconds, and the run's progress.json."""

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from datatools import DatatoolsError
from pipelines.runs import current
from pipelines.runs.messages import Bars, duration, quiet, say
from pipelines.runs.workers import leads
from pipelines.settings.base import Json
from pipelines.texts import visible


class Progress:
    """The progress of a loop. `progress` creates it; `advance` is fast enough to be called for every batch.

    Args:
        description: What the loop does, as shown.
        total: The number of units; None if unknown.
        unit: The name of the units, in the plural.
        done: The number of units that an earlier attempt finished.
        line_seconds: Seconds between two lines of news where there is no bar.
        file_seconds: Seconds between two reports to the run.
        clock: A function that returns seconds since a fixed moment.
    """

    def __init__(
        self,
        description: str,
        total: int | None,
        unit: str,
        done: int = 0,
        *,
        line_seconds: float = 30.0,
        file_seconds: float = 2.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.description, self.total, self.unit, self.done = description, total, unit, done
        self.notes: dict[str, Json] = {}
        self._first, self._clock, self._start = done, clock, clock()
        self._line_seconds, self._file_seconds = line_seconds, file_seconds
        self._next_line, self._next_file = self._start + line_seconds, self._start
        self._bars: Bars | None = None
        self._bar: Any = None
        self._aside = 0.0
        self.more: Callable[[float], float] | None = None
        """Seconds to come besides the units (validation), given the seconds per unit so far."""

    def resume(self, done: int) -> None:
        """Count units that an earlier attempt finished; they do not enter the rate.

        Args:
            done: The number of these units.
        """
        self._first += done
        self.advance(done)

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Leave the time of what happens inside out of the rate: it is no work on units."""
        began = self._clock()
        try:
            yield
        finally:
            self._aside += self._clock() - began

    def advance(self, n: int = 1, **notes: float | int | str) -> None:
        """Count more units as finished.

        Args:
            n: The number of units.
            **notes: Values that are shown until they are replaced, such as `loss=1.2`.
        """
        self.done += n
        self.notes |= notes
        now = self._clock()
        if self._bars is not None:
            self._bars.update(self._bar, self.done, self._detail())
        elif now >= self._next_line:
            self._next_line = now + self._line_seconds
            say(self.line())
        if now >= self._next_file:
            self._next_file = now + self._file_seconds
            self._report()

    @property
    def rate(self) -> float | None:
        """Units per second since the start of this process."""
        seconds = self._clock() - self._start - self._aside
        return (self.done - self._first) / seconds if seconds > 0 and self.done > self._first else None

    @property
    def eta_seconds(self) -> float | None:
        """Seconds until the loop ends at the present rate."""
        rate = self.rate
        if self.total is None or rate is None:
            return None
        more = 0.0 if self.more is None else self.more(1 / rate)
        return max(0, self.total - self.done) / rate + more

    @property
    def run_eta_seconds(self) -> float | None:
        """Seconds until the whole run ends, if the run has stated its parts."""
        run = current.run()
        if run is None or run.ahead is None or not run.ahead.parts:
            return None
        share = min(1.0, self.done / self.total) if self.total else 0.0
        return run.ahead.left(self.description, self._clock() - self._start, share, self.eta_seconds)

    def line(self) -> str:
        """Return one line such as `gradients: 120 of 1,000 rows (12 %), 4.1 rows/s, about 3 min 35 s left`."""
        share = f" of {_count(self.total)}" if self.total is not None else ""
        percent = f" ({100 * self.done // self.total} %)" if self.total else ""
        parts = [f"{self.description}: {_count(self.done)}{share} {self.unit}{percent}"]
        parts += [detail] if (detail := self._detail()) else []
        eta, whole = self.eta_seconds, self.run_eta_seconds
        if eta and whole is not None:
            parts.append(f"about {duration(eta)} left, {duration(max(eta, whole))} of the whole run")
        elif eta:
            parts.append(f"about {duration(eta)} left")
        return ", ".join(parts)

    def _detail(self) -> str:
        parts = [f"{_count(self.rate)} {self.unit}/s"] if self.rate else []
        if self._bars is not None and (left := self.run_eta_seconds) is not None:
            parts.append(f"run {duration(left)} left")
        for name, value in self.notes.items():
            parts.append(f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}")
        return visible(", ".join(parts))

    def _report(self) -> None:
        if (run := current.run()) is not None:
            eta = self.eta_seconds
            run.report_progress(
                state="running",
                eta_seconds=self.run_eta_seconds,
                doing={
                    "description": self.description,
                    "done": self.done,
                    "total": self.total,
                    "unit": self.unit,
                    "per_second": self.rate,
                    "eta_seconds": eta,
                    **({"notes": dict(self.notes)} if self.notes else {}),
                },
            )

    def _open(self) -> None:
        self._report()
        if quiet() or not leads():
            self._next_line = float("inf")
        elif sys.stderr.isatty() and os.environ.get("TERM") != "dumb":
            self._bars = Bars.shared()
            self._bar = self._bars.add(self.description, self.total, self.done)

    def _close(self, failed: bool) -> None:
        if self._bars is not None:
            self._bars.remove(self._bar)
            self._bars = None
        seconds = self._clock() - self._start
        if not failed:
            run = current.run()
            if run is not None and run.ahead is not None:
                run.ahead.finish(self.description, seconds)
            rate = f", {_count(self.rate)} {self.unit}/s" if self.rate else ""
            say(f"{self.description}: {_count(self.done)} {self.unit} in {duration(seconds)}{rate}")
        with suppress(DatatoolsError):
            self._report()


@contextmanager
def progress(description: str, total: int | None, unit: str = "rows", *, done: int = 0) -> Iterator[Progress]:
    """Show the progress of the loop inside the `with` block, its rate and the time left, and update progress.json.

    Args:
        description: What the loop does.
        total: The number of units; None if unknown.
        unit: The name of the units, in the plural.
        done: The number of units that an earlier attempt finished; they do not count for the rate.
    """
    bar = Progress(description, total, unit, done)
    bar._open()
    failed = True
    try:
        yield bar
        failed = False
    finally:
        bar._close(failed)


def _count(number: float) -> str:
    return f"{number:,.0f}" if number >= 100 or number == int(number) else f"{number:.3g}"
