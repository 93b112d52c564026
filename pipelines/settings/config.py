"""Settings: documented pydantic models. `config_files` reads and writes them.

Nothing here imports torch, so that `--help` and `--print-config` answer at once.
"""

from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self, get_args

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

Json = bool | int | float | str | None | list["Json"] | dict[str, "Json"]


def home(text: str) -> str:
    """A path as it was typed, `~` opened. Raises: ValueError for characters that no file name has."""
    if "\0" in text or any("\ud800" <= character <= "\udfff" for character in text):
        raise ValueError(f"{text!r} holds a character that no file name has")
    return str(Path(text).expanduser()) if text.startswith("~") else text


def _home_path(path: Path) -> Path:
    return Path(home(str(path)))


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


def _columns(value: object) -> object:
    """'a=b,c=d' as {a: b, c: d}; a list of such texts, joined."""
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        value = ",".join(value)
    if not isinstance(value, str):
        return value
    pairs = [part.partition("=") for part in value.split(",") if part.strip()]
    wrong = next((name for name, equals, theirs in pairs if not (equals and name.strip() and theirs.strip())), None)
    if wrong is not None:
        raise ValueError(f"{wrong!r} names no column; expected OURS=YOURS, such as prompt=question,completion=answer")
    return {name.strip(): theirs.strip() for name, _, theirs in pairs}


Columns = Annotated[dict[str, str | dict[str, str]], BeforeValidator(_columns)]
Name = Annotated[str, Field(min_length=1, max_length=4096), AfterValidator(home)]
Names = Annotated[list[Name], BeforeValidator(_listed), Field(max_length=10_000)]
FilePath = Annotated[Path, AfterValidator(_home_path)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
Scalar = bool | int | float | str | None
Options = dict[str, Scalar | list[Scalar]]

# Marks of fields. Volatile says how to run, not what: neither in run.yaml nor in the fingerprint. A run may move, so
# its folder is in run.yaml and not in the fingerprint.
VOLATILE: dict[str, Json] = {"volatile": True}
ELSEWHERE: dict[str, Json] = {"elsewhere": True}
# Read only after everything expensive is computed: a finished run may be asked again with another value.
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
        default="sdpa", description="attention code; a model without sdpa (CodeGen, gpt-oss, Mamba) gets eager"
    )
    trust_remote_code: bool = Field(
        default=False,
        description="run Python code that comes with the model; recorded when on. Only a flag can allow it: "
        "--trust-remote-code, with every command",
    )
    chat: Name = Field(
        default="auto", description="auto (the tokenizer's own template), tulu (as LESS), or a .jinja file"
    )
    max_length: int | None = Field(
        default=None, ge=2, le=2**20, description="longest row in tokens; null is what the model takes"
    )
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
    targets: Literal["attention", "auto"] | Names = Field(
        default="attention",
        description="the layers that get an adapter: attention is the linear layers of attention blocks (q_proj, "
        "k_proj, v_proj and o_proj of Llama), auto every linear layer but the head; or endings of their names",
    )


class DataConfig(Settings):
    """Rows: where they are and what to do with bad and repeated ones."""

    shorthand = "paths"
    paths: Names = Field(
        min_length=1,
        description="files (.jsonl .json .csv .parquet .arrow, also .gz .zst .xz .bz2), patterns ('a/*.jsonl'), "
        "folders (of files, or of save_to_disk), or hub names (hf:NAME or NAME:split)",
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
    columns: Columns | None = Field(
        default=None,
        description="names of your columns, as {prompt: yours, completion: yours} or 'prompt=yours,...', and of single "
        "files, as {file.jsonl: {...}}; null detects the usual formats",
    )
    preference: Literal["chosen"] | None = Field(
        default=None, description="chosen reads rows with a chosen and a rejected answer as prompt and chosen answer"
    )


class TargetData(DataConfig):
    """Rows that are read beside a pool: its names of columns are tried where they have none of their own."""

    borrowed: bool = Field(default=False, description="the names of columns are the pool's: others are detected")


class ZerothOrderConfig(Settings):
    """How `gradient: zo` estimates the gradient from forward passes (MeZO and its family)."""

    estimator: Literal["two-sided", "one-sided", "forward"] = Field(
        default="two-sided",
        description="two-sided: f(p + eps z) and f(p - eps z); one-sided: f(p + eps z) and f(p); forward: the exact "
        "derivative along z, by forward-mode differentiation",
    )
    eps: float = Field(default=1e-3, gt=0, le=100, description="how far the weights move; 1e-2 suits LoRA")
    q: int = Field(
        default=1, ge=1, le=10_000, description="directions a step; two forward passes each, one-sided q + 1 in all"
    )
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
    weight_decay: float = Field(
        default=0.0, ge=0, le=100, description="decoupled weight decay; norms and biases have none (decay_all)"
    )
    decay_all: bool = Field(default=False, description="weight decay on norms and biases too, where Trainer has none")
    rounding: Literal["auto", "nearest", "stochastic", "master"] = Field(
        default="auto",
        description="of bfloat16 weights that train: stochastic (up or down at random, right on average; auto is "
        "this), master (float32 weights, computed with in bfloat16: 4 bytes a weight more), or nearest, which loses "
        "small updates and says how much",
    )
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
    nonfinite_steps: int = Field(
        default=5,
        ge=1,
        le=10_000,
        description="a step whose loss or gradient is not finite is skipped; so many in a row stop the run",
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
        default="hooks",
        min_length=1,
        max_length=64,
        description="hooks (fast, completed by loop where needed), vmap or loop; loop is the definition",
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
    target_columns: Columns | None = Field(
        default=None, description="columns of the target, as `train.columns`; null tries the pool's, then detects"
    )
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
    sequences: Annotated[list[FilePath], BeforeValidator(_listed)] = Field(
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


class ExplainConfig(Settings):
    """Why was this row selected, or not?"""

    file: FilePath = Field(description="selected.jsonl of a run")
    line: int = Field(default=1, ge=1, le=10**12, description="line in that file, counted from 1; not used with `row`")
    row: str | None = Field(
        default=None,
        min_length=1,
        max_length=4096,
        description="any row of the run's pool: FILE:LINE of one of its files, or its id",
    )
    nearest: int = Field(default=5, ge=1, le=1000, description="how many target rows to show")
    trust_remote_code: bool = Field(default=False, description="run the Python code that comes with the run's model")


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
