"""`datatools diagnose`: examines a model's weights, gradients and loss surface on rows, with a report.

Each check writes `checks/NAME.json` when it is done, so that an interrupted run continues with the next check. Memory:
a gradient of the whole model (for smoothness, that of a Hessian-vector product), plus one tensor at a time.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

import optim
from datatools import DataError, UsageError, files
from pipelines import former
from pipelines.diagnose.checks import CHECKS, check
from pipelines.diagnose.looks import Look
from pipelines.models import load as models
from pipelines.models import quantized
from pipelines.models.load import LoadedModel
from pipelines.report import diagnose_page as diagnose_view
from pipelines.rows import preflight
from pipelines.rows.inputs import Inputs
from pipelines.rows.rows import Rows
from pipelines.runs.folder import Run, in_scratch
from pipelines.runs.messages import say
from pipelines.runs.seeds import derive_seed
from pipelines.runs.workers import alone
from pipelines.settings import redaction
from pipelines.settings.base import Json
from pipelines.settings.diagnose import DiagnoseConfig
from pipelines.training import cost


def run(config: DiagnoseConfig) -> Path:
    """Run the remaining checks, and write `diagnose.json` and `report.html` to `out`.

    Args:
        config: The settings.

    Returns:
        The folder of the run.

    Raises:
        UsageError: An optimizer does not exist.
        DataError: Rows cannot be used, or a check finds no finite value.
        EnvironmentProblem: The model cannot be loaded.
    """
    alone("datatools diagnose")
    preflight.contradictions(config)
    chosen = [name for name in CHECKS if name in config.checks]
    _check_optimizers(config)
    with in_scratch(config) as kept, Run(kept.out, kept, "diagnose", overwrite=kept.overwrite) as current:
        with current.stage("read"):
            tokenizer = models.load(config.model, tokenizer_only=True)
            inputs = Inputs(current, config.model, tokenizer)
            rows = inputs.read("data", config.data, bad_rows=True)
        picked = pick(rows, config.rows, seed=derive_seed(config.seed, "rows"))
        inputs.record()
        tokens = int(rows.scan.tokens[picked].sum())
        say(
            f"{len(picked):,} rows, {tokens:,} tokens; checks: {', '.join(chosen)}; about "
            f"{passes(config):,} forward and backward passes over them"
        )
        if config.dry_run:
            _estimate(config, tokenizer, tokens, len(picked)).announce()
            say("dry run: data and model load; nothing was measured")
            return config.out
        files.make_folder(current.path("checks"))
        todo = [name for name in chosen if _result(current, name) is None]
        loaded = _load(config, tokenizer) if any(check(name).needs_model for name in todo) else None
        look = Look(None if loaded is None else loaded.model, rows, picked, config)
        for name in todo:
            with current.stage(name):
                found = measure(name, look)
                files.write_json(current.path("checks", f"{name}.json"), _plain(found))
        summary: dict[str, Any] = {
            "format": 1,
            "model": config.model.name,
            "adapter": None if config.model.adapter is None else str(config.model.adapter),
            "data": {"paths": list(config.data.paths), "rows": len(picked), "of": len(rows), "tokens": tokens},
            "seed": config.seed,
            "created": current.provenance["created"],
            "versions": current.provenance["versions"],
            "checks": {name: _result(current, name) for name in chosen},
        }
        files.write_json(current.path("diagnose.json"), redaction.hide_all(summary))
        diagnose_view.render(current.folder)
        say(f"report: {current.path('report.html')}")
    return config.out


def pick(rows: Rows, most: int, *, seed: int) -> list[int]:
    """Return at most `most` usable rows, drawn at random, in file order.

    Args:
        rows: The rows.
        most: The number of rows.
        seed: The seed.
    """
    usable = np.flatnonzero(rows.usable)
    drawn = np.random.default_rng(seed).choice(usable, min(most, len(usable)), replace=False)
    return sorted(int(i) for i in drawn)


def _check_optimizers(config: DiagnoseConfig) -> None:
    for name in config.updates:
        try:
            optim.create(name, optim.example_parameters(), lr=1.0)
        except (ValueError, TypeError) as error:
            raise UsageError(f"updates: {error}") from error


def passes(config: DiagnoseConfig) -> int:
    """Return the forward and backward passes over the rows of all checks.

    Args:
        config: The settings.
    """
    return sum(check(name).passes(config) for name in set(config.checks))


def measure(name: str, look: Look) -> dict[str, Any]:
    """Return the result of a check.

    Args:
        name: The name of the check.
        look: The model and the rows.

    Raises:
        DataError: The check finds no finite value.
    """
    try:
        return check(name).measure(look, derive_seed(look.config.seed, name))
    except ValueError as error:
        raise DataError(f"diagnose {name}: {error}") from error


def _estimate(config: DiagnoseConfig, tokenizer: LoadedModel, tokens: int, rows: int) -> cost.Estimate:
    """Return the expected cost of the checks, without the spectra of large matrices and the data of double-descent."""
    loaded = _load(config, tokenizer)
    found = cost.probe(loaded.model, tokens // max(1, rows))
    seconds = passes(config) * found.seconds(tokens, max(1, tokens // config.token_budget))
    kept = max(check(name).keeps(config, found.trainable) for name in config.checks)
    return cost.Estimate(
        parts={"checks": seconds},
        tokens=passes(config) * tokens,
        memory=cost.memory(found, kept, config.token_budget),
        disk=1_000_000,
        based_on=found.text(),
    )


def _result(current: Run, name: str) -> Any:
    path = current.path("checks", f"{name}.json")
    return files.read_json(path) if path.is_file() else None


def _load(config: DiagnoseConfig, tokenizer: LoadedModel) -> LoadedModel:
    wide = config.model.model_copy(update={"dtype": "float32"}) if config.model.dtype == "auto" else config.model
    loaded = models.load(wide, tokenizer=tokenizer)
    quantized.refuse_training(loaded.model)
    loaded.model.requires_grad_(True)
    return loaded


def _plain(value: Any) -> Json:
    """Return a value for JSON, in which numbers that are not finite become texts."""
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "nan" if math.isnan(value) else "inf" if value > 0 else "-inf"
    assert value is None or isinstance(value, bool | int | float | str), type(value)
    return value


former.callable_as(__name__, "run")
