"""Settings of `datatools audit`."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from pipelines.settings.base import ELSEWHERE, Columns, FilePath, Names, RunSettings
from pipelines.settings.parts import DataConfig, LoraConfig, ModelConfig, TrainingConfig

ARMS = ("random", "random-length", "tfidf", "rds", "loss", "full")


class AuditConfig(RunSettings):
    """Is the selection better than simple baselines? Trains on each with several seeds and compares held-out losses."""

    selected: FilePath = Field(description="selected.jsonl of a run")
    pool: DataConfig = Field(description="the pool that it was selected from")
    test: DataConfig = Field(description="held-out rows of the target; never the rows used to select")
    target: Names = Field(default=[], description="the target rows, for baselines that need them")
    target_columns: Columns | None = Field(
        default=None, description="columns of the target, as `pool.columns`; null tries the pool's, then detects"
    )
    against: Annotated[
        list[Literal["random", "random-length", "tfidf", "rds", "loss", "full"]], Field(max_length=16)
    ] = Field(
        default=["random", "random-length"], description=f"baselines with the same number of rows: {', '.join(ARMS)}"
    )
    allow_overlap: bool = Field(
        default=False, description="audit although test rows are in the pool or the target; the report says so"
    )
    seeds: int = Field(default=3, ge=1, le=1000, description="training runs per arm; fewer than three give no verdict")
    model: ModelConfig = Field(description="the model to train; the run's own model if not given")
    lora: LoraConfig | None = Field(default=LoraConfig(), description="train adapters; null trains every weight")
    training: TrainingConfig = Field(default=TrainingConfig(), description="the same recipe for every arm")
    features: FilePath | None = Field(
        default=None,
        description="where hidden states (rds) are kept; null is the audit's own folder",
        json_schema_extra=ELSEWHERE,
    )
    arms: FilePath | None = Field(
        default=None,
        description="where trained arms are kept; null is the audit's own folder. Audits that name the same one "
        "share them",
        json_schema_extra=ELSEWHERE,
    )
    out: FilePath = Field(default=Path("runs/audit"), description="folder of the audit", json_schema_extra=ELSEWHERE)
