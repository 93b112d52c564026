"""Dion in float64 numpy, from arXiv 2504.05295, algorithm 1, with the first basis of optim.kernels.philox."""

import math

import numpy as np

from optim.kernels.philox import normals


def run(
    start,
    grads,
    *,
    lr,
    weight_decay,
    momentum=0.95,
    rank_fraction=1.0,
    rank_multiple_of=1,
    power_iters=1,
    eps=1e-8,
    seed=0,
):
    """Parameters after every gradient; a gradient that is None is no step."""
    theta = np.array(start, dtype=np.float64)
    w = theta.reshape(len(theta), -1)
    wide = w.shape[0] < w.shape[1]
    scale = math.sqrt(w.shape[0] / w.shape[1])
    b = np.zeros(w.T.shape if wide else w.shape)
    side = min(w.shape)
    rank = min(side, rank_multiple_of * math.ceil(rank_fraction * side / rank_multiple_of))
    q = normals(side * rank, seed=seed).double().numpy().reshape(side, rank)
    path = []
    for grad in grads:
        if grad is not None:
            g = grad.reshape(w.shape)
            b = b + (g.T if wide else g)
            r = q
            for _ in range(power_iters):
                p = np.linalg.qr(b @ r)[0]
                r = b.T @ p
            if not b.any():
                p, r = np.zeros_like(p), q
            b = b - (1 - momentum) * p @ r.T
            q = r / (np.linalg.norm(r, axis=0) + eps)
            u = p @ q.T
            w = w - lr * (scale * (u.T if wide else u) + weight_decay * w)
        path.append(w.reshape(theta.shape).copy())
    return path
