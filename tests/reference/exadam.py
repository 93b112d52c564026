"""EXAdam in float64 numpy, from arXiv 2412.20302 version 2."""

import numpy as np


def run(start, grads, *, lr, weight_decay, betas=(0.9, 0.999), eps=1e-8):
    """Parameters after every gradient; a gradient that is None is no step."""
    theta = np.array(start, dtype=np.float64)
    m, v, t, path = np.zeros_like(theta), np.zeros_like(theta), 0, []
    for g in grads:
        if g is not None:
            t += 1
            b1_t, b2_t = betas[0] ** t, betas[1] ** t
            m = betas[0] * m + (1 - betas[0]) * g
            v = betas[1] * v + (1 - betas[1]) * g**2
            m_tilde = m / (1 - b1_t) * (1 + v / (v + eps) * b2_t)
            v_tilde = v / (1 - b2_t) * (1 + m**2 / (m**2 + eps) * b1_t)
            g_tilde = g / (1 - b1_t) * (1 + v / (v + eps) * b2_t)
            theta = theta - lr * weight_decay * theta - lr * (m_tilde + g_tilde) / (np.sqrt(v_tilde) + eps)
        path.append(theta.copy())
    return path
