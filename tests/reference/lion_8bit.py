"""Lion with a momentum of 8 bits in float64 numpy."""

import numpy as np

from tests.reference.quantized import kept


def run(start, grads, *, lr, weight_decay, betas=(0.9, 0.99), **coding):
    """Parameters after every gradient; a gradient that is None is no step."""
    theta = np.array(start, dtype=np.float64)
    m, path = np.zeros_like(theta), []
    for g in grads:
        if g is not None:
            step = np.sign(betas[0] * m + (1 - betas[0]) * g)
            theta = theta - lr * (step + weight_decay * theta)
            m = kept(betas[1] * m + (1 - betas[1]) * g, signed=True, **coding)
        path.append(theta.copy())
    return path
