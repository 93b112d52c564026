"""1-bit Adam on N workers in one process, from arXiv 2102.02888 (algorithm 1) and DeepSpeed's message layout."""

import math

import numpy as np
import torch


def run(start, grads, *, lr, weight_decay, betas=(0.9, 0.999), eps=1e-8, freeze_step=100_000):
    """Parameters after every gradient, with one worker, who compresses nothing; None is no step."""
    alone = Workers(np.array(start), 1, lr, betas, eps, weight_decay, freeze_step)
    alone.all_reduce = lambda xs: xs[0]
    path = []
    for g in grads:
        if g is not None:
            alone.step([np.array(g)])
        path.append(alone.p.copy())
    return path


class PublishedOneBitAdam(torch.optim.Optimizer):
    """DeepSpeed's step of one worker (runtime/fp16/onebit/adam.py, Apache-2.0), without its first call."""

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, freeze_step=100_000):
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self.freeze_step = freeze_step

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                grad, state = p.grad, self.state[p]
                if len(state) == 0:
                    state["step"] = 0
                    state["exp_avg"] = torch.zeros_like(p)
                    state["exp_avg_sq"] = torch.zeros_like(p)
                beta1, beta2 = group["betas"]
                state["step"] += 1
                state["exp_avg"].mul_(beta1).add_(grad, alpha=1 - beta1)
                if state["step"] <= self.freeze_step:
                    state["exp_avg_sq"].mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
                update = state["exp_avg"] / (state["exp_avg_sq"].sqrt() + group["eps"])
                update += group["weight_decay"] * p
                p.add_(-group["lr"] * update)


class Workers:
    """All workers' view of one tensor: shared parameter and moments, errors of each worker and of each server."""

    def __init__(self, p, workers, lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, freeze_step=100):
        self.p, self.n, self.lr, self.betas, self.eps = p.astype(np.float64), workers, lr, betas, eps
        self.weight_decay, self.freeze_step, self.t = weight_decay, freeze_step, 0
        self.m, self.v = np.zeros_like(self.p), np.zeros_like(self.p)
        unit = workers * 8 * workers // math.gcd(workers, 8)
        self.length = (p.size + unit - 1) // unit * unit
        self.worker_error = np.zeros((workers, self.length))
        self.server_error = np.zeros((workers, self.length // workers))

    def step(self, grads, lr=None):
        """grads [workers, *shape]."""
        b1, b2 = self.betas
        lr = self.lr if lr is None else lr
        self.t += 1
        if self.t <= self.freeze_step:
            g = sum(grads) / self.n
            self.m = b1 * self.m + (1 - b1) * g
            self.v = b2 * self.v + (1 - b2) * g * g
        else:
            self.m = self.all_reduce([b1 * self.m + (1 - b1) * g for g in grads])
        self.p = self.p - lr * (self.m / (np.sqrt(self.v) + self.eps) + self.weight_decay * self.p)

    def all_reduce(self, xs):
        shape, size = xs[0].shape, xs[0].size
        sent = []
        for r, x in enumerate(xs):
            x = np.concatenate([x.ravel(), np.zeros(self.length - size)]) + self.worker_error[r]
            q = np.where(x >= 0, 1.0, -1.0) * (np.linalg.norm(x) / math.sqrt(self.length))
            self.worker_error[r] = x - q
            sent.append(q)
        mean = sum(sent) / self.n
        chunk = self.length // self.n
        whole = []
        for j in range(self.n):
            y = mean[j * chunk : (j + 1) * chunk] + self.server_error[j]
            q = np.where(y >= 0, 1.0, -1.0) * (np.linalg.norm(y) / math.sqrt(chunk))
            self.server_error[j] = y - q
            whole.append(q)
        return np.concatenate(whole)[:size].reshape(shape)
