"""Spectra: the singular values of weights and of the first updates of optimizers."""

from __future__ import annotations

from typing import Any

from torch import Tensor

import optim
from optim import diagnostics
from pipelines.diagnose.looks import Check, Look, gradients, roles
from pipelines.runs.progress import progress


def spectrum(look: Look, seed: int) -> dict[str, Any]:
    """Return the spectra of every matrix of the layers, and of the first update that each optimizer would make.

    Args:
        look: The model and the rows.
        seed: Not used.
    """
    model, updates = look.model, look.config.updates
    grads = gradients(model, look.parts)
    matrices = [(name, p) for name, p in model.named_parameters() if roles(model, name, p)]
    kinds: dict[str, list[tuple[str, dict[str, float]]]] = {kind: [] for kind in ("weights", *updates)}
    layers: list[dict[str, Any]] = []
    with progress("spectra", len(matrices) * len(kinds), "matrices") as bar:
        for name, param in matrices:
            for kind in kinds:
                tensor = param.detach() if kind == "weights" else _first_update(kind, name, param, grads.get(name))
                for role, matrix in roles(model, name, tensor) if tensor is not None else []:
                    found = diagnostics.spectrum(matrix)
                    kinds[kind].append((role, found))
                    layers.append({"name": name, "role": role, "of": kind, **found})
                bar.advance()
    return {"roles": {kind: diagnostics.by_role(found) for kind, found in kinds.items()}, "matrices": layers}


def _first_update(optimizer: str, name: str, param: Tensor, gradient: Tensor | None) -> Tensor | None:
    """Return the direction of the optimizer's first step for this gradient, without weight decay."""
    if gradient is None:
        return None
    map_ = optim.UpdateMap.of(optim.create(optimizer, [(name, param)], lr=1.0), copy=False)
    return map_({name: gradient})[name]


CHECK = Check(
    title="spectra of the weights and of the first update of each optimizer",
    cost="one pass, and the singular values of every matrix",
    measure=spectrum,
    passes=lambda config: 1,
    source="arXiv 2509.26030",
)
