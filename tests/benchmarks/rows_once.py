"""One job on many generated rows in a process of its own, and the time and memory it took; `test_rows` runs it.

    python -m tests.benchmarks.rows_once JOB ROWS FOLDER

JOB is index, random, tfidf or scores. Prints one line of JSON. The peak is the kernel's high-water mark of resident
memory; `before` is what was resident when the libraries were loaded.
"""

import json
import random
import resource
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from tests.benchmarks.extract_once import status
from tests.benchmarks.measure import Settings

DIM, TARGETS, SCORED = 512, 16, 256
SOURCES = ("facts", "words", "code", "notes", "calendar", "units")


def write_rows(path: Path, rows: int) -> Path:
    """Write chat rows of about 450 bytes; the words have the frequencies of a natural text."""
    draw = random.Random(0)
    words = ["".join(draw.choice("aeiounrstlmdkg") for _ in range(draw.randint(2, 8))) for _ in range(20_000)]

    def text(count: int) -> str:
        return " ".join(words[min(len(words), int(draw.paretovariate(0.6))) - 1] for _ in range(count))

    with open(path, "w") as file:
        for row in range(rows):
            turns = [{"role": "user", "content": text(draw.randint(8, 30))},
                     {"role": "assistant", "content": text(draw.randint(10, 50))}]  # fmt: skip
            file.write(json.dumps({"id": f"row-{row}", "dataset": draw.choice(SOURCES), "messages": turns}) + "\n")
    return path


def model_of(settings: Settings, folder: Path) -> str:
    from tests.tiny import save_tiny_model

    return str(save_tiny_model(folder / "model")) if settings.model == "tiny" else "smollm2"


def index(settings: Settings, rows: int, folder: Path) -> Any:
    """Read, check and encode all rows, in one process."""
    from pipelines.models import load as models
    from pipelines.rows.prepare import prepare
    from pipelines.settings.parts import DataConfig, ModelConfig

    config = ModelConfig(name=model_of(settings, folder))
    loaded = models.load(config, tokenizer_only=True)
    data = DataConfig(paths=[str(write_rows(folder / "pool.jsonl", rows))])
    return lambda: prepare(data, config, loaded.tokenizer, cache=folder / "cache", label="pool", limits=loaded.limits)


def selection(settings: Settings, rows: int, folder: Path, method: str) -> Any:
    """`datatools select` from its settings to its report."""
    from pipelines.select import run as select
    from pipelines.settings.load import load_config
    from pipelines.settings.select import SelectConfig

    pool, target = write_rows(folder / "pool.jsonl", rows), folder / "target.jsonl"
    with open(pool) as file:
        target.write_text("".join(line.replace('"row-', '"target-') for line, _ in zip(file, range(TARGETS))))  # noqa: B905
    given = {"model": model_of(settings, folder), "train.paths": [str(pool)], "target": [str(target)],
             "method": method, "budget": "1%", "out": str(folder / "run")}  # fmt: skip
    config = load_config(SelectConfig, None, given)
    return lambda: select.run(config)


def scores(settings: Settings, rows: int, folder: Path) -> Any:
    """Score stored features, int8, against target rows by `less_scores`."""
    import torch

    from datatools import GradientFeatures, files, less_scores

    keys = [files.digest(str(row).encode()) for row in range(rows)]
    wanted = [files.digest(f"target {row}".encode()) for row in range(SCORED)]
    stores = []
    for name, held in (("train", keys), ("target", wanted)):
        store = GradientFeatures.create_or_open(folder / name, meta={}, dim=DIM, dtype="int8", keys=held)
        generator = torch.Generator().manual_seed(len(held))
        for unit in store.missing_units():
            store.write_unit(unit, torch.randn(len(store.unit_keys(unit)), DIM, generator=generator))
        stores.append([GradientFeatures.open(folder / name)])
    groups = torch.arange(SCORED) % 4
    return lambda: less_scores(*stores, [1.0], groups, keys=keys, target_keys=wanted)


def main(job: str, rows: int, folder: Path) -> None:
    settings = Settings.read()
    work = {"index": index, "scores": scores}.get(job) or (lambda *given: selection(*given, job))
    run = work(settings, rows, folder)
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    before, wall, cpu = status("VmRSS"), time.perf_counter(), processor()
    run()
    found = {"seconds": time.perf_counter() - wall, "cpu": processor() - cpu, "before": before, "peak": status("VmHWM")}
    print(json.dumps(found))


def processor() -> float:
    """Seconds of processor time of this process and of those that have ended."""
    from pipelines.rows.chat.render import worker

    worker.close()
    mine = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in mine)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]))
