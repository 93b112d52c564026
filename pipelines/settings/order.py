"""Settings of `datatools order`."""

from functools import partial
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from pipelines.settings import names
from pipelines.settings.base import Columns, FilePath, Names, Paths, RunSettings
from pipelines.settings.engine import EngineConfig
from pipelines.settings.marks import DATA, ELSEWHERE, LATE, METHOD, TRAINING, UNSAID, VOLATILE, Flag, Flags, OneOf
from pipelines.settings.parts import DataConfig, LoraConfig, ModelConfig, TrainingConfig


class OrderData(DataConfig):
    """Rows that batches are drawn from: a row that cannot be used is left out and counted."""

    on_bad_row: Literal["error", "skip", "quarantine"] = Field(
        default="skip",
        description="a row that cannot be read: error stops, skip leaves it out and counts it, quarantine also writes "
        "it to quarantine.jsonl",
    )


class OrderTraining(TrainingConfig):
    """The run whose order is studied: one epoch at a constant, small learning rate."""

    learning_rate: float = Field(default=1e-4, ge=0, le=100, description="peak learning rate")
    schedule: str = Field(
        default="constant",
        min_length=1,
        max_length=64,
        description="a name from `datatools ls schedules`",
    )
    epochs: int = Field(default=1, ge=1, le=1000, description="passes over the batches")
    gradient_clip: float | None = Field(
        default=None, gt=0, le=1e9, description="largest norm of the gradient; with null it is not clipped"
    )


ORDER_TASKS = ("plan", "curricula", "record", "estimate", "search", "validate", "map")


class OrderConfig(RunSettings):
    """What would another order of training have done?

    Estimates it from one recorded run, without retraining. The tasks share the folder --out and its settings: record
    the run; estimate the losses of orders; search for a better one (order.npz); validate estimates against true
    retrainings; map what the position of a batch does. The task plan asks which source should come first, and needs
    no recorded run; curricula arranges batches by scores. Writes report.html.
    """

    examples = (
        "datatools order validate --model M --data a.jsonl --batches 32 --orders 30 "
        "--estimators pairwise,reduced,table --out runs/order --seed 0",
        "datatools order search --out runs/order",
        "datatools order curricula --model M --data a.jsonl --batches 32 --out runs/order",
        "datatools order plan --model M --data a.jsonl --grouping source --batches 40 --out runs/plan",
        "datatools order map --out runs/order --set map_batches=8",
        "datatools train --model M --data a.jsonl --order runs/order/order.npz --lora-rank 0",
    )

    engine: Annotated[EngineConfig, Flags("name workers")] = Field(
        default_factory=EngineConfig, description="the processes that share the work", json_schema_extra=VOLATILE
    )
    task: Literal["plan", "curricula", "record", "estimate", "search", "validate", "map"] = Field(
        default="validate", description="what to do with the reference run", json_schema_extra=LATE
    )
    model: Annotated[ModelConfig, Flags("name chat trust_remote_code max_length device dtype quantize")] = Field(
        description="the model to start from"
    )
    data: Annotated[OrderData, Flags("paths on_bad_row columns preference")] = Field(description="the rows to train on")
    validation: Annotated[Names, Flag("--validation", DATA, "FILE")] = Field(
        default=[],
        description="held-out rows whose loss is predicted; without them, `held_out` rows of the data are used",
    )
    validation_columns: Annotated[Columns | None, Flag("--validation-columns", DATA, "OURS=YOURS")] = Field(
        default=None,
        description="columns of the validation rows, as --columns; null tries the data's, then detects them",
    )
    held_out: int = Field(
        default=64,
        ge=1,
        le=100_000,
        description="rows held out when `validation` names none, at most a quarter of the data",
    )
    out: FilePath = Field(
        default=Path("runs/order"),
        description="folder of the run; its tasks share one reference run",
        json_schema_extra=ELSEWHERE,
    )
    lora: Annotated[LoraConfig | None, Flags("rank")] = Field(
        default=None, description="train adapters; null trains every weight"
    )
    training: Annotated[OrderTraining, Flags("optimizer schedule learning_rate epochs batch_size")] = Field(
        default_factory=OrderTraining, description="the optimizer and its schedule"
    )
    batches: Annotated[int, Flag("--batches", METHOD, "T")] = Field(
        default=32, ge=2, le=4096, description="number of batches, of training.batch_size rows each"
    )
    grouping: Annotated[Literal["auto", "mixed", "source"], Flag("--grouping", METHOD, "HOW")] = Field(
        default="auto",
        description="what a batch is drawn from: mixed is all rows, source the rows of one source; auto is source "
        "where the data has enough rows of each, else mixed",
    )
    sources: Annotated[Names | None, Flag("--sources", METHOD, "NAMES")] = Field(
        default=None,
        description="sources that batches are drawn from; null takes all",
        json_schema_extra=UNSAID,
    )
    clusters: int | None = Field(
        default=None,
        ge=2,
        le=1000,
        description="number of clusters of hidden states that take the place of the rows' sources; null uses sources",
        json_schema_extra=UNSAID,
    )
    warmup_steps: Annotated[int, Flag("--warmup-steps", TRAINING)] = Field(
        default=64,
        ge=0,
        le=100_000,
        description="steps on other rows before the reference run, which then starts as in the middle of training; "
        "with a fresh optimizer, without moments, pairwise estimates do not hold",
    )
    sample_rows: int = Field(
        default=3,
        ge=0,
        le=100_000,
        description="for `reduced`: rows of every batch whose gradients each score computes again, at a share of the "
        "cost of retraining; 0 uses `dimensions` directions instead",
        json_schema_extra=LATE,
    )
    anchors: int = Field(
        default=3, ge=2, le=4097, description="number of points of the reference run where gradients are taken"
    )
    estimators: Annotated[
        list[Annotated[str, OneOf(partial(names.known, "estimator"))]],
        Flag("--estimators", METHOD, "NAMES"),
    ] = Field(
        default=["pairwise", "reduced"],
        min_length=1,
        max_length=16,
        description="which estimates to make; a search uses the first, and the second, if any, judges what it found",
        json_schema_extra=LATE,
    )
    orders: Annotated[int, Flag("--orders", METHOD, "R")] = Field(
        default=16,
        ge=2,
        le=10_000,
        description="number of random orders to estimate, and to retrain when validating",
        json_schema_extra=LATE,
    )
    references: Annotated[int, Flag("--references", METHOD)] = Field(
        default=1,
        ge=1,
        le=100,
        description="number of reference orders to estimate from; 3 show how much the choice matters",
        json_schema_extra=LATE,
    )
    seeds: int = Field(
        default=5,
        ge=0,
        le=100,
        description="runs of one order with other random draws; 0 is none",
        json_schema_extra=LATE,
    )
    calibration: int = Field(
        default=0,
        ge=0,
        le=1000,
        description="true runs, besides `orders`, to which a mixture of the estimates is fitted",
        json_schema_extra=LATE,
    )
    dimensions: int = Field(
        default=8,
        ge=1,
        le=4096,
        description="number of directions to which `reduced` without rows reduces Hessians",
        json_schema_extra=LATE,
    )
    second_moment: Literal["own", "expected", "anchor"] = Field(
        default="own",
        description="for `reduced`: own replays the rule itself; expected or anchor freeze it, for a fast model in "
        "`dimensions` numbers where the optimizer is warm",
        json_schema_extra=LATE,
    )
    products: Literal["auto", "exact", "difference", "gauss-newton"] = Field(
        default="auto",
        description="products with Hessians: exact, by differences of gradients, or with the Gauss-Newton matrix "
        "instead; auto is exact where the operations of the model have second derivatives",
        json_schema_extra=LATE,
    )
    pairwise_anchors: int = Field(
        default=1,
        ge=1,
        le=4097,
        description="number of anchors at which pairwise (and a frozen `reduced`) take products",
        json_schema_extra=LATE,
    )
    table_projection: int = Field(
        default=0,
        ge=0,
        le=1 << 30,
        description="for `table`: dimension to which each update term is projected at random, as published; 0 does not "
        "project. Vectors do not survive it, and `trust` says so",
        json_schema_extra=LATE,
    )
    sequences: Paths = Field(
        default=[], max_length=10_000, description="order files to estimate", json_schema_extra=LATE
    )
    search: Annotated[str, OneOf(partial(names.known, "search")), Flag("--search", METHOD, "HOW")] = Field(
        default="local", description="how orders are searched", json_schema_extra=LATE
    )
    budget: int = Field(
        default=20_000, ge=1, le=10**9, description="number of orders that a search may score", json_schema_extra=LATE
    )
    judged: int = Field(
        default=64,
        ge=0,
        le=10_000,
        description="orders that the second estimator of a search tries besides the shortlist of the first: random "
        "ones, then crosses of the best",
        json_schema_extra=LATE,
    )
    retrain: int = Field(
        default=3,
        ge=0,
        le=100,
        description="number of found orders that a search retrains, with as many random ones",
        json_schema_extra=LATE,
    )
    replicates: int = Field(
        default=3,
        ge=1,
        le=4096,
        description="for `plan`: batches of each source of which gradients and products are taken; two or more give "
        "error bars",
        json_schema_extra=LATE,
    )
    plan_anchors: int = Field(
        default=1,
        ge=1,
        le=4097,
        description="for `plan`: points of the reference run at which sources are compared, at most `anchors`; 1 is "
        "the start, which needs no recorded run",
        json_schema_extra=LATE,
    )
    scores: Names = Field(
        default=["length", "loss", "gradient-norm", "influence", "learnability", "similarity"],
        min_length=1,
        max_length=64,
        description="for `curricula`: what batches are arranged by; column:NAME is a numeric column of the rows",
        json_schema_extra=LATE,
    )
    shapes: list[Annotated[str, OneOf(partial(names.known, "shape"))]] = Field(
        default=["sort", "reverse", "fold", "zigzag", "stair", "saw"],
        min_length=1,
        max_length=16,
        description="for `curricula`: the shapes in which batches are arranged",
        json_schema_extra=LATE,
    )
    layers: int = Field(
        default=3, ge=1, le=1000, description="passes through the scores of a fold or zigzag", json_schema_extra=LATE
    )
    sections: int = Field(default=3, ge=1, le=1000, description="sections of a stair or saw", json_schema_extra=LATE)
    ratio: float = Field(
        default=0.1,
        ge=0,
        le=0.5,
        description="half width of the transition between sections, as a share of the steps",
        json_schema_extra=LATE,
    )
    window: int = Field(
        default=0,
        ge=0,
        le=10**6,
        description="steps within which a curriculum is shuffled in the end; 0 does not shuffle",
        json_schema_extra=LATE,
    )
    train_all: bool = Field(
        default=False,
        description="for `curricula`: train every curriculum instead of estimating it",
        json_schema_extra=LATE,
    )
    worth: float = Field(
        default=0.001,
        ge=0,
        le=1e9,
        description="the smallest difference of held-out losses that is worth an order: if the estimates expect less, "
        "`plan`, `curricula` and `search` say so and end before anything is retrained; 0 always goes on",
        json_schema_extra=LATE,
    )
    map_batches: int = Field(
        default=4, ge=1, le=4096, description="number of batches in the memory map", json_schema_extra=LATE
    )
    map_positions: int = Field(
        default=4,
        ge=2,
        le=4096,
        description="number of positions in the map, at most one per step",
        json_schema_extra=LATE,
    )
    completions: int = Field(
        default=8,
        ge=1,
        le=1000,
        description="random orders of the other batches, for each position of the map",
        json_schema_extra=LATE,
    )
    map_by: Literal["moments", "retraining"] = Field(
        default="retraining",
        description="what the map is made from: true runs, or the estimate `moments`",
        json_schema_extra=LATE,
    )
