"""MARS in float64 numpy, from arXiv 2411.10438, algorithms 2 and 3 with the last gradient."""

import numpy as np


def run(start, grads, *, lr, weight_decay, betas=(0.95, 0.99), gamma=0.025, form="adamw", eps=1e-8):
    """Parameters after every gradient; a gradient that is None is no step."""
    theta = np.array(start, dtype=np.float64)
    m, v, last, t = *(np.zeros_like(theta) for _ in range(3)), 0
    path = []
    for g in grads:
        if g is not None:
            t += 1
            c = g + gamma * betas[0] / (1 - betas[0]) * (g - last)
            c = c / max(1.0, np.linalg.norm(c))
            last = g
            m = betas[0] * m + (1 - betas[0]) * c
            v = betas[1] * v + (1 - betas[1]) * c**2
            u = m / (1 - betas[0] ** t) / (np.sqrt(v / (1 - betas[1] ** t)) + eps) if form == "adamw" else np.sign(m)
            theta = theta - lr * (u + weight_decay * theta)
        path.append(theta.copy())
    return path
