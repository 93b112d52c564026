"""PSGD Kron in float64 numpy, from the code of evanatyourservice/kron_torch, with the noise of optim.kernels.philox."""

import numpy as np

from optim.kernels.philox import normals


def fitted(q, a, b, rate):
    """The factor after a fit, with a and b as they look from its side."""
    if q.ndim == 1:
        ours, theirs = (a**2).sum(1), (b**2).sum(1)
        return q - rate * (ours - theirs) * q / np.max(ours + theirs)
    ours, theirs = a @ a.T, b @ b.T
    both = ours + theirs
    peak = np.abs(both).max()
    column = both[:, np.argmax((both**2).sum(0))] / peak
    x = column @ (both / peak)
    norm = peak * np.linalg.norm(both / peak @ (x / np.linalg.norm(x)))
    return q - rate * np.triu(ours - theirs) / norm @ q


def full(q):
    return np.diag(q) if q.ndim == 1 else q


def run(
    start,
    grads,
    *,
    lr,
    weight_decay,
    momentum=0.9,
    update_probability=None,
    precond_lr=0.1,
    precond_init_scale=1.0,
    max_size_triangular=8192,
    diagonal="none",
    fit_momentum=True,
    seed=0,
):
    """Parameters after every gradient; a gradient that is None is no step. Shorter than 100 steps."""
    theta = np.array(start, dtype=np.float64)
    w = theta.reshape(len(theta), -1)
    q = []
    for i, size in enumerate(w.shape):
        longest = i == (0 if w.shape[0] > w.shape[1] else 1)
        short = size == 1 or size > max_size_triangular or diagonal == "all" or (diagonal == "largest" and longest)
        q.append(precond_init_scale**0.5 * (np.ones(size) if short else np.eye(size)))
    m, t, since, path = np.zeros_like(w), 0, 0, []
    for grad in grads:
        if grad is not None:
            g = grad.reshape(w.shape)
            m = momentum * m + (1 - momentum) * g
            mean = m / (1 - momentum ** (t + 1))
            since += 1
            if since >= 1 / (1.0 if update_probability is None else update_probability):
                since = 0
                h = mean if fit_momentum else g
                noise = normals(h.size, seed=seed, stream=t).double().numpy().reshape(h.shape)
                h = h + np.sqrt(np.finfo(np.float32).eps) * np.abs(h).mean() * noise
                left, right = map(full, q)
                a = left @ h @ right.T
                b = np.linalg.inv(left).T @ noise @ np.linalg.inv(right)
                q = [fitted(q[0], a, b, precond_lr), fitted(q[1], a.T, b.T, precond_lr)]
            left, right = map(full, q)
            u = left.T @ left @ mean @ right.T @ right
            u = u * min(1.0, 1.1 / (np.sqrt((u**2).mean()) + 1e-12))
            w = w - lr * (u + weight_decay * w)
            t += 1
        path.append(w.reshape(theta.shape).copy())
    return path
