"""Sections that several commands share: the model, its rows, adapters, and how a model is trained."""

import re
from typing import Annotated, ClassVar, Literal

from pydantic import AfterValidator, Field

from pipelines.settings.base import Columns, FilePath, Name, Names, Options, Scalar, Settings
from pipelines.settings.marks import DATA, MODEL, TRAINING, VOLATILE, Flag


def _device(value: str) -> str:
    if re.fullmatch(r"auto|cpu|cuda(:\d{1,3})?|mps", value) is None:
        raise ValueError(f"{value!r} is no device; expected auto, cpu, cuda, cuda:N (the GPU of this number) or mps")
    return value


Device = Annotated[str, Field(max_length=64), AfterValidator(_device)]


class ModelConfig(Settings):
    """The model, and how rows are turned into its tokens."""

    shorthand = "name"
    name: Annotated[Name, Flag("--model", MODEL)] = Field(description="a folder, a hub name, or one .gguf file")
    revision: str | None = Field(
        default=None, description="the hub revision (branch, tag or commit); null is the newest"
    )
    device: Annotated[Device, Flag("--device", MODEL, "DEVICE")] = Field(
        default="auto",
        description="auto, cpu, cuda, cuda:N or mps; auto is the GPU that CUDA counts first, without one the CPU; of "
        "several workers on a machine each gets a GPU of its own",
        json_schema_extra=VOLATILE,
    )
    dtype: Annotated[Literal["auto", "float32", "bfloat16", "float16"], Flag("--dtype", MODEL, "TYPE")] = Field(
        default="auto",
        description="auto is bfloat16 on a GPU of CUDA, otherwise float32; float16 is for forward passes only "
        "(evaluate, and select with rds or loss)",
    )
    quantize: Annotated[Literal["none", "4bit", "8bit"], Flag("--quantize", MODEL, "BITS")] = Field(
        default="none",
        description="hold the weights of linear layers in 4bit (NF4, as in QLoRA) or 8bit, by bitsandbytes; adapters "
        "train on them",
    )
    attention: Literal["sdpa", "eager"] = Field(
        default="sdpa",
        description="implementation of attention; a model without sdpa (CodeGen, gpt-oss, Mamba) gets eager",
    )
    trust_remote_code: Annotated[bool, Flag("--trust-remote-code", MODEL)] = Field(
        default=False,
        description="run the Python code that comes with the model; a run records that it was allowed, and only this "
        "flag, given with every command, can allow it",
    )
    chat: Annotated[Name, Flag("--chat-template", MODEL)] = Field(
        default="auto", description="chat template: auto (the tokenizer's own), tulu (as in LESS), or a .jinja file"
    )
    max_length: Annotated[int | None, Flag("--max-length", MODEL)] = Field(
        default=None, ge=2, le=2**20, description="longest row in tokens; null is the most that the model takes"
    )
    on_long: Literal["truncate", "skip", "error"] = Field(
        default="truncate", description="what to do with a longer row"
    )
    adapter: Annotated[FilePath | None, Flag("--adapter", MODEL, "DIR")] = Field(
        default=None, description="folder of a LoRA adapter to load on top of the model"
    )


class LoraConfig(Settings):
    """Low-rank adapters: the parameters that are trained."""

    shorthand: ClassVar[str | None] = None
    rank: Annotated[int, Flag("--lora-rank", MODEL, off=0, off_means="trains every weight")] = Field(
        default=8, ge=1, le=4096, description="rank of each adapter"
    )
    alpha: float = Field(default=16.0, gt=0, le=1e6, description="adapters are scaled by alpha / rank")
    dropout: float = Field(default=0.0, ge=0, lt=1, description="dropout inside adapters while training")
    targets: Literal["attention", "auto"] | Names = Field(
        default="attention",
        description="the layers that get an adapter: attention is the linear layers of attention blocks (q_proj, "
        "k_proj, v_proj and o_proj of Llama), auto every linear layer but the head; or endings of their names",
    )


class DataConfig(Settings):
    """Rows: where they are, and what to do with unreadable and repeated ones."""

    shorthand = "paths"
    paths: Annotated[Names, Flag("--data", DATA, "FILE")] = Field(
        min_length=1,
        description="files (.jsonl .json .csv .parquet .arrow, also .gz .zst .xz .bz2), patterns ('a/*.jsonl'), "
        "folders (of files, or of save_to_disk), or hub names (hf:NAME or NAME:split)",
    )
    on_bad_row: Annotated[Literal["error", "skip", "quarantine"], Flag("--on-bad-row", DATA, "HOW")] = Field(
        default="error",
        description="a row that cannot be read: error stops, skip leaves it out and counts it, quarantine also writes "
        "it to quarantine.jsonl",
    )
    source_key: Annotated[str, Flag("--source-key", DATA)] = Field(
        default="dataset", min_length=1, max_length=256, description="the column that names a row's source"
    )
    dedup: Annotated[Literal["none", "exact", "near"], Flag("--dedup", DATA, "HOW")] = Field(
        default="none", description="drop rows with the same text (exact) or nearly the same text (near)"
    )
    near_threshold: float = Field(
        default=0.8, gt=0, le=1, description="Jaccard similarity at and above which rows are near duplicates"
    )
    columns: Annotated[Columns | None, Flag("--columns", DATA, "OURS=YOURS")] = Field(
        default=None,
        description="names of your columns, such as prompt=question,completion=answer; in YAML also as a mapping, and "
        "for single files as {file.jsonl: {...}}; null detects the usual formats",
    )
    preference: Annotated[Literal["chosen"] | None, Flag("--preference", DATA)] = Field(
        default=None, description="chosen reads rows with a chosen and a rejected answer as prompt and chosen answer"
    )


class TargetData(DataConfig):
    """Rows that are read next to a pool: its column names are tried where they have none of their own."""

    borrowed: bool = Field(default=False, description="the column names are the pool's; other formats are detected")


class ZerothOrderConfig(Settings):
    """How `gradient: zo` estimates the gradient from forward passes (MeZO and its family)."""

    estimator: Literal["two-sided", "one-sided", "forward"] = Field(
        default="two-sided",
        description="two-sided: f(p + eps z) and f(p - eps z); one-sided: f(p + eps z) and f(p); forward: the exact "
        "derivative along z, by forward-mode differentiation",
    )
    eps: float = Field(default=1e-3, gt=0, le=100, description="how far the weights move; 1e-2 suits LoRA")
    q: int = Field(
        default=1, ge=1, le=10_000, description="directions per step; two forward passes each, one-sided q + 1 in all"
    )
    sign: Literal["scalar", "elementwise"] | None = Field(
        default=None,
        description="sign of the estimate: elementwise (the paper of ZO-SGD-Sign), scalar (its code); null is none",
    )
    conserve: bool = Field(
        default=False,
        description="keep the best of the step, its opposite, and no step; only for optimizer sgd without momentum",
    )
    sparsity: float = Field(default=0.0, ge=0, lt=1, description="share of the weights that a direction leaves alone")
    mask: Literal["uniform", "normal"] = Field(
        default="uniform",
        description="normal repeats an error of the published code: it drops Phi(sparsity), 0.69 for 0.5",
    )
    sparse_by: Literal["layer", "global"] = Field(
        default="layer", description="the same share of every tensor, or its share of the smallest weights of all"
    )
    mask_steps: int = Field(default=1, ge=1, le=10**9, description="number of steps for which a mask is kept")
    blocks: Literal["none", "layer", "module"] = Field(
        default="none", description="estimate layer by layer, or module by module (attention, feed-forward, ...)"
    )
    block_order: Literal["coordinate", "joint"] = Field(
        default="coordinate", description="update each block before the next is estimated, or all at the end"
    )
    first_order_layers: int = Field(
        default=0,
        ge=0,
        le=10_000,
        description="number of last layers that backpropagation trains, with what follows them",
    )
    restore: Literal["inplace", "copy"] = Field(
        default="inplace", description="copy restores the weights exactly, from a copy: for 16-bit weights"
    )


class TrainingConfig(Settings):
    """One training run."""

    optimizer: Annotated[str, Flag("--optimizer", TRAINING)] = Field(
        default="adamw", min_length=1, max_length=64, description="a name from `datatools ls optimizers`"
    )
    optimizer_options: dict[str, Scalar | list[Scalar] | dict[str, str | Options]] = Field(
        default={},
        description="hyper-parameters of the optimizer, such as {betas: [0.9, 0.95]}; an optimizer for matrices also "
        "takes {assign: {router: adamw}}, which maps part of a parameter's name to matrix, adamw or settings, and an "
        "elementwise one {wrapper: cautious} or {wrapper: grams}",
    )
    gradient: Annotated[Literal["backprop", "zo"], Flag("--gradient", TRAINING)] = Field(
        default="backprop",
        description="backprop, or zo: gradients estimated from forward passes alone, in the memory of inference",
    )
    zo: ZerothOrderConfig = Field(
        default_factory=ZerothOrderConfig, description="how `gradient: zo` estimates the gradient"
    )
    learning_rate: Annotated[float, Flag("--learning-rate", TRAINING)] = Field(
        default=1e-3, ge=0, le=100, description="peak learning rate"
    )
    weight_decay: Annotated[float, Flag("--weight-decay", TRAINING, "W")] = Field(
        default=0.0,
        ge=0,
        le=100,
        description="decoupled weight decay; norms and biases have none, as with Trainer (unless decay_all)",
    )
    decay_all: bool = Field(default=False, description="apply weight decay to norms and biases too; Trainer does not")
    rounding: Annotated[Literal["auto", "nearest", "stochastic", "master"], Flag("--rounding", TRAINING, "HOW")] = (
        Field(
            default="auto",
            description="rounding of bfloat16 weights while they train: stochastic (up or down at random, right on "
            "average; auto is this), master (float32 weights beside them: 4 more bytes per weight), or nearest, which "
            "loses small updates and reports how much",
        )
    )
    schedule: Annotated[str, Flag("--schedule", TRAINING)] = Field(
        default="linear",
        min_length=1,
        max_length=64,
        description="a name from `datatools ls schedules`",
    )
    schedule_options: Options = Field(
        default={}, description="options of the schedule, such as {min_ratio: 0.1}; see `datatools ls schedules`"
    )
    warmup_ratio: float = Field(
        default=0.03,
        ge=0,
        le=1,
        description="share of the steps over which the learning rate rises; one_cycle has its own setting, pct_start",
    )
    block_ratios: Literal["paper"] | dict[str, float] | None = Field(
        default=None,
        description="factors of the learning rate by kind of block: paper (arXiv 2502.19002), or {embedding: 10, qk: "
        "8, ffn: 6, vo: 4, norm: 1, head: 1}; null is the same rate for all",
    )
    epochs: Annotated[int, Flag("--epochs", TRAINING)] = Field(
        default=3, ge=1, le=10_000, description="passes over the rows"
    )
    batch_size: Annotated[int, Flag("--batch-size", TRAINING)] = Field(
        default=8, ge=1, le=1_000_000, description="rows per optimizer step, over all micro-batches"
    )
    max_steps: int | None = Field(default=None, ge=1, le=10**9, description="stop after this many optimizer steps")
    micro_tokens: int = Field(
        default=2048,
        ge=1,
        le=2**24,
        description="padded tokens per forward pass; limits memory and changes results only by rounding",
    )
    gradient_clip: float | None = Field(
        default=1.0,
        gt=0,
        le=1e9,
        description="largest norm of the gradient; with null it is not clipped, nor with gradient: zo",
    )
    nonfinite_steps: int = Field(
        default=5,
        ge=1,
        le=10_000,
        description="a step whose loss or gradient is not finite is skipped; this many in a row stop the run",
    )
