"""One run by several processes: which engine starts them, and what they may not do together; see `member`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from datatools import UsageError
from pipelines.engines import local, ranks, ray_pool
from pipelines.engines.member import take_part
from pipelines.engines.units import own_name
from pipelines.runs import workers
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
    if here is None and how.workers == 1 and how.name == "local":
        return program(config)
    if shares:
        asked = "several ranks" if here is not None else f"--engine {how.name} --workers {how.workers}"
        raise UsageError(f"{asked}: {shares}")
    if config.dry_run:
        return program(config) if here is None or here.rank == 0 else config.out
    if here is None and how.name == "local":
        return local.run(program, config, how)
    if config.overwrite:
        raise UsageError(
            f"--overwrite: several processes would move the run in {shown(config.out)} aside one after another; move "
            "it away yourself, or choose another --out"
        )
    if here is None:
        return ray_pool.run(program, config, how)
    with ranks.apart(here):
        me = workers.Member(own_name(f"rank-{here.rank}"), here.rank, here.world, leads=False)
        return take_part(program, config, me)
