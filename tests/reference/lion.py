"""Lion in float64 numpy from the paper's algorithm 2, and the published PyTorch code."""

import numpy as np
import torch


def run(start, grads, *, lr, weight_decay, betas=(0.9, 0.99)):
    """Parameters after every gradient; a gradient that is None is no step."""
    theta = np.array(start, dtype=np.float64)
    m, path = np.zeros_like(theta), []
    for g in grads:
        if g is not None:
            c = betas[0] * m + (1 - betas[0]) * g
            theta = theta - lr * (np.sign(c) + weight_decay * theta)
            m = betas[1] * m + (1 - betas[1]) * g
        path.append(theta.copy())
    return path


class GoogleLion(torch.optim.Optimizer):
    """The update of google/automl, lion/lion_pytorch.py (Apache-2.0), transcribed line by line."""

    def __init__(self, params, lr=1e-4, betas=(0.9, 0.99), weight_decay=0.0):
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                p.data.mul_(1 - group["lr"] * group["weight_decay"])
                grad, state = p.grad, self.state[p]
                if len(state) == 0:
                    state["exp_avg"] = torch.zeros_like(p)
                exp_avg = state["exp_avg"]
                beta1, beta2 = group["betas"]
                update = exp_avg * beta1 + grad * (1 - beta1)
                p.add_(update.sign_(), alpha=-group["lr"])
                exp_avg.mul_(beta2).add_(grad, alpha=1 - beta2)
