"""A process that works when it is told to; `test_side_by_side` runs one or two of them at a time.

    python -m tests.benchmarks.side_by_side_once KIND HOW FOLDER

KIND: train (`datatools train` of a tiny model, all of its weights), extract (gradient features), order (gradients of
batches). HOW: `datatools` waits as a command does, `torch` as torch does by itself. Each line on stdin starts one piece
of work; its answer is a line of JSON.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

from pipelines.runs import threads


def work_of(kind: str, folder: Path) -> Callable[[], object]:
    from tests.benchmarks.measure import Settings
    from tests.tiny import save_tiny_model, write_rows

    settings = Settings.read()
    if kind == "extract":
        from tests.benchmarks.workload import prepared

        work = prepared(settings, folder, rows=settings.size(2, 32))
        return lambda: work.extract(folder / f"store-{time.time_ns()}")
    model = save_tiny_model(folder / "model", layers=5, hidden=64)
    rows = write_rows(folder / "rows.jsonl", settings.size(160, 16), answer="answer " * 24)
    if kind == "train":
        from pipelines.cli.app import main

        def train() -> None:
            out = folder / f"run-{time.time_ns()}"
            command = ["train", "--model", str(model), "--data", str(rows), "--lora-rank", "0", "--epochs", "2"]
            if main([*command, "--quiet", "--out", str(out)]):
                raise RuntimeError("datatools train failed")

        return train
    from datatools import order
    from pipelines.models import load as models
    from pipelines.order.setting import functional_loss, in_parts
    from pipelines.rows.prepare import prepare
    from pipelines.settings.parts import DataConfig, ModelConfig

    config = ModelConfig(name=str(model))
    loaded = models.load(config)
    pool = prepare(DataConfig(paths=[str(rows)]), config, loaded.tokenizer, cache=folder / "cache", label="rows")
    batches = [in_parts(pool, list(range(lo, lo + 8)), 2048, loaded.model.device) for lo in range(0, 16, 8)]
    problem = order.Problem(functional_loss(loaded.model), batches, batches[:1])
    params = {n: p.detach().clone() for n, p in loaded.model.named_parameters()}

    def gradients() -> None:
        for number in range(settings.size(20, 4)):
            problem.gradient(params, number % len(batches))

    return gradients


def main(kind: str, how: str, folder: Path) -> None:
    answers, sys.stdout = sys.stdout, sys.stderr
    if how == "torch":
        for name in threads.WAITING:
            os.environ.pop(name, None)
    else:
        threads.choose()
    work = work_of(kind, folder)
    work()  # warm
    print(json.dumps({"ready": True}), file=answers, flush=True)
    for _ in sys.stdin:
        cpu, wall = sum(os.times()[:2]), time.perf_counter()
        work()
        done = {"seconds": time.perf_counter() - wall, "cpu_seconds": sum(os.times()[:2]) - cpu}
        print(json.dumps(done), file=answers, flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
