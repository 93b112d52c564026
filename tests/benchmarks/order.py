"""Estimates of the order of training against true retrainings, at two learning rates.

    python -m tests.benchmarks.order --model ../shared/data/models/stories260k --chat tulu --max-length 192 \
        --out runs/orders
    python -m tests.benchmarks.order --model smollm2 --lora-rank 8 --batch-size 2 --max-length 96 --warmup-steps 32 \
        --held-out 16 --sample-rows 1 --rates 3e-4,1e-3 --out runs/orders-smollm2

For each rate: Spearman with its interval, regret, cost in retrainings and orders scored a second, of every estimator
and of the mean over reference orders; whether it is trusted, and its mean indicators (`order.limits()` are from
--rates 1e-4,3e-4,1e-3,3e-3); then the regret of what a search proposes, retrained beside random orders. Prints a table
and writes `order.json` in `--out`, where runs are kept and continued. Needs ../shared/data (or DATATOOLS_SHARED).
"""

import argparse
import json
import os
import time
from pathlib import Path

import torch

from datatools import order
from datatools.order.estimators.pairwise import Pairwise
from pipelines.order.run import run
from pipelines.settings.order import OrderConfig, OrderData, OrderTraining
from pipelines.settings.parts import LoraConfig, ModelConfig

SHARED = Path(os.environ.get("DATATOOLS_SHARED", Path(__file__).resolve().parents[3] / "shared"))


def orders_a_second(steps: int = 64, count: int = 20_000) -> float:
    """Random orders of `steps` batches that a pairwise surrogate scores a second, on this machine."""
    generator = torch.Generator().manual_seed(0)
    made = Pairwise(
        tuple(range(steps)),
        order.Cost(),
        0.0,
        torch.randn(steps, steps, generator=generator, dtype=torch.float64),
        torch.ones(steps, steps, dtype=torch.float64).triu(1),
        torch.randn(1, steps, steps, generator=generator, dtype=torch.float64),
        torch.zeros(steps, dtype=torch.int64),
    )
    drawn = torch.stack([torch.randperm(steps, generator=generator) for _ in range(count)])
    made._scores(drawn[:256])
    start = time.monotonic()
    made._scores(drawn)
    return count / (time.monotonic() - start)


def settings(options: argparse.Namespace, rate: float, task: str) -> OrderConfig:
    """One case; the two tasks share its folder."""
    return OrderConfig(
        task=task,
        model=ModelConfig(name=options.model, chat=options.chat, max_length=options.max_length),
        data=OrderData(paths=[str(SHARED / "data" / "train" / "mix-1k.jsonl")]),
        out=Path(options.out) / f"{rate:g}",
        seed=options.seed,
        lora=LoraConfig(rank=options.lora_rank) if options.lora_rank else None,
        training=OrderTraining(learning_rate=rate, batch_size=options.batch_size),
        batches=options.batches,
        grouping=options.grouping,
        warmup_steps=options.warmup_steps,
        held_out=options.held_out,
        anchors=options.anchors,
        dimensions=options.dimensions,
        sample_rows=options.sample_rows,
        orders=options.orders,
        references=options.references,
        estimators=options.estimators.split(","),
        accept_change=["code"],
    )


def means(indicators: list[dict[str, float]]) -> dict[str, float]:
    """Of each indicator of trust, over orders."""
    return {name: sum(one[name] for one in indicators) / len(indicators) for name in (indicators or [{}])[0]}


def main() -> None:
    """Run both cases and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--chat", default="auto")
    parser.add_argument("--out", required=True)
    parser.add_argument("--rates", default="1e-4,3e-4")
    parser.add_argument("--estimators", default="pairwise,reduced,moments,table")
    parser.add_argument("--grouping", default="auto")
    for name, value in {
        "batches": 32, "orders": 30, "batch-size": 8, "references": 3, "max-length": 256, "lora-rank": 0,
        "warmup-steps": 64, "held-out": 64, "anchors": 3, "dimensions": 8, "sample-rows": 3, "seed": 0,
    }.items():  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=value)
    options = parser.parse_args()
    rows = []
    for rate in map(float, options.rates.split(",")):
        folder = run(settings(options, rate, "validate"))
        found = json.loads((folder / "validation.json").read_text())
        run(settings(options, rate, "search"))
        searched = json.loads((folder / "search.json").read_text())
        known = [row["true"] for row in searched["rows"] if row["true"] is not None]
        proposed = next(row["true"] for row in searched["rows"] if row["name"] == searched["proposed"])
        best = min([*known, *(one["true"] for one in found["orders"])])
        for name, entry in found["estimators"].items():
            rows.append(
                {
                    "rate": rate, "estimator": name, "spearman": entry["spearman"],
                    "interval": entry["spearman_interval"], "regret": entry["regret"],
                    "regret_random": entry["regret_random"],
                    "retrainings": entry["cost_in_batch_gradients"] / found["retraining_in_batch_gradients"],
                    "a_second": 1 / entry["seconds_a_score"] if entry.get("seconds_a_score") else None,
                    "trusted": sum(entry.get("trusted", [])),
                    "indicators": means(entry.get("trust", [])),
                    "references": [one["spearman"] for one in entry.get("references", [])],
                    "spread": found["anything_to_win"]["over_orders"], "regret_of_search": proposed - best,
                }
            )  # fmt: skip
    speed = orders_a_second()
    case = {"options": vars(options) | {"out": ""}, "pairwise_64_a_second": speed, "rows": rows}
    case["options"]["model"] = Path(options.model).name
    (Path(options.out) / "order.json").write_text(json.dumps(case, indent=1) + "\n")
    for row in rows:
        low, high = row["interval"] or (float("nan"), float("nan"))
        print(
            f"{row['rate']:g} {row['estimator']:32} {row['spearman'] or float('nan'):6.3f} ({low:.3f} to {high:.3f}) "
            f"regret {row['regret']:.4f} of {row['regret_random']:.4f}, {row['retrainings']:.1f} retrainings; trusted "
            f"{row['trusted']} of {options.orders} "
            + ", ".join(f"{name} {value:.2g}" for name, value in row["indicators"].items())
        )
    print(f"pairwise at T = 64: {speed:,.0f} orders a second")


if __name__ == "__main__":
    main()
