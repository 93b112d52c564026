"""Settings of `datatools audit`."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from pipelines.settings.base import Columns, FilePath, Names, RunSettings, Settings
from pipelines.settings.engine import EngineConfig
from pipelines.settings.marks import DATA, ELSEWHERE, LATE, METHOD, RUN, VOLATILE, Flag, Flags, OneOf
from pipelines.settings.methods import arms, default_arms
from pipelines.settings.metrics import MetricsConfig
from pipelines.settings.parts import DataConfig, LoraConfig, ModelConfig, TrainingConfig

RUNS = "as in the run"
"""The default that help shows for settings that an audit takes from the run whose selection it judges."""


class OracleConfig(Settings):
    """Counterfactual checks of scores, by short training runs."""

    rows: int = Field(
        default=200, ge=10, le=10**7, description="rows of the pool that the checks use, drawn by the seed"
    )
    drop: float = Field(
        default=0.2, gt=0, le=0.5, description="share of the rows that is left out: the best, the worst, a random one"
    )
    noise: float = Field(default=0.1, gt=0, le=0.5, description="share of the rows whose answers are swapped")
    exact: Literal["subsets", "leave-one-out", "none"] = Field(
        default="subsets",
        description="the truth that scores are compared with: training on random halves, or without one row each time",
    )
    exact_rows: int = Field(default=32, ge=6, le=10**6, description="rows that the exact check draws from")
    subsets: int = Field(default=16, ge=6, le=10**5, description="random halves to train on, with `exact: subsets`")


class AuditConfig(RunSettings):
    """Compare the selection with simple baselines: train on each with several seeds, and compare loss and accuracy.

    The model, the target and the training recipe are those of the run that made the selection, unless given here.
    """

    examples = (
        "datatools audit --selected runs/select/selected.jsonl --pool pool.jsonl --test test.jsonl "
        "--against random,random-length,tfidf,rds --seeds 3",
        "datatools audit --selected runs/select/selected.jsonl --pool pool.jsonl --test test.jsonl --metric exact "
        "--extract number --lr-check",
        "datatools audit --selected runs/select/selected.jsonl --test test.jsonl --oracle --set oracle_checks.rows=100",
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
        list[Annotated[str, OneOf(arms)]] | None,
        Field(max_length=16),
        Flag("--against", METHOD, "NAMES", default=",".join(default_arms(target=True))),
    ] = Field(
        default=None,
        description=f"baselines with the same number of rows: {', '.join(arms())}; null is random rows and what is "
        "chosen by words alone, which needs target rows",
    )
    metrics: Annotated[MetricsConfig, Flags("names extract max_new_tokens allow_code_execution")] = Field(
        default_factory=MetricsConfig, description="what is measured besides the loss", json_schema_extra=LATE
    )
    lr_check: Annotated[bool, Flag("--lr-check", METHOD)] = Field(
        default=False,
        description="train every arm again at a quarter of the learning rate, and say whether the ranking held",
        json_schema_extra=LATE,
    )
    allow_overlap: Annotated[bool, Flag("--allow-overlap", DATA)] = Field(
        default=False, description="continue although test rows are in the pool or the target; the report says so"
    )
    seeds: Annotated[int, Flag("--seeds", METHOD)] = Field(
        default=3, ge=1, le=1000, description="training runs per arm; fewer than three give no verdict"
    )
    oracle: Annotated[bool, Flag("--oracle", METHOD)] = Field(
        default=False,
        description="also check the scores themselves: train without the best and the worst rows, look for swapped "
        "answers, and compare with exact retraining (--set oracle_checks.rows=N and others)",
    )
    oracle_checks: OracleConfig = Field(default_factory=OracleConfig, description="the checks of --oracle")
    model: Annotated[ModelConfig, Flags("name dtype quantize", default=RUNS), Flags("trust_remote_code device")] = (
        Field(description="the model to train")
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
    engine: Annotated[EngineConfig, Flags("name workers")] = Field(
        default_factory=EngineConfig, description="the processes that share the work", json_schema_extra=VOLATILE
    )
    out: Annotated[FilePath, Flag("--out", RUN, "DIR", default="'audit' in the run's folder")] = Field(
        default=Path("runs/audit"), description="folder of the audit", json_schema_extra=ELSEWHERE
    )
