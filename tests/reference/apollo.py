"""See tests/reference/low_rank.py. The draws of the random bases are the rule's own: they are what is given."""

import numpy as np

from optim.kernels.philox import normals
from tests.reference import low_rank


def draw(count, length, rank):
    """Of a group's first parameter, at seed 0."""
    return normals(length * rank, seed=0, stream=65536 + count).double().numpy().reshape(length, rank) / np.sqrt(rank)


def run(start, grads, *, scale=1.0, **settings):
    """Parameters after every gradient."""
    return low_rank.run(start, grads, form="scale", scale=scale, draw=draw, **settings)
