"""Optimizers of several processes: whole matrices on the rank that owns them, and messages of one bit an entry."""

from optim.distributed.onebit import OneBitAdam, OneBitAdamRule, compressed_means
from optim.distributed.owner import OwnerComputes
from optim.distributed.setup import World, world

__all__ = ["OneBitAdam", "OneBitAdamRule", "OwnerComputes", "World", "compressed_means", "world"]
