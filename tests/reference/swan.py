"""SWAN in float64 numpy, whitening by what it does to singular values; and in PyTorch, product by product."""

import numpy as np
import torch


def whitened(x, steps, beta):
    """Each singular value s of x / |x|_F ends as z s, with y = s^2, z = 1; t = 3 - z y; y, z = beta y t, beta t z."""
    u, s, vt = np.linalg.svd(x, full_matrices=False)
    s = s / (np.sqrt((s**2).sum()) + 1e-12)
    y, z = s**2, np.ones_like(s)
    for _ in range(steps):
        t = 3 - z * y
        y, z = beta * y * t, beta * t * z
    return (u * (z * s)) @ vt


def run(start, grads, *, lr, weight_decay, alpha=0.05, steps=10, beta=0.8, center=True):
    """Parameters after every gradient; a gradient that is None is no step."""
    theta = np.array(start, dtype=np.float64)
    m, n = theta.shape[0], int(np.prod(theta.shape[1:]))
    path = []
    for g in grads:
        if g is not None:
            g = g.reshape(m, n)
            if center:
                g = g - g.mean(1, keepdims=True)
            g = g / np.maximum(np.sqrt((g**2).mean(1, keepdims=True)), 1e-8)
            white = whitened(g, steps, beta)
            size = np.sqrt((white**2).sum())
            step = alpha * np.sqrt((g**2).sum()) / size * white if size > 0 else white
            theta = theta - lr * (step.reshape(theta.shape) + weight_decay * theta)
        path.append(theta.copy())
    return path


class WrittenOut(torch.optim.Optimizer):
    """SWAN without centring, matrix by matrix; there is no published code."""

    def __init__(self, params, lr, weight_decay, steps, beta, alpha=0.05):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})
        self.alpha, self.steps, self.beta = alpha, steps, beta

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                g = p.grad * p.shape[1] ** 0.5 / p.grad.norm(dim=1, keepdim=True)
                x = (g if p.shape[0] <= p.shape[1] else g.T) / g.norm()
                y, z = x @ x.T, torch.eye(len(x))
                for _ in range(self.steps):
                    t = 3 * torch.eye(len(x)) - z @ y
                    y, z = self.beta * (y @ t), self.beta * (t @ z)
                o = z @ x if p.shape[0] <= p.shape[1] else (z @ x).T
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.sub_(group["lr"] * self.alpha * g.norm() / o.norm() * o)
