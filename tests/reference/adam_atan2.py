"""Adam-atan2 in float64 numpy, from arXiv 2407.05872."""

import numpy as np


def run(start, grads, *, lr, weight_decay, betas=(0.9, 0.99), a=1.27, b=1.0):
    """Parameters after every gradient; a gradient that is None is no step."""
    theta = np.array(start, dtype=np.float64)
    m, v, t = np.zeros_like(theta), np.zeros_like(theta), 0
    path = []
    for g in grads:
        if g is not None:
            t += 1
            m = betas[0] * m + (1 - betas[0]) * g
            v = betas[1] * v + (1 - betas[1]) * g**2
            u = a * np.arctan2(m / (1 - betas[0] ** t), b * np.sqrt(v / (1 - betas[1] ** t)))
            theta = theta - lr * (u + weight_decay * theta)
        path.append(theta.copy())
    return path
