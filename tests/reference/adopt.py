"""ADOPT in float64 numpy, from arXiv 2411.02853, algorithm 2 with clipping."""

import numpy as np


def run(start, grads, *, lr, weight_decay, betas=(0.9, 0.9999), eps=1e-6, clip_exponent=0.25):
    """Parameters after every gradient; a gradient that is None is no step."""
    theta = np.array(start, dtype=np.float64)
    m, v, t = np.zeros_like(theta), None, 0
    path = []
    for g in grads:
        if g is not None:
            if v is None:
                v = g**2
            else:
                n = g / np.maximum(np.sqrt(v), eps)
                if clip_exponent is not None:
                    n = np.clip(n, -(t**clip_exponent), t**clip_exponent)
                m = betas[0] * m + (1 - betas[0]) * n
                theta = theta - lr * (m + weight_decay * theta)
                v = betas[1] * v + (1 - betas[1]) * g**2
            t += 1
        path.append(theta.copy())
    return path
