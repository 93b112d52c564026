"""Blockwise Adam in float64 numpy, one tensor a block, and the published AdaSGD in PyTorch, one param group a block."""

import math

import numpy as np
import torch


def run(start, grads, *, lr, weight_decay, betas=(0.9, 0.999), eps=1e-8, block="tensor"):
    """Parameters after every gradient; a gradient that is None is no step. Alone in its group a tensor is the block."""
    theta = np.array(start, dtype=np.float64)
    first, second, t, path = np.zeros_like(theta), 0.0, 0, []
    for g in grads:
        if g is not None:
            t += 1
            first = betas[0] * first + (1 - betas[0]) * g
            second = betas[1] * second + (1 - betas[1]) * float(np.mean(g**2))
            step = first / (1 - betas[0] ** t) / (math.sqrt(second / (1 - betas[1] ** t)) + eps)
            theta = theta - lr * weight_decay * theta - lr * step
        path.append(theta.copy())
    return path


class PublishedAdaSGD(torch.optim.Optimizer):
    """The step of mohamad-amin/adam-coordinate-adaptivity, src/optimizer/adasgd.py: in its order, in place."""

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=1e-2):
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            present = [p for p in group["params"] if p.grad is not None]
            if not present:
                continue
            average = sum((p.grad**2).sum() for p in present) / sum(p.numel() for p in present)
            for p in present:
                state = self.state[p]
                if len(state) == 0:
                    state.update(step=0, exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros((), dtype=p.dtype))
                state["step"] += 1
                p.mul_(1 - group["lr"] * group["weight_decay"])
                state["exp_avg"].lerp_(p.grad, 1 - beta1)
                state["exp_avg_sq"].mul_(beta2).add_(average, alpha=1 - beta2)
                step_size = group["lr"] / (1 - beta1 ** state["step"])
                denom = state["exp_avg_sq"].sqrt() / math.sqrt(1 - beta2 ** state["step"]) + group["eps"]
                p.add_(state["exp_avg"] / denom, alpha=-step_size)
