"""What is wrong with a command and needs no model to be seen: found before torch is imported, in no time.

The pipelines check all of it again, for they are called without the command line too.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from datatools import Budget, EnvironmentProblem, UsageError
from pipelines import trackers
from pipelines.config import DataConfig, ModelConfig, RunSettings, Settings, TrainConfig
from pipelines.sources import find_sources


def check(config: Settings) -> None:
    """Raise what is sure to be raised later: a missing file, a budget that says nothing, a folder that cannot be made.

    Raises: UsageError, DataError, EnvironmentProblem, as the pipelines would.
    """
    if isinstance(config, RunSettings):
        _writable(config.out)
    if isinstance(budget := getattr(config, "budget", None), str):
        Budget.parse(budget)
    if isinstance(config, TrainConfig):
        trackers.check(config)
    for name, value in _settings(config):
        if isinstance(value, DataConfig):
            find_sources(value.paths)
        elif isinstance(value, ModelConfig):
            _there(value.name)
        elif name in ("target", "eval_data") and isinstance(value, list) and value:
            find_sources(value)
        elif name in ("checkpoints", "adapter") and value:
            for path in value if isinstance(value, list) else [value]:
                if isinstance(path, Path) and not path.exists():
                    raise UsageError(f"--{name} {path}: no such folder")


def _settings(config: Settings) -> Iterator[tuple[str, object]]:
    for name in type(config).model_fields:
        value = getattr(config, name)
        yield name, value
        if isinstance(value, ModelConfig):
            yield "adapter", value.adapter


def _there(model: str) -> None:
    """A model that is written as a path must be one."""
    if (model.startswith((".", "/", "~")) or model.count("/") > 1) and not Path(model).expanduser().exists():
        raise UsageError(f"--model {model}: no such file or folder")


def _writable(out: Path) -> None:
    nearest = out
    while not nearest.exists() and nearest != nearest.parent:
        nearest = nearest.parent
    if nearest.is_dir() and os.access(nearest, os.W_OK | os.X_OK):
        return
    if not nearest.is_dir():
        raise UsageError(f"--out {out}: {nearest} is a file; name a folder")
    raise EnvironmentProblem(f"--out {out}: {nearest} cannot be written to; name another folder")
