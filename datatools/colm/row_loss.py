"""The loss of a row, as its only feature."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from datatools.colm.feature import FeatureKind
from datatools.colm.target import Target
from datatools.gradients import Batch, Loss


def _measure(model: nn.Module, losses: Loss, batch: Batch, target: Target, directions: Tensor, *, eps: float) -> Tensor:
    with torch.no_grad():
        return losses(model, batch).float()[:, None]


ROW_LOSS = FeatureKind(
    name="row_loss",
    title="the loss of the row",
    measure=_measure,
    cost="a forward pass",
    width=lambda target: 1,
    as_training=False,
)
