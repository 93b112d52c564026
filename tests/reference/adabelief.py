"""AdaBelief in float64 numpy: algorithm 2 of Zhuang et al. 2020, and RAdam's rectification by its variance ratio."""

import numpy as np


def run(
    start,
    grads,
    *,
    lr,
    weight_decay,
    betas=(0.9, 0.999),
    eps=1e-16,
    amsgrad=False,
    rectify=True,
    degenerated_to_sgd=True,
    l2=0.0,
    fixed_decay=False,
):
    """Parameters after every gradient; a gradient that is None is no step."""
    theta = np.array(start, dtype=np.float64)
    mean, belief, largest = np.zeros_like(theta), np.zeros_like(theta), np.zeros_like(theta)
    t, path = 0, []
    for g in grads:
        if g is not None:
            g = g + l2 * theta
            t += 1
            mean = betas[0] * mean + (1 - betas[0]) * g
            belief = betas[1] * belief + (1 - betas[1]) * (g - mean) ** 2 + eps
            largest = np.maximum(largest, belief)
            unbiased, seen = mean / (1 - betas[0] ** t), 1 - betas[1] ** t
            if not rectify:
                step = unbiased / (np.sqrt((largest if amsgrad else belief) / seen) + eps)
            else:
                limit = 2 / (1 - betas[1]) - 1
                length = limit - 2 * t * (1 - seen) / seen  # of the average, in independent gradients
                if length >= 5:
                    variance = [(n - 4) * (n - 2) / n for n in (length, limit)]
                    step = np.sqrt(seen * variance[0] / variance[1]) * unbiased / (np.sqrt(belief) + eps)
                else:
                    step = unbiased if degenerated_to_sgd else np.zeros_like(theta)
            theta = theta * (1 - weight_decay * (1 if fixed_decay else lr)) - lr * step
        path.append(theta.copy())
    return path
