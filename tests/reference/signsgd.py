"""SignSGD with momentum in float64 numpy, from arXiv 1802.04434."""

import numpy as np


def run(start, grads, *, lr, weight_decay, momentum=0.9):
    """Parameters after every gradient; a gradient that is None is no step."""
    theta = np.array(start, dtype=np.float64)
    m = np.zeros_like(theta)
    path = []
    for g in grads:
        if g is not None:
            m = momentum * m + (1 - momentum) * g
            theta = theta - lr * (np.sign(m) + weight_decay * theta)
        path.append(theta.copy())
    return path
