"""Precision at k on the planted problems: how many of the chosen rows are the relevant ones.

    python -m tests.benchmarks.planted --model ../shared/data/models/stories260k --chat tulu --out runs/planted
    python -m tests.benchmarks.planted --model smollm2 --sets planted-topic --out runs/planted-smollm2

Prints one row a set and method; corrupted rows (right topic, wrong answer) are counted beside. Runs in `--out` are kept
and continued. Needs ../shared/data (or DATATOOLS_SHARED).
"""

import argparse
import json
import os
from pathlib import Path

import pyarrow.parquet as pq

from pipelines.runs.messages import quietly
from pipelines.select.run import run
from pipelines.settings.parts import DataConfig, LoraConfig, ModelConfig
from pipelines.settings.select import FeaturesConfig, ProjectorConfig, SelectConfig, WarmupConfig

SHARED = Path(os.environ.get("DATATOOLS_SHARED", Path(__file__).resolve().parents[3] / "shared"))
BASELINES = ("random", "random-length", "tfidf", "bm25", "rds", "loss")


def measure(name: str, method: str, options: argparse.Namespace) -> dict[str, object]:
    """Precision at k (k = the number of relevant rows) of one method on one set."""
    folder = SHARED / "data" / "planted" / name
    truth = json.loads((folder / "truth.json").read_text())
    relevant = sum(role == "relevant" for role in truth["roles"].values())
    label, _, variant = method.partition(":")
    settings = dict(pair.split("=") for pair in variant.split(",") if pair)
    out = Path(options.out) / name / method.replace(":", "-").replace(",", "-").replace("=", "-")
    kind = "-".join(settings.get(name, "") for name in ("mode", "optimizer", "lora", "seed"))
    shared_features = Path(options.out) / name / f"features{kind}"
    config = SelectConfig(
        method=label,
        model=ModelConfig(name=options.model, max_length=options.max_length, chat=options.chat),
        lora=LoraConfig(targets="auto") if settings.get("lora") == "auto" else LoraConfig(),
        train=DataConfig(paths=[str(folder / "pool.jsonl")]),
        target=[str(folder / "dev.jsonl")],
        budget=str(relevant),
        out=out,
        seed=int(settings.get("seed", 0)),
        aggregate=settings.get("aggregate", "less"),
        projector=ProjectorConfig(name="sjlt"),
        features=FeaturesConfig(adam_mode=settings.get("mode", "paper"), folder=shared_features, token_budget=1024),
        warmup=WarmupConfig(
            epochs=options.epochs, fraction=0.05, checkpoints=1, optimizer=settings.get("optimizer", "adamw")
        ),
        accept_change=["code"],
    )
    run(config)
    chosen = pq.read_table(out / "selected.parquet", columns=["_id"])["_id"].to_pylist()
    roles = [truth["roles"][identity] for identity in chosen]
    return {
        "set": name,
        "method": method,
        "k": len(chosen),
        "precision": roles.count("relevant") / len(roles),
        "corrupted": roles.count("corrupted"),
        "adjacent": roles.count("adjacent"),
    }


def main() -> None:
    """Run every asked method on every asked set and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--out", required=True)
    parser.add_argument("--sets", nargs="+", default=["planted-math", "planted-topic"])
    parser.add_argument("--methods", nargs="+", default=[*BASELINES, "tov", "tacs", "gist", "less"])
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument("--chat", default="auto", help="auto, or tulu for a tokenizer without a template (stories260k)")
    options = parser.parse_args()
    print(f"| set | method | k | precision | corrupted | adjacent |\n|---|---|---|---|---|---|  ({options.model})")
    for name in options.sets:
        for method in options.methods:
            with quietly():
                found = measure(name, method, options)
            print(
                "| " + " | ".join(f"{v:.2f}" if isinstance(v, float) else str(v) for v in found.values()) + " |",
                flush=True,
            )


if __name__ == "__main__":
    main()
