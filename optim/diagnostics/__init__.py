"""Measurements of a loss and its parameters; none of them changes the training state or the global generators."""

from optim.diagnostics import double_descent
from optim.diagnostics.components import ARMS, by_component, tail_learning
from optim.diagnostics.conditioning import condition_numbers, condition_penalty, gate_penalty, transformed_l1
from optim.diagnostics.paths import path_smoothness
from optim.diagnostics.sharpness import block_sharpness, propose_ratios
from optim.diagnostics.smoothness import (
    Rotation,
    frobenius,
    hessian,
    lanczos,
    linf_smoothness,
)
from optim.diagnostics.spectrum import ROLE_GROUPS, by_role, roles, spectrum

__all__ = [
    "ARMS",
    "ROLE_GROUPS",
    "Rotation",
    "block_sharpness",
    "by_component",
    "by_role",
    "condition_numbers",
    "condition_penalty",
    "double_descent",
    "frobenius",
    "gate_penalty",
    "hessian",
    "lanczos",
    "linf_smoothness",
    "path_smoothness",
    "propose_ratios",
    "roles",
    "spectrum",
    "tail_learning",
    "transformed_l1",
]
