"""CAME in float64 numpy, from arXiv 2307.02047, algorithm 2."""

import numpy as np

from tests.reference.adafactor import averaged, estimate


def run(start, grads, *, lr, weight_decay, betas=(0.9, 0.999, 0.9999), eps=(1e-30, 1e-16), clip_threshold=1.0):
    """Parameters after every gradient; a gradient that is None is no step."""
    theta = np.array(start, dtype=np.float64)
    m, v, s = np.zeros_like(theta), None, None
    path = []
    for g in grads:
        if g is not None:
            v = averaged(v, g**2 + eps[0], betas[1])
            h = g / np.sqrt(estimate(v))
            h = h / max(1.0, np.sqrt(np.mean(h**2)) / clip_threshold)
            m = betas[0] * m + (1 - betas[0]) * h
            u = m
            if theta.ndim > 1:
                s = averaged(s, (h - m) ** 2 + eps[1], betas[2])
                u = m / np.sqrt(estimate(s))
            theta = theta - lr * (u + weight_decay * theta)
        path.append(theta.copy())
    return path
