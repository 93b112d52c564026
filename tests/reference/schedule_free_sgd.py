"""Schedule-Free SGD in float64 numpy, from arXiv 2405.15682, with its three sequences."""

import numpy as np


def run(start, grads, *, lr, weight_decay, momentum=0.9, warmup_steps=0, r=0.0, weight_lr_power=2.0, shape=lambda g: g):
    """Parameters after every gradient; a gradient that is None is no step."""
    theta = np.array(start, dtype=np.float64)
    z, x, t, top, total = theta.copy(), theta.copy(), 0, 0.0, 0.0
    path = []
    for g in grads:
        if g is not None:
            t += 1
            rate = lr * min(1.0, t / warmup_steps) if warmup_steps else lr
            top = max(top, rate)
            total += t**r * top**weight_lr_power
            z = z - rate * (shape(g) + weight_decay * theta)
            c = t**r * top**weight_lr_power / total
            x = (1 - c) * x + c * z
            theta = momentum * x + (1 - momentum) * z
        path.append(theta.copy())
    return path
