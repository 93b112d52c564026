"""Settings: documented pydantic models, and how YAML, flags and `--set` become one of them.

Weakest first: defaults < a run to lean on < YAML < flags < `--set a.b=c`. Unknown names are errors.
Nothing here imports torch, so that `--help` and `--print-config` answer at once.
"""

import difflib
import hashlib
import json
import textwrap
import types
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, NoReturn, Self, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

Json = bool | int | float | str | None | list["Json"] | dict[str, "Json"]

MAX_YAML_BYTES = 1_000_000
MAX_YAML_DEPTH = 32

# --------------------------------------------------------------------------------------------------------- the models


def _home(text: str) -> str:
    if "\0" in text or any("\ud800" <= character <= "\udfff" for character in text):
        raise ValueError(f"{text!r} holds a character that no file name has")
    return str(Path(text).expanduser()) if text.startswith("~") else text


def _home_path(path: Path) -> Path:
    return Path(_home(str(path)))


def _listed(value: object) -> object:
    return [value] if isinstance(value, str | Path) else value


def _number_as_text(value: object) -> object:
    return str(value) if isinstance(value, int | float) and not isinstance(value, bool) else value


def _cap(value: object) -> object:
    """'30%' is 0.3, '100%' is no cap, and 500.0 is 500."""
    if isinstance(value, str):
        if value == "100%":
            return None
        with suppress(ValueError):
            value = float(value[:-1]) / 100 if value.endswith("%") else float(value)
    return int(value) if isinstance(value, float) and value >= 1 and value.is_integer() else value


Name = Annotated[str, Field(min_length=1, max_length=4096), AfterValidator(_home)]
Names = Annotated[list[Name], BeforeValidator(_listed), Field(max_length=10_000)]
FilePath = Annotated[Path, AfterValidator(_home_path)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
Scalar = bool | int | float | str | None
Options = dict[str, Scalar | list[Scalar]]

# Marks of fields. Volatile says how to run, not what: neither in run.yaml nor in the fingerprint. A run may move, so
# its folder is in run.yaml and not in the fingerprint.
VOLATILE: dict[str, Json] = {"volatile": True}
ELSEWHERE: dict[str, Json] = {"elsewhere": True}
# Read only after everything dear is computed: a finished run may be asked again with another value.
LATE: dict[str, Json] = {"late": True}


class Settings(BaseModel):
    """Base of every configuration: unknown names refused, values immutable, numbers finite.

    `shorthand` names the field that a bare text (or list) stands for: `model: NAME` is `model: {name: NAME}`.
    """

    model_config = ConfigDict(
        extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False, hide_input_in_errors=True
    )
    shorthand: ClassVar[str | None] = None

    @model_validator(mode="before")
    @classmethod
    def _expand(cls, value: object) -> object:
        return cls.expand(value)

    @classmethod
    def expand(cls, value: object) -> object:
        """The mapping that a shorthand stands for; anything else comes back as it is."""
        if cls.shorthand is not None and isinstance(value, str | list | Path):
            return {cls.shorthand: value}
        return value


class ModelConfig(Settings):
    """Which model, and how rows are turned into its tokens."""

    shorthand = "name"
    name: Name = Field(description="a folder, a hub name, or one .gguf file")
    revision: str | None = Field(
        default=None, description="the hub revision (branch, tag or commit); null is the newest"
    )
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        default="auto", description="auto is float32 on CPU, bfloat16 on GPU"
    )
    attention: Literal["sdpa", "eager"] = Field(
        default="sdpa", description="attention code; eager where sdpa is not supported"
    )
    trust_remote_code: bool = Field(
        default=False, description="run Python code that comes with the model; recorded when on"
    )
    chat: Name = Field(
        default="auto", description="auto (the tokenizer's own template), tulu (as LESS), or a .jinja file"
    )
    max_length: int = Field(default=1024, ge=2, le=2**20, description="longest row in tokens")
    on_long: Literal["truncate", "skip", "error"] = Field(
        default="truncate", description="what to do with a longer row"
    )
    adapter: FilePath | None = Field(
        default=None, description="a folder with a LoRA adapter to load on top of the model"
    )


class LoraConfig(Settings):
    """Low-rank adapters: the parameters that are trained."""

    shorthand: ClassVar[str | None] = None
    rank: int = Field(default=8, ge=1, le=4096, description="rank of each adapter")
    alpha: float = Field(default=16.0, gt=0, le=1e6, description="adapters are scaled by alpha / rank")
    dropout: float = Field(default=0.0, ge=0, lt=1, description="dropout inside adapters while training")
    targets: Literal["auto"] | Names = Field(
        default=["q_proj", "k_proj", "v_proj", "o_proj"],
        description="endings of the names of the layers that get an adapter; auto is every linear layer but the head",
    )


class DataConfig(Settings):
    """Rows: where they are and what to do with bad and repeated ones."""

    shorthand = "paths"
    paths: Names = Field(
        min_length=1,
        description="files (.jsonl .json .csv .parquet, .gz), folders, or hub names (hf:NAME or NAME:split)",
    )
    on_bad_row: Literal["error", "skip", "quarantine"] = Field(
        default="error",
        description="a row that cannot be read: stop, leave out and count, or set aside in quarantine.jsonl",
    )
    source_key: str = Field(
        default="dataset", min_length=1, max_length=256, description="the column that names a row's source"
    )
    dedup: Literal["none", "exact", "near"] = Field(
        default="none", description="drop rows with the same, or nearly the same, text"
    )
    near_threshold: float = Field(
        default=0.8, gt=0, le=1, description="Jaccard similarity from which near duplicates are one row"
    )
    columns: dict[str, str] | None = Field(
        default=None, description="names of your columns, as {ours: yours}; null detects the usual formats"
    )


class ZerothOrderConfig(Settings):
    """How `gradient: zo` estimates the gradient from forward passes (MeZO and its family)."""

    estimator: Literal["two-sided", "one-sided", "forward"] = Field(
        default="two-sided",
        description="two-sided: f(p + eps z) and f(p - eps z); one-sided: f(p + eps z) and f(p); forward: the exact "
        "derivative along z, by forward-mode differentiation",
    )
    eps: float = Field(default=1e-3, gt=0, le=100, description="how far the weights move; 1e-2 suits LoRA")
    q: int = Field(default=1, ge=1, le=10_000, description="directions a step; each costs two forward passes")
    sign: Literal["scalar", "elementwise"] | None = Field(
        default=None,
        description="sign of the estimate: elementwise (the paper of ZO-SGD-Sign), scalar (its code); null is none",
    )
    conserve: bool = Field(
        default=False, description="keep the best of the step, its opposite and no step; optimizer sgd without momentum"
    )
    sparsity: float = Field(default=0.0, ge=0, lt=1, description="share of the weights that a direction leaves alone")
    mask: Literal["uniform", "normal"] = Field(
        default="uniform", description="normal is the published code's slip: it drops Phi(sparsity), 0.69 for 0.5"
    )
    sparse_by: Literal["layer", "global"] = Field(
        default="layer", description="the same share of every tensor, or its share of the smallest weights of all"
    )
    mask_steps: int = Field(default=1, ge=1, le=10**9, description="steps for which a mask is kept")
    blocks: Literal["none", "layer", "module"] = Field(
        default="none", description="estimate layer by layer, or by attention, feed-forward, ... one after another"
    )
    block_order: Literal["coordinate", "joint"] = Field(
        default="coordinate", description="step each block before the next is estimated, or all at the end"
    )
    first_order_layers: int = Field(
        default=0, ge=0, le=10_000, description="last layers that back-propagation trains, with what comes after them"
    )
    restore: Literal["inplace", "copy"] = Field(
        default="inplace", description="copy restores from a copy of the weights, exactly: for 16-bit weights"
    )


class TrainingConfig(Settings):
    """One training run."""

    optimizer: str = Field(
        default="adamw", min_length=1, max_length=64, description="a name from `datatools ls optimizers`"
    )
    optimizer_options: dict[str, Scalar | list[Scalar] | dict[str, str | Options]] = Field(
        default={},
        description="hyper-parameters of the rule, such as {betas: [0.9, 0.95]}; with a rule for matrices also "
        "{assign: {router: adamw}}, part of a name -> matrix, adamw or settings",
    )
    gradient: Literal["backprop", "zo"] = Field(
        default="backprop",
        description="zo estimates gradients from forward passes alone, in the memory of inference (see zo below)",
    )
    zo: ZerothOrderConfig = Field(default=ZerothOrderConfig(), description="how `gradient: zo` estimates")
    learning_rate: float = Field(default=1e-3, ge=0, le=100, description="peak learning rate")
    weight_decay: float = Field(default=0.0, ge=0, le=100, description="decoupled weight decay")
    schedule: str = Field(
        default="linear", min_length=1, max_length=64, description="a name from `datatools ls schedules`"
    )
    schedule_options: Options = Field(
        default={}, description="settings of the schedule, such as {min_ratio: 0.1}; `datatools ls schedules`"
    )
    warmup_ratio: float = Field(
        default=0.03,
        ge=0,
        le=1,
        description="share of the steps over which the learning rate rises; one_cycle has its own (pct_start)",
    )
    block_ratios: Literal["paper"] | dict[str, float] | None = Field(
        default=None,
        description="learning rates by block, times learning_rate: paper (arXiv 2502.19002) or {embedding: 10, qk: 8, "
        "ffn: 6, vo: 4, norm: 1, head: 1}; null is one rate",
    )
    epochs: int = Field(default=3, ge=1, le=10_000, description="passes over the rows")
    batch_size: int = Field(default=8, ge=1, le=1_000_000, description="rows an optimizer step, over all micro-batches")
    max_steps: int | None = Field(default=None, ge=1, le=10**9, description="stop after this many optimizer steps")
    micro_tokens: int = Field(
        default=2048,
        ge=1,
        le=2**24,
        description="padded tokens a forward pass; bounds memory, changes results only by rounding",
    )
    gradient_clip: float | None = Field(
        default=1.0, gt=0, le=1e9, description="largest norm of the gradient; null does not clip, nor does gradient: zo"
    )


class WarmupConfig(TrainingConfig):
    """The short training run at whose checkpoints gradients are taken (LESS, section 4.1)."""

    epochs: int = Field(default=4, ge=1, le=10_000, description="passes over the warm-up rows; one checkpoint each")
    fraction: float = Field(default=0.05, gt=0, le=1, description="share of the pool to warm up on, drawn at random")
    minimum_rows: int = Field(default=64, ge=1, le=10**9, description="fewest warm-up rows, where the pool has them")
    checkpoints: int | None = Field(
        default=None, ge=1, le=10_000, description="take gradients at the last so many checkpoints only; null is at all"
    )


class ProjectorConfig(Settings):
    """The random projection that makes a gradient a feature."""

    shorthand = "name"
    name: str = Field(default="sjlt", min_length=1, max_length=64, description="a name from `datatools ls projectors`")
    dim: int = Field(default=8192, ge=1, le=2**20, description="numbers a feature")


class FeaturesConfig(Settings):
    """How gradient features are computed and stored."""

    method: str = Field(
        default="hooks", min_length=1, max_length=64, description="hooks, vmap or loop; loop is the definition"
    )
    token_budget: int = Field(default=1024, ge=1, le=2**24, description="padded tokens a batch; bounds memory")
    dtype: Literal["float16", "bfloat16", "float32", "int8", "int4", "int1"] = Field(
        default="float16", description="how stored features are rounded (int8, int4, int1 as in QLESS)"
    )
    folder: FilePath | None = Field(
        default=None,
        description="where features are kept; null is the run's own folder. Runs that name the same one share them: "
        "another target on the same pool and checkpoints costs only the target's rows",
        json_schema_extra=ELSEWHERE,
    )
    rows_per_unit: int | None = Field(
        default=None, ge=1, le=2**20, description="rows a file, and lost at most when killed"
    )
    adam_mode: Literal["paper", "code", "precond_only"] = Field(
        default="paper",
        description="Adam's update as in the paper (eps outside the root, bias corrected), as in LESS's code "
        "(eps inside, none), or the gradient over sqrt(v) without the momentum that all rows share",
    )


class RunSettings(Settings):
    """What every pipeline with a folder has."""

    out: FilePath = Field(
        description="folder of the run; an interrupted run in it is continued", json_schema_extra=ELSEWHERE
    )
    seed: Seed = Field(default=0, description="the one seed; all others are derived from it by name")
    overwrite: bool = Field(
        default=False, description="move an existing run aside to OUT.old-N", json_schema_extra=VOLATILE
    )
    dry_run: bool = Field(
        default=False,
        description="check that everything loads, say what it will cost, stop",
        json_schema_extra=VOLATILE,
    )
    accept_change: Names = Field(
        default=[],
        description="things that may have changed since the run began (code, data, ...)",
        json_schema_extra=VOLATILE,
    )


METHODS: dict[str, str] = {
    "less": "gradient influence on the target rows (Xia et al. 2024)",
    "random": "uniformly at random",
    "random-length": "at random, with answers as long as those of the target rows",
    "tfidf": "similarity of words with the target rows",
    "rds": "similarity of hidden states with the target rows",
    "loss": "rows on which the model's loss is highest",
}
NEED_TARGET = ("less", "tfidf", "rds")


class SelectConfig(RunSettings):
    """Select the training rows that move the model towards the target rows."""

    model: ModelConfig = Field(description="the model to select for")
    train: DataConfig = Field(description="the pool to select from")
    target: Names = Field(default=[], description="files with a few examples of what the model should get better at")
    budget: Annotated[str, BeforeValidator(_number_as_text), Field(min_length=1, max_length=64)] = Field(
        default="5%",
        description="how much to select: a share '5%', a count '500', or '20000 tokens'",
        json_schema_extra=LATE,
    )
    method: Literal["less", "random", "random-length", "tfidf", "rds", "loss"] = Field(
        default="less", description="how rows are scored; `datatools ls methods` explains them"
    )
    out: FilePath = Field(
        default=Path("runs/select"),
        description="folder of the run; an interrupted run in it is continued",
        json_schema_extra=ELSEWHERE,
    )
    lora: LoraConfig = Field(default=LoraConfig(), description="the parameters whose gradients count")
    warmup: WarmupConfig = Field(default=WarmupConfig(), description="the warm-up run; not used with `checkpoints`")
    checkpoints: list[FilePath] = Field(
        default=[], max_length=1000, description="checkpoints of your own run, instead of a warm-up"
    )
    features: FeaturesConfig = Field(default=FeaturesConfig(), description="gradients and their storage")
    projector: ProjectorConfig = Field(default=ProjectorConfig(), description="the random projection")
    aggregate: str = Field(
        default="less",
        min_length=1,
        max_length=64,
        description="from many target rows to one score a row: a name from `datatools ls aggregations`",
        json_schema_extra=LATE,
    )
    max_per_source: Annotated[int | float | None, BeforeValidator(_cap)] = Field(
        default=None,
        gt=0,
        le=10**12,
        description="most rows a source: a count (500), or below 1 a share of the selection (0.3)",
        json_schema_extra=LATE,
    )

    @model_validator(mode="after")
    def _has_target(self) -> Self:
        if self.method in NEED_TARGET and not self.target:
            raise ValueError(
                f"method '{self.method}' compares with target rows and got none; name them with --target "
                "FILE (setting 'target')"
            )
        return self


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
    projection: str | None = Field(default=None, description="the layer to take gradients of, where it is not found")
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
    anchors: int = Field(
        default=3, ge=2, le=4097, description="places of the reference run where gradients are taken"
    )
    estimators: list[Literal["pairwise", "reduced", "moments", "own-moments", "table", "groups"]] = Field(
        default=["pairwise", "reduced"],
        min_length=1,
        max_length=6,
        description="which estimates to make; a search uses the first",
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
        default=8, ge=1, le=4096, description="directions to which `reduced` without rows reduces Hessians",
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
        default=1, ge=1, le=4097, description="anchors at which pairwise (and a frozen `reduced`) take products",
        json_schema_extra=LATE,
    )
    sequences: Annotated[list[FilePath], BeforeValidator(_listed)] = Field(
        default=[], max_length=10_000, description="order files to estimate", json_schema_extra=LATE
    )
    search: Literal["local", "genetic", "borda", "random"] = Field(
        default="local", description="how orders are searched", json_schema_extra=LATE
    )
    budget: int = Field(default=20_000, ge=1, le=10**9, description="orders a search may score", json_schema_extra=LATE)
    retrain: int = Field(
        default=3, ge=0, le=100, description="found orders, and as many random ones, that a search retrains",
        json_schema_extra=LATE,
    )
    map_batches: int = Field(default=4, ge=1, le=4096, description="batches of the memory map", json_schema_extra=LATE)
    map_positions: int = Field(default=4, ge=2, le=4096, description="positions of the map", json_schema_extra=LATE)
    completions: int = Field(
        default=8, ge=1, le=1000, description="random orders of the rest, for each place of the map",
        json_schema_extra=LATE,
    )
    map_by: Literal["moments", "retraining"] = Field(
        default="retraining", description="what makes the map: true runs, or the estimate `moments`",
        json_schema_extra=LATE,
    )


class EvaluateConfig(Settings):
    """Loss of a model on rows."""

    model: ModelConfig = Field(description="the model, with its adapter if it has one")
    data: DataConfig = Field(description="held-out rows")
    token_budget: int = Field(default=2048, ge=1, le=2**24, description="padded tokens a batch; bounds memory")


ARMS = ("random", "random-length", "tfidf", "rds", "loss", "full")


class AuditConfig(RunSettings):
    """Is the selection better than simple baselines? Trains on each with several seeds and compares held-out losses."""

    selected: FilePath = Field(description="selected.jsonl of a run")
    pool: DataConfig = Field(description="the pool that it was selected from")
    test: DataConfig = Field(description="held-out rows of the target; never the rows used to select")
    target: Names = Field(default=[], description="the target rows, for baselines that need them")
    against: Annotated[
        list[Literal["random", "random-length", "tfidf", "rds", "loss", "full"]], Field(max_length=16)
    ] = Field(
        default=["random", "random-length"], description=f"baselines with the same number of rows: {', '.join(ARMS)}"
    )
    seeds: int = Field(default=3, ge=1, le=1000, description="training runs an arm; two or fewer give no interval")
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


class ExplainConfig(Settings):
    """Why was this row selected?"""

    file: FilePath = Field(description="selected.jsonl of a run")
    line: int = Field(ge=1, le=10**12, description="line in that file, counted from 1")
    nearest: int = Field(default=5, ge=1, le=1000, description="how many target rows to show")


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


class DemoConfig(RunSettings):
    """The whole chain on bundled data with a small model: select, audit, report."""

    out: FilePath = Field(default=Path("runs/demo"), description="folder of the demo", json_schema_extra=ELSEWHERE)
    model: ModelConfig | None = Field(default=None, description="another model than the demo's own")
    budget: Annotated[str, BeforeValidator(_number_as_text), Field(min_length=1, max_length=64)] = Field(
        default="5%", description="how much to select"
    )
    seeds: int = Field(default=1, ge=0, le=100, description="training runs an arm of the audit; 0 leaves the audit out")


# -------------------------------------------------------------------------------------------------------------- YAML

# libyaml where there is one: 1 MB in a second, not in twenty
_BASE: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)

_INT = r"[-+]?(?:0|[1-9][0-9]*)"
_FLOAT = r"[-+]?(?:[0-9]+\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)"
_BOOL = r"true|True|TRUE|false|False|FALSE|yes|Yes|YES|no|No|NO|on|On|ON|off|Off|OFF"
_NULL = r"~|null|Null|NULL|"
_ODD_NUMBER = r"[-+]?0[0-9_]+|[-+]?0[xXoObB][0-9a-fA-F_]+|[-+]?[0-9][0-9_]*_[0-9_]*"


def _resolvers() -> dict[str, list[tuple[str, Any]]]:
    """Plain scalars: YAML 1.2's numbers, YAML 1.1's truth values; dates and 1:30 stay text.

    Truth values stay so that `no` for a text is refused by its type and not taken differently by two YAML readers;
    `010` (8 to some readers, 10 to others), hexadecimal and underscored numbers are refused by name.
    """
    import re

    table: dict[str, list[tuple[str, Any]]] = {}
    for tag, pattern, first in [
        ("bool", _BOOL, "yYnNtTfFoO"),
        ("odd", _ODD_NUMBER, "-+0123456789"),
        ("int", _INT, "-+0123456789"),
        ("float", _FLOAT, "-+0123456789."),
        ("null", _NULL, ["~", "n", "N", ""]),
        ("merge", "<<", "<"),
    ]:
        for character in first:
            table.setdefault(character, []).append((f"tag:yaml.org,2002:{tag}", re.compile(f"(?:{pattern})$")))
    return table


class _Loader(_BASE):  # type: ignore[misc]
    yaml_implicit_resolvers = _resolvers()


class _Dumper(yaml.SafeDumper):
    yaml_implicit_resolvers = _resolvers()

    def ignore_aliases(self, data: object) -> bool:
        return True


def _where(mark: Any) -> str:
    return f"line {mark.line + 1}" if mark is not None else "somewhere"


def _construct_mapping(loader: Any, node: Any) -> dict[str, Json]:
    result: dict[str, Json] = {}
    lines: dict[str, int] = {}
    for key_node, value_node in node.value:
        if key_node.tag != "tag:yaml.org,2002:str":
            shown = repr(key_node.value) if isinstance(key_node.value, str) else "a list or mapping"
            raise yaml.constructor.ConstructorError(
                None,
                None,
                f"a setting's name must be text and is {shown}; put it in quotes if it is meant",
                key_node.start_mark,
            )
        key = key_node.value
        if key in result:
            raise yaml.constructor.ConstructorError(
                None, None, f"{key!r} is set twice, first on line {lines[key]}; keep one", key_node.start_mark
            )
        lines[key] = key_node.start_mark.line + 1
        result[key] = loader.construct_object(value_node, deep=True)
    return result


def _construct_odd(loader: Any, node: Any) -> Json:
    raise yaml.constructor.ConstructorError(
        None,
        None,
        f"{node.value} is read as different numbers by different YAML readers; write a plain decimal number, "
        f"or '{node.value}' in quotes for text",
        node.start_mark,
    )


def _construct_int(loader: Any, node: Any) -> int:
    if len(node.value) > 40:
        raise yaml.constructor.ConstructorError(None, None, "a number of more than 40 digits", node.start_mark)
    return int(node.value)


def _construct_float(loader: Any, node: Any) -> float:
    text = node.value.lower()
    return float(text.replace(".inf", "inf").replace(".nan", "nan"))


_Loader.add_constructor("tag:yaml.org,2002:map", _construct_mapping)
_Loader.add_constructor("tag:yaml.org,2002:odd", _construct_odd)
_Loader.add_constructor("tag:yaml.org,2002:int", _construct_int)
_Loader.add_constructor("tag:yaml.org,2002:float", _construct_float)


def parse_yaml(text: str, name: str = "YAML") -> Json:
    """The value of one YAML document; `name` is what errors call it.

    Refused: duplicate keys, anchors and aliases, tags, merge keys, more than 1 MB, deeper than 32, two documents,
    numbers that YAML versions disagree about. Raises: UsageError.
    """
    size = len(text.encode("utf-8", "surrogatepass"))
    if size > MAX_YAML_BYTES:
        _refuse(f"{name}: {size} bytes of YAML; at most {MAX_YAML_BYTES} are read")
    try:
        depth = documents = 0
        for event in yaml.parse(text, Loader=_Loader):  # events first: nothing is built from what will be refused
            at = _where(event.start_mark)
            if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None) is not None:
                _refuse(
                    f"{name}, {at}: anchors and aliases (& and *) are not read; write the value out where it is used"
                )
            tag = getattr(event, "tag", None)
            if tag is not None:
                _refuse(f"{name}, {at}: the tag {tag} is not read; a setting is text, a number, a list or a mapping")
            if isinstance(event, yaml.DocumentStartEvent):
                documents += 1
                if documents > 1:
                    _refuse(f"{name}, {at}: a second document ('---'); one file holds one configuration")
            if isinstance(event, yaml.CollectionStartEvent):
                depth += 1
                if depth > MAX_YAML_DEPTH:
                    _refuse(f"{name}, {at}: nested more than {MAX_YAML_DEPTH} deep")
            elif isinstance(event, yaml.CollectionEndEvent):
                depth -= 1
        loader = _Loader(text)
        try:
            value: Json = loader.get_single_data()
        finally:
            loader.dispose()
        return value
    except yaml.MarkedYAMLError as error:
        at = _where(error.problem_mark or error.context_mark)
        _refuse(f"{name}, {at}: {error.problem or error.context or 'not YAML'}")
    except (yaml.YAMLError, UnicodeError, ValueError) as error:
        _refuse(f"{name}: not readable as YAML: {' '.join(str(error).split())[:200]}")


def read_yaml(path: Path) -> dict[str, Json]:
    """The mapping in a YAML file. Raises: UsageError, as `parse_yaml`, and for files that cannot be read."""
    try:
        size = path.stat().st_size
        if size > MAX_YAML_BYTES:
            _refuse(f"{path}: {size} bytes; a configuration has at most {MAX_YAML_BYTES}")
        text = path.read_bytes().decode("utf-8-sig")
    except IsADirectoryError:
        _refuse(f"{path} is a folder; expected a YAML file, such as {path / 'run.yaml'}")
    except OSError as error:
        _refuse(f"{path}: cannot be read ({error.strerror}); expected a YAML file with settings")
    except UnicodeDecodeError as error:
        _refuse(f"{path}: not UTF-8 text at byte {error.start}; expected a YAML file with settings")
    value = parse_yaml(text, str(path))
    if value is None:
        return {}
    if not isinstance(value, dict):
        _refuse(f"{path}: holds a {type(value).__name__}; expected settings, one 'name: value' a line")
    return value


# ------------------------------------------------------------------------------------------------------------ loading

M = TypeVar("M", bound=Settings)


def _refuse(message: str) -> NoReturn:
    from datatools import UsageError

    raise UsageError(message) from None


def _members(annotation: Any) -> list[Any]:
    """The alternatives of an annotation, with Annotated and unions opened."""
    origin = get_origin(annotation)
    if origin is Annotated:
        return _members(get_args(annotation)[0])
    if origin in (Union, types.UnionType):
        return [member for argument in get_args(annotation) for member in _members(argument)]
    return [annotation]


def _submodel(annotation: Any) -> type[Settings] | None:
    for member in _members(annotation):
        if isinstance(member, type) and issubclass(member, Settings):
            return member
    return None


def _takes(annotation: Any, *kinds: Any) -> bool:
    return any(member in kinds or (get_origin(member) is Literal and str in kinds) for member in _members(annotation))


def _all_names(model: type[Settings], prefix: str = "") -> list[str]:
    names = []
    for name, field in model.model_fields.items():
        names.append(prefix + name)
        if (sub := _submodel(field.annotation)) is not None:
            names += _all_names(sub, f"{prefix}{name}.")
    return names


def _unknown(model: type[Settings], root: type[Settings], path: str, key: str, origin: str) -> NoReturn:
    """`select.yaml: SelectConfig has no setting 'fracton'; did you mean 'fraction'?`, found at any level."""
    close = difflib.get_close_matches(key, model.model_fields, n=1, cutoff=0.7)
    if not close:  # a setting of another level: say where it lives
        leaves: dict[str, list[str]] = {}
        for name in _all_names(root):
            leaves.setdefault(name.rpartition(".")[2], []).append(name)
        close = [name for leaf in difflib.get_close_matches(key, leaves, n=1, cutoff=0.7) for name in leaves[leaf][:2]]
    close = close or difflib.get_close_matches(key, model.model_fields, n=1, cutoff=0.5)
    hint = (
        f"; did you mean {' or '.join(repr(c) for c in close)}?"
        if close
        else f"; it has {', '.join(model.model_fields)}"
    )
    inside = f"{path}: " if path else ""
    _refuse(f"{origin}: {inside}{model.__name__} has no setting {key!r}{hint}")


def _absorb(
    root: type[Settings],
    model: type[Settings],
    data: Mapping[str, object],
    origin: str,
    into: dict[str, Any],
    origins: dict[str, str],
    prefix: str = "",
) -> None:
    """Merge `data` over `into`, level by level; lists and option mappings are replaced whole."""
    for key, value in data.items():
        if key not in model.model_fields:
            _unknown(model, root, prefix.rstrip("."), key, origin)
        path, annotation = prefix + key, model.model_fields[key].annotation
        sub = _submodel(annotation)
        if sub is not None and value is not None:
            expanded = sub.expand(value)
            if isinstance(expanded, Mapping):
                if not isinstance(into.get(key), dict):
                    into[key] = {}
                _absorb(root, sub, expanded, origin, into[key], origins, f"{path}.")
                continue
        if isinstance(value, bool) and not _takes(annotation, bool):
            _refuse(
                f"{origin}: setting {path!r} is {'yes/true/on' if value else 'no/false/off'}, a truth value; expected "
                f"{model.model_fields[key].description}; put text in quotes ('yes', 'no')"
            )
        into[key] = value
        origins[path] = origin


def _assign(model: type[Settings], assignment: str, into: dict[str, Any], origins: dict[str, str]) -> None:
    """One `--set a.b=c`. The value is read as YAML, but stays text where the setting is text."""
    path, equals, text = assignment.partition("=")
    path, text = path.strip(), text.strip()
    origin = f"--set {path}"
    if not equals or not path:
        _refuse(f"--set {assignment!r}: expected NAME=VALUE, such as --set projector.dim=4096")
    parts = path.split(".")
    level: type[Settings] = model
    here = into
    for depth, part in enumerate(parts):
        done = ".".join(parts[:depth])
        if part not in level.model_fields:
            _unknown(level, model, done, part, origin)
        field = level.model_fields[part]
        sub = _submodel(field.annotation)
        last = depth == len(parts) - 1
        if sub is not None and not last:
            if not isinstance(here.get(part), dict):
                here[part] = {}
            level, here = sub, here[part]
            continue
        if last:
            value: Json
            if _takes(field.annotation, str, Path) and not _takes(field.annotation, int, float, bool):
                listed = text.startswith("[") and any(get_origin(m) is list for m in _members(field.annotation))
                none = text in ("", "~", "null") and _takes(field.annotation, type(None))
                value = parse_yaml(text, origin) if listed else None if none else text
            else:
                value = parse_yaml(text, origin)
            _absorb(model, level, {part: value}, origin, here, origins, f"{done}." if done else "")
            return
        if any(get_origin(member) is dict for member in _members(field.annotation)) and depth == len(parts) - 2:
            table = here.get(part)
            here[part] = {**(table if isinstance(table, dict) else {}), parts[-1]: parse_yaml(text, origin)}
            origins[".".join(parts[: depth + 1])] = origin
            return
        _refuse(f"{origin}: {'.'.join(parts[: depth + 1])!r} has no settings inside; set it as a whole")


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _explain(model: type[Settings], error: ValidationError, origins: Mapping[str, str]) -> str:
    """A pydantic error in the house's words: who, what came, what was expected, what to do."""
    lines: dict[str, str] = {}  # one a setting: a union complains once for each of its members
    for problem in sorted(error.errors(include_url=False), key=lambda e: -len(e["loc"])):
        path, level, description = [], model, ""
        inside_model = True
        for part in problem["loc"]:
            if inside_model and isinstance(part, str) and part in level.model_fields:
                field = level.model_fields[part]
                path.append(part)
                description = field.description or ""
                sub = _submodel(field.annotation)
                inside_model = sub is not None
                level = sub or level
            elif isinstance(part, int) and path:
                path[-1] += f"[{part}]"
        name = ".".join(path)
        bare = name.split("[")[0]
        origin = next(
            (origins[o] for o in sorted(origins, key=len, reverse=True) if bare == o or bare.startswith(f"{o}.")), ""
        )
        who = f"{origin}: " if origin else ""
        message = problem["msg"].removeprefix("Value error, ").removeprefix("Input ")
        message = message[:1].lower() + message[1:]
        if problem["type"] == "missing":
            flag = FLAGS.get(name)
            how = f"give {flag}, or " if flag else ""
            lines.setdefault(name, f"{model.__name__} needs {name!r} ({description}); {how}set it in the YAML")
        elif problem["type"] == "value_error" or not name:
            lines.setdefault(bare, f"{who}{name + ': ' if name else ''}{message}")
        else:
            came = problem["input"]
            if problem["type"] == "literal_error" and isinstance(came, str):
                choices = [c.strip(" '") for c in problem["ctx"]["expected"].replace(" or ", ",").split(",")]
                close = difflib.get_close_matches(came, choices, n=1)
                message += f"; did you mean '{close[0]}'?" if close else ""
            if problem["type"] == "string_type":
                message += "; put text in quotes"
            what = f" ({description})" if description else ""
            lines.setdefault(bare, f"{who}setting {name!r} is {_short(came)}; {message}{what}")
    unique = list(lines.values())
    more = f" (and {len(unique) - 1} more: {' | '.join(unique[1:4])})" if len(unique) > 1 else ""
    return unique[0] + more


# The flag that sets a required setting, for the error that says it is missing.
FLAGS = {
    "model": "--model",
    "model.name": "--model",
    "train": "--train",
    "train.paths": "--train",
    "data": "--data",
    "data.paths": "--data",
    "pool": "--pool",
    "test": "--test",
    "selected": "--selected",
    "out": "--out",
}


def load_config(
    model: type[M],
    yaml_path: Path | None = None,
    flags: Mapping[str, object] | None = None,
    sets: Sequence[str] | None = None,
    *,
    base: Mapping[str, object] | None = None,
    base_name: str = "the run",
) -> M:
    """A configuration from its sources: defaults < `base` < YAML < `flags` < `sets`.

    `flags` maps dotted names to values ("train.paths": [...]); None means not given. `sets` are "a.b=value" texts.
    `base` is what a run to lean on says (an audit takes its model from the run that it audits).
    Raises: UsageError naming the source, the setting, what came and what was expected.
    """
    tree: dict[str, Any] = {}
    origins: dict[str, str] = {}
    if base:
        _absorb(model, model, base, base_name, tree, origins)
    if yaml_path is not None:
        _absorb(model, model, read_yaml(yaml_path), str(yaml_path), tree, origins)
    for name, value in (flags or {}).items():
        if value is None or value == [] or value == ():
            continue
        nested: object = value if not isinstance(value, tuple) else list(value)
        for part in reversed(name.split(".")):
            nested = {part: nested}
        assert isinstance(nested, dict)
        _absorb(model, model, nested, "command line", tree, origins)
    for assignment in sets or ():
        _assign(model, assignment, tree, origins)
    try:
        return model.model_validate(tree)
    except ValidationError as error:
        _refuse(_explain(model, error, origins))


def audit_base(selected: Path | None, yaml_path: Path | None = None) -> tuple[dict[str, Json], str]:
    """What an audit takes over from the run whose selected.jsonl it judges, and the name of the file it is from.

    Model, target, pool and adapters are the run's, the training recipe is that of its warm-up.
    """
    if selected is None and yaml_path is not None:
        named = read_yaml(yaml_path).get("selected")
        selected = Path(named) if isinstance(named, str) else None
    if selected is None:
        return {}, ""
    folder = Path(_home(str(selected))).parent
    path = folder / "run.yaml"
    if not path.is_file():
        return {}, ""
    run = read_yaml(path)
    base: dict[str, Json] = {name: run[name] for name in ("model", "target", "lora") if name in run}
    if "train" in run:
        base["pool"] = run["train"]
    warmup = run.get("warmup")
    if isinstance(warmup, dict):
        base["training"] = {name: value for name, value in warmup.items() if name in TrainingConfig.model_fields}
    kept = run.get("features")
    features = kept.get("folder") if isinstance(kept, dict) else None
    return base | {"out": str(folder / "audit"), "features": features or str(folder / "features")}, str(path)


def order_base(out: Path | None) -> tuple[dict[str, Json], str]:
    """The settings of the run in `out`, which another task of `datatools order` goes on with, and its file's name."""
    path = Path(_home(str(out or OrderConfig.model_fields["out"].default))) / "run.yaml"
    return (read_yaml(path), str(path)) if path.is_file() else ({}, "")


# ------------------------------------------------------------------------------------------------------------- output


def _marked(field: Any, *marks: str) -> bool:
    extra = field.json_schema_extra
    return isinstance(extra, dict) and any(extra.get(mark) for mark in marks)


def _plain(value: object) -> Json:
    if isinstance(value, Settings):
        return as_dict(value)
    if isinstance(value, Path):
        return _tilde(str(value))
    if isinstance(value, str):
        return _tilde(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    assert value is None or isinstance(value, bool | int | float), type(value)
    return value


def _tilde(text: str) -> str:
    """A path in the home folder, without its owner's name."""
    home = str(Path.home())
    return "~" + text[len(home) :] if home != "/" and (text == home or text.startswith(home + "/")) else text


def as_dict(config: Settings, *, leave_out: Sequence[str] = ("volatile",)) -> dict[str, Json]:
    """The settings as plain values, home folder as `~`, without the fields that carry a mark in `leave_out`."""
    fields = type(config).model_fields
    return {name: _plain(getattr(config, name)) for name, field in fields.items() if not _marked(field, *leave_out)}


def flatten(value: Json, prefix: str = "") -> dict[str, Json]:
    """Nested settings as dotted names: {"model": {"name": "x"}} -> {"model.name": "x"}."""
    if isinstance(value, dict) and (value or not prefix):
        flat: dict[str, Json] = {}
        for key, inner in value.items():
            flat |= flatten(inner, f"{prefix}.{key}" if prefix else key)
        return flat
    return {prefix: value}


def fingerprint(config: Settings) -> dict[str, Json]:
    """Dotted name -> value of everything that can change the result; two runs may share a folder when these agree."""
    return flatten(as_dict(config, leave_out=("volatile", "elsewhere", "late")))


def config_digest(config: Settings) -> str:
    """128-bit blake2b, in hex, of `fingerprint`."""
    text = json.dumps(fingerprint(config), sort_keys=True, ensure_ascii=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def dump(config: Settings, *, comments: bool = False) -> str:
    """YAML that `load_config` reads back to an equal configuration; `comments` puts each setting's meaning above it."""
    return "".join(_dump_level(config, 0, comments))


def _dump_level(config: Settings, depth: int, comments: bool) -> list[str]:
    pad, lines = "  " * depth, []
    for name, field in type(config).model_fields.items():
        if _marked(field, "volatile"):
            continue
        value = getattr(config, name)
        if comments and field.description:
            for line in textwrap.wrap(field.description, 110 - len(pad), break_on_hyphens=False):
                lines.append(f"{pad}# {line}\n")
        if isinstance(value, Settings):
            lines.append(f"{pad}{name}:\n")
            lines += _dump_level(value, depth + 1, comments)
        else:
            text = yaml.dump(
                _plain(value), Dumper=_Dumper, default_flow_style=True, allow_unicode=True, width=10**9, sort_keys=False
            )
            lines.append(f"{pad}{name}: {text.removesuffix(chr(10)).removesuffix(chr(10) + '...')}\n")
    return lines
