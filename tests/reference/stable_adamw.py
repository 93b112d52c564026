"""StableAdamW in float64 numpy, from arXiv 2304.13013, algorithm 2, with clipped decay."""

import numpy as np


def run(start, grads, *, lr, weight_decay, betas=(0.9, 0.99), eps=1e-6):
    """Parameters after every gradient; a gradient that is None is no step."""
    theta = np.array(start, dtype=np.float64)
    m, v, t = np.zeros_like(theta), np.zeros_like(theta), 0
    path = []
    for g in grads:
        if g is not None:
            t += 1
            b1, b2 = (b * (1 - b ** (t - 1)) / (1 - b**t) for b in betas)
            m = b1 * m + (1 - b1) * g
            v = b2 * v + (1 - b2) * g**2
            rms = np.sqrt(np.mean(g**2 / np.maximum(v, eps**2)))
            theta = theta - lr / max(1.0, rms) * (m / (np.sqrt(v) + eps) + weight_decay * theta)
        path.append(theta.copy())
    return path
