"""AdamW with states of 8 bits in float64 numpy: the step is made before the states are rounded."""

import numpy as np

from tests.reference.quantized import kept


def run(start, grads, *, lr, weight_decay, betas=(0.9, 0.999), eps=1e-8, **coding):
    """Parameters after every gradient; a gradient that is None is no step."""
    theta = np.array(start, dtype=np.float64)
    m, v, t, path = np.zeros_like(theta), np.zeros_like(theta), 0, []
    for g in grads:
        if g is not None:
            t += 1
            m, v = betas[0] * m + (1 - betas[0]) * g, betas[1] * v + (1 - betas[1]) * g**2
            step = m / (1 - betas[0] ** t) / (np.sqrt(v / (1 - betas[1] ** t)) + eps)
            theta = theta - lr * (step + weight_decay * theta)
            m, v = kept(m, signed=True, **coding), kept(v, signed=False, **coding)
        path.append(theta.copy())
    return path
