"""`datatools`: each command builds a configuration and hands it to its pipeline.

Nothing heavy is imported before a command needs it: help answers at once. Exit codes: 0, 1 (a bug), 2 (usage),
3 (data), 4 (environment), 130 (Ctrl-C), 143 (SIGTERM).
"""

import errno
import inspect
import itertools
import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext, redirect_stdout
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer
import typer.core

from pipelines.runs import threads

if TYPE_CHECKING:
    from pipelines.settings.base import Settings

app = typer.Typer(
    name="datatools",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120},
    help="Which training rows make a language model better at what you want, and proof that they do.\n\n"
    "\b\nStart with `datatools demo`,\nthen `datatools select --help`.\nSomething does not work: `datatools doctor`.",
)

F = TypeVar("F", bound=Callable[..., None])


_WIDTH = 56  # of an example: a narrow terminal shows it as it is
_WORD = re.compile(r"""(?:[^\s'"]|'[^']*'|"[^"]*")+""")


class _Command(typer.core.TyperCommand):
    """A command whose help ends with examples that can be pasted: nothing pads or wraps them."""

    examples: tuple[str, ...] = ()

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Typer's help, then the examples."""
        super().format_help(ctx, formatter)
        typer.echo("\n".join([" Examples:", *self.examples]))


def pasteable(command: str) -> str:
    """A command in lines of at most `_WIDTH` characters, broken with backslashes; an option stays with its value."""
    words: list[str] = []
    for word in _WORD.findall(command):
        if words and words[-1].startswith("--") and " " not in words[-1] and not word.startswith("-"):
            words[-1] += f" {word}"
        else:
            words.append(word)
    lines = [f"  {words[0]}"]
    for word in words[1:]:
        if len(lines[-1]) + len(word) + 3 <= _WIDTH + 2:
            lines[-1] += f" {word}"
        else:
            lines.append(f"      {word}")
    return " \\\n".join(lines)


def _command(name: str, *examples: str) -> Callable[[F], F]:
    """Register a command; its help is the docstring and the examples. A line that ends in a backslash goes on."""
    whole = "\n".join(examples).replace("\\\n", " ").split("\n")
    shown = type("_Command", (_Command,), {"examples": tuple(map(pasteable, whole))})

    def register(function: F) -> F:
        text = inspect.getdoc(function) or ""
        first = re.split(r"(?<=[.?:]) ", text.split("\n")[0])[0].rstrip(":")
        return app.command(name, cls=shown, help=text, short_help=first)(function)

    return register


# ---------------------------------------------------------------------------------------------------------------- flags
# None is "not given": defaults live in `settings.config`, and `show_default` repeats them (a test compares the two).

_DATA, _MODEL, _METHOD, _TRAINING, _RUN = "Data", "Model", "Method", "Training", "Run"


def _flag(name: str, text: str, panel: str, default: object = False, **more: Any) -> Any:
    shown = default if default is False else str(default)
    return typer.Option(name, help=text, rich_help_panel=panel, show_default=shown, **more)


YamlArgument = Annotated[
    Path | None,
    typer.Argument(metavar="YAML", help="settings in a file; a run's own run.yaml replays it", show_default=False),
]
YamlOption = Annotated[Path | None, _flag("--config", "the same, as an option", _RUN, metavar="YAML")]
SetOption = Annotated[
    list[str] | None,
    _flag("--set", "any other setting, such as projector.dim=4096; see --print-config", _RUN, metavar="A.B=C"),
]
OutOption = Annotated[Path | None, _flag("--out", "folder of the run", _RUN, metavar="DIR")]
SeedOption = Annotated[int | None, _flag("--seed", "the one seed of everything random", _RUN, 0, metavar="N")]
OverwriteOption = Annotated[bool, _flag("--overwrite", "move an existing run aside to DIR.old-N", _RUN)]
AcceptOption = Annotated[
    list[str] | None,
    _flag("--accept-change", "continue a run although this changed: code, data, model ...", _RUN, metavar="NAME"),
]
DryOption = Annotated[bool, _flag("--dry-run", "check that everything loads, say what it costs, stop", _RUN)]
PrintOption = Annotated[bool, _flag("--print-config", "print every setting with its meaning, and stop", _RUN)]
QuietOption = Annotated[bool, _flag("--quiet", "only warnings and errors", _RUN)]

ModelOption = Annotated[str | None, _flag("--model", "a folder, a hub name, or one .gguf file", _MODEL, metavar="NAME")]
TrustOption = Annotated[bool, _flag("--trust-remote-code", "run the Python code that comes with the model", _MODEL)]
AdapterOption = Annotated[Path | None, _flag("--adapter", "a LoRA adapter to load on top", _MODEL, metavar="DIR")]
ChatOption = Annotated[
    str | None, _flag("--chat-template", "auto, tulu, or a .jinja file", _MODEL, "auto", metavar="NAME")
]
LengthOption = Annotated[
    int | None, _flag("--max-length", "longest row in tokens; else what the model takes", _MODEL, metavar="N")
]
LoraRankOption = Annotated[int | None, _flag("--lora-rank", "rank of the adapters", _MODEL, 8, metavar="N")]

BadRowOption = Annotated[
    str | None,
    _flag("--on-bad-row", "rows that cannot be read: error, skip or quarantine", _DATA, "error", metavar="HOW"),
]
ColumnsOption = Annotated[
    list[str] | None,
    _flag("--columns", "names of your columns: prompt=question,completion=answer", _DATA, metavar="OURS=YOURS"),
]
TargetColumnsOption = Annotated[
    list[str] | None,
    _flag("--target-columns", "those of the target rows; else the same, or detected", _DATA, metavar="OURS=YOURS"),
]
PreferenceOption = Annotated[
    str | None,
    _flag("--preference", "chosen: rows with a chosen and a rejected answer are the chosen one", _DATA, metavar="NAME"),
]
DedupOption = Annotated[
    str | None, _flag("--dedup", "drop repeated rows: none, exact or near", _DATA, "none", metavar="HOW")
]

OptimizerOption = Annotated[
    str | None, _flag("--optimizer", "see: datatools ls optimizers", _TRAINING, "adamw", metavar="NAME")
]
ScheduleOption = Annotated[
    str | None, _flag("--schedule", "see: datatools ls schedules", _TRAINING, "linear", metavar="NAME")
]
LearningRateOption = Annotated[
    float | None, _flag("--learning-rate", "peak learning rate", _TRAINING, 0.001, metavar="X")
]
GradientOption = Annotated[
    str | None,
    _flag("--gradient", "backprop, or zo: forward passes only, in the memory of inference", _TRAINING, "backprop",
          metavar="NAME"),
]  # fmt: skip
EpochsOption = Annotated[int | None, _flag("--epochs", "passes over the rows", _TRAINING, 3, metavar="N")]
WarmupEpochsOption = Annotated[int | None, _flag("--epochs", "passes over the warm-up rows", _TRAINING, 4, metavar="N")]
BatchSizeOption = Annotated[int | None, _flag("--batch-size", "rows an optimizer step", _TRAINING, 8, metavar="N")]


# ------------------------------------------------------------------------------------------------------------- commands


@_command(
    "select",
    "datatools select --model M --train pool.jsonl --target dev.jsonl \\",
    "    --budget 5% --out runs/less",
    "datatools select --model M --train a.jsonl --train b.jsonl \\",
    "    --method random --budget 500 --out runs/random",
    "datatools select settings.yaml --seed 1 --set projector.dim=4096",
    "datatools select runs/less/run.yaml",
)
def select(
    yaml: YamlArgument = None,
    model: ModelOption = None,
    train: Annotated[
        list[str] | None, _flag("--train", "rows to select from; may be repeated", _DATA, metavar="FILE")
    ] = None,
    target: Annotated[
        list[str] | None,
        _flag("--target", "a few rows like those to get better at; may be repeated", _DATA, metavar="FILE"),
    ] = None,
    budget: Annotated[
        str | None, _flag("--budget", "how much to select: 5%, 500, or '20000 tokens'", _METHOD, "5%", metavar="SIZE")
    ] = None,
    out: OutOption = None,
    seed: SeedOption = None,
    method: Annotated[
        str | None, _flag("--method", "see: datatools ls methods", _METHOD, "less", metavar="NAME")
    ] = None,
    on_bad_row: BadRowOption = None,
    columns: ColumnsOption = None,
    target_columns: TargetColumnsOption = None,
    preference: PreferenceOption = None,
    dedup: DedupOption = None,
    max_per_source: Annotated[
        str | None, _flag("--max-per-source", "most rows a source: 500, or a share such as 0.3", _METHOD, metavar="X")
    ] = None,
    checkpoints: Annotated[
        list[Path] | None,
        _flag(
            "--checkpoints", "of your own training run, instead of a warm-up; may be repeated", _METHOD, metavar="DIR"
        ),
    ] = None,
    adam_mode: Annotated[
        str | None,
        _flag("--adam-mode", "form of Adam's update: paper, code or precond_only", _METHOD, "paper", metavar="FORM"),
    ] = None,
    projector: Annotated[
        str | None, _flag("--projector", "see: datatools ls projectors", _METHOD, "sjlt", metavar="NAME")
    ] = None,
    dim: Annotated[int | None, _flag("--dim", "numbers a gradient feature", _METHOD, 8192, metavar="N")] = None,
    chat_template: ChatOption = None,
    trust_remote_code: TrustOption = False,
    max_length: LengthOption = None,
    lora_rank: LoraRankOption = None,
    optimizer: OptimizerOption = None,
    learning_rate: LearningRateOption = None,
    epochs: WarmupEpochsOption = None,
    batch_size: BatchSizeOption = None,
    config: YamlOption = None,
    set_: SetOption = None,
    overwrite: OverwriteOption = False,
    accept_change: AcceptOption = None,
    dry_run: DryOption = False,
    print_config: PrintOption = False,
    quiet: QuietOption = False,
) -> None:
    """Select the training rows that move the model towards the target rows.

    Writes selected.jsonl, scores.parquet and report.html to --out. Stopped runs go on where they were.
    """
    from pipelines.settings.select import SelectConfig

    flags = {
        "model.name": model,
        "model.chat": chat_template,
        "model.trust_remote_code": trust_remote_code or None,
        "model.max_length": max_length,
        "train.paths": train,
        "train.on_bad_row": on_bad_row,
        "train.columns": columns,
        "train.preference": preference,
        "target_columns": target_columns,
        "train.dedup": dedup,
        "target": target,
        "budget": budget,
        "method": method,
        "out": out,
        "seed": seed,
        "max_per_source": max_per_source,
        "checkpoints": checkpoints,
        "features.adam_mode": adam_mode,
        "projector.name": projector,
        "projector.dim": dim,
        "lora.rank": lora_rank,
        "warmup.optimizer": optimizer,
        "warmup.learning_rate": learning_rate,
        "warmup.epochs": epochs,
        "warmup.batch_size": batch_size,
        "overwrite": overwrite or None,
        "dry_run": dry_run or None,
        "accept_change": accept_change,
    }
    _launch(SelectConfig, "pipelines.select.run:run", _yaml(yaml, config), flags, set_, print_config, quiet)


@_command(
    "train",
    "datatools train --model M --data runs/select/selected.jsonl --out runs/new",
    "datatools train --model M --data a.jsonl --data b.jsonl --optimizer muon",
    "datatools train --model M --data a.jsonl --lora-rank 0 --learning-rate 2e-5",
    "datatools train --model M --data a.jsonl --optimizer lion --schedule cosine --learning-rate 1e-4",
    "datatools train --model M --data a.jsonl --order runs/order/order.npz --lora-rank 0",
    "datatools train --model M --data a.jsonl --coreset colm --large-batch 128 --keep 64 --source-key dataset",
    "datatools train --model M --data a.jsonl --gradient zo --optimizer sgd --learning-rate 1e-5 --lora-rank 0",
    "datatools train --model M --data a.jsonl --gradient zo --optimizer adamw --learning-rate 1e-4 \\",
    "    --set training.zo.eps=1e-2 --set training.zo.q=4 --set training.zo.sparsity=0.5",
)
def train(
    yaml: YamlArgument = None,
    model: ModelOption = None,
    data: Annotated[
        list[str] | None, _flag("--data", "rows to train on; may be repeated", _DATA, metavar="FILE")
    ] = None,
    source_key: Annotated[
        str | None, _flag("--source-key", "the column that names a row's source", _DATA, "dataset", metavar="NAME")
    ] = None,
    out: OutOption = None,
    seed: SeedOption = None,
    on_bad_row: BadRowOption = None,
    columns: ColumnsOption = None,
    preference: PreferenceOption = None,
    dedup: DedupOption = None,
    adapter: AdapterOption = None,
    chat_template: ChatOption = None,
    trust_remote_code: TrustOption = False,
    max_length: LengthOption = None,
    lora_rank: Annotated[
        int | None, _flag("--lora-rank", "rank of the adapters; 0 trains every weight", _MODEL, 8, metavar="N")
    ] = None,
    gradient: GradientOption = None,
    optimizer: OptimizerOption = None,
    schedule: ScheduleOption = None,
    learning_rate: LearningRateOption = None,
    epochs: EpochsOption = None,
    batch_size: BatchSizeOption = None,
    weight_decay: Annotated[
        float | None,
        _flag("--weight-decay", "decoupled; norms and biases have none, as with Trainer", _TRAINING, 0.0, metavar="W"),
    ] = None,
    rounding: Annotated[
        str | None,
        _flag(
            "--rounding", "of bfloat16 weights: stochastic, master (float32), nearest", _TRAINING, "auto", metavar="HOW"
        ),
    ] = None,
    coreset: Annotated[
        str | None,
        _flag("--coreset", "colm: train each step on rows that stand for a larger batch", _TRAINING, metavar="NAME"),
    ] = None,
    large_batch: Annotated[
        int | None,
        _flag("--large-batch", "rows that --coreset draws a step; else twice those kept", _TRAINING, metavar="N"),
    ] = None,
    keep: Annotated[
        int | None, _flag("--keep", "rows that --coreset keeps of them; else --batch-size", _TRAINING, metavar="N")
    ] = None,
    order: Annotated[
        Path | None, _flag("--order", "train in this order: an order.npz of datatools order", _TRAINING, metavar="FILE")
    ] = None,
    eval_data: Annotated[
        list[str] | None,
        _flag("--eval-data", "held-out rows; the weights of their lowest loss are kept", _DATA, metavar="FILE"),
    ] = None,
    eval_every: Annotated[
        int | None, _flag("--eval-every", "steps between evaluations; else one an epoch", _TRAINING, metavar="N")
    ] = None,
    patience: Annotated[
        int | None, _flag("--patience", "stop after N evaluations without a new lowest loss", _TRAINING, metavar="N")
    ] = None,
    report_to: Annotated[
        str | None,
        _flag("--report-to", "tensorboard, wandb or trackio, while the run lasts", _RUN, "none", metavar="NAME"),
    ] = None,
    config: YamlOption = None,
    set_: SetOption = None,
    overwrite: OverwriteOption = False,
    accept_change: AcceptOption = None,
    dry_run: DryOption = False,
    print_config: PrintOption = False,
    quiet: QuietOption = False,
) -> None:
    """Train a model on rows, with any optimizer of the suite.

    Writes checkpoints and the trained weights or adapter to --out. Stopped runs go on where they were.
    """
    from pipelines.settings.train import TrainConfig

    flags = {
        "model.name": model,
        "model.adapter": adapter,
        "model.chat": chat_template,
        "model.trust_remote_code": trust_remote_code or None,
        "model.max_length": max_length,
        "data.paths": data,
        "data.on_bad_row": on_bad_row,
        "data.columns": columns,
        "data.preference": preference,
        "data.dedup": dedup,
        "out": out,
        "seed": seed,
        "data.source_key": source_key,
        **_training_flags(optimizer, learning_rate, epochs, batch_size),
        "training.weight_decay": weight_decay,
        "training.rounding": rounding,
        "eval_data": eval_data,
        "eval_every": eval_every,
        "patience": patience,
        "report_to": report_to,
        "order": order,
        "coreset.name": coreset,
        "coreset.large_batch": large_batch,
        "coreset.keep": keep,
        "training.gradient": gradient,
        "training.schedule": schedule,
        "lora.rank": lora_rank or None,
        "overwrite": overwrite or None,
        "dry_run": dry_run or None,
        "accept_change": accept_change,
    }
    sets = _sets(lora_rank, set_)
    _launch(TrainConfig, "pipelines.training.train:run", _yaml(yaml, config), flags, sets, print_config, quiet)


@_command(
    "order",
    "datatools order validate --model M --data a.jsonl --batches 32 --orders 30 \\",
    "    --estimators pairwise,reduced,table --out runs/order --seed 0",
    "datatools order search --out runs/order",
    "datatools order map --out runs/order --set map_batches=8",
    "datatools train --model M --data a.jsonl --order runs/order/order.npz --lora-rank 0",
)
def order(
    task: Annotated[
        str,
        typer.Argument(
            metavar="TASK", help="record, estimate, search, validate or map; or a run's run.yaml", show_default=False
        ),
    ],
    yaml: YamlArgument = None,
    model: ModelOption = None,
    data: Annotated[
        list[str] | None, _flag("--data", "rows to train on; may be repeated", _DATA, metavar="FILE")
    ] = None,
    validation: Annotated[
        list[str] | None,
        _flag("--validation", "held-out rows whose loss counts; else up to 64 of --data", _DATA, metavar="FILE"),
    ] = None,
    out: OutOption = None,
    seed: SeedOption = None,
    batches: Annotated[int | None, _flag("--batches", "batches to order", _METHOD, 32, metavar="T")] = None,
    grouping: Annotated[
        str | None, _flag("--grouping", "auto, batches of mixed rows, or of one source", _METHOD, "auto", metavar="HOW")
    ] = None,
    orders: Annotated[
        int | None, _flag("--orders", "random orders to estimate, or to retrain to validate", _METHOD, 16, metavar="R")
    ] = None,
    estimators: Annotated[
        str | None,
        _flag(
            "--estimators",
            "comma-separated; known: pairwise, reduced, moments, own-moments, table, groups",
            _METHOD,
            "pairwise,reduced",
            metavar="NAMES",
        ),
    ] = None,
    references: Annotated[
        int | None, _flag("--references", "reference orders to estimate from", _METHOD, 1, metavar="N")
    ] = None,
    search: Annotated[
        str | None, _flag("--search", "local, genetic, borda or random", _METHOD, "local", metavar="HOW")
    ] = None,
    warmup_steps: Annotated[
        int | None, _flag("--warmup-steps", "steps on other rows before", _TRAINING, 64, metavar="N")
    ] = None,
    on_bad_row: Annotated[
        str | None,
        _flag("--on-bad-row", "rows that cannot be read: error, skip or quarantine", _DATA, "skip", metavar="HOW"),
    ] = None,
    columns: ColumnsOption = None,
    validation_columns: Annotated[
        list[str] | None,
        _flag("--validation-columns", "those of --validation; else the same, or detected", _DATA, metavar="OURS=YOURS"),
    ] = None,
    preference: PreferenceOption = None,
    chat_template: ChatOption = None,
    trust_remote_code: TrustOption = False,
    max_length: LengthOption = None,
    lora_rank: Annotated[
        int | None, _flag("--lora-rank", "rank of the adapters; 0 trains every weight", _MODEL, 0, metavar="N")
    ] = None,
    optimizer: OptimizerOption = None,
    schedule: Annotated[
        str | None, _flag("--schedule", "see: datatools ls schedules", _TRAINING, "constant", metavar="NAME")
    ] = None,
    learning_rate: Annotated[
        float | None, _flag("--learning-rate", "peak learning rate", _TRAINING, 0.0001, metavar="X")
    ] = None,
    epochs: Annotated[int | None, _flag("--epochs", "passes over the batches", _TRAINING, 1, metavar="N")] = None,
    batch_size: BatchSizeOption = None,
    config: YamlOption = None,
    set_: SetOption = None,
    overwrite: OverwriteOption = False,
    accept_change: AcceptOption = None,
    dry_run: DryOption = False,
    print_config: PrintOption = False,
    quiet: QuietOption = False,
) -> None:
    """What would another order of training have done?

    Estimates it from one recorded run, without retraining. Tasks share the
    folder --out, and take its settings over: record the run; estimate losses of
    orders; search a better one (order.npz); validate estimates against true
    retrainings; map what the place of a batch does. Writes report.html.
    """
    from datatools import UsageError, did_you_mean
    from pipelines.settings.load import order_base
    from pipelines.settings.order import ORDER_TASKS, OrderConfig

    again = task not in ORDER_TASKS and yaml is None and Path(task).expanduser().is_file()
    if again:  # a run's own run.yaml, which says what to do
        yaml = Path(task)
    elif task not in ORDER_TASKS:
        raise UsageError(f"order has no task {task!r}{did_you_mean(task, ORDER_TASKS)}")
    path = _yaml(yaml, config)
    flags = {
        "task": None if again else task,
        "model.name": model,
        "model.chat": chat_template,
        "model.trust_remote_code": trust_remote_code or None,
        "model.max_length": max_length,
        "data.paths": data,
        "data.on_bad_row": on_bad_row,
        "data.columns": columns,
        "data.preference": preference,
        "validation_columns": validation_columns,
        "validation": validation,
        "out": out,
        "seed": seed,
        "batches": batches,
        "grouping": grouping,
        "orders": orders,
        "estimators": None if estimators is None else [name.strip() for name in estimators.split(",") if name.strip()],
        "references": references,
        "search": search,
        "warmup_steps": warmup_steps,
        **_training_flags(optimizer, learning_rate, epochs, batch_size),
        "training.schedule": schedule,
        "lora.rank": lora_rank or None,
        "overwrite": overwrite or None,
        "dry_run": dry_run or None,
        "accept_change": accept_change,
    }
    base, name = order_base(out) if path is None and not overwrite else ({}, "")
    sets = _sets(lora_rank, set_)
    _launch(OrderConfig, "pipelines.order.run:run", path, flags, sets, print_config, quiet, base=base, base_name=name)


@_command(
    "evaluate",
    "datatools evaluate --model M --data test.jsonl",
    "datatools evaluate --model M --adapter runs/new/adapter --data test.jsonl",
)
def evaluate(
    yaml: YamlArgument = None,
    model: ModelOption = None,
    adapter: AdapterOption = None,
    data: Annotated[list[str] | None, _flag("--data", "held-out rows; may be repeated", _DATA, metavar="FILE")] = None,
    on_bad_row: BadRowOption = None,
    columns: ColumnsOption = None,
    preference: PreferenceOption = None,
    chat_template: ChatOption = None,
    trust_remote_code: TrustOption = False,
    max_length: LengthOption = None,
    config: YamlOption = None,
    set_: SetOption = None,
    print_config: PrintOption = False,
    quiet: QuietOption = False,
) -> None:
    """Loss of a model on rows: one line of JSON on stdout, everything else on stderr."""
    from pipelines.settings.train import EvaluateConfig

    flags = {
        "model.name": model,
        "model.adapter": adapter,
        "model.chat": chat_template,
        "model.trust_remote_code": trust_remote_code or None,
        "model.max_length": max_length,
        "data.paths": data,
        "data.on_bad_row": on_bad_row,
        "data.columns": columns,
        "data.preference": preference,
    }
    _launch(
        EvaluateConfig, "pipelines.training.evaluation:evaluate", _yaml(yaml, config), flags, set_, print_config, quiet
    )


@_command(
    "audit",
    "datatools audit --selected runs/select/selected.jsonl --pool pool.jsonl \\",
    "    --test test.jsonl --against random,random-length,tfidf,rds --seeds 3",
)
def audit(
    yaml: YamlArgument = None,
    selected: Annotated[Path | None, _flag("--selected", "selected.jsonl of a run", _DATA, metavar="FILE")] = None,
    pool: Annotated[
        list[str] | None, _flag("--pool", "what it was selected from; else as in the run", _DATA, metavar="FILE")
    ] = None,
    test: Annotated[
        list[str] | None, _flag("--test", "held-out rows like the target, not used to select", _DATA, metavar="FILE")
    ] = None,
    target: Annotated[
        list[str] | None, _flag("--target", "for baselines that need it; else as in the run", _DATA, metavar="FILE")
    ] = None,
    columns: Annotated[
        list[str] | None,
        _flag("--columns", "names of the pool's columns; else as in the run", _DATA, metavar="OURS=YOURS"),
    ] = None,
    target_columns: Annotated[
        list[str] | None,
        _flag("--target-columns", "of the target rows; else as in the run", _DATA, metavar="OURS=YOURS"),
    ] = None,
    test_columns: Annotated[
        list[str] | None,
        _flag("--test-columns", "of the test rows; else they are detected", _DATA, metavar="OURS=YOURS"),
    ] = None,
    preference: PreferenceOption = None,
    against: Annotated[
        str | None,
        _flag(
            "--against",
            "baselines, comma-separated; known: random, random-length, tfidf, rds, loss, full",
            _METHOD,
            "random,random-length",
            metavar="NAMES",
        ),
    ] = None,
    seeds: Annotated[int | None, _flag("--seeds", "training runs an arm", _METHOD, 3, metavar="N")] = None,
    allow_overlap: Annotated[
        bool, _flag("--allow-overlap", "go on although test rows are in the pool or the target", _DATA)
    ] = False,
    model: Annotated[
        str | None, _flag("--model", "the model to train; else as in the run", _MODEL, metavar="NAME")
    ] = None,
    trust_remote_code: TrustOption = False,
    out: Annotated[
        Path | None, _flag("--out", "folder of the audit; else 'audit' in the run's folder", _RUN, metavar="DIR")
    ] = None,
    seed: SeedOption = None,
    lora_rank: Annotated[
        int | None,
        _flag("--lora-rank", "rank of the adapters; 0 trains every weight; else as in the run", _MODEL, metavar="N"),
    ] = None,
    optimizer: Annotated[
        str | None,
        _flag("--optimizer", "see: datatools ls optimizers; else as in the run", _TRAINING, metavar="NAME"),
    ] = None,
    learning_rate: Annotated[
        float | None, _flag("--learning-rate", "peak learning rate; else as in the run", _TRAINING, metavar="X")
    ] = None,
    epochs: Annotated[
        int | None, _flag("--epochs", "passes over the rows; else as in the run", _TRAINING, metavar="N")
    ] = None,
    batch_size: Annotated[
        int | None, _flag("--batch-size", "rows an optimizer step; else as in the run", _TRAINING, metavar="N")
    ] = None,
    config: YamlOption = None,
    set_: SetOption = None,
    overwrite: OverwriteOption = False,
    accept_change: AcceptOption = None,
    dry_run: DryOption = False,
    print_config: PrintOption = False,
    quiet: QuietOption = False,
) -> None:
    """Is the selection better than simple baselines? Trains on each with several seeds and compares held-out losses.

    Model, target and training recipe are those of the run that made the selection, unless given here.
    """
    from pipelines.settings.audit import AuditConfig
    from pipelines.settings.load import audit_base

    path = _yaml(yaml, config)
    flags = {
        "selected": selected,
        "pool.paths": pool,
        "test.paths": test,
        "target": target,
        "pool.columns": columns,
        "target_columns": target_columns,
        "test.columns": test_columns,
        "pool.preference": preference,
        "test.preference": preference,
        "against": None if against is None else [name.strip() for name in against.split(",") if name.strip()],
        "seeds": seeds,
        "allow_overlap": allow_overlap or None,
        "model.name": model,
        "model.trust_remote_code": trust_remote_code or None,
        "out": out,
        "seed": seed,
        **_training_flags(optimizer, learning_rate, epochs, batch_size),
        "lora.rank": lora_rank or None,
        "overwrite": overwrite or None,
        "dry_run": dry_run or None,
        "accept_change": accept_change,
    }
    base, name = audit_base(selected, path)
    sets = _sets(lora_rank, set_)
    _launch(
        AuditConfig, "pipelines.select.audit:run", path, flags, sets, print_config, quiet, base=base, base_name=name
    )


@_command(
    "diagnose",
    "datatools diagnose --model M --data a.jsonl --out runs/look",
    "datatools diagnose --model M --data a.jsonl --checks sharpness,spectrum --rows 64",
    "datatools diagnose --model M --data a.jsonl --set probes=50 --set lanczos_steps=50",
)
def diagnose(
    yaml: YamlArgument = None,
    model: ModelOption = None,
    data: Annotated[
        list[str] | None, _flag("--data", "rows whose loss is looked at; may be repeated", _DATA, metavar="FILE")
    ] = None,
    checks: Annotated[
        str | None,
        _flag(
            "--checks",
            "comma-separated: sharpness, spectrum, smoothness, conditioning, double-descent; else all",
            _METHOD,
            metavar="NAMES",
        ),
    ] = None,
    rows: Annotated[int | None, _flag("--rows", "rows to look at, drawn at random", _DATA, 16, metavar="N")] = None,
    out: OutOption = None,
    seed: SeedOption = None,
    on_bad_row: BadRowOption = None,
    columns: ColumnsOption = None,
    preference: PreferenceOption = None,
    adapter: AdapterOption = None,
    chat_template: ChatOption = None,
    trust_remote_code: TrustOption = False,
    max_length: LengthOption = None,
    config: YamlOption = None,
    set_: SetOption = None,
    overwrite: OverwriteOption = False,
    accept_change: AcceptOption = None,
    dry_run: DryOption = False,
    print_config: PrintOption = False,
    quiet: QuietOption = False,
) -> None:
    """How a model's weights, gradients and loss surface look: sharpness, spectra, smoothness, conditioning.

    Writes report.html, with a picture a check, and diagnose.json to --out. Stopped runs go on with the next check.
    """
    from pipelines.settings.diagnose import DiagnoseConfig

    flags = {
        "model.name": model,
        "model.adapter": adapter,
        "model.chat": chat_template,
        "model.trust_remote_code": trust_remote_code or None,
        "model.max_length": max_length,
        "data.paths": data,
        "data.on_bad_row": on_bad_row,
        "data.columns": columns,
        "data.preference": preference,
        "checks": None if checks is None else [name.strip() for name in checks.split(",") if name.strip()],
        "rows": rows,
        "out": out,
        "seed": seed,
        "overwrite": overwrite or None,
        "dry_run": dry_run or None,
        "accept_change": accept_change,
    }
    _launch(DiagnoseConfig, "pipelines.diagnose.run:run", _yaml(yaml, config), flags, set_, print_config, quiet)


@_command(
    "explain",
    "datatools explain runs/select/selected.jsonl:17",
    "datatools explain runs/select pool.jsonl:803",
    "datatools explain runs/select some-id",
)
def explain(
    place: Annotated[
        str,
        typer.Argument(metavar="FILE:LINE|DIR", help="a line of selected.jsonl, or a run's folder", show_default=False),
    ],
    row: Annotated[
        str | None,
        typer.Argument(metavar="ROW", help="a row of the run's pool: FILE:LINE or its id", show_default=False),
    ] = None,
    nearest: Annotated[int | None, _flag("--nearest", "how many target rows to show", _METHOD, 5, metavar="N")] = None,
    trust_remote_code: TrustOption = False,
) -> None:
    """Why was this row selected, or not? Its score and rank, and the target rows that it resembles most."""
    from datatools import UsageError
    from pipelines.settings.base import home as opened
    from pipelines.settings.select import ExplainConfig

    place = opened(place)
    shown = {"nearest": nearest, "trust_remote_code": trust_remote_code or None}
    if row is not None:
        home = Path(place)
        home = home.parent if home.name == "selected.jsonl" else home
        name, _, number = row.rpartition(":")
        listed = number.isdecimal() and (name == "selected.jsonl" or Path(name) == home / "selected.jsonl")
        flags = {"file": home / "selected.jsonl", **({"line": int(number)} if listed else {"row": row})}
        _launch(ExplainConfig, "pipelines.select.explain:run", None, {**flags, **shown})
        return
    file, colon, line = place.rpartition(":")
    if not colon or not file or not line.isdecimal():
        raise UsageError(
            f"explain: {place!r} names no row; expected FILE:LINE, such as runs/select/selected.jsonl:17, or a run's "
            "folder and a row of its pool"
        )
    if Path(file).name != "selected.jsonl" and not (Path(file).parent / "run.yaml").is_file():
        raise UsageError(
            f"explain: {file} lies in no run; for a row of the pool give the run too: datatools explain DIR {place}"
        )
    _launch(ExplainConfig, "pipelines.select.explain:run", None, {"file": file, "line": int(line), **shown})


@_command("report", "datatools report runs/select")
def report(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="folder of a run", show_default=False)],
) -> None:
    """Draw report.html of a run again, from what the run has written."""
    from pipelines.rows import preflight
    from pipelines.settings.base import home

    folder = Path(home(str(folder)))
    preflight.run_folder(folder)
    from pipelines.report.pages import draw

    typer.echo(draw(folder))


@_command("demo", "datatools demo", "datatools demo --out runs/demo-3 --set seeds=3")
def demo(
    out: OutOption = None,
    seed: SeedOption = None,
    model: Annotated[
        str | None, _flag("--model", "another model than the demo's own small one", _MODEL, metavar="NAME")
    ] = None,
    set_: SetOption = None,
    overwrite: OverwriteOption = False,
    accept_change: AcceptOption = None,
    dry_run: DryOption = False,
    print_config: PrintOption = False,
    quiet: QuietOption = False,
) -> None:
    """See it work, in a few minutes on a CPU.

    Selects from bundled rows with a small model, trains on them and on random rows, and draws the report. Needs no
    network.
    """
    from pipelines.settings.demo import DemoConfig

    flags = {
        "out": out,
        "seed": seed,
        "model.name": model,
        "overwrite": overwrite or None,
        "dry_run": dry_run or None,
        "accept_change": accept_change,
    }
    _launch(DemoConfig, "pipelines.demo:run", None, flags, set_, print_config, quiet)


@_command("doctor", "datatools doctor", "datatools doctor --out /scratch/runs --json")
def doctor(
    out: Annotated[Path, _flag("--out", "where runs will be written", _RUN, "runs", metavar="DIR")] = Path("runs"),
    as_json: Annotated[bool, _flag("--json", "one JSON object instead of a table", _RUN)] = False,
) -> None:
    """Check this machine: versions, memory, speed, disk, network settings. Exit code 4 if something must be fixed."""
    from pipelines.doctor import examine, show

    checks = examine(out)
    show(checks, as_json=as_json)
    if any(check.state == "fail" for check in checks):
        raise typer.Exit(4)


@_command("ls", "datatools ls", "datatools ls optimizers")
def ls(
    kind: Annotated[str | None, typer.Argument(metavar="KIND", help="what to list", show_default=False)] = None,
) -> None:
    """List what there is: optimizers, projectors, selectors, aggregations, schedules, methods, formats."""
    from pipelines.listing import show

    show(kind)


def _show_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import PackageNotFoundError, version

        try:
            typer.echo(f"datatools {version('datatools-llm')}")
        except PackageNotFoundError:
            typer.echo("datatools, not installed as a package")
        raise typer.Exit()


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", help="show the version and stop", is_eager=True, callback=_show_version)
    ] = False,
) -> None:
    pass


# ------------------------------------------------------------------------------------------------------------- plumbing


def _yaml(argument: Path | None, option: Path | None) -> Path | None:
    if argument is not None and option is not None:
        from datatools import UsageError

        raise UsageError(f"two files with settings, {argument} and --config {option}; give one")
    from pipelines.settings.base import home

    given = argument if argument is not None else option
    return None if given is None else Path(home(str(given)))


def _training_flags(optimizer: object, learning_rate: object, epochs: object, batch_size: object) -> dict[str, object]:
    return {
        "training.optimizer": optimizer,
        "training.learning_rate": learning_rate,
        "training.epochs": epochs,
        "training.batch_size": batch_size,
    }


def _sets(lora_rank: int | None, sets: Sequence[str] | None) -> list[str]:
    return [*(["lora=null"] if lora_rank == 0 else []), *(sets or [])]


_TALKERS = (
    "pipelines.select.audit:run",
    "pipelines.select.explain:run",
    "pipelines.demo:run",
)  # they show tables, on stdout


def _launch(
    model: "type[Settings]",
    entry: str,
    yaml: Path | None,
    flags: Mapping[str, object],
    sets: Sequence[str] | None = None,
    print_config: bool = False,
    quiet: bool = False,
    **base: Any,
) -> None:
    """Build the configuration and call `entry` ("module:function") with it, or print it."""
    from pipelines.runs import current, messages, signals, workers
    from pipelines.settings.dump import dump
    from pipelines.settings.load import load_config

    config = load_config(model, yaml, flags, sets, **base)
    if print_config:
        typer.echo(dump(config, comments=True), nl=False)
        return
    from pipelines.rows import preflight

    preflight.check(config, re.split(r"[.:]", entry)[1])
    messages.set_quiet(quiet)
    current.opened(None)
    module, _, name = entry.partition(":")
    with signals.interruptible():
        try:
            # stdout is for the result alone, whatever a library prints
            with nullcontext() if entry in _TALKERS else redirect_stdout(sys.stderr):
                result = getattr(import_module(module), name)(config)
        except KeyboardInterrupt as interrupt:
            code = 143 if isinstance(interrupt, signals.Terminated) else 130
            print(f"\ninterrupted: {signals.how_to_continue()}", file=sys.stderr)
            raise typer.Exit(code) from None
    if workers.rank() != 0 or getattr(config, "dry_run", False):
        return
    if isinstance(result, dict) and entry not in _TALKERS:
        typer.echo(json.dumps(result, ensure_ascii=True, allow_nan=False))
    elif isinstance(result, Path):
        typer.echo(str(result))


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code. Expected errors are one line on stderr, others keep their traceback."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    threads.choose(command=True)  # before torch is loaded
    try:
        code = typer.main.get_command(app).main(args=arguments, prog_name="datatools", standalone_mode=False)
    except Exception as error:
        return _report(error, arguments)
    return code if isinstance(code, int) else 0


_MACHINE = {
    getattr(errno, name) for name in ("ENOSPC", "EDQUOT", "EFBIG", "EACCES", "EROFS", "EMFILE", "ENFILE", "EIO")
}


def _report(error: Exception, arguments: Sequence[str]) -> int:
    from datatools import DatatoolsError, EnvironmentProblem

    if hasattr(error, "format_message") and hasattr(error, "exit_code"):  # typer's own: wrong options and arguments
        if type(error).__name__ == "NoArgsIsHelpError":  # the bare command
            typer.echo(error.format_message(), err=True)
            return 2
        command = f" {arguments[0]}" if arguments and not arguments[0].startswith("-") else ""
        message = " ".join(str(error.format_message()).split())
        options = getattr(getattr(error, "param", None), "opts", [])
        came = [value for option, value in itertools.pairwise(arguments) if option in options]
        if came and repr(came[-1]) not in message:
            message = f"{message.rstrip('.')}; it was {came[-1]!r}"
        return _complain(f"{message.rstrip('.')}; see datatools{command} --help", 2)
    if isinstance(error, DatatoolsError):
        from pipelines.cli.advice import fitting

        return _complain(fitting(str(error), arguments[0] if arguments else "", flags_of_commands()), error.exit_code)
    if isinstance(error, OSError) and not isinstance(error, BrokenPipeError):
        from datatools import files

        known = files.explain(error, error.filename or "a file", "use")
        if error.errno in _MACHINE:
            return _complain(str(known), known.exit_code)
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        advice = "use smaller batches (--set features.token_budget=512, or training.micro_tokens=512) or shorter rows"
        return _complain(f"out of memory: {advice}", EnvironmentProblem.exit_code)

    import traceback

    traceback.print_exception(error)
    print(
        "\nThis is a bug in datatools. Please report it with the lines above, the command, and what "
        "`datatools doctor --json` prints.",
        file=sys.stderr,
    )
    return 1


def flags_of_commands() -> dict[str, set[str]]:
    """Command -> the flags that it has."""
    commands = getattr(typer.main.get_command(app), "commands", {})
    return {
        name: {option for parameter in command.params for option in parameter.opts if option.startswith("--")}
        for name, command in commands.items()
    }


def _complain(message: str, code: int) -> int:
    from pipelines.texts import visible

    print(f"error: {visible(message, keep=chr(10))}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
