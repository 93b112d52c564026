"""Zeroth-order optimization: gradients from evaluations of the loss alone, as a source that works with any rule."""

from optim.zeroth_order.noise import add_normal_
from optim.zeroth_order.replay import Losses, NotFinite, Taken
from optim.zeroth_order.settings import Estimator, decay_groups
from optim.zeroth_order.source import ZerothOrder

__all__ = ["Estimator", "Losses", "NotFinite", "Taken", "ZerothOrder", "add_normal_", "decay_groups"]
