"""Settings of `datatools plan`: how large the job is, on which hardware, and how often something goes wrong."""

from __future__ import annotations

import re
from typing import Annotated, ClassVar, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from pipelines.settings.base import FilePath, Name, Seed, Settings
from pipelines.settings.marks import DATA, METHOD, MODEL, RUN, Flag, Flags, OneOf
from pipelines.settings.methods import DEFAULT, SCORERS

SUFFIXES = {"k": 1e3, "m": 1e6, "b": 1e9, "g": 1e9, "t": 1e12}
_NUMBER = re.compile(r"(\d+(?:\.\d*)?|\.\d+)(e[+-]?\d{1,3})?([a-z]?)", re.IGNORECASE)


def amount(text: str) -> float | None:
    """Return the number that a text such as 1e8, 100M, 8B or 250,000 names; None if it names none.

    Args:
        text: The text.

    Example:
        >>> amount("1e8"), amount("0.5B"), amount("8X")
        (100000000.0, 500000000.0, None)
    """
    found = _NUMBER.fullmatch(text.strip().replace(",", "").replace("_", ""))
    if found is None or (found[3] and found[3].lower() not in SUFFIXES):
        return None
    return float(found[1] + (found[2] or "")) * SUFFIXES.get(found[3].lower(), 1.0)


def _amount(value: object) -> object:
    if not isinstance(value, str):
        return value
    found = amount(value)
    if found is None:
        raise ValueError(f"{value!r} is no number; expected one such as 1e8, 100M or 250000")
    return found


Count = Annotated[int | float, BeforeValidator(_amount)]
"""Two types, so that a flag takes any text: 100M is no number to a command line."""


class HardwareConfig(Settings):
    """The machines. A figure that is null is that of the named kind (`datatools plan` prints all of them)."""

    shorthand: ClassVar[str | None] = "name"
    name: Annotated[
        Literal["h100", "h200", "b200", "a100-40", "a100", "l40s", "v100", "mi300x", "cpu"], Flag("--hardware", RUN)
    ] = Field(default="h100", description="what each worker computes with; cpu is one core")
    tflops: float | None = Field(
        default=None, gt=0, le=1e6, description="peak of one worker in 10^12 operations per second, dense, as computed"
    )
    utilisation: float | None = Field(
        default=None, gt=0, le=1, description="share of that peak that a forward or backward pass reaches"
    )
    memory_gb: float | None = Field(default=None, gt=0, le=1e6, description="memory of one worker in GB")
    per_node: int | None = Field(default=None, ge=1, le=1024, description="workers on one machine")
    disk_write: float = Field(
        default=2.0, gt=0, le=1e6, description="GB per second that all workers together write to the shared folder"
    )
    disk_read: float = Field(
        default=5.0, gt=0, le=1e6, description="GB per second that all workers together read from it"
    )
    network: float = Field(default=3.0, gt=0, le=1e6, description="GB per second between one machine and that folder")


class TroubleConfig(Settings):
    """What goes wrong, for the simulation. With `stragglers=0` and `failures=null` nothing does."""

    stragglers: Annotated[float, Flag("--stragglers", RUN, "X")] = Field(
        default=0.05, ge=0, le=1, description="share of the workers that are slow"
    )
    slowdown: float = Field(default=1.5, ge=1, le=100, description="how many times slower these are")
    spread: float = Field(
        default=0.05, ge=0, le=5, description="standard deviation of the seconds of a unit, as a share of their mean"
    )
    failures: Annotated[float | None, Flag("--hours-between-failures", RUN, "X")] = Field(
        default=50_000.0,
        gt=0,
        le=1e12,
        description="hours that one worker runs until it is lost, on average; the default is what Meta reports for the "
        "GPUs on which Llama 3 was trained (419 interruptions of 16,384 GPUs in 54 days). null: never",
    )
    restart: float = Field(
        default=300.0, ge=0, le=1e7, description="seconds until a lost worker is there again, without loading its model"
    )
    trials: int | None = Field(
        default=None,
        ge=1,
        le=1000,
        description="simulated runs; the median and the range are shown. null is 20, or fewer with more than 256 "
        "workers",
    )


class PlanConfig(Settings):
    """How long will a selection take on a cluster, what will it occupy, and what limits it? Computes nothing.

    From FLOPs, bytes and stated figures of the hardware, or from the measured costs of a small run (--run): hours,
    GPU-hours, disk and network, with slow and lost workers simulated. The bottleneck is named.
    """

    examples = (
        "datatools plan --rows 1e8 --tokens-per-row 350 --model 8B --gpus 64 --engine ray",
        "datatools plan --rows 1e6 --model 1.5B --gpus 8 --method rds --hardware a100 --json",
        "datatools plan --run runs/pilot --rows 10M --gpus 16 --engine ranks",
        "datatools plan --rows 1e7 --model 135M --gpus 32 --hardware cpu --engine ranks --set hardware.tflops=0.1",
    )

    rows: Annotated[Count, Flag("--rows", DATA, "N")] = Field(
        ge=1, le=1e12, description="rows of the pool, as 1e8 or 100M"
    )
    tokens_per_row: Annotated[Count | None, Flag("--tokens-per-row", DATA, "N")] = Field(
        default=None, ge=1, le=1e6, description="tokens of a row, on average; null is 350, or that of --run"
    )
    targets: Annotated[int, Flag("--target-rows", DATA)] = Field(
        default=256, ge=1, le=10**7, description="rows of the target"
    )
    model: Annotated[Name | None, Flag("--model", MODEL)] = Field(
        default=None,
        description="the number of parameters, such as 8B or 135M, or a model: a folder, a hub name, or a .gguf file",
    )
    run: Annotated[FilePath | None, Flag("--run", MODEL, "DIR")] = Field(
        default=None,
        description="a finished run of `datatools select` on a small part of the pool: its measured seconds replace "
        "the figures of the hardware, and its settings are those of the plan",
    )
    method: Annotated[str | None, OneOf(lambda: tuple(SCORERS)), Flag("--method", METHOD)] = Field(
        default=None, description=f"a name from `datatools ls methods`; null is {DEFAULT}, or that of --run"
    )
    dim: Annotated[int | None, Flag("--dim", METHOD)] = Field(
        default=None, ge=1, le=2**20, description="feature dimension; null is 8192, or that of --run"
    )
    dtype: Literal["float16", "bfloat16", "float32", "int8", "int4", "int1"] | None = Field(
        default=None, description="how stored features are rounded; null is float16, or that of --run"
    )
    checkpoints: Annotated[int | None, Flag("--warmup-checkpoints", METHOD)] = Field(
        default=None,
        ge=1,
        le=1000,
        description="checkpoints at which gradients are taken; null is what the method takes after 4 epochs, or that "
        "of --run",
    )
    warmup: Annotated[float | None, Flag("--warmup-share", METHOD, "X")] = Field(
        default=None,
        ge=0,
        le=1,
        description="share of the pool on which the warm-up trains for 4 epochs, by one worker; 0 if you bring "
        "checkpoints of your own. null is 0.05, or that of --run",
    )
    rows_per_unit: int | None = Field(
        default=None,
        ge=1,
        le=2**20,
        description="rows that are computed and committed together; null is as in `select`",
    )
    gpus: Annotated[int, Flag("--gpus", RUN)] = Field(
        default=1, ge=1, le=16_384, description="workers, each with one GPU (or one core, with --hardware cpu)"
    )
    engine: Annotated[Literal["local", "ranks", "ray"], Flag("--engine", RUN)] = Field(
        default="local", description="as in `select`; what happens when a worker is lost depends on it"
    )
    hardware: Annotated[HardwareConfig, Flags("name")] = Field(
        default_factory=HardwareConfig, description="the machines"
    )
    trouble: Annotated[TroubleConfig, Flags("stragglers failures")] = Field(
        default_factory=TroubleConfig, description="what goes wrong"
    )
    seed: Annotated[Seed, Flag("--seed", RUN)] = Field(default=0, description="the seed of the simulation")
    as_json: Annotated[bool, Flag("--json", RUN)] = Field(
        default=False, description="print one JSON object instead of tables"
    )

    @model_validator(mode="after")
    def _has_costs(self) -> Self:
        if self.model is None and self.run is None:
            raise ValueError(
                "what a row costs is unknown: name the model with --model (8B, a folder, a hub name), or a small run "
                "that has been measured with --run DIR"
            )
        if self.model is not None and self.run is not None:
            raise ValueError(
                "--model and --run exclude each other: the run says which model it measured; leave one out"
            )
        return self
