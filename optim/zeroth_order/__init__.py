"""Zeroth order: gradients from evaluations of the loss alone, as a source that works with any rule."""

from optim.zeroth_order.noise import add_normal_
from optim.zeroth_order.source import Estimator, Losses, NotFinite, Taken, ZerothOrder, decay_groups

__all__ = ["Estimator", "Losses", "NotFinite", "Taken", "ZerothOrder", "add_normal_", "decay_groups"]
