"""Settings of `datatools audit`."""

from pathlib import Path
from typing import Annotated

from pydantic import Field

from pipelines.settings.base import Columns, FilePath, Names, RunSettings
from pipelines.settings.marks import DATA, ELSEWHERE, METHOD, RUN, Flag, Flags, OneOf
from pipelines.settings.methods import arms
from pipelines.settings.parts import DataConfig, LoraConfig, ModelConfig, TrainingConfig

RUNS = "as in the run"
"""The default that help shows for settings that an audit takes from the run whose selection it judges."""


class AuditConfig(RunSettings):
    """Compare the selection with simple baselines: train on each with several seeds, and compare held-out losses.

    The model, the target and the training recipe are those of the run that made the selection, unless given here.
    """

    examples = (
        "datatools audit --selected runs/select/selected.jsonl --pool pool.jsonl --test test.jsonl "
        "--against random,random-length,tfidf,rds --seeds 3",
    )

    selected: Annotated[FilePath, Flag("--selected", DATA)] = Field(description="selected.jsonl of a run")
    pool: Annotated[DataConfig, Flags("paths columns", default=RUNS, paths="--pool"), Flags("preference")] = Field(
        description="the pool from which the rows were selected"
    )
    test: Annotated[DataConfig, Flags("paths columns preference", paths="--test", columns="--test-columns")] = Field(
        description="held-out rows that resemble the target; never rows that were used for the selection"
    )
    target: Annotated[Names, Flag("--target", DATA, "FILE", default=RUNS)] = Field(
        default=[], description="the target rows, for baselines that need them"
    )
    target_columns: Annotated[Columns | None, Flag("--target-columns", DATA, "OURS=YOURS", default=RUNS)] = Field(
        default=None, description="columns of the target rows, as --columns; null tries the pool's, then detects them"
    )
    against: Annotated[
        list[Annotated[str, OneOf(arms)]],
        Field(max_length=16),
        Flag("--against", METHOD, "NAMES"),
    ] = Field(
        default=["random", "random-length"], description=f"baselines with the same number of rows: {', '.join(arms())}"
    )
    allow_overlap: Annotated[bool, Flag("--allow-overlap", DATA)] = Field(
        default=False, description="continue although test rows are in the pool or the target; the report says so"
    )
    seeds: Annotated[int, Flag("--seeds", METHOD)] = Field(
        default=3, ge=1, le=1000, description="training runs per arm; fewer than three give no verdict"
    )
    model: Annotated[ModelConfig, Flags("name", default=RUNS), Flags("trust_remote_code")] = Field(
        description="the model to train"
    )
    lora: Annotated[LoraConfig | None, Flags("rank", default=RUNS)] = Field(
        default_factory=LoraConfig, description="train adapters; null trains every weight"
    )
    training: Annotated[TrainingConfig, Flags("optimizer learning_rate epochs batch_size", default=RUNS)] = Field(
        default_factory=TrainingConfig, description="the same recipe for every arm"
    )
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
    out: Annotated[FilePath, Flag("--out", RUN, "DIR", default="'audit' in the run's folder")] = Field(
        default=Path("runs/audit"), description="folder of the audit", json_schema_extra=ELSEWHERE
    )
