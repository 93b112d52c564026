"""Settings of how many processes do the work of a command, and who starts them."""

from typing import Annotated, Literal

from pydantic import Field

from pipelines.settings.base import Settings
from pipelines.settings.marks import RUN, Flag


class EngineConfig(Settings):
    """The processes that share the units of work of one run. They change its speed, not its results."""

    shorthand = "name"
    name: Annotated[Literal["local", "ranks", "ray"], Flag("--engine", RUN)] = Field(
        default="local",
        description="local starts the workers on this machine; ranks joins the processes that torchrun, accelerate, "
        "srun or a Slurm array has started (with RANK and WORLD_SIZE set, that is the default); ray starts actors on "
        "the cluster at RAY_ADDRESS, or on this machine",
    )
    workers: Annotated[int, Flag("--workers", RUN)] = Field(
        default=1,
        ge=1,
        le=1024,
        description="processes that compute gradients, hidden states, losses and training runs, this one included; "
        "each gets a GPU, or a share of the cores",
    )
    threads: int | None = Field(
        default=None,
        ge=1,
        le=1024,
        description="threads of each worker on a CPU; null divides the cores among the workers. Equal threads give "
        "equal bytes, however many workers there are",
    )
