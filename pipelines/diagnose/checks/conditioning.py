"""Conditioning: how far the matrices are from singular."""

from __future__ import annotations

from typing import Any

import torch

import optim
from optim import diagnostics
from pipelines.diagnose.looks import Check, Look, roles
from pipelines.runs.progress import progress


def conditioning(look: Look, seed: int) -> dict[str, Any]:
    """Return the condition numbers of every matrix, and the penalty of TSCNC.

    Args:
        look: The model and the rows.
        seed: Not used.
    """
    named = [(name, p) for name, p in look.model.named_parameters() if p.ndim >= 2]
    found = []
    with progress("condition numbers", len(named), "matrices") as bar, torch.no_grad():
        for name, param in named:
            for role, matrix in roles(look.model, name, param.detach()) or [(optim.block_of(name), param.detach())]:
                penalty = float(diagnostics.condition_penalty(matrix))
                found.append({"name": name, "role": role, "shape": list(matrix.shape), "penalty": penalty,
                              **diagnostics.condition_numbers(matrix)})  # fmt: skip
            bar.advance()
    return {"matrices": found}


CHECK = Check(
    title="condition numbers of every matrix, and the penalty of TSCNC",
    cost="the singular values of every matrix; no pass",
    measure=conditioning,
    source="arXiv 2503.20454",
)
