"""RMSprop in float64 numpy."""

import numpy as np


def run(start, grads, *, lr, weight_decay, alpha=0.99, eps=1e-8, momentum=0.0, centered=False):
    """Parameters after every gradient; a gradient that is None is no step."""
    theta = np.array(start, dtype=np.float64)
    v, a, b = (np.zeros_like(theta) for _ in range(3))
    path = []
    for g in grads:
        if g is not None:
            v = alpha * v + (1 - alpha) * g**2
            a = alpha * a + (1 - alpha) * g if centered else a
            b = momentum * b + g / (np.sqrt(np.maximum(v - a**2, 0)) + eps)
            theta = theta - lr * (b + weight_decay * theta)
        path.append(theta.copy())
    return path
