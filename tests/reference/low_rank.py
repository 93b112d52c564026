"""GaLore, Fira and APOLLO in float64 numpy, from the papers and the order of things in the published codes."""

import numpy as np


def singular(g, side, rank):
    u, _, vt = np.linalg.svd(g, full_matrices=False)
    vectors = (u if side == "left" else vt.T)[:, :rank]
    largest = vectors[np.abs(vectors).argmax(0), np.arange(rank)]
    return vectors * np.where(largest < 0, -1, 1)


def run(
    start,
    grads,
    *,
    form,
    lr,
    weight_decay,
    betas=(0.9, 0.999),
    eps=1e-6,
    rank=128,
    update_proj_gap=200,
    proj_type="std",
    scale=0.25,
    scale_type="channel",
    scale_front=False,
    exact_residual=False,
    limiter=1.01,
    limiter_reset=True,
    draw=None,
):
    """Parameters after every gradient; a gradient that is None is no step. draw(count, length, rank): random bases."""
    theta = np.array(start, dtype=np.float64)
    rows, cols = theta.shape[0], int(np.prod(theta.shape[1:]))
    rank = min(rank, rows, cols)
    side = {"std": "right" if rows >= cols else "left", "reverse_std": "left" if rows >= cols else "right"}.get(
        proj_type, proj_type
    )
    t, stored, m, v, path = 0, None, 0.0, 0.0, []
    for given in grads:
        if given is None:
            path.append(theta.copy())
            continue
        g = given.reshape(rows, cols)
        if t % update_proj_gap == 0:
            length = rows if side == "left" else cols
            basis = draw(t // update_proj_gap, length, rank) if draw else singular(g, side, rank)
        t += 1
        low = basis.T @ g if side == "left" else g @ basis

        def back(x, basis=basis):
            return basis @ x if side == "left" else x @ basis.T

        m, v = betas[0] * m + (1 - betas[0]) * low, betas[1] * v + (1 - betas[1]) * low**2
        n = m / (np.sqrt(v) + eps)
        if form == "project":
            u = scale * back(n)
        else:
            axis = 0 if side == "left" else 1
            if scale_type == "tensor":
                s = np.linalg.norm(n) / (np.linalg.norm(low) + 1e-8)
            else:
                s = np.linalg.norm(n, axis=axis, keepdims=True) / (np.linalg.norm(low, axis=axis, keepdims=True) + 1e-8)
            if form == "residual":
                rest = (g - (1 if exact_residual else scale) * back(low)) * s
            else:
                rest = g * s * (np.sqrt(scale) if scale_front else 1)
            norm = np.linalg.norm(rest)
            if limiter:
                if stored is None or (limiter_reset and stored == 0):
                    stored = norm
                elif not (limiter_reset and norm == 0):
                    cut = max(norm / (stored + 1e-8), limiter) / limiter
                    rest, stored = rest / cut, norm / cut
            u = scale * back(n) + rest if form == "residual" else rest * (1 if scale_front else np.sqrt(scale))
        u = u * np.sqrt(1 - betas[1] ** t) / (1 - betas[0] ** t)
        theta = theta - lr * (u.reshape(theta.shape) + weight_decay * theta)
        path.append(theta.copy())
    return path
