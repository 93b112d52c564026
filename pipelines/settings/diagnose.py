"""Settings of `datatools diagnose`."""

from functools import partial
from pathlib import Path
from typing import Annotated

from pydantic import Field

from pipelines.settings import names
from pipelines.settings.base import FilePath, RunSettings
from pipelines.settings.marks import DATA, ELSEWHERE, LATE, METHOD, Flag, Flags, OneOf
from pipelines.settings.parts import DataConfig, ModelConfig


class DiagnoseConfig(RunSettings):
    """Examine a model's weights, gradients and loss surface: sharpness, spectra, smoothness, conditioning.

    Writes report.html, with one picture per check, and diagnose.json to --out. An interrupted run continues with the
    next check.
    """

    examples = (
        "datatools diagnose --model M --data a.jsonl --out runs/look",
        "datatools diagnose --model M --data a.jsonl --checks sharpness,spectrum --rows 64",
        "datatools diagnose --model M --data a.jsonl --set probes=50 --set lanczos_steps=50",
    )

    model: Annotated[ModelConfig, Flags("name adapter chat trust_remote_code max_length device dtype")] = Field(
        description="the model to examine, with its adapter if it has one; dtype auto is float32"
    )
    data: Annotated[DataConfig, Flags("paths on_bad_row columns preference")] = Field(
        description="the rows whose loss is examined"
    )
    out: FilePath = Field(
        default=Path("runs/diagnose"),
        description="folder of the run; an interrupted run in it is continued",
        json_schema_extra=ELSEWHERE,
    )
    checks: Annotated[
        list[Annotated[str, OneOf(partial(names.known, "check"))]],
        Field(min_length=1, max_length=16),
        Flag("--checks", METHOD, "NAMES", default="all"),
    ] = Field(default=list(names.known("check")), description="what to measure", json_schema_extra=LATE)
    rows: Annotated[int, Flag("--rows", DATA)] = Field(
        default=16, ge=1, le=10**6, description="number of rows, drawn at random; the cost grows with it"
    )
    token_budget: int = Field(default=1024, ge=1, le=2**24, description="padded tokens per pass; limits memory")
    updates: list[str] = Field(
        default=["sgd", "adamw", "muon"],
        max_length=16,
        description="optimizers whose first update is compared with the weights, by its spectrum",
    )
    probes: int = Field(default=20, ge=3, le=10_000, description="Cauchy probes of the Hessian (smoothness)")
    coordinates: int = Field(default=4096, ge=1, le=10**9, description="entries of each tensor that are probed")
    rotate: bool = Field(
        default=True, description="measure smoothness in rotated coordinates too, which doubles the cost of the probes"
    )
    lanczos_steps: int = Field(default=20, ge=1, le=1000, description="Lanczos steps towards the largest eigenvalue")
