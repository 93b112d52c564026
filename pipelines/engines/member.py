"""One member of a team: it leads the run if nobody does, otherwise it helps.

Every member runs the same program on the same settings. The member that gets the lock of the run folder leads: it alone
writes the records of the run, trains the warm-up, merges and selects. The others help: they read the same inputs, wait
for what the leader makes, and take units of work (`units.taken`). The run folder is the only channel.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from datatools import DataError, files
from pipelines.runs import following, workers
from pipelines.runs.run_files import shown
from pipelines.settings.base import RunSettings

S = TypeVar("S", bound=RunSettings)

LED = "failed in the process that leads it"


def take_part(program: Callable[[S], Path], config: S, me: workers.Member) -> Path:
    """Lead the run if nobody does, otherwise help; take the lead when the leader is lost.

    Args:
        program: The program.
        config: Its settings.
        me: This process.

    Returns:
        The folder of the run, which is then complete.

    Raises:
        DataError: The run failed in the process that leads it.
    """
    while True:
        with suppress(files.InUse), workers.acting_as(replace(me, leads=True)):
            return program(config)
        with suppress(following.Orphaned), workers.acting_as(replace(me, leads=False)):
            try:
                program(config)
            except following.Enough:
                for _ in following.pauses():  # until the leader has merged, or is lost
                    following.check_leader()
        if files.holder(config.out) is not None:  # another one leads already
            continue
        state, error = following.outcome(config.out)
        if state == "done":
            return config.out
        if state == "failed":
            raise DataError(f"the run in {shown(config.out)} {LED}: {error}")
