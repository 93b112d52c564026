"""Shampoo in float64 numpy, from arXiv 2309.06497 and its code: blocks with eigendecompositions, and grafting."""

import numpy as np


def inverse_root(factor, epsilon):
    values, vectors = np.linalg.eigh(factor + epsilon * np.eye(len(factor)))
    values = values + max(epsilon - values.min(), 0)
    return vectors * values**-0.25 @ vectors.T


class Block:
    """The factors of one block, and their roots."""

    def __init__(self, shape):
        self.left, self.right = (np.zeros((size, size)) for size in shape)
        self.roots = [np.eye(size) for size in shape]

    def measure(self, g, beta):
        weight = 1 if beta == 1 else 1 - beta
        self.left, self.right = beta * self.left + weight * g @ g.T, beta * self.right + weight * g.T @ g


def run(
    start,
    grads,
    *,
    lr,
    weight_decay,
    betas=(0.9, 0.999),
    epsilon=1e-12,
    max_preconditioner_dim=1024,
    precondition_frequency=10,
    start_preconditioning_step=None,
    grafting="adam",
    grafting_beta2=0.999,
    grafting_epsilon=1e-8,
):
    """Parameters after every gradient; a gradient that is None is no step."""
    theta = np.array(start, dtype=np.float64)
    w = theta.reshape(len(theta), -1)
    m, v = np.zeros_like(w), np.zeros_like(w)
    first = start_preconditioning_step or precondition_frequency
    size = max_preconditioner_dim
    places = [np.s_[i : i + size, j : j + size] for i in range(0, len(w), size) for j in range(0, w.shape[1], size)]
    blocks = [Block(w[place].shape) for place in places]
    t, path = 0, []
    for grad in grads:
        if grad is not None:
            g = grad.reshape(w.shape)
            t += 1
            m = betas[0] * m + (1 - betas[0]) * g
            mean = m / (1 - betas[0] ** t)
            if grafting == "adagrad":
                v = v + g**2
                a = mean / (np.sqrt(v) + grafting_epsilon)
            elif grafting == "adam":
                v = grafting_beta2 * v + (1 - grafting_beta2) * g**2
                a = mean / (np.sqrt(v / (1 - grafting_beta2**t)) + grafting_epsilon)
            else:
                a = mean
            u = np.zeros_like(w)
            for place, block in zip(places, blocks, strict=True):
                block.measure(g[place], betas[1])
                if t == first or (t > first and t % precondition_frequency == 0):
                    unbiased = 1 if betas[1] == 1 else 1 - betas[1] ** t
                    block.roots = [inverse_root(f / unbiased, epsilon) for f in (block.left, block.right)]
                s = block.roots[0] @ mean[place] @ block.roots[1]
                if grafting != "none":
                    s = s * np.linalg.norm(a[place]) / (np.linalg.norm(s) + 1e-16)
                    s = a[place] if t < first else s
                u[place] = s
            w = w - lr * (u + weight_decay * w)
        path.append(w.reshape(theta.shape).copy())
    return path
