"""The unit costs of a finished run of `datatools select`, as its records say."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datatools import DataError, UsageError, files
from pipelines.runs.run_files import WORKERS, shown
from pipelines.settings.load import load_config
from pipelines.settings.select import SelectConfig

_START = ("load model", "cost")
_OTHERS = ("read", "warm-up", "scores", "select and write", "verify", *_START)


@dataclass(frozen=True)
class Pilot:
    """What a small run has measured. Seconds are those of one worker.

    Attributes:
        method: The name of its method.
        parameters: The parameters of its model.
        rows: Its rows.
        tokens: Its tokens per row.
        bytes_per_row: Bytes of its input files per row.
        start: Seconds until the model was there.
        read: Seconds per row to read and encode.
        warmup: Seconds per token to train.
        features: Seconds per token and pass.
        scores: Seconds per row to score stored features.
        write: Seconds per row to select and write.
        passes: Its passes over the pool.
        share: The share of the pool that its warm-up trained on.
        epochs: The epochs of the warm-up.
        dim: The feature dimension.
        numbers: Numbers of a hidden state; 0 if unknown.
        dtype: How features are stored.
        unit: Rows of a unit; 0 for as many as `select` chooses.
    """

    method: str
    parameters: float
    rows: int
    tokens: float
    bytes_per_row: float
    start: float
    read: float
    warmup: float
    features: float
    scores: float
    write: float
    passes: int
    share: float
    epochs: int
    dim: int
    numbers: int
    dtype: str
    unit: int


def read(folder: Path) -> Pilot:
    """Return what a run has measured.

    Args:
        folder: The folder of the run.

    Raises:
        UsageError: The folder contains no finished run of `select`.
        DataError: A record is damaged, or the run computed too little.
    """
    summary_path = folder / "summary.json"
    if not (folder / "run.yaml").is_file() or not summary_path.is_file():
        what = "no finished run of `datatools select` is in it" if folder.is_dir() else "no such folder"
        raise UsageError(f"--run {shown(folder)}: {what}; run one on a small part of the pool first")
    config = load_config(SelectConfig, folder / "run.yaml")
    summary: Any = files.read_json(summary_path, limit=64_000_000)
    stages = _stages(folder)
    try:
        pool, method = summary["pool"], str(summary["method"])
        rows, tokens = int(pool["rows"]), int(pool["tokens"])
        size = sum(int(file["bytes"]) for file in pool["files"])
        parameters = float((summary.get("model") or {}).get("parameters") or 0)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(f"--run {shown(folder)}: summary.json is damaged or of another version ({error})") from error
    if rows < 1 or tokens < 1 or "read" not in stages:
        raise DataError(f"--run {shown(folder)}: it has measured nothing; run it anew into another folder")
    shared = {name: seconds for name, seconds in stages.items() if name not in _OTHERS}
    receipts = _receipts(folder)
    passes = max(1, sum(name.startswith("features at step") for name in shared))
    if parameters and (receipts or sum(shared.values())) <= 0:
        raise DataError(
            f"--run {shown(folder)}: its features were there before it began, so that it measured none; run it anew "
            "into another folder, without features.folder"
        )
    warm_rows = min(rows, max(config.warmup.minimum_rows, int(config.warmup.fraction * rows)))
    warm_tokens = warm_rows * config.warmup.epochs * tokens / rows
    return Pilot(
        method=method,
        parameters=parameters,
        rows=rows,
        tokens=tokens / rows,
        bytes_per_row=size / rows,
        start=sum(stages.get(name, 0.0) for name in _START),
        read=stages["read"] / rows,
        warmup=stages.get("warm-up", 0.0) / warm_tokens,
        features=(receipts or sum(shared.values())) / tokens / passes,
        scores=stages.get("scores", 0.0) / rows,
        write=stages.get("select and write", 0.0) / rows,
        passes=passes,
        share=0.0 if config.checkpoints else config.warmup.fraction,
        epochs=config.warmup.epochs,
        dim=config.projector.dim,
        numbers=0,
        dtype=config.features.dtype,
        unit=config.features.rows_per_unit or 0,
    )


def _stages(folder: Path) -> Mapping[str, float]:
    """Return the seconds of each stage over all attempts."""
    found: dict[str, float] = {}
    for line in _lines(folder / "events.jsonl"):
        if line.get("event") == "stage_end":
            found[str(line["name"])] = found.get(str(line["name"]), 0.0) + float(line["seconds"])
    return found


def _receipts(folder: Path) -> float:
    """Return the seconds of all units that several workers computed; 0 for one worker."""
    return sum(float(one["seconds"]) for path in (folder / WORKERS).glob("*.jsonl") for one in _lines(path))


def _lines(path: Path) -> list[dict[str, Any]]:
    found = []
    for line in files.read_bytes(path).split(b"\n")[:-1]:
        with suppress(ValueError):
            entry = json.loads(line)
            if isinstance(entry, dict):
                found.append(entry)
    return found
