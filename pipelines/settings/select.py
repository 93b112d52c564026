"""Settings of `datatools select`."""

from contextlib import suppress
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from pipelines.settings.base import BudgetText, Columns, FilePath, Names, RunSettings, Settings
from pipelines.settings.engine import EngineConfig
from pipelines.settings.marks import DATA, ELSEWHERE, LATE, METHOD, UNSAID, VOLATILE, Flag, Flags, OneOf
from pipelines.settings.methods import DEFAULT, SCORERS, known
from pipelines.settings.metrics import MetricsConfig
from pipelines.settings.parts import DataConfig, LoraConfig, ModelConfig, TrainingConfig


def _cap(value: object) -> object:
    """'30%' is 0.3, '100%' is no cap, and 500.0 is 500."""
    if isinstance(value, str):
        if value == "100%":
            return None
        with suppress(ValueError):
            value = float(value[:-1]) / 100 if value.endswith("%") else float(value)
    return int(value) if isinstance(value, float) and value >= 1 and value.is_integer() else value


class WarmupConfig(TrainingConfig):
    """The short training run at whose checkpoints gradients are taken (LESS, section 4.1)."""

    epochs: int = Field(default=4, ge=1, le=10_000, description="passes over the warm-up rows; one checkpoint each")
    fraction: float = Field(default=0.05, gt=0, le=1, description="share of the pool to warm up on, drawn at random")
    minimum_rows: int = Field(default=64, ge=1, le=10**9, description="fewest warm-up rows, where the pool has them")
    checkpoints: int | None = Field(
        default=None,
        ge=1,
        le=10_000,
        description="take gradients at this many of the last checkpoints only; null is all of them",
    )


class ProjectorConfig(Settings):
    """The random projection that turns a gradient into a feature."""

    shorthand = "name"
    name: Annotated[str, Flag("--projector", METHOD)] = Field(
        default="sjlt", min_length=1, max_length=64, description="a name from `datatools ls projectors`"
    )
    dim: Annotated[int, Flag("--dim", METHOD)] = Field(default=8192, ge=1, le=2**20, description="feature dimension")


class FeaturesConfig(Settings):
    """How gradient features are computed and stored."""

    method: str = Field(
        default="hooks",
        min_length=1,
        max_length=64,
        description="hooks (fast, completed by loop where needed), vmap or loop; loop is the definition",
    )
    token_budget: int = Field(default=1024, ge=1, le=2**24, description="padded tokens per batch; limits memory")
    dtype: Literal["float16", "bfloat16", "float32", "int8", "int4", "int1"] = Field(
        default="float16", description="how stored features are rounded (int8, int4, int1 as in QLESS)"
    )
    folder: FilePath | None = Field(
        default=None,
        description="where features are kept; null is the run's own folder. Runs that name the same one share them: "
        "another target on the same pool and checkpoints costs only the target's rows",
        json_schema_extra=ELSEWHERE,
    )
    checkpoints: Literal["all", "last"] | Annotated[list[Annotated[int, Field(ge=1)]], Field(min_length=1)] | None = (
        Field(
            default=None,
            description="the checkpoints at which gradients are taken: all, last, or a list of their steps; null is "
            "the method's own: all, and the last with gist",
            json_schema_extra=UNSAID,
        )
    )
    layers: (
        Annotated[str, Field(pattern="^(first|middle|last)-[1-9][0-9]{0,3}$")]
        | Annotated[list[Annotated[int, Field(ge=-10_000, le=10_000)]], Field(min_length=1, max_length=10_000)]
        | None
    ) = Field(
        default=None,
        description="the layers whose gradients become features: first-4, middle-4, last-4 (any number), or a list of "
        "layers, where -1 is the last; null is every trained parameter",
        json_schema_extra=UNSAID,
    )
    modules: Annotated[Names, Field(min_length=1)] | None = Field(
        default=None,
        description="the modules whose gradients become features, by a part of their names, such as "
        "[v_proj, o_proj] or mlp; null is every trained parameter",
        json_schema_extra=UNSAID,
    )
    layer: int = Field(
        default=-1,
        ge=-10_000,
        le=10_000,
        description="whose hidden states are compared (`rds`): 0 is the embeddings, 1 the first layer; -1 is the last "
        "layer, -2 the one before",
    )
    pooling: Literal["weighted", "mean", "last", "answer"] = Field(
        default="weighted",
        description="how the hidden states of a row become one vector: weighted (mean with weights 1, 2, ..., s), "
        "mean, last (of the last token), or answer (mean over the answer)",
    )
    rows_per_unit: int | None = Field(
        default=None,
        ge=1,
        le=2**20,
        description="rows per file, which is also the most that is lost when the run is killed",
    )
    adam_mode: Annotated[Literal["paper", "code", "precond_only"], Flag("--adam-mode", METHOD, "FORM")] = Field(
        default="paper",
        description="form of Adam's update: paper (eps outside the root, bias-corrected), code (as in LESS's code: "
        "eps inside the root, no correction), or precond_only (the gradient over sqrt(v), without the momentum that "
        "all rows share)",
    )


class Bm25Config(Settings):
    """How BM25 weighs words."""

    k1: float = Field(
        default=1.2, ge=0, le=1000, description="how slowly repetitions of a word saturate; 0 counts a word once"
    )
    b: float = Field(default=0.75, ge=0, le=1, description="how strongly long rows are discounted; 0 is not at all")


class GistConfig(Settings):
    """How gradients are compared in the span of the target's."""

    rank: int | None = Field(
        default=None,
        ge=1,
        le=10_000,
        description="how many directions of the target's gradients, the strongest ones; null is all of them",
    )
    update: Literal["optimizer", "plain"] = Field(
        default="optimizer", description="what a pool row is compared by: the optimizer's update, or its plain gradient"
    )


class AdaptationConfig(Settings):
    """A few steps of training on the target rows, after which rows are judged by their loss (`tov`, `tacs`)."""

    adapters: Literal["target", "subtask", "fold"] = Field(
        default="target",
        description="one adapter for the whole target, one per subtask, or one without each fold; each is a column, "
        "and `aggregate` makes one score of them",
    )
    depths: list[Annotated[int, Field(ge=1, le=10_000)]] = Field(
        default=[2, 8, 32],
        min_length=1,
        max_length=100,
        description="numbers of steps to choose from, by specificity on held-out target rows; a single one (with a "
        "single learning rate) is taken as it is, which costs less",
    )
    learning_rates: list[Annotated[float, Field(gt=0, le=100)]] = Field(
        default=[1e-5, 5e-5], min_length=1, max_length=100, description="constant learning rates to choose from"
    )
    batch_size: int = Field(default=4, ge=1, le=1_000_000, description="target rows per step")
    folds: int = Field(default=3, ge=2, le=1000, description="folds of the target; one after another is held out")
    generic_rows: int = Field(
        default=16,
        ge=1,
        le=10**6,
        description="pool rows, drawn at random, whose gradient stands for what is not the target",
    )
    length: Literal["mean", "sum", "capped"] = Field(
        default="mean",
        description="what is compared: the drop of the mean loss per token of the answer (mean), of its sum (sum), or "
        "the mean drop times the answer's length up to the mean length of the target's answers (capped)",
    )
    lora: LoraConfig = Field(
        default_factory=lambda: LoraConfig(rank=1, alpha=4.0), description="the adapters that are trained"
    )


class TargetsConfig(Settings):
    """How several targets share one selection."""

    shorthand = "share"
    share: Annotated[Literal["no", "union", "maxmin"], Flag("--targets", METHOD, "HOW")] = Field(
        default="no",
        description="several targets (one --target file each, or the column subtask of target rows): union lets them "
        "take turns, each its best row; maxmin gives the turn to the target that is served worst so far; no ranks rows "
        "by the one score that `aggregate` makes of all target rows",
        json_schema_extra=LATE | UNSAID,
    )
    budgets: dict[str, BudgetText] = Field(
        default={},
        description="rows for each target in place of `budget`, such as {maths: 3%, code: 100}",
        json_schema_extra=LATE | UNSAID,
    )

    @model_validator(mode="after")
    def _shared(self) -> Self:
        if self.budgets and self.share == "no":
            raise ValueError("budgets of targets need a way to share: --targets union (or maxmin)")
        return self


class MixtureConfig(Settings):
    """The sampling weights of sources that a selection suggests (weights.yaml)."""

    shorthand = "weights"
    weights: Literal["selection", "scores"] = Field(
        default="selection",
        description="selection: a source's share of the selected rows; scores: its share of the pool, times the "
        "exponential of its standardised mean score over the temperature",
        json_schema_extra=LATE | UNSAID,
    )
    temperature: float = Field(
        default=1.0,
        gt=0,
        le=1e6,
        description="of `weights: scores`; higher is closer to the pool's own mixture",
        json_schema_extra=LATE | UNSAID,
    )
    floor: float = Field(
        default=0.1,
        ge=0,
        le=1,
        description="share of the pool's own mixture in the weights, so that no source vanishes",
        json_schema_extra=LATE | UNSAID,
    )


class SelectConfig(RunSettings):
    """Select the training rows that move the model towards the target rows.

    Writes selected.jsonl, scores.parquet and report.html to --out. An interrupted run continues where it stopped.
    """

    examples = (
        "datatools select --model M --train pool.jsonl --target dev.jsonl --budget 5% --out runs/maths",
        "datatools select --model M --train pool.jsonl --target dev.jsonl --budget 5% --verify --out runs/verified",
        "datatools select --model M --train a.jsonl --train b.jsonl --method random --budget 500 --out runs/random",
        "datatools select settings.yaml --seed 1 --set projector.dim=4096",
        "datatools select runs/maths/run.yaml",
    )

    model: Annotated[ModelConfig, Flags("name chat trust_remote_code max_length device dtype quantize")] = Field(
        description="the model to select for"
    )
    train: Annotated[DataConfig, Flags("paths on_bad_row columns preference dedup", paths="--train")] = Field(
        description="the pool to select from"
    )
    target: Annotated[Names, Flag("--target", DATA, "FILE")] = Field(
        default=[], description="files with a few examples of what the model should get better at"
    )
    target_columns: Annotated[Columns | None, Flag("--target-columns", DATA, "OURS=YOURS")] = Field(
        default=None, description="columns of the target rows, as --columns; null tries the pool's, then detects them"
    )
    budget: Annotated[BudgetText, Flag("--budget", METHOD, "SIZE")] = Field(
        default="5%",
        description="how much to select: a share '5%', a count '500', or '20000 tokens'",
        json_schema_extra=LATE,
    )
    method: Annotated[str, OneOf(lambda: tuple(SCORERS)), Flag("--method", METHOD)] = Field(
        default=DEFAULT, description="a name from `datatools ls methods`: how rows are scored"
    )
    verify: Annotated[bool, Flag("--verify", METHOD)] = Field(
        default=False,
        description="choose by evidence (method auto): select by several candidates from one half of the target rows, "
        "train on each, measure on the other half, and keep the candidate that wins",
        json_schema_extra=LATE,
    )
    selector: Annotated[str | None, Flag("--selector", METHOD)] = Field(
        default=None,
        min_length=1,
        max_length=64,
        description="a name from `datatools ls selectors`: how rows are taken; null is the method's own, the highest "
        "scores or at random",
        json_schema_extra=LATE | UNSAID,
    )
    out: FilePath = Field(
        default=Path("runs/select"),
        description="folder of the run; an interrupted run in it is continued",
        json_schema_extra=ELSEWHERE,
    )
    objective: Annotated[Literal["ce", "dpo", "reward"], Flag("--objective", METHOD)] = Field(
        default="ce",
        description="what target rows are, for methods that take their gradients: ce is answers to learn; dpo pairs of "
        "a chosen and a rejected answer (preference: chosen is then set); reward answers with a number in the column "
        "reward",
        json_schema_extra=UNSAID,
    )
    lora: Annotated[LoraConfig, Flags("rank")] = Field(
        default_factory=LoraConfig, description="the parameters whose gradients are compared"
    )
    warmup: Annotated[WarmupConfig, Flags("optimizer learning_rate epochs batch_size")] = Field(
        default_factory=WarmupConfig, description="the warm-up run; not used with `checkpoints`"
    )
    checkpoints: Annotated[list[FilePath], Flag("--checkpoints", METHOD, "DIR")] = Field(
        default=[], max_length=1000, description="checkpoints of your own training run, instead of a warm-up"
    )
    features: Annotated[FeaturesConfig, Flags("adam_mode")] = Field(
        default_factory=FeaturesConfig, description="gradients and their storage"
    )
    projector: Annotated[ProjectorConfig, Flags("name dim")] = Field(
        default_factory=ProjectorConfig, description="random projection of gradients"
    )
    bm25: Bm25Config = Field(default_factory=Bm25Config, description="weights of words with `--method bm25`")
    gist: GistConfig = Field(default_factory=GistConfig, description="the span of the target's gradients (`gist`)")
    adaptation: AdaptationConfig = Field(
        default_factory=AdaptationConfig, description="steps on the target with `--method tov` and `tacs`"
    )
    training: TrainingConfig = Field(
        default_factory=TrainingConfig, description="how --verify trains on each candidate", json_schema_extra=LATE
    )
    metrics: Annotated[MetricsConfig, Flags("names extract allow_code_execution")] = Field(
        default_factory=MetricsConfig,
        description="what --verify measures besides the loss",
        json_schema_extra=LATE,
    )
    aggregate: str = Field(
        default="less",
        min_length=1,
        max_length=64,
        description="how the similarities to many target rows become one score per row: a name from `datatools ls "
        "aggregations`",
        json_schema_extra=LATE,
    )
    shortlist: float = Field(
        default=0.2,
        gt=0,
        le=1,
        description="with method auto: the share of the pool whose gradients are computed",
    )
    common: int | None = Field(
        default=None,
        ge=0,
        le=1000,
        description="remove what the updates of all rows share before they are compared (less, gist): the mean of a "
        "random sample of the pool and this many main directions around it; null removes nothing, as in the papers",
        json_schema_extra=LATE,
    )
    max_per_source: Annotated[int | float | None, BeforeValidator(_cap), Flag("--max-per-source", METHOD, "X")] = Field(
        default=None,
        gt=0,
        le=10**12,
        description="most rows per source: a count (500), or a share of the selection (0.3, 30%)",
        json_schema_extra=LATE,
    )

    engine: Annotated[EngineConfig, Flags("name workers")] = Field(
        default_factory=EngineConfig, description="the processes that share the work", json_schema_extra=VOLATILE
    )
    targets: Annotated[TargetsConfig, Flags("share")] = Field(
        default_factory=TargetsConfig, description="several targets at once"
    )
    mixture: MixtureConfig = Field(default_factory=MixtureConfig, description="suggested sampling weights of sources")

    @model_validator(mode="before")
    @classmethod
    def _pairs_are_read(cls, value: object) -> object:
        """Rows with two answers are read: by the chosen one, where a reader wants one row."""
        if not isinstance(value, dict) or value.get("objective") != "dpo":
            return value
        train = DataConfig.expand(value.get("train"))
        if isinstance(train, DataConfig):
            train = train.model_copy(update={"preference": "chosen"})
        elif isinstance(train, dict):
            train = {**train, "preference": "chosen"}
        return {**value, "train": train}

    @model_validator(mode="after")
    def _has_target(self) -> Self:
        if "target" in known(self.method).needs and not self.target:
            free = " or ".join(name for name in SCORERS if "target" not in known(name).needs)
            raise ValueError(
                f"method '{self.method}' compares with target rows and got none; name them with --target "
                f"FILE (setting 'target'), or use a method that needs none: --method {free}"
            )
        return self

    @model_validator(mode="after")
    def _has_candidates(self) -> Self:
        if self.verify and not known(self.method).candidates:
            able = " or ".join(name for name in SCORERS if known(name).candidates)
            raise ValueError(
                f"--verify compares the candidates of a method, and method '{self.method}' has none; leave it out, or "
                f"use --method {able}"
            )
        return self
