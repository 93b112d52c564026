"""NAdam in float64 numpy, from Dozat 2016 with torch's momentum schedule; the schedule is computed beforehand."""

import numpy as np


def run(start, grads, *, lr, weight_decay, betas=(0.9, 0.999), eps=1e-8, momentum_decay=4e-3, l2=0.0):
    """Parameters after every gradient; a gradient that is None is no step."""
    theta = np.array(start, dtype=np.float64)
    first, second = np.zeros_like(theta), np.zeros_like(theta)
    schedule = [betas[0] * (1 - 0.5 * 0.96 ** (i * momentum_decay)) for i in range(1, len(grads) + 2)]
    t, path = 0, []
    for g in grads:
        if g is not None:
            g = g + l2 * theta
            t += 1
            first = betas[0] * first + (1 - betas[0]) * g
            second = betas[1] * second + (1 - betas[1]) * g**2
            past, future = np.prod(schedule[:t]), np.prod(schedule[: t + 1])
            ahead = schedule[t] * first / (1 - future) + (1 - schedule[t - 1]) * g / (1 - past)
            step = ahead / (np.sqrt(second / (1 - betas[1] ** t)) + eps)
            theta = theta - lr * weight_decay * theta - lr * step
        path.append(theta.copy())
    return path
