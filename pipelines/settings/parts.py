"""Sections that several commands share: the model, its rows, adapters, and how a model is trained."""

from typing import ClassVar, Literal

from pydantic import Field

from pipelines.settings.base import Columns, FilePath, Name, Names, Options, Scalar, Settings


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
