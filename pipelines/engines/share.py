"""What several workers change in an estimate of cost."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from pipelines.engines import ranks
from pipelines.runs import devices, threads
from pipelines.settings.engine import EngineConfig
from pipelines.texts import plural

ALONE = "warm-up"
"""The beginning of the labels of parts that the leader does by itself."""


@dataclass(frozen=True)
class Share:
    """How the work of a run is divided.

    Attributes:
        workers: The processes that share it, on all machines.
        here: The processes on this machine that were started together.
    """

    workers: int
    here: int

    @classmethod
    def of(cls, how: EngineConfig) -> Share:
        """Return how the work of a run is divided by these settings, or among the ranks that were started.

        Args:
            how: The engine.
        """
        place = ranks.place(how)
        if place is not None:
            return cls(place.world, 1)
        return cls(how.workers, how.workers)

    def parts(self, seconds: Mapping[str, float], shared: tuple[str, ...] = ("",)) -> dict[str, float]:
        """Return the seconds of each part when all workers do it together.

        Workers that share a core or a GPU are not faster than one.

        Args:
            seconds: The seconds that one process takes, by the label of the part.
            shared: The beginnings of the labels of parts that are shared; by default, all but the warm-up.
        """
        most = (len(devices.gpus()) or threads.cores()) if self.here > 1 else self.workers
        by = max(1, min(self.workers, most))
        return {
            label: one / by if label.startswith(shared) and not label.startswith(ALONE) else one
            for label, one in seconds.items()
        }

    def text(self) -> str:
        """Return how many workers an estimate counts on; empty for one."""
        return f", shared by {plural(self.workers, 'worker')}" if self.workers > 1 else ""
