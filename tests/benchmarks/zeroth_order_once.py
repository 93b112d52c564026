"""One way of training, or inference, in a process of its own, and the memory it took; `test_zeroth_order` runs it.

    python -m tests.benchmarks.zeroth_order_once ARM ROWS

ARM: inference (forward passes), mezo, zo_momentum, zo_adam, forward, or backprop_adamw. Prints one line
of JSON. The peak is the kernel's high-water mark of resident memory, reset once the model is loaded.
"""

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from optim import SGD, AdamW
from optim.zeroth_order import ZerothOrder
from pipelines.models.load import load
from pipelines.models.losses import token_losses
from pipelines.settings.parts import ModelConfig
from tests.benchmarks.extract_once import status
from tests.benchmarks.measure import Settings
from tests.tiny import save_tiny_model

STEPS = 3
LENGTH = 128


def arm_of(name: str, model: Any, loss: Callable[[], torch.Tensor]) -> Callable[[], object]:
    """One step of the arm."""
    if name == "inference":
        return lambda: [no_graph(loss) for _ in range(2)]
    named = list(model.named_parameters())
    if name == "backprop_adamw":
        optimizer = AdamW(named, lr=1e-5)

        def step() -> None:
            optimizer.zero_grad()
            loss().backward()
            optimizer.step()

        return step
    estimator: Any = "forward" if name == "forward" else "two-sided"
    source = ZerothOrder(named, module=model, estimator=estimator)
    makers = {"zo_adam": lambda: AdamW(named, lr=1e-6), "zo_momentum": lambda: SGD(named, lr=1e-6, momentum=0.9)}
    chosen = makers.get(name, lambda: SGD(named, lr=1e-6))()
    return lambda: source.step(chosen, loss)


def no_graph(loss: Callable[[], torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        return loss()


def main(arm: str, rows: int) -> None:
    settings = Settings.read()
    with TemporaryDirectory() as scratch:
        name = str(save_tiny_model(Path(scratch) / "model")) if settings.model == "tiny" else settings.model
        model = load(ModelConfig(name=name)).model.requires_grad_(True)
    drawn = torch.Generator().manual_seed(0)
    ids = torch.randint(5, 250, (rows, LENGTH), generator=drawn)
    batch = {"input_ids": ids, "labels": ids.clone()}
    batch["labels"][:, : LENGTH - 32] = -100  # answers of 32 tokens

    def loss() -> torch.Tensor:
        return token_losses(model, batch)[0].mean()

    no_graph(loss)  # pages of the model and the thread pool count for every arm
    step = arm_of(arm, model, loss)
    try:
        Path("/proc/self/clear_refs").write_text("5")
        reset = True
    except OSError:
        reset = False
    before, started = status("VmRSS"), time.perf_counter()
    for _ in range(STEPS):
        step()
    seconds = (time.perf_counter() - started) / STEPS
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    largest = max(p.numel() * p.element_size() for p in model.parameters())
    print(
        json.dumps(
            {
                "arm": arm,
                "rows": rows,
                "tokens": ids.numel(),
                "before": before,
                "peak": status("VmHWM"),
                "reset": reset,
                "seconds": seconds,
                "weights": size,
                "largest": largest,
            }
        )
    )


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
