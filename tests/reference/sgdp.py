"""SGDP in float64 numpy; the projection is AdamP's."""

import numpy as np

from tests.reference.adamp import projected


def run(
    start,
    grads,
    *,
    lr,
    weight_decay,
    momentum=0.0,
    dampening=0.0,
    nesterov=False,
    eps=1e-8,
    delta=0.1,
    wd_ratio=0.1,
    project_buffer=False,
):
    """Parameters after every gradient; a gradient that is None is no step."""
    theta = np.array(start, dtype=np.float64)
    buffer, path = np.zeros_like(theta), []
    for g in grads:
        if g is not None:
            buffer = momentum * buffer + (1 - dampening) * g
            step, share = projected(g + momentum * buffer if nesterov else buffer, g, theta, delta, eps, wd_ratio)
            theta = theta - lr * weight_decay * share / (1 - momentum) * theta - lr * step
            if project_buffer:
                buffer = step
        path.append(theta.copy())
    return path
