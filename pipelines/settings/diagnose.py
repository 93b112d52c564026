"""Settings of `datatools diagnose`."""

from pathlib import Path
from typing import Annotated, Literal, get_args

from pydantic import Field

from pipelines.settings.base import ELSEWHERE, LATE, FilePath, RunSettings
from pipelines.settings.parts import DataConfig, ModelConfig

Check = Literal["sharpness", "spectrum", "smoothness", "conditioning", "double-descent"]


CHECKS: tuple[Check, ...] = get_args(Check)


class DiagnoseConfig(RunSettings):
    """How a model's weights, gradients and loss surface look on rows."""

    model: ModelConfig = Field(description="the model to look at, with its adapter if it has one; float32 if auto")
    data: DataConfig = Field(description="the rows whose loss is looked at")
    out: FilePath = Field(
        default=Path("runs/diagnose"),
        description="folder of the run; an interrupted run in it is continued",
        json_schema_extra=ELSEWHERE,
    )
    checks: Annotated[
        list[Check],
        Field(min_length=1, max_length=16),
    ] = Field(default=list(CHECKS), description=f"what to measure: {', '.join(CHECKS)}", json_schema_extra=LATE)
    rows: int = Field(default=16, ge=1, le=10**6, description="rows to look at, drawn at random; costs grow with them")
    token_budget: int = Field(default=1024, ge=1, le=2**24, description="padded tokens a pass; bounds memory")
    updates: list[str] = Field(
        default=["sgd", "adamw", "muon"],
        max_length=16,
        description="optimizers whose first update's spectrum is compared with that of the weights",
    )
    probes: int = Field(default=20, ge=3, le=10_000, description="Cauchy probes of the Hessian (smoothness)")
    coordinates: int = Field(default=4096, ge=1, le=10**9, description="entries of each tensor that the probes look at")
    rotate: bool = Field(default=True, description="smoothness in rotated coordinates too, at the cost of the probes")
    lanczos_steps: int = Field(default=20, ge=1, le=1000, description="steps towards the largest eigenvalue")
