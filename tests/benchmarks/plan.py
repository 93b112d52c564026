"""Plans of sources against true retrainings of random orders of the sources.

    python -m tests.benchmarks.plan --model ../shared/data/models/stories260k --chat tulu --out runs/plan

Prints the true losses of the plan, its reverse, mixed sources and random orders, the predicted gain beside the true
one, and the rank correlation of predictions with true losses. Needs ../shared/data (or DATATOOLS_SHARED).
"""

import argparse
import json
from pathlib import Path

from datatools.order import spearman
from pipelines.order.run import run
from pipelines.settings.order import OrderConfig, OrderData, OrderTraining
from pipelines.settings.parts import ModelConfig
from tests.benchmarks.order import SHARED


def main() -> None:
    """Plan, retrain, and print what came of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--chat", default="auto")
    parser.add_argument("--out", required=True)
    parser.add_argument("--rates", default="3e-4")
    for name, value in {"batches": 24, "batch-size": 4, "orders": 24, "max-length": 128, "seed": 0}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    options = parser.parse_args()
    for rate in map(float, options.rates.split(",")):
        folder = run(
            OrderConfig(
                task="plan",
                model=ModelConfig(name=options.model, chat=options.chat, max_length=options.max_length),
                data=OrderData(paths=[str(SHARED / "data" / "train" / "mix-1k.jsonl")]),
                out=Path(options.out) / f"{rate:g}",
                seed=options.seed,
                training=OrderTraining(learning_rate=rate, batch_size=options.batch_size),
                batches=options.batches,
                held_out=32,
                retrain=options.orders,
                worth=0,
                accept_change=["code"],
            )
        )
        found = json.loads((folder / "plan.json").read_text())
        rows = [row for row in found["rows"] if row["sources"]]
        guess, true = ([row[key] for row in rows] for key in ("estimated", "true"))
        mean = [sum(values[2:]) / len(values[2:]) for values in (guess, true)]
        print(
            f"{rate:g}: plan {true[0]:.4f}, reversed {true[1]:.4f}, mixed {found['rows'][2]['true']:.4f}, random "
            f"{mean[1]:.4f} (best {min(true[2:]):.4f}); gain predicted {mean[0] - guess[0]:.4f}, true "
            f"{mean[1] - true[0]:.4f}; Spearman of random orders {spearman(guess[2:], true[2:]) or float('nan'):.2f}, "
            f"of all {spearman(guess, true) or float('nan'):.2f}"
        )


if __name__ == "__main__":
    main()
