"""Double descent and conditioning: a separate experiment that does not use the model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

import optim
from optim import diagnostics
from pipelines.diagnose.looks import Check, Look
from pipelines.runs.progress import progress

DESCENTS: Mapping[str, tuple[str, dict[str, Any], float, int | None]] = {
    "gradient descent": ("sgd", {}, 1.0, None),
    "SGD, batch 8": ("sgd", {}, 0.25, 8),
    "SGD, batch 1": ("sgd", {}, 0.05, 1),
    "momentum 0.9": ("sgd", {"momentum": 0.9}, 0.5, None),
    "Adam": ("adamw", {}, 0.0, None),
    "Muon": ("muon", {}, 0.0, None),
}
"""Name -> (optimizer, its settings, its rate in terms of 1 / lambda_max (0: `FIXED_RATE`), rows per step)."""

FIXED_RATE = 0.02
DESCENT_STEPS = 2000


def double_descent(look: Look, seed: int) -> dict[str, Any]:
    """Run the experiment of `optim.diagnostics.double_descent`, in closed form and with optimizers at the threshold.

    Args:
        look: Not used.
        seed: The seed of the data and of batches.
    """
    dd = diagnostics.double_descent
    data = dd.make_data(seed=seed % 2**32)
    threshold = len(data.x)
    with progress("double descent", len(dd.VARIANTS) + len(DESCENTS), "arms") as bar:
        closed = {}
        for variant in dd.VARIANTS:
            closed[variant] = dd.experiment(data, variant=variant)
            bar.advance()
        f, _ = dd.features(data, threshold)
        rate = len(f) / float(torch.linalg.matrix_norm(f, 2)) ** 2
        arms: dict[str, dict[str, float]] = {}
        for name, (optimizer, options, factor, batch) in DESCENTS.items():
            lr = rate * factor or FIXED_RATE

            def make(
                named: list[tuple[str, nn.Parameter]], o: str = optimizer, lr: float = lr, s: Any = options
            ) -> torch.optim.Optimizer:
                return optim.create(o, named, lr=lr, **s)

            train, test = dd.descend(data, threshold, make, steps=DESCENT_STEPS, batch=batch, seed=seed % 2**32)
            arms[name] = {"train_mse": train, "test_mse": test, "lr": lr, "steps": DESCENT_STEPS}
            bar.advance()
    return {"widths": list(dd.WIDTHS), "steps": list(dd.STEPS), "threshold": threshold, "closed": closed, "arms": arms}


CHECK = Check(
    title="test error and condition number of random-feature regression, in closed form and with optimizers",
    cost="seconds; needs no model",
    measure=double_descent,
    needs_model=False,
    source="arXiv 2312.03951",
)
