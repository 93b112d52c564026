"""Adagrad in float64 numpy."""

import numpy as np


def run(start, grads, *, lr, weight_decay, lr_decay=0.0, initial_accumulator_value=0.0, eps=1e-10):
    """Parameters after every gradient; a gradient that is None is no step."""
    theta = np.array(start, dtype=np.float64)
    v, t = np.full_like(theta, initial_accumulator_value), 0
    path = []
    for g in grads:
        if g is not None:
            v = v + g**2
            u = g / (np.sqrt(v) + eps) / (1 + t * lr_decay)
            theta = theta - lr * (u + weight_decay * theta)
            t += 1
        path.append(theta.copy())
    return path
