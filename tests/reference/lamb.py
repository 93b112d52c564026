"""LAMB in float64 numpy, from arXiv 1904.00962, algorithm 2."""

import numpy as np


def run(
    start,
    grads,
    *,
    lr,
    weight_decay,
    betas=(0.9, 0.999),
    eps=1e-6,
    bias_correction=True,
    always_adapt=True,
    trust_clip=False,
):
    """Parameters after every gradient; a gradient that is None is no step."""
    theta = np.array(start, dtype=np.float64)
    m, v, t = np.zeros_like(theta), np.zeros_like(theta), 0
    path = []
    for g in grads:
        if g is not None:
            t += 1
            m = betas[0] * m + (1 - betas[0]) * g
            v = betas[1] * v + (1 - betas[1]) * g**2
            c1, c2 = (1 - betas[0] ** t, 1 - betas[1] ** t) if bias_correction else (1.0, 1.0)
            u = m / c1 / (np.sqrt(v / c2) + eps) + weight_decay * theta
            sizes = np.linalg.norm(theta), np.linalg.norm(u)
            ratio = sizes[0] / sizes[1] if min(sizes) > 0 and (always_adapt or weight_decay > 0) else 1.0
            theta = theta - lr * (min(ratio, 1.0) if trust_clip else ratio) * u
        path.append(theta.copy())
    return path
