"""Adam-mini in float64 numpy from the paper's algorithm 1, and the published PyTorch code."""

import math

import numpy as np
import torch


def run(start, grads, *, lr, weight_decay, betas=(0.9, 0.999), eps=1e-8, blocks="tensor"):
    """Parameters after every gradient; a gradient that is None is no step. Block by block."""
    theta = np.array(start, dtype=np.float64)
    size = {"tensor": theta.size, "element": 1, "row": theta.size // len(theta) if theta.ndim > 1 else theta.size}
    cut = [slice(i, i + size.get(blocks, blocks)) for i in range(0, theta.size, size.get(blocks, blocks))]
    first, second = np.zeros(theta.size), dict.fromkeys(range(len(cut)), 0.0)
    flat, t, path = theta.reshape(-1).copy(), 0, []
    for g in grads:
        if g is not None:
            t += 1
            flat *= 1 - lr * weight_decay
            first = betas[0] * first + (1 - betas[0]) * g.reshape(-1)
            for b, part in enumerate(cut):
                second[b] = betas[1] * second[b] + (1 - betas[1]) * np.mean(g.reshape(-1)[part] ** 2)
                denominator = math.sqrt(second[b] / (1 - betas[1] ** t)) + eps
                flat[part] -= lr * first[part] / (1 - betas[0] ** t) / denominator
        path.append(flat.reshape(theta.shape).copy())
    return path


class PublishedAdamMini(torch.optim.Optimizer):
    """The step of zyushun/Adam-mini, adam_mini.py 1.1.1, for matrices with one v a row ("neuron") or one in all."""

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, by_row=True):
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self.by_row = by_row

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                state, grad = self.state[p], p.grad
                tmp_lr = (grad * grad).mean(dim=1) if self.by_row else torch.mean(grad * grad)
                if len(state) == 0:
                    state.update(step=0, m=torch.zeros_like(grad), vmean=torch.zeros_like(tmp_lr))
                v = state["vmean"].mul_(beta2).add_(tmp_lr, alpha=1 - beta2)
                state["step"] += 1
                p.mul_(1 - group["lr"] * group["weight_decay"])
                state["m"].lerp_(grad, 1 - beta1)
                h = (v.sqrt() / math.sqrt(1 - beta2 ** state["step"])).add_(group["eps"])
                stepsize = (1 / (1 - beta1 ** state["step"])) / h
                update = state["m"] * (stepsize.unsqueeze(1) if self.by_row else stepsize)
                p.add_(update, alpha=-group["lr"])
