"""Settings of `datatools order`."""

from pathlib import Path
from typing import Literal

from pydantic import Field

from pipelines.settings.base import ELSEWHERE, LATE, Columns, FilePath, Names, Paths, RunSettings
from pipelines.settings.parts import DataConfig, LoraConfig, ModelConfig, TrainingConfig


class OrderData(DataConfig):
    """Rows that batches are drawn from: one that cannot be used is left out, and counted."""

    on_bad_row: Literal["error", "skip", "quarantine"] = Field(
        default="skip",
        description="a row that cannot be read: stop, leave out and count, or set aside in quarantine.jsonl",
    )


class OrderTraining(TrainingConfig):
    """The run whose order is asked about: one epoch at a constant, small learning rate."""

    learning_rate: float = Field(default=1e-4, ge=0, le=100, description="peak learning rate")
    schedule: str = Field(
        default="constant", min_length=1, max_length=64, description="a name from `datatools ls schedules`"
    )
    epochs: int = Field(default=1, ge=1, le=1000, description="passes over the batches")
    gradient_clip: float | None = Field(
        default=None, gt=0, le=1e9, description="largest norm of the gradient; null does not clip"
    )


ORDER_TASKS = ("record", "estimate", "search", "validate", "map")


ORDER_ESTIMATORS = ("pairwise", "reduced", "moments", "own-moments", "table", "groups")


class OrderConfig(RunSettings):
    """What would another order of training have done?"""

    task: Literal["record", "estimate", "search", "validate", "map"] = Field(
        default="validate", description="what to do with the reference run", json_schema_extra=LATE
    )
    model: ModelConfig = Field(description="the model to start from")
    data: OrderData = Field(description="the rows to train on")
    validation: Names = Field(
        default=[], description="held-out rows whose loss is predicted; [] takes `held_out` rows of the data"
    )
    validation_columns: Columns | None = Field(
        default=None, description="columns of `validation`, as `data.columns`; null tries the data's, then detects"
    )
    held_out: int = Field(
        default=64, ge=1, le=100_000, description="rows held out where `validation` names none, at most a quarter"
    )
    out: FilePath = Field(
        default=Path("runs/order"),
        description="folder of the run; its tasks share one reference run",
        json_schema_extra=ELSEWHERE,
    )
    lora: LoraConfig | None = Field(default=None, description="train adapters; null trains every weight")
    training: OrderTraining = Field(default=OrderTraining(), description="the optimizer and its schedule")
    batches: int = Field(default=32, ge=2, le=4096, description="batches of training.batch_size rows")
    grouping: Literal["auto", "mixed", "source"] = Field(
        default="auto",
        description="what a batch is drawn from: all rows, or the rows of one source; auto: one source where the data "
        "has enough of each, else all",
    )
    warmup_steps: int = Field(
        default=64,
        ge=0,
        le=100_000,
        description="steps on other rows before the reference run, as in the middle of a training run: on a fresh "
        "optimizer, without moments, pairwise estimates do not hold",
    )
    sample_rows: int = Field(
        default=3,
        ge=0,
        le=100_000,
        description="of `reduced`: rows of every batch whose gradients each score takes again, at a share of the cost "
        "of retraining; 0: none, but `dimensions` directions",
        json_schema_extra=LATE,
    )
    anchors: int = Field(default=3, ge=2, le=4097, description="places of the reference run where gradients are taken")
    estimators: list[Literal["pairwise", "reduced", "moments", "own-moments", "table", "groups"]] = Field(
        default=["pairwise", "reduced"],
        min_length=1,
        max_length=6,
        description="which estimates to make; a search uses the first, and the second, if any, judges what it found",
        json_schema_extra=LATE,
    )
    orders: int = Field(
        default=16,
        ge=2,
        le=10_000,
        description="random orders to estimate, and to retrain to validate",
        json_schema_extra=LATE,
    )
    references: int = Field(
        default=1,
        ge=1,
        le=100,
        description="reference orders to estimate from; 3 show how much it matters",
        json_schema_extra=LATE,
    )
    seeds: int = Field(
        default=5,
        ge=0,
        le=100,
        description="runs of one order with other random draws (0: none)",
        json_schema_extra=LATE,
    )
    calibration: int = Field(
        default=0,
        ge=0,
        le=1000,
        description="true runs, beside `orders`, to which a mixture of the estimates is fitted",
        json_schema_extra=LATE,
    )
    dimensions: int = Field(
        default=8,
        ge=1,
        le=4096,
        description="directions to which `reduced` without rows reduces Hessians",
        json_schema_extra=LATE,
    )
    second_moment: Literal["own", "expected", "anchor"] = Field(
        default="own",
        description="of `reduced`: own replays the rule itself; expected or anchor freeze it, for a fast model in "
        "`dimensions` numbers where the optimizer is warm",
        json_schema_extra=LATE,
    )
    products: Literal["auto", "exact", "difference", "gauss-newton"] = Field(
        default="auto",
        description="of Hessians: exact, by differences of gradients, or with the Gauss-Newton matrix in their place; "
        "auto is exact where the model's operations have second derivatives",
        json_schema_extra=LATE,
    )
    pairwise_anchors: int = Field(
        default=1,
        ge=1,
        le=4097,
        description="anchors at which pairwise (and a frozen `reduced`) take products",
        json_schema_extra=LATE,
    )
    table_projection: int = Field(
        default=0,
        ge=0,
        le=1 << 30,
        description="of `table`: numbers to which each update term is projected at random, as published; 0: none. "
        "Vectors do not survive it: `trust` says so",
        json_schema_extra=LATE,
    )
    sequences: Paths = Field(
        default=[], max_length=10_000, description="order files to estimate", json_schema_extra=LATE
    )
    search: Literal["local", "genetic", "borda", "random"] = Field(
        default="local", description="how orders are searched", json_schema_extra=LATE
    )
    budget: int = Field(default=20_000, ge=1, le=10**9, description="orders a search may score", json_schema_extra=LATE)
    judged: int = Field(
        default=64,
        ge=0,
        le=10_000,
        description="orders that a search's second estimator tries besides the shortlist of the first: random, then "
        "crosses of the best",
        json_schema_extra=LATE,
    )
    retrain: int = Field(
        default=3,
        ge=0,
        le=100,
        description="found orders, and as many random ones, that a search retrains",
        json_schema_extra=LATE,
    )
    map_batches: int = Field(default=4, ge=1, le=4096, description="batches of the memory map", json_schema_extra=LATE)
    map_positions: int = Field(default=4, ge=2, le=4096, description="positions of the map", json_schema_extra=LATE)
    completions: int = Field(
        default=8,
        ge=1,
        le=1000,
        description="random orders of the rest, for each place of the map",
        json_schema_extra=LATE,
    )
    map_by: Literal["moments", "retraining"] = Field(
        default="retraining",
        description="what makes the map: true runs, or the estimate `moments`",
        json_schema_extra=LATE,
    )
