"""NAdamW in float64 numpy, as in the AlgoPerf benchmark."""

import numpy as np


def run(start, grads, *, lr, weight_decay, betas=(0.9, 0.999), eps=1e-8):
    """Parameters after every gradient; a gradient that is None is no step."""
    theta = np.array(start, dtype=np.float64)
    m, v, t = np.zeros_like(theta), np.zeros_like(theta), 0
    path = []
    for g in grads:
        if g is not None:
            t += 1
            m = betas[0] * m + (1 - betas[0]) * g
            v = betas[1] * v + (1 - betas[1]) * g**2
            ahead = betas[0] * m + (1 - betas[0]) * g
            u = ahead / (1 - betas[0] ** t) / (np.sqrt(v / (1 - betas[1] ** t)) + eps)
            theta = theta - lr * (u + weight_decay * theta)
        path.append(theta.copy())
    return path
