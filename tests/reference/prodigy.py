"""Prodigy in float64 numpy, from arXiv 2306.06101, algorithm 4, and its code."""

import numpy as np


def run(
    start,
    grads,
    *,
    lr,
    weight_decay,
    betas=(0.9, 0.999),
    beta3=None,
    eps=1e-8,
    use_bias_correction=False,
    safeguard_warmup=False,
    d0=1e-6,
    d_coef=1.0,
    growth_rate=None,
):
    """Parameters after every gradient; a gradient that is None is no step."""
    theta = np.array(start, dtype=np.float64)
    first, m, v, s = theta.copy(), *(np.zeros_like(theta) for _ in range(3))
    b3 = betas[1] ** 0.5 if beta3 is None else beta3
    d = most = d0
    r, t, path = 0.0, 0, []
    for g in grads:
        if g is not None:
            t += 1
            c = (1 - betas[1] ** t) ** 0.5 / (1 - betas[0] ** t) if use_bias_correction else 1.0
            rate = d * lr * c
            m = betas[0] * m + d * (1 - betas[0]) * g
            v = betas[1] * v + d**2 * (1 - betas[1]) * g**2
            s = b3 * s + d / d0 * (d if safeguard_warmup else rate) * g
            after = d
            if np.abs(s).sum() > 0:
                r = b3 * r + d / d0 * rate * np.sum(g * (first - theta))
                hat = d_coef * r / np.abs(s).sum()
                after = max(d, hat) if d == d0 else d
                most = max(most, hat)
                after = most if growth_rate is None else min(most, after * growth_rate)
            theta = theta - rate * (m / (np.sqrt(v) + after * eps) + weight_decay * theta)
            d = after
        path.append(theta.copy())
    return path
