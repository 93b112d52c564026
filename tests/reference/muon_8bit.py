"""Muon with a momentum of 8 bits in float64 numpy; the direction is made of the momentum before it is rounded."""

import numpy as np

from tests.reference.muon import orthogonalised
from tests.reference.quantized import kept


def run(
    start,
    grads,
    *,
    lr,
    weight_decay,
    momentum=0.95,
    nesterov=False,
    ns_dtype="param",
    code="linear",
    block_size=2048,
    **coding,
):
    """Parameters after every gradient; a gradient that is None is no step."""
    assert ns_dtype == "param"
    theta = np.array(start, dtype=np.float64)
    buffer, path = np.zeros_like(theta), []
    rows, cols = theta.shape[0], int(np.prod(theta.shape[1:]))
    for g in grads:
        if g is not None:
            buffer = momentum * buffer + g
            d = g + momentum * buffer if nesterov else buffer
            step = 0.2 * np.sqrt(max(rows, cols)) * orthogonalised(d.reshape(rows, cols)).reshape(theta.shape)
            theta = theta - lr * (step + weight_decay * theta)
            buffer = kept(buffer, signed=True, code=code, block_size=block_size, **coding)
        path.append(theta.copy())
    return path
