"""Measurements of a loss and its parameters; none of them changes the training state or the global generators."""

from optim.diagnostics.sharpness import block_sharpness, propose_ratios

__all__ = ["block_sharpness", "propose_ratios"]
