"""AdamW in float64 numpy, written from Loshchilov & Hutter 2019 (algorithm 2) and the statement of the switches."""

import numpy as np


def run(
    start,
    grads,
    *,
    lr,
    weight_decay,
    betas=(0.9, 0.999),
    eps=1e-8,
    eps_root=0.0,
    bias_correction=True,
    amsgrad=False,
    eps_before_correction=False,
):
    """Parameters after every gradient; a gradient that is None is no step."""
    theta = np.array(start, dtype=np.float64)
    first, second, largest = np.zeros_like(theta), np.zeros_like(theta), np.zeros_like(theta)
    t, path = 0, []
    for g in grads:
        if g is not None:
            t += 1
            first = betas[0] * first + (1 - betas[0]) * g
            second = betas[1] * second + (1 - betas[1]) * g**2
            largest = np.maximum(largest, second)
            v = largest if amsgrad else second
            unbias1 = 1 - np.power(betas[0], t) if bias_correction else 1.0
            unbias2 = 1 - np.power(betas[1], t) if bias_correction else 1.0
            if eps_before_correction:
                step = np.sqrt(unbias2) / unbias1 * first / (np.sqrt(v + eps_root) + eps)
            else:
                step = (first / unbias1) / (np.sqrt(v / unbias2 + eps_root) + eps)
            theta = theta - lr * weight_decay * theta - lr * step
        path.append(theta.copy())
    return path
