"""What each parameter is: a hidden matrix and its memory layout, an embedding, a head, or none of these.

This is inferred from names and shapes, and also from the types of modules if the model itself is given.
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
