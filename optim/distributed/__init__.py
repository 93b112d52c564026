"""Several processes: whole matrices on the rank that owns them, and messages of one bit per entry."""

from optim.distributed.onebit import compressed_means
from optim.distributed.owner import OwnerComputes
from optim.distributed.setup import World, world

__all__ = ["OwnerComputes", "World", "compressed_means", "world"]
