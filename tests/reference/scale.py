"""SCALE in float64 numpy, row by row, and the published PyTorch code."""

import numpy as np
import torch


def run(start, grads, *, lr, weight_decay, momentum=0.0, axis="inputs", normaliser="rms"):
    """Parameters after every gradient; a gradient that is None is no step."""
    theta = np.array(start, dtype=np.float64)
    m, n = theta.shape[0], int(np.prod(theta.shape[1:]))
    buffer, path = np.zeros((m, n)), []
    for g in grads:
        if g is not None:
            buffer = momentum * buffer + (1 - momentum) * g.reshape(m, n)
            d = (buffer if axis == "inputs" else buffer.T).copy()
            for i, row in enumerate(d):
                if normaliser == "rms":
                    d[i] = row / max(np.sqrt(np.mean(row**2)), 1e-8)
                else:
                    d[i] = row / max(np.sqrt(np.sum(row**2)), 1e-8)
            step = (d if axis == "inputs" else d.T).reshape(theta.shape)
            theta = theta - lr * (step + weight_decay * theta)
        path.append(theta.copy())
    return path


class PublishedSCALE(torch.optim.Optimizer):
    """The step of OptimAI-Lab/Minimalist_LLM_Pretraining, scale_optimizer.py, for its last layer."""

    def __init__(self, params, lr=1e-3, weight_decay=0.0, momentum=0.9):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                buffer = self.state[p].setdefault("momentum_buffer", torch.zeros_like(p))
                buffer.mul_(group["momentum"]).add_(p.grad, alpha=1 - group["momentum"])
                scale = torch.sqrt(torch.mean(buffer**2, dim=1, keepdim=True)).clamp(min=1e-8)
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(buffer / scale, alpha=-group["lr"])
