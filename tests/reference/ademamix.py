"""AdEMAMix in float64 numpy, from arXiv 2409.03137, algorithm 1 and its schedulers."""

import numpy as np


def run(
    start, grads, *, lr, weight_decay, betas=(0.9, 0.999, 0.9999), alpha=2.0, alpha_warmup=0, beta3_warmup=0, eps=1e-8
):
    """Parameters after every gradient; a gradient that is None is no step."""
    theta = np.array(start, dtype=np.float64)
    m, s, v, t = *(np.zeros_like(theta) for _ in range(3)), 0
    path = []
    for g in grads:
        if g is not None:
            t += 1
            a = alpha * min(t / alpha_warmup, 1) if alpha_warmup else alpha
            b3 = betas[2]
            if beta3_warmup and t < beta3_warmup:
                lives = [np.log(0.5) / np.log(b + 1e-8) - 1 for b in (betas[0], betas[2])]
                b3 = 0.5 ** (1 / ((1 - t / beta3_warmup) * lives[0] + t / beta3_warmup * lives[1] + 1))
            m = betas[0] * m + (1 - betas[0]) * g
            s = b3 * s + (1 - b3) * g
            v = betas[1] * v + (1 - betas[1]) * g**2
            u = (m / (1 - betas[0] ** t) + a * s) / (np.sqrt(v / (1 - betas[1] ** t)) + eps)
            theta = theta - lr * (u + weight_decay * theta)
        path.append(theta.copy())
    return path
