"""Sharpness: the curvature of the loss in each block."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor

import optim
from optim import diagnostics
from pipelines.diagnose.looks import Check, Look
from pipelines.models.losses import token_losses
from pipelines.runs.progress import progress


def sharpness(look: Look, seed: int) -> dict[str, Any]:
    """Return the average sharpness of each block and tensor from sampled labels, and the ratios that it suggests.

    Args:
        look: The model and the rows.
        seed: The seed of the labels.

    Raises:
        ValueError: A sharpness is not finite.
    """
    model, rows, picked, config = look.model, look.rows, look.picked, look.config
    batches = rows.micro_batches(picked, config.token_budget, model.device)
    named = list(model.named_parameters())
    with progress("sharpness", len(batches), "batches") as bar:

        def losses() -> Iterator[Callable[[], Tensor]]:
            for _, batch in batches:
                yield lambda batch=batch: token_losses(model, batch)[0].mean()  # type: ignore[misc]
                bar.advance()

        tensors = diagnostics.block_sharpness(losses(), named, block=lambda name: name, seed=seed)
    sizes = {name: p.numel() for name, p in named}
    blocks: dict[str, list[str]] = {}
    for name in tensors:
        blocks.setdefault(optim.block_of(name), []).append(name)
    pooled = {
        block: sum(tensors[n] * sizes[n] for n in names) / sum(sizes[n] for n in names)
        for block, names in blocks.items()
    }
    if not all(math.isfinite(value) for value in pooled.values()):
        raise ValueError("a block's sharpness is not finite; check the model's weights and the rows")
    positive = {block: value for block, value in pooled.items() if value > 0 and block != "other"}
    return {
        "labels": "sampled",
        "batches": len(batches),
        "blocks": {b: {"sharpness": v, "parameters": sum(sizes[n] for n in blocks[b])} for b, v in pooled.items()},
        "tensors": tensors,
        "ratios": diagnostics.propose_ratios(positive),
    }


CHECK = Check(
    title="average sharpness of each block and tensor, and learning-rate ratios that it suggests",
    cost="one forward and backward pass",
    measure=sharpness,
    passes=lambda config: 1,
    source="arXiv 2502.19002",
)
