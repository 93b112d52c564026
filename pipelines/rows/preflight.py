"""Errors of a command that are visible without a model, found before torch is imported, in a fraction of a second.

The pipelines check all of it again, because they can be called without the command line.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path

from datatools import Budget, DataError, EnvironmentProblem, UsageError, did_you_mean
from pipelines.models.named import find
from pipelines.rows import peek
from pipelines.rows.input_files import find_sources
from pipelines.runs import devices
from pipelines.runs.folder import Run
from pipelines.runs.workers import alone, member, world_size
from pipelines.settings import methods, metrics, names, trackers
from pipelines.settings.audit import AuditConfig
from pipelines.settings.base import Columns, RunSettings, Settings
from pipelines.settings.diagnose import DiagnoseConfig
from pipelines.settings.explain import ExplainConfig
from pipelines.settings.flags import flag_for
from pipelines.settings.order import OrderConfig
from pipelines.settings.parts import DataConfig, ModelConfig, TrainingConfig
from pipelines.settings.select import ProjectorConfig, SelectConfig
from pipelines.settings.train import EvaluateConfig, TrainConfig

_FEATURE_METHODS = ("hooks", "loop", "vmap")


def check(config: Settings, command: str = "") -> None:
    """Raise the errors that would occur later in any case, in the order in which a reader would find them.

    These are flags that exclude each other, unknown names, missing files and folders, columns that the first rows do
    not have, and an output folder that cannot be created or contains something else.

    Args:
        config: The settings.
        command: The name of the command.

    Raises:
        UsageError: As in the pipelines.
        DataError: As in the pipelines.
        EnvironmentProblem: As in the pipelines.
    """
    contradictions(config)
    check_names(config)
    if isinstance(budget := getattr(config, "budget", None), str):
        Budget.parse(budget)
    if isinstance(config, TrainConfig):
        trackers.check(config)
    if isinstance(config, RunSettings):
        if command == "diagnose":
            alone(f"datatools {command}")
        _writable(config.out)
        # the recipe of an order becomes the run's settings when it is read
        if command in ("select", "train", "audit", "order", "diagnose") and not getattr(config, "order", None):
            Run(config.out, config, command).refuse()
    if isinstance(config, ExplainConfig):
        _line(config.file, config.line if config.row is None else 1)
    for name, value in _settings(config):
        if isinstance(value, ModelConfig):
            _model(value)
        elif name in ("checkpoints", "adapter") and value:
            for path in value if isinstance(value, list) else [value]:
                if isinstance(path, Path) and not path.is_dir():
                    raise UsageError(f"--{name} {path}: {'not a folder' if path.exists() else 'no such folder'}")
        elif name in ("order", "sequences", "selected") and value:
            for path in value if isinstance(value, list) else [value]:
                _file(Path(str(path)), name)
    _rows(config)


def contradictions(config: Settings) -> None:
    """Refuse settings that exclude each other, or that this machine cannot do. The pipelines call this first.

    Afterwards, this process computes with the device of the settings (`devices.use`).

    Args:
        config: The settings.

    Raises:
        UsageError: Two settings exclude each other.
        EnvironmentProblem: The device is not here.
    """
    if isinstance(config, TrainConfig):
        if config.model.adapter is not None and config.lora is not None:
            raise UsageError(
                f"model.adapter {config.model.adapter}: new adapters would be trained on top of it and saved without "
                "it; merge it into its model first, or train all weights (--lora-rank 0)"
            )
        if config.order is not None and config.coreset is not None:
            raise UsageError("--order and --coreset exclude each other; give only one of them")
        if config.tokens is not None and config.training.gradient == "zo":
            raise UsageError(
                "--token-reference and --gradient zo exclude each other: the two losses of a difference would be those "
                "of other tokens; give only one of them"
            )
        if config.coreset is not None:
            config.coreset.sizes(config.training.batch_size)
        if config.metrics is not None and not config.eval_data:
            raise UsageError(
                "train --metric: there are no held-out rows to measure it on; name them with --eval-data FILE"
            )
    elif isinstance(config, AuditConfig):
        if config.lora is None:
            raise UsageError("audit: lora is null; an audit trains adapters, so that all arms share one base model")
        for arm in config.against or ():
            if arm != methods.FULL and "target" in methods.known(arm).needs and not config.target:
                raise UsageError(
                    f"audit --against {arm}: it compares with target rows; name the run's target files with --target"
                )
    elif isinstance(config, OrderConfig):
        _order(config)
    if isinstance(config, AuditConfig | EvaluateConfig | TrainConfig | SelectConfig):
        measured = config.metrics if not isinstance(config, SelectConfig) or config.verify else None
        if measured is not None:
            metrics.check(measured)
    if isinstance(model := getattr(config, "model", None), ModelConfig):
        _dtype(config, model.dtype)
        if model.quantize != "none" and find_spec("bitsandbytes") is None:
            raise EnvironmentProblem(
                f"--quantize {model.quantize}: needs bitsandbytes, which is not installed: "
                "pip install 'datatools-llm[quantized]'"
            )
        engine = getattr(config, "engine", None)
        several = engine is not None and (engine.workers > 1 or engine.name != "local")
        elsewhere = engine is not None and engine.name == "ray" and member() is None
        devices.use(model, processes=several or world_size() > 1, elsewhere=elsewhere)


def _dtype(config: Settings, dtype: str) -> None:
    """Refuse a dtype in which a command cannot compute what it promises."""
    if isinstance(config, OrderConfig) and dtype not in ("auto", "float32"):
        raise UsageError(
            f"--dtype {dtype}: `datatools order` computes in float32, because the differences between orders are "
            "smaller than the rounding of 16 bits; leave it out"
        )
    trains = isinstance(config, TrainConfig | AuditConfig | DiagnoseConfig)
    if isinstance(config, SelectConfig):
        method = methods.known(config.method)
        trains = config.verify or method.walks or "gradients" in method.needs
    if dtype == "float16" and trains:
        raise UsageError(
            "--dtype float16: this takes gradients, and nothing scales the loss here, so that gradients of activations "
            "below 6e-8 would become zero; use bfloat16 or float32 (float16 is for `datatools evaluate` and for "
            "`datatools select` with --method rds or loss)"
        )


def _order(config: OrderConfig) -> None:
    if config.lora is not None and config.lora.dropout > 0:
        raise UsageError(
            f"lora.dropout is {config.lora.dropout:g}: dropout differs in every run, and no estimate could "
            "separate it from the effect of the order; set it to 0"
        )
    if config.task == "plan" and config.grouping == "mixed":
        raise UsageError("plan: batches of mixed rows belong to no source; use --grouping source")
    for name in config.estimators if config.grouping == "mixed" else ():
        if names.fact("estimator", name, "by_source"):
            raise UsageError(f"estimator {name}: batches of mixed rows belong to no source; use --grouping source")
    if config.training.max_steps is not None:
        raise UsageError("training.max_steps cannot be set: a run trains on all --batches; use fewer batches")
    if config.training.gradient == "zo":
        raise UsageError("training.gradient is zo, but orders are estimated from gradients; use gradient 'backprop'")


# --------------------------------------------------------------------------------------------------------------- names


def _settings(config: Settings) -> Iterator[tuple[str, object]]:
    for name in type(config).model_fields:
        value = getattr(config, name)
        yield name, value
        if isinstance(value, ModelConfig):
            yield "adapter", value.adapter


def check_names(config: Settings) -> None:
    """Refuse names of optimizers, projectors, selectors and the like that do not exist.

    Args:
        config: Settings of the command.

    Raises:
        UsageError: A name is in no table; the nearest one is suggested.
    """
    for name, value in _settings(config):
        _names(name, value)


def _names(name: str, value: object) -> None:
    if isinstance(value, TrainingConfig):
        names.check("optimizer", value.optimizer, f"{name}.optimizer")
        names.check("schedule", value.schedule, f"{name}.schedule")
    elif isinstance(value, ProjectorConfig):
        names.check("projector", value.name, f"{name}.name")
    elif name == "aggregate" and isinstance(value, str):
        names.check("aggregation", value, name)
    elif name == "selector" and isinstance(value, str):
        names.check("selector", value, name)
    elif name == "features" and (method := getattr(value, "method", None)) is not None:
        if method not in _FEATURE_METHODS:
            known = did_you_mean(method, _FEATURE_METHODS)
            raise UsageError(f"features.method: there is no '{method}'{known}")
    elif name == "updates" and isinstance(value, list):
        for optimizer in value:
            names.check("optimizer", optimizer, "updates")


# --------------------------------------------------------------------------------------------------- files and folders


def _model(config: ModelConfig) -> None:
    """Check that a model given as a path exists, that a file is GGUF, and that a folder contains one model."""
    find(config.name)
    template = config.chat
    if template not in ("auto", "tulu") and not Path(template).expanduser().is_file():
        near = did_you_mean(template, ("auto", "tulu"))
        raise UsageError(f"--chat-template {template}: no such file; expected auto, tulu or a .jinja file{near}")
    adapter = config.adapter
    if adapter is not None and adapter.is_dir() and not (adapter / "adapter_config.json").is_file():
        raise DataError(f"--adapter {adapter}: adapter_config.json is missing; give the folder of an adapter")


def _file(path: Path, name: str) -> None:
    if not path.is_file():
        flag = "--set sequences=" if name == "sequences" else f"--{name} "
        wanted = "the selected.jsonl of a run" if name == "selected" else "an order.npz of `datatools order`"
        what = "a folder" if path.is_dir() else "no such file"
        raise UsageError(f"{flag}{path}: {what}; give {wanted}")


def _line(path: Path, line: int) -> None:
    """Check that the line of `explain FILE:LINE` exists."""
    if not path.is_file():
        raise UsageError(f"{path}: {'a folder' if path.is_dir() else 'no such file'}; give selected.jsonl of a run")
    with open(path, "rb") as file:
        count = sum(1 for _ in file)
    if line > count:
        raise UsageError(f"{path}:{line}: the file has {count} lines")


def _writable(out: Path) -> None:
    nearest = out
    while not nearest.exists() and nearest != nearest.parent:
        nearest = nearest.parent
    if nearest.is_dir() and os.access(nearest, os.W_OK | os.X_OK):
        return
    if not nearest.is_dir():
        raise UsageError(f"--out {out}: {nearest} is a file; name a folder")
    raise EnvironmentProblem(f"--out {out}: {nearest} cannot be written to; name another folder")


# ---------------------------------------------------------------------------------------------------------------- rows


def _rows(config: Settings) -> None:
    """Check that every input exists and that its first rows have the named columns."""
    pool: DataConfig | None = None
    for name in type(config).model_fields:
        value = getattr(config, name)
        if isinstance(value, DataConfig):
            _look(value, value.paths, value.columns, "--test-columns" if name == "test" else "--columns")
            if name in ("train", "data", "pool"):
                pool = value
    if pool is None:
        return
    for name in ("target", "validation", "eval"):
        paths = getattr(config, "eval_data" if name == "eval" else name, None)
        if isinstance(paths, list) and paths:
            setting = f"{name}_columns"
            own: Columns | None = getattr(config, setting)
            flag = flag_for(type(config), setting) or setting
            _look(pool, paths, own or pool.columns, flag, borrowed=own is None, strict=True)


def _look(
    data: DataConfig,
    paths: Sequence[str],
    columns: Columns | None,
    flag: str,
    *,
    borrowed: bool = False,
    strict: bool | None = None,
) -> None:
    named = data.source_key != DataConfig.model_fields["source_key"].default and strict is None
    peek.check(
        find_sources(paths),
        columns=columns,
        flag=flag,
        source_key=data.source_key if named else None,
        preference=data.preference,
        strict=data.on_bad_row == "error" if strict is None else strict,
        borrowed=borrowed,
    )
