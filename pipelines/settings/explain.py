"""Settings of `datatools explain` and `datatools neighbours`, which read the run of a selection."""

from typing import Annotated

from pydantic import Field

from pipelines.settings.base import FilePath, Settings
from pipelines.settings.marks import METHOD, MODEL, Flag
from pipelines.settings.parts import Device


class ExplainConfig(Settings):
    """Why was this row selected, or not? Shows its score, its rank, and the target rows that it resembles most."""

    examples = (
        "datatools explain runs/select/selected.jsonl:17",
        "datatools explain runs/select pool.jsonl:803",
        "datatools explain runs/select some-id",
    )

    file: FilePath = Field(description="selected.jsonl of a run")
    line: int = Field(default=1, ge=1, le=10**12, description="line in that file, counted from 1; not used with `row`")
    row: str | None = Field(
        default=None,
        min_length=1,
        max_length=4096,
        description="any row of the run's pool: FILE:LINE of one of its files, or its id",
    )
    nearest: Annotated[int, Flag("--nearest", METHOD)] = Field(
        default=5, ge=1, le=1000, description="how many target rows to show"
    )
    device: Annotated[Device, Flag("--device", MODEL, "DEVICE")] = Field(
        default="auto", description="auto, cpu, cuda, cuda:N or mps, for methods whose explanation needs the model"
    )
    trust_remote_code: Annotated[bool, Flag("--trust-remote-code", MODEL)] = Field(
        default=False, description="run the Python code that comes with the run's model"
    )


class NeighboursConfig(Settings):
    """What lies near a row in the space in which a run compared rows?

    Shows the nearest rows of the pool and of the target. Without a row: the nearest pool rows of each target row, and
    how many clusters of the pool the selection reaches. The run's method must keep features (less, rds).
    """

    examples = (
        "datatools neighbours runs/select pool.jsonl:803",
        "datatools neighbours runs/select some-id --nearest 10",
        "datatools neighbours runs/select",
    )

    folder: FilePath = Field(description="folder of the run")
    row: str | None = Field(
        default=None, min_length=1, max_length=4096, description="a row of the run's pool: FILE:LINE or its id"
    )
    nearest: Annotated[int, Flag("--nearest", METHOD)] = Field(
        default=5, ge=1, le=1000, description="how many rows to show"
    )
    clusters: Annotated[int | None, Flag("--clusters", METHOD)] = Field(
        default=None,
        ge=1,
        le=100_000,
        description="without a row: clusters of the pool; null is the square root of its rows, at most 256",
    )
    trust_remote_code: Annotated[bool, Flag("--trust-remote-code", MODEL)] = Field(
        default=False, description="run the Python code that comes with the run's model"
    )
