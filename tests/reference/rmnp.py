"""RMNP in float64 numpy, from arXiv 2603.20527."""

import numpy as np


def run(start, grads, *, lr, weight_decay, momentum=0.95, nesterov=True, scale="match_rms"):
    """Parameters after every gradient; a gradient that is None is no step."""
    theta = np.array(start, dtype=np.float64)
    b = np.zeros_like(theta)
    path = []
    for g in grads:
        if g is not None:
            b = momentum * b + g
            d = (g + momentum * b if nesterov else b).reshape(len(theta), -1)
            m, n = d.shape
            f = {"match_rms": 0.2 * n**0.5, "original": max(1.0, m / n) ** 0.5, "none": 1.0}[scale]
            u = f * d / np.maximum(np.linalg.norm(d, axis=1, keepdims=True), 1e-12)
            theta = theta - lr * (u.reshape(theta.shape) + weight_decay * theta)
        path.append(theta.copy())
    return path
