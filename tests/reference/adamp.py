"""AdamP in float64 numpy, row by row; `projected` is shared with SGDP's reference."""

import numpy as np


def projected(update, grad, weights, delta, eps, wd_ratio):
    """(the update, the factor of weight decay) after the projection of Heo et al. 2020."""
    if weights.ndim < 2:
        return update, 1.0
    for shape in ((weights.shape[0], -1), (1, -1)):
        rows = list(zip(*(x.reshape(shape) for x in (update, grad, weights)), strict=True))
        cosines = [abs(g @ w) / (max(np.linalg.norm(g), eps) * max(np.linalg.norm(w), eps)) for _, g, w in rows]
        if max(cosines) < delta / np.sqrt(len(rows[0][0])):
            units = [w / (np.linalg.norm(w) + eps) for _, _, w in rows]
            tangents = [u - (n @ u) * n for (u, _, _), n in zip(rows, units, strict=True)]
            return np.stack(tangents).reshape(weights.shape), wd_ratio
    return update, 1.0


def run(start, grads, *, lr, weight_decay, betas=(0.9, 0.999), eps=1e-8, delta=0.1, wd_ratio=0.1, nesterov=False):
    """Parameters after every gradient; a gradient that is None is no step."""
    theta = np.array(start, dtype=np.float64)
    m, v, t, path = np.zeros_like(theta), np.zeros_like(theta), 0, []
    for g in grads:
        if g is not None:
            t += 1
            m = betas[0] * m + (1 - betas[0]) * g
            v = betas[1] * v + (1 - betas[1]) * g**2
            numerator = betas[0] * m + (1 - betas[0]) * g if nesterov else m
            adam = numerator / (1 - betas[0] ** t) / (np.sqrt(v / (1 - betas[1] ** t)) + eps)
            step, share = projected(adam, g, theta, delta, eps, wd_ratio)
            theta = theta - lr * weight_decay * share * theta - lr * step
        path.append(theta.copy())
    return path
