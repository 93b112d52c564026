"""What each parameter is: a hidden matrix and how it lies in memory, an embedding, a head, or none of these.

Names and shapes tell it, or, where the model itself is given, the types of its modules as well.
"""

from optim.roles.blocks import BLOCKS, Block, block_of
from optim.roles.kinds import Kind, is_matrix, kind_of
from optim.roles.layouts import Named, layouts
from optim.roles.names import is_bias, is_norm_or_bias
from optim.roles.role import Role, roles

__all__ = [
    "BLOCKS", "Block", "Kind", "Named", "Role", "block_of", "is_bias", "is_matrix", "is_norm_or_bias", "kind_of",
    "layouts", "roles",
]  # fmt: skip
