"""Training on several processes: each whole matrix on the rank that owns it, and messages with one bit per entry."""

from optim.distributed.onebit import compressed_means
from optim.distributed.owner import OwnerComputes
from optim.distributed.setup import World, world

__all__ = ["OwnerComputes", "World", "compressed_means", "world"]
