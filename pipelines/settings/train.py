"""Settings of `datatools train` and `datatools evaluate`."""

import math
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from datatools import UsageError
from pipelines.settings import names
from pipelines.settings.base import Columns, FilePath, Names, RunSettings, Settings
from pipelines.settings.marks import DATA, ELSEWHERE, LATE, RUN, TRAINING, UNSAID, Flag, Flags, OneOf
from pipelines.settings.metrics import LOSS, MetricsConfig
from pipelines.settings.parts import DataConfig, LoraConfig, ModelConfig, TrainingConfig


class CoresetConfig(Settings):
    """Large batches from the data; each step trains on a few of their rows, chosen to stand for all of them (CoLM)."""

    shorthand = "name"
    name: Annotated[Literal["colm"], Flag("--coreset", TRAINING)] = Field(
        default="colm",
        description="colm, which keeps all rows of small sources and chooses a quota of each large one",
    )
    large_batch: Annotated[int | None, Flag("--large-batch", TRAINING)] = Field(
        default=None,
        ge=1,
        le=1_000_000,
        description="rows that a coreset draws per step; null is twice the number that it keeps",
    )
    keep: Annotated[int | None, Flag("--keep", TRAINING)] = Field(
        default=None,
        ge=1,
        le=1_000_000,
        description="rows that a coreset keeps per step, and trains on; null is training.batch_size",
    )
    keep_schedule: Literal["linear", "cosine"] | None = Field(
        default=None,
        description="how many rows the steps keep: linear and cosine begin with the whole large batch and end with "
        "`keep` at the last step; null is `keep` in all of them",
        json_schema_extra=UNSAID,
    )
    method: Annotated[
        str, OneOf(partial(names.known, "coreset method")), Flag("--coreset-method", TRAINING, "NAME")
    ] = Field(default="herding", description="how rows are chosen: a name from `datatools ls coresets`")
    features: Annotated[
        str, OneOf(partial(names.known, "coreset feature")), Flag("--coreset-features", TRAINING, "NAME")
    ] = Field(
        default="exact",
        description="features of a row: exact, the gradient of the last value projection; probes, derivatives along "
        "random directions (forward passes only); paper_code, the published estimate; early, gradients in the first "
        "quarter of the layers, for a part of a pass; without a pass over the large "
        "batch: stored (coreset.store or coreset.refresh_every), and stale, by-products of the row's last step",
    )
    store: Annotated[FilePath | None, Flag("--coreset-store", TRAINING, "FOLDER")] = Field(
        default=None,
        description="for coreset features `stored`: a folder of features that `datatools select` wrote for the same "
        "model and rows, such as runs/select/features/train-40 or hidden-pool",
        json_schema_extra=UNSAID,
    )
    refresh_every: int | None = Field(
        default=None,
        ge=1,
        le=10**9,
        description="for `stored`: measure the features of all rows again every so many steps, at the first one too "
        "where there is no store; null is never",
        json_schema_extra=UNSAID,
    )
    stale_limit: int | None = Field(
        default=None,
        ge=1,
        le=10**9,
        description="for `stale`: the age in steps after which a feature is not used any more; null is no limit",
        json_schema_extra=UNSAID,
    )
    by_product: Literal["gradient", "logits", "loss"] | None = Field(
        default=None,
        description="for `stale`: what is kept of a training step; null is what the method reads, mostly the gradient",
        json_schema_extra=UNSAID,
    )
    target: Annotated[Names, Flag("--coreset-target", TRAINING, "FILE")] = Field(
        default=[],
        description="rows that methods such as greats compare rows with: not those that a result is judged by",
    )
    target_rows: int = Field(
        default=16, ge=1, le=100_000, description="how many rows of `coreset.target` are drawn at a time"
    )
    target_every: int = Field(
        default=1, ge=1, le=10**9, description="steps after which the gradient of target rows is measured again"
    )
    kept_dim: int = Field(
        default=256,
        ge=1,
        le=2**20,
        description="for `stored` and `stale`: numbers kept per row (in memory, and in checkpoints unless a store has "
        "them)",
    )
    weights: Literal["auto", "uniform", "expectation"] = Field(
        default="auto",
        description="weights of kept rows: expectation counts each source as much as the large batch does, uniform "
        "leaves small sources that are kept whole their greater part; auto is expectation for `stored` and `stale`",
    )
    max_weight: float = Field(
        default=4.0, ge=1, le=1e6, description="largest weight of a row under `weights: expectation`"
    )
    rule: Literal["auto", "none", "adam"] = Field(
        default="auto",
        description="update rule between gradients and features: adam, with a history of its own, or none; auto is "
        "adam for methods that ask for it (facility_location)",
    )
    metric: Literal["l1", "l2", "cosine"] = Field(default="l1", description="distance that facility_location uses")
    probes: int = Field(default=64, ge=1, le=4096, description="number of random directions of `features: probes`")
    dim: int | None = Field(
        default=2560,
        ge=1,
        le=2**24,
        description="feature dimension: facility_location keeps the largest entries, the others project; null keeps "
        "all",
    )
    history: Literal["selected", "all"] = Field(default="selected", description="the rows that update adam's history")
    per_source: bool = Field(
        default=True, description="choose within each large source; false chooses among all of them"
    )
    small: Literal["auto"] | Names = Field(
        default="auto", description="sources whose rows are all kept: auto is those below the average size, [] is none"
    )
    clusters: int | None = Field(
        default=None,
        ge=2,
        le=10_000,
        description="make this many sources by clustering hidden states, for rows that name no source",
    )
    loss_weighting: Literal["example", "token"] | None = Field(
        default=None,
        description="example: each row has the same weight; token: each token has; null is example here, and the "
        "Trainer's own loss under CoresetMixin",
    )
    projection: str | None = Field(
        default=None, description="the linear layer whose gradients are taken; null is the last value projection"
    )
    token_budget: int = Field(default=4096, ge=1, le=2**24, description="padded tokens per forward pass while choosing")
    monitor_every: int = Field(
        default=10,
        ge=1,
        le=10**9,
        description="steps between measurements of the choice, which cost a pass over the large batch; five times as "
        "many for `stored` and `stale`, whose choice costs none",
    )

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.keep is not None and (wrong := self._misfit(self.keep)):
            raise ValueError(wrong)
        return self

    def _misfit(self, keep: int) -> str | None:
        if self.large_batch is None or keep <= self.large_batch:
            return None
        return (
            f"cannot keep {keep} rows of a large batch of {self.large_batch}; keep fewer (--keep) or draw more "
            "(--large-batch)"
        )

    def sizes(self, batch_size: int) -> tuple[int, int]:
        """Return how many rows a step keeps, and how many it draws for that.

        Args:
            batch_size: The batch size of the recipe, which counts where `keep` is not given.

        Raises:
            UsageError: More rows would be kept than are drawn.
        """
        keep = batch_size if self.keep is None else self.keep
        if wrong := self._misfit(keep):
            raise UsageError(f"coreset: {wrong}")
        return keep, 2 * keep if self.large_batch is None else self.large_batch

    def kept_at(self, step: int, steps: int, *, keep: int, large: int) -> int:
        """Return how many rows of a large batch a step keeps, by the schedule.

        Args:
            step: The step, counted from 0.
            steps: The number of steps of the run.
            keep: The rows that the last step keeps.
            large: The rows of a large batch.

        Example:
            >>> [CoresetConfig(keep_schedule="linear").kept_at(t, 5, keep=4, large=12) for t in range(5)]
            [12, 10, 8, 6, 4]
        """
        done = min(1.0, step / max(1, steps - 1))
        left = {None: 0.0, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}
        return round(keep + (large - keep) * left[self.keep_schedule])

    def arguments(self) -> dict[str, Any]:
        """The settings that `datatools.CoLM` takes."""
        names = ("features", "method", "metric", "rule", "probes", "dim", "history", "per_source", "token_budget",
                 "projection", "weights", "max_weight")  # fmt: skip
        return {name: getattr(self, name) for name in names}


class TokensConfig(Settings):
    """Each step trains on the tokens whose loss exceeds that of a reference model most (Rho-1)."""

    shorthand = "reference"
    reference: Annotated[str, Flag("--token-reference", TRAINING, "MODEL")] = Field(
        description="train on the tokens whose loss exceeds that of this model most (Rho-1)"
    )
    adapter: FilePath | None = Field(default=None, description="an adapter of the reference model")
    share: Annotated[float, Flag("--token-share", TRAINING)] = Field(
        default=0.6, gt=0, le=1, description="share of each row's tokens that --token-reference keeps"
    )


class ValidationMetrics(MetricsConfig):
    """What is measured on held-out rows of a training run besides their loss, and when."""

    when: Annotated[Literal["end", "always"], Flag("--metric-when", TRAINING)] = Field(
        default="end",
        description="end measures --metric once, on the weights that are saved; always at every evaluation too",
    )
    best_by: Annotated[str, Field(max_length=256), Flag("--best-by", TRAINING)] = Field(
        default=LOSS,
        description="what decides which weights are the best, and when --patience ends: loss, or one of the metrics, "
        "which is then measured at every evaluation",
    )

    @property
    def during(self) -> bool:
        """Whether every evaluation measures them."""
        return self.when == "always" or self.best_by != LOSS


class TrainConfig(RunSettings):
    """Train a model on rows, with any optimizer of the suite.

    Writes checkpoints and the trained weights or adapter to --out. An interrupted run continues where it stopped.
    """

    examples = (
        "datatools train --model M --data runs/select/selected.jsonl --out runs/new",
        "datatools train --model M --data a.jsonl --data b.jsonl --optimizer muon",
        "datatools train --model M --data a.jsonl --lora-rank 0 --learning-rate 2e-5",
        "datatools train --model M --data a.jsonl --optimizer lion --schedule cosine --learning-rate 1e-4",
        "datatools train --model M --data a.jsonl --order runs/order/order.npz --lora-rank 0",
        "datatools train --model M --data a.jsonl --coreset colm --large-batch 128 --keep 64 --source-key dataset",
        "datatools train --model M --data a.jsonl --coreset colm --coreset-features stored "
        "--coreset-store runs/select/features/train-40",
        "datatools train --model M --data a.jsonl --eval-data held_out.jsonl --metric exact --extract number",
        "datatools train --model M --data a.jsonl --gradient zo --optimizer sgd --learning-rate 1e-5 --lora-rank 0",
        "datatools train --model M --data a.jsonl --gradient zo --optimizer adamw --learning-rate 1e-4 "
        "--set training.zo.eps=1e-2 --set training.zo.q=4 --set training.zo.sparsity=0.5",
    )

    model: Annotated[ModelConfig, Flags("name adapter chat trust_remote_code max_length device dtype quantize")] = (
        Field(description="the model to start from")
    )
    data: Annotated[DataConfig, Flags("paths source_key on_bad_row columns preference dedup")] = Field(
        description="the rows to train on"
    )
    out: FilePath = Field(
        default=Path("runs/train"),
        description="folder of the run; an interrupted run in it is continued",
        json_schema_extra=ELSEWHERE,
    )
    lora: Annotated[LoraConfig | None, Flags("rank")] = Field(
        default_factory=LoraConfig, description="train adapters; null trains every weight"
    )
    training: Annotated[
        TrainingConfig,
        Flags("gradient optimizer schedule learning_rate epochs batch_size weight_decay rounding"),
    ] = Field(default_factory=TrainingConfig, description="the optimizer and its schedule")
    coreset: Annotated[CoresetConfig | None, Flags("name large_batch keep method features store target")] = Field(
        default=None, description="a few rows of each large batch to train on (null trains on all)"
    )
    tokens: Annotated[TokensConfig | None, Flags("reference share")] = Field(
        default=None,
        description="the tokens of a row to train on (null is all with a loss)",
        json_schema_extra=UNSAID,
    )
    order: Annotated[FilePath | None, Flag("--order", TRAINING)] = Field(
        default=None,
        description="train in the order of this order.npz, made by `datatools order`: its batches, its sequence, one "
        "pass",
    )
    save_steps: int | None = Field(
        default=None, ge=1, le=10**9, description="steps between checkpoints; null is one checkpoint per epoch"
    )
    eval_data: Annotated[Names, Flag("--eval-data", DATA, "FILE")] = Field(
        default=[],
        description="held-out rows whose loss is measured during training; the weights with the lowest loss are kept",
    )
    eval_columns: Columns | None = Field(
        default=None, description="columns of `eval_data`, as `data.columns`; null tries the data's, then detects them"
    )
    eval_every: Annotated[int | None, Flag("--eval-every", TRAINING)] = Field(
        default=None, ge=1, le=10**9, description="steps between evaluations; null is one evaluation per epoch"
    )
    patience: Annotated[int | None, Flag("--patience", TRAINING)] = Field(
        default=None, ge=1, le=10**6, description="stop after this many evaluations without a new lowest loss"
    )
    metrics: Annotated[
        ValidationMetrics | None, Flags("names extract max_new_tokens allow_code_execution when best_by")
    ] = Field(
        default=None,
        description="what is measured on eval_data besides the loss; null is nothing",
        json_schema_extra=UNSAID,
    )
    keep_best: bool = Field(
        default=True,
        description="with eval_data, the result is that of the lowest loss (or best --best-by); false takes that of "
        "the last step",
    )
    report_to: Annotated[Literal["none", "tensorboard", "wandb", "trackio"], Flag("--report-to", RUN)] = Field(
        default="none",
        description="where else the numbers of metrics.jsonl go during the run, by the callbacks of transformers",
        json_schema_extra=LATE,
    )


class EvaluateConfig(Settings):
    """Measure the loss of a model on rows, and its accuracy: one line of JSON on stdout, everything else on stderr."""

    examples = (
        "datatools evaluate --model M --data test.jsonl",
        "datatools evaluate --model M --adapter runs/new/adapter --data test.jsonl",
        "datatools evaluate --model M --data test.jsonl --metric options,exact --predictions answers.jsonl",
        "datatools evaluate --model M --data gsm8k.jsonl --metric exact --extract number --max-new-tokens 256",
        "datatools evaluate --model M --data mbpp.jsonl --metric code --allow-code-execution",
    )

    model: Annotated[ModelConfig, Flags("name adapter chat trust_remote_code max_length device dtype quantize")] = (
        Field(description="the model, with its adapter if it has one")
    )
    data: Annotated[DataConfig, Flags("paths on_bad_row columns preference")] = Field(description="held-out rows")
    metrics: Annotated[MetricsConfig, Flags("names extract max_new_tokens allow_code_execution")] = Field(
        default_factory=MetricsConfig, description="what is measured besides the loss"
    )
    predictions: Annotated[FilePath | None, Flag("--predictions", RUN)] = Field(
        default=None, description="also write what the model answered to each row to this JSONL file"
    )
    token_budget: int = Field(default=2048, ge=1, le=2**24, description="padded tokens per batch; limits memory")
