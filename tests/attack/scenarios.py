"""What is attacked: commands, the state of the folder in which each starts, and what it must end with.

A scenario's `before` commands build the folder; `command` is then tried again and again under attack. `$W` stands for
the world (model and data), `$R` for the run folder, which has the same path in every try.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SELECT = (
    "select --model $W/model --train $W/pool.jsonl --target $W/target.jsonl --method less --budget 10% --dim 256 "
    "--lora-rank 4 --set warmup.minimum_rows=16 --epochs 2 --batch-size 4 --set features.rows_per_unit=30 --out $R"
)
TRAIN = "train --model $W/model --data $W/few.jsonl --epochs 1 --lora-rank 4 --set save_steps=2 --out $R"
ORDER = (
    "order validate --model $W/model --data $W/few.jsonl --batches 2 --orders 2 --estimators pairwise --lora-rank 4 "
    "--warmup-steps 8 --set seeds=2 --set budget=500 --set completions=1 --out $R"
)
METHODS = ("auto", "gist", "rds", "tov")
AUDIT = "audit --selected $R/selected.jsonl --pool $W/pool.jsonl --test $W/test.jsonl --against random --seeds 1"


@dataclass(frozen=True)
class Scenario:
    """One command under attack. `shown`: what it prints on stdout is its result too."""

    name: str
    command: str
    before: tuple[str, ...] = ()
    shown: bool = False


SCENARIOS = (
    Scenario("select", SELECT),
    Scenario("select-tfidf", SELECT.replace("--method less", "--method tfidf")),
    *(Scenario(f"select-{name}", SELECT.replace("--method less", f"--method {name}")) for name in METHODS),
    Scenario("train", TRAIN),
    Scenario("train-full", TRAIN.replace("--lora-rank 4", "--lora-rank 0")),
    Scenario("train-coreset", f"{TRAIN} --coreset colm --large-batch 8 --keep 4"),
    Scenario(
        "train-order",
        TRAIN.replace("--out $R", "--order $R/plan/order.npz --out $R/trained").replace("--epochs 1 ", ""),
        (f"order search{ORDER.removeprefix('order validate')}/plan".replace(" --orders 2", ""),),
    ),
    Scenario("train-validated", f"{TRAIN} --eval-data $W/test.jsonl --eval-every 1"),
    Scenario("order-validate", ORDER),
    Scenario("order-record", ORDER.replace("validate", "record")),
    Scenario("order-estimate", ORDER.replace("validate", "estimate")),
    Scenario("order-search", ORDER.replace("validate", "search")),
    Scenario("order-map", ORDER.replace("validate", "map")),
    Scenario("audit", AUDIT, (SELECT,)),
    Scenario("diagnose", "diagnose --model $W/model --data $W/few.jsonl --checks sharpness --out $R"),
    Scenario("evaluate", "evaluate --model $W/model --adapter $R/adapter --data $W/test.jsonl", (TRAIN,), shown=True),
    Scenario("explain", "explain $R/selected.jsonl:1", (SELECT,), shown=True),
    Scenario("report", "report $R", (SELECT, AUDIT)),
)

# Logs of what happened when and their digests, what a run still had to do when it began (true, and different after a
# kill), and model cards that peft writes.
_DISPLAYED = {
    "seals.jsonl", "events.jsonl", "progress.json", "provenance.json", ".lock", "training_args.bin", "README.md",
    "cost.json",
}  # fmt: skip
_ASIDE = (".broken", ".damaged", ".tmp-")
_COSTS = (".cost.", ".warnings.", ".trainer_state.json.")  # the last logs how long steps took


def leaves(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """The leaves of a JSON value by path."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from leaves(inner, f"{name}.{key}")
    elif isinstance(value, list):
        for number, inner in enumerate(value):
            yield from leaves(inner, f"{name}.{number}")
    else:
        yield name, value


def results(folder: Path, shown: str) -> dict[str, Any]:
    """What a run left: each file by its digest, JSON by its leaves, and what it printed.

    Logs of what happened when (events, progress, provenance) and folders set aside as damaged are not results.
    """
    found: dict[str, Any] = {"stdout": shown}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        aside = any(mark in name for mark in _ASIDE)
        if not path.is_file() or path.name in _DISPLAYED or aside:
            continue
        data = path.read_bytes()
        if path.suffix in (".json", ".jsonl"):
            try:
                lines = path.suffix == ".jsonl"
                parsed = [json.loads(line) for line in data.splitlines()] if lines else json.loads(data)
            except ValueError:
                found[name] = hashlib.blake2b(data).hexdigest()
                continue
            found |= {f"{name}:{leaf}": value for leaf, value in leaves(parsed) if not leaf.startswith(_COSTS)}
        else:
            found[name] = hashlib.blake2b(data).hexdigest()
    return found
