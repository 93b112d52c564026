"""The layers that carry the influence of a row, for `datatools explain`: from exact gradients, without projection."""

from __future__ import annotations

import re
from collections import defaultdict
from typing import Any

import torch

from datatools import per_sample_grads
from optim import SGDRule
from pipelines.models import load as models
from pipelines.models.losses import losses_for
from pipelines.rows.rows import Rows
from pipelines.select import parameters
from pipelines.settings.select import SelectConfig
from pipelines.training import checkpoints

_LAYER = re.compile(r"\.(?:layers|h|blocks|block)\.(\d+)\.")


def layers_of(
    config: SelectConfig, stop: checkpoints.Checkpoint, pool: Rows, index: int, target: Rows, nearest: list[int]
) -> list[dict[str, Any]]:
    """Return the share of each layer in the mean cosine of the row's update with the nearest target rows' gradients.

    Args:
        config: The settings of the selection.
        stop: The checkpoint.
        pool: The pool.
        index: The pool row.
        target: The target.
        nearest: Target rows.

    Returns:
        `[{"layer": ..., "cosine": ...}]`, the largest absolute cosine first.
    """
    base = models.load(config.model).model
    with checkpoints.at(stop, config.model, base) as module:
        params = checkpoints.trainable(module)
        state = checkpoints.updates(stop, params, adam_mode=config.features.adam_mode, module=module, base=base)
        trained = {name: p for name, p in module.named_parameters() if name in state.params}
        names = parameters.covered_by(module, trained, config.features)
        method: Any = config.features.method
        losses = losses_for(method)
        update = checkpoints.restrict(state, names).per_sample(
            per_sample_grads(losses, module, pool.batch([index], module.device), names, method=method)
        )
        plain = checkpoints.restrict(state, names, SGDRule())
        sums: dict[str, float] = defaultdict(float)
        length = torch.stack([u.square().sum() for u in update.values()]).sum().sqrt()
        for row in nearest:
            batch = target.batch([row], module.device)
            grads = plain.per_sample(per_sample_grads(losses, module, batch, names, method=method))
            norm = torch.stack([g.square().sum() for g in grads.values()]).sum().sqrt()
            for name in names:
                sums[_layer(name)] += float((update[name] * grads[name]).sum() / (length * norm)) / len(nearest)
    return [{"layer": name, "cosine": value} for name, value in sorted(sums.items(), key=lambda item: -abs(item[1]))]


def _layer(name: str) -> str:
    """Return `layer 12 o_proj` for a parameter of block 12, and the name of the module for any other parameter."""
    found = _LAYER.search(name)
    module = re.sub(r"\.(lora_[AB]\.\w+\.)?(weight|bias)$", "", name).rsplit(".", 1)[-1]
    return f"layer {found[1]} {module}" if found else module
