"""One run by several processes: who leads it, who helps, and what happens when one of them ends.

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

from datatools import DataError, UsageError, files
from pipelines.engines import local, ranks
from pipelines.engines.units import own_name
from pipelines.runs import following, workers
from pipelines.runs.run_files import shown
from pipelines.settings.base import RunSettings
from pipelines.settings.engine import EngineConfig

S = TypeVar("S", bound=RunSettings)


def run(program: Callable[[S], Path], config: S, how: EngineConfig, *, shares: str = "") -> Path:
    """Run a program by the processes that the settings ask for, or that have been started together with this one.

    Args:
        program: The program. It can be imported by its module and name, and other processes import it.
        config: Its settings.
        how: The engine.
        shares: Why there is nothing to share with these settings; empty if there is.

    Returns:
        The folder of the run.

    Raises:
        UsageError: There is nothing to share, or the settings do not fit together.
        DataError: The run failed in the process that leads it.
    """
    here = ranks.place(how)
    if here is None and how.workers == 1:
        return program(config)
    if shares:
        raise UsageError(f"{'--workers ' + str(how.workers) if here is None else 'several ranks'}: {shares}")
    if config.dry_run:
        return program(config) if here is None or here.rank == 0 else config.out
    if here is None:
        return local.run(program, config, how)
    if config.overwrite:
        raise UsageError(
            f"--overwrite: several ranks would move the run in {shown(config.out)} aside one after another; move it "
            "away yourself, or choose another --out"
        )
    with ranks.apart(here):
        me = workers.Member(own_name(f"rank-{here.rank}"), here.rank, here.world, leads=False)
        return take_part(program, config, me)


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
        with suppress(following.Orphaned, following.Enough), workers.acting_as(replace(me, leads=False)):
            program(config)
        for _ in following.pauses():
            if files.holder(config.out) is None:
                break
        state, error = following.outcome(config.out)
        if state == "done":
            return config.out
        if state == "failed":
            raise DataError(f"the run in {shown(config.out)} failed in the process that leads it: {error}")
