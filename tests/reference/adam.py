"""Adam in float64 numpy, with weight decay in the gradient."""

import numpy as np


def run(start, grads, *, lr, weight_decay, betas=(0.9, 0.999), eps=1e-8, amsgrad=False):
    """Parameters after every gradient; a gradient that is None is no step."""
    theta = np.array(start, dtype=np.float64)
    m, v, top, t = *(np.zeros_like(theta) for _ in range(3)), 0
    path = []
    for g in grads:
        if g is not None:
            t += 1
            h = g + weight_decay * theta
            m = betas[0] * m + (1 - betas[0]) * h
            v = betas[1] * v + (1 - betas[1]) * h**2
            top = np.maximum(top, v) if amsgrad else v
            theta = theta - lr * m / (1 - betas[0] ** t) / (np.sqrt(top / (1 - betas[1] ** t)) + eps)
        path.append(theta.copy())
    return path
