"""Settings of `datatools train` and `datatools evaluate`."""

from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from pipelines.settings.base import ELSEWHERE, LATE, Columns, FilePath, Names, RunSettings, Settings
from pipelines.settings.parts import DataConfig, LoraConfig, ModelConfig, TrainingConfig


class CoresetConfig(Settings):
    """Large batches from the data, of which each step trains on a few rows that stand for all (CoLM)."""

    shorthand = "name"
    name: Literal["colm"] = Field(
        default="colm", description="colm: rows of small sources all kept, of each large source so many chosen"
    )
    large_batch: int | None = Field(
        default=None, ge=1, le=1_000_000, description="rows drawn a step; null is twice those kept"
    )
    keep: int | None = Field(
        default=None, ge=1, le=1_000_000, description="rows kept, and trained on; null is training.batch_size"
    )
    method: Literal["herding", "matching_pursuit", "facility_location", "top_norm", "random_in_source"] = Field(
        default="herding",
        description="herding: rows whose mean gradient is nearest to the batch's, by quotas; matching_pursuit: the "
        "same in each source, with weights; facility_location: medoids, as published; top_norm; random_in_source: the "
        "control",
    )
    features: Literal["exact", "probes", "paper_code"] = Field(
        default="exact",
        description="of a row: exact gradient of the last value projection; derivatives along random probes (forward "
        "passes only); or the published estimate",
    )
    rule: Literal["auto", "none", "adam"] = Field(
        default="auto",
        description="between gradients and features: adam, with a history of its own, or none; auto is adam for "
        "facility_location",
    )
    metric: Literal["l1", "l2", "cosine"] = Field(default="l1", description="distance, for facility_location")
    probes: int = Field(default=64, ge=1, le=4096, description="directions, for features: probes")
    dim: int | None = Field(
        default=2560,
        ge=1,
        le=2**24,
        description="numbers of a feature: facility_location keeps the largest, the others project; null keeps all",
    )
    history: Literal["selected", "all"] = Field(default="selected", description="rows that move adam's history")
    per_source: bool = Field(default=True, description="choose within each large source; false: among all of them")
    small: Literal["auto"] | Names = Field(
        default="auto", description="sources whose rows are all kept: auto is those below the average size, [] none"
    )
    clusters: int | None = Field(
        default=None, ge=2, le=10_000, description="make so many sources by clustering hidden states, for rows without"
    )
    loss_weighting: Literal["example", "token"] | None = Field(
        default=None,
        description="example: each row counts the same; token: each token; null is example here, and the Trainer's own "
        "loss under CoresetMixin",
    )
    projection: str | None = Field(
        default=None, description="the linear layer to take gradients of; null is the last value projection"
    )
    token_budget: int = Field(default=4096, ge=1, le=2**24, description="padded tokens a forward pass while choosing")
    monitor_every: int = Field(default=10, ge=1, le=10**9, description="steps between measurements of the choice")

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.large_batch is not None and self.keep is not None and self.keep > self.large_batch:
            raise ValueError(
                f"keep {self.keep} of a large batch of {self.large_batch} rows; keep fewer (--keep), or draw more "
                "(--large-batch)"
            )
        if self.method == "matching_pursuit" and self.loss_weighting == "token":
            raise ValueError("matching_pursuit gives weights to rows, which loss_weighting 'token' has no place for")
        return self

    def arguments(self) -> dict[str, Any]:
        """The settings that `datatools.CoLM` takes."""
        names = ("features", "method", "metric", "rule", "probes", "dim", "history", "per_source", "token_budget",
                 "projection")  # fmt: skip
        return {name: getattr(self, name) for name in names}


class TrainConfig(RunSettings):
    """Train a model on rows with any optimizer of the suite."""

    model: ModelConfig = Field(description="the model to start from")
    data: DataConfig = Field(description="the rows to train on")
    out: FilePath = Field(
        default=Path("runs/train"),
        description="folder of the run; an interrupted run in it is continued",
        json_schema_extra=ELSEWHERE,
    )
    lora: LoraConfig | None = Field(default=LoraConfig(), description="train adapters; null trains every weight")
    training: TrainingConfig = Field(default=TrainingConfig(), description="the optimizer and its schedule")
    coreset: CoresetConfig | None = Field(
        default=None, description="draw large batches and train on a few of their rows (CoLM); null trains on all"
    )
    order: FilePath | None = Field(
        default=None,
        description="train in this order (an order.npz of `datatools order`): its batches, its sequence, one pass",
    )
    save_steps: int | None = Field(
        default=None, ge=1, le=10**9, description="steps between checkpoints; null is one an epoch"
    )
    eval_data: Names = Field(
        default=[], description="held-out rows whose loss is measured while the model trains; never trained on"
    )
    eval_columns: Columns | None = Field(
        default=None, description="columns of `eval_data`, as `data.columns`; null tries the data's, then detects"
    )
    eval_every: int | None = Field(
        default=None, ge=1, le=10**9, description="optimizer steps between evaluations; null is one an epoch"
    )
    patience: int | None = Field(
        default=None, ge=1, le=10**6, description="stop after so many evaluations in a row without a new lowest loss"
    )
    keep_best: bool = Field(
        default=True, description="with eval_data, the result is that of the lowest loss; false takes the last step's"
    )
    report_to: Literal["none", "tensorboard", "wandb", "trackio"] = Field(
        default="none",
        description="where else the numbers of metrics.jsonl go while the run lasts, by transformers' callbacks",
        json_schema_extra=LATE,
    )


class EvaluateConfig(Settings):
    """Loss of a model on rows."""

    model: ModelConfig = Field(description="the model, with its adapter if it has one")
    data: DataConfig = Field(description="held-out rows")
    token_budget: int = Field(default=2048, ge=1, le=2**24, description="padded tokens a batch; bounds memory")
