"""SinkGD and multi-normalisation in float64 numpy, by l2 norms; in PyTorch with row and column scales as vectors."""

import numpy as np
import torch


def normalised(x, norm):
    """The point of largest inner product with x on the sphere of the norm that has Frobenius radius sqrt(m n)."""
    m, n = x.shape
    if norm == "sign":
        return np.sign(x)
    if norm == "spectral":
        u, s, vt = np.linalg.svd(x, full_matrices=False)
        live = s > max(m, n) * np.finfo(float).eps * s.max(initial=0)
        return np.sqrt(max(m, n)) * (u[:, live] @ vt[live])
    axis = 1 if norm == "row" else 0
    return x * np.sqrt(x.shape[axis]) / np.maximum(np.sqrt((x**2).sum(axis, keepdims=True)), 1e-8)


def run(start, grads, *, lr, weight_decay, alpha=0.05, rounds=5, norms=("row", "column")):
    """Parameters after every gradient; a gradient that is None is no step."""
    theta = np.array(start, dtype=np.float64)
    path = []
    for g in grads:
        if g is not None:
            x = g.reshape(theta.shape[0], -1)
            for _ in range(rounds):
                for norm in norms:
                    x = normalised(x, norm)
            theta = theta - lr * (alpha * x.reshape(theta.shape) + weight_decay * theta)
        path.append(theta.copy())
    return path


class ByScales(torch.optim.Optimizer):
    """SinkGD as diag(r) G diag(c): the gradient is never rewritten; there is no published code."""

    def __init__(self, params, lr, weight_decay, alpha=0.05, rounds=5):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})
        self.alpha, self.rounds = alpha, rounds

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                square = p.grad.square()
                r, c = torch.ones(len(p)), torch.ones(p.shape[1])
                for _ in range(self.rounds):
                    r = (p.shape[1] / (square @ c.square())).sqrt()
                    c = (p.shape[0] / (square.T @ r.square())).sqrt()
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.sub_(group["lr"] * self.alpha * r[:, None] * p.grad * c)
