"""LARS in float64 numpy, from arXiv 1708.03888."""

import numpy as np


def run(
    start, grads, *, lr, weight_decay, momentum=0.9, nesterov=False, trust_coeff=0.001, eps=1e-8, always_adapt=True
):
    """Parameters after every gradient; a gradient that is None is no step."""
    theta = np.array(start, dtype=np.float64)
    b = np.zeros_like(theta)
    path = []
    for g in grads:
        if g is not None:
            size, slope = np.linalg.norm(theta), np.linalg.norm(g)
            adapts = min(size, slope) > 0 and (always_adapt or weight_decay > 0)
            ratio = trust_coeff * size / (slope + weight_decay * size + eps) if adapts else 1.0
            h = ratio * (g + weight_decay * theta)
            b = momentum * b + h
            theta = theta - lr * (h + momentum * b if nesterov else b)
        path.append(theta.copy())
    return path
