"""Adafactor in float64 numpy, from arXiv 1804.04235, in the forms of torch and transformers."""

import numpy as np


def averaged(old, x, beta):
    """The average of x, or of its means over the last and over the last but one dimension."""
    means = (x,) if x.ndim < 2 else (x.mean(-1), x.mean(-2))
    old = [np.zeros_like(mean) for mean in means] if old is None else old
    return [beta * a + (1 - beta) * mean for a, mean in zip(old, means, strict=True)]


def estimate(means, least=0.0):
    """What the means say of the average of all entries."""
    if len(means) == 1:
        return np.maximum(means[0], least**2)
    row, col = means
    mean = np.maximum(row.mean(-1, keepdims=True), least)
    return np.maximum(row[..., :, None] * col[..., None, :] / mean[..., None], least**2)


def run(
    start,
    grads,
    *,
    lr,
    weight_decay,
    beta2_decay=-0.8,
    eps=(None, 1e-3),
    clip_threshold=1.0,
    beta1=None,
    scale_parameter=True,
    relative_step=True,
    warmup_init=False,
    convention="torch",
):
    """Parameters after every gradient; a gradient that is None is no step."""
    theta = np.array(start, dtype=np.float64)
    v, m, t, path = None, np.zeros_like(theta), 0, []
    ours = convention == "torch"
    floor = (np.finfo(np.float64).eps if ours else 1e-30) if eps[0] is None else eps[0]
    for g in grads:
        if g is not None:
            t += 1
            v = averaged(v, g**2 + (0 if ours else floor), 1 - t**beta2_decay)
            u = g / np.sqrt(estimate(v, floor if ours else 0.0))
            u = u / max(1.0, np.sqrt(np.mean(u**2)) / clip_threshold)
            rate = lr * 1e-4 * t if warmup_init else lr
            rate = min(rate, t**-0.5) if relative_step else rate
            rate *= max(eps[1], np.sqrt(np.mean(theta**2))) if scale_parameter else 1.0
            step = rate * u
            if beta1 is not None:
                step = m = beta1 * m + (1 - beta1) * step
            theta = theta * (1 - (lr if ours else rate) * weight_decay) - step
        path.append(theta.copy())
    return path
