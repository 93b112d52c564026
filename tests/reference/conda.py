"""Conda in float64 numpy; the basis by an eigendecomposition of the smaller Gram matrix, not by an SVD."""

import numpy as np


def run(start, grads, *, lr, weight_decay, betas=(0.9, 0.999), eps=1e-8, update_proj_gap=2000, scale=1.0):
    """Parameters after every gradient; a gradient that is None is no step."""
    theta = np.array(start, dtype=np.float64)
    m, n = theta.shape[0], int(np.prod(theta.shape[1:]))
    first, second, basis, t, path = np.zeros((m, n)), np.zeros((m, n)), np.eye(min(m, n)), 0, []
    for g in grads:
        if g is not None:
            g = g.reshape(m, n)
            first = betas[0] * first + (1 - betas[0]) * g
            if t % update_proj_gap == 0:
                gram = first.T @ first if m >= n else first @ first.T
                basis = np.linalg.eigh(gram)[1][:, ::-1]
            t += 1
            turn = (lambda x, b=basis: x @ b) if m >= n else (lambda x, b=basis: b.T @ x)
            second = betas[1] * second + (1 - betas[1]) * turn(g) ** 2
            inner = turn(first) / (np.sqrt(second) + eps)
            step = inner @ basis.T if m >= n else basis @ inner
            step = scale * np.sqrt(1 - betas[1] ** t) / (1 - betas[0] ** t) * step
            theta = theta - lr * (step.reshape(theta.shape) + weight_decay * theta)
        path.append(theta.copy())
    return path
