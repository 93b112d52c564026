"""The engine `ranks`: processes that torchrun, accelerate, srun or a Slurm array has started for one run.

They need no collectives, no port and no common start: each looks into the run folder. So ranks may be lost, and may
join later.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from pipelines.runs import devices, workers
from pipelines.settings.engine import EngineConfig

_LAUNCHER = (
    *("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT"),
    *("PMI_RANK", "PMI_SIZE", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_RANK"),
    *("MV2_COMM_WORLD_SIZE", "TORCHELASTIC_RUN_ID"),
)
"""Variables by which accelerate would make one training run of all ranks; here each trains by itself, if at all."""


@dataclass(frozen=True)
class Place:
    """The place of this process among the ranks.

    Attributes:
        rank: Its number among all ranks.
        world: The number of ranks.
        local: Its number among the ranks of its machine.
    """

    rank: int
    world: int
    local: int


def place(how: EngineConfig) -> Place | None:
    """Return the place of this process among ranks; None if it was started by itself.

    RANK and WORLD_SIZE are enough. The variables of Slurm count with `--engine ranks` alone, because Slurm also sets
    them for commands that run once.

    Args:
        how: The engine that the settings ask for.

    Raises:
        EnvironmentProblem: A variable is not a whole number.
    """
    world = workers.world_size()
    if world > 1:
        return Place(workers.rank(), world, workers.whole_number("LOCAL_RANK", workers.rank()))
    if how.name != "ranks":
        return None
    number = workers.whole_number
    if os.environ.get("SLURM_ARRAY_TASK_ID"):
        first, count = number("SLURM_ARRAY_TASK_MIN", 0), number("SLURM_ARRAY_TASK_COUNT", 1)
        step = max(1, number("SLURM_ARRAY_TASK_STEP", 1))
        return Place((number("SLURM_ARRAY_TASK_ID", 0) - first) // step, count, 0)
    if os.environ.get("SLURM_PROCID"):
        return Place(number("SLURM_PROCID", 0), number("SLURM_NTASKS", 1), number("SLURM_LOCALID", 0))
    return Place(0, 1, 0)


@contextmanager
def apart(here: Place) -> Iterator[None]:
    """Hide the launcher's variables from libraries, and give this rank one GPU of its machine, if there are any.

    Args:
        here: The place of this process.
    """
    hidden = {name: os.environ.pop(name) for name in _LAUNCHER if name in os.environ}
    before = os.environ.get("CUDA_VISIBLE_DEVICES")
    os.environ |= devices.gpu_of(here.local)
    try:
        yield
    finally:
        os.environ |= hidden
        if before is None:
            os.environ.pop("CUDA_VISIBLE_DEVICES", None)
        else:
            os.environ["CUDA_VISIBLE_DEVICES"] = before
