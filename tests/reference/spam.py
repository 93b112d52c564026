"""SPAM in float64 numpy from the paper's algorithm 1, and the published PyTorch code."""

import math

import numpy as np
import torch


def run(
    start,
    grads,
    *,
    lr,
    weight_decay,
    betas=(0.9, 0.999),
    eps=1e-6,
    correct_bias=True,
    warmup_steps=150,
    threshold=5000,
    DeltaT=500,
    grad_accu_steps=20,
):
    """Parameters after every gradient; a gradient that is None is no step. Entry by entry, in plain Python."""
    theta = np.array(start, dtype=np.float64)
    first, second = np.zeros_like(theta), np.zeros_like(theta)
    calls, last_reset, path = 0, None, []
    for g in grads:
        if g is not None:
            calls += 1
            if DeltaT and calls % DeltaT == 0:
                last_reset = calls
                first, second = np.zeros_like(theta), np.zeros_like(theta)
            since = calls if last_reset is None else calls - last_reset
            warmth = 1.0
            if last_reset is not None and since < warmup_steps:
                warmth = 1 - 0.99 * 0.5 * (1 + math.cos(math.pi * since / (warmup_steps + 1)))
            clips = threshold and since >= grad_accu_steps
            theta *= 1 - lr * weight_decay
            for i in np.ndindex(theta.shape):
                entry = g[i]
                if clips and entry**2 > threshold * second[i]:
                    entry = math.copysign(math.sqrt(threshold * second[i]), entry)
                first[i] = betas[0] * first[i] + (1 - betas[0]) * entry
                second[i] = betas[1] * second[i] + (1 - betas[1]) * entry**2
                rate = lr * warmth
                if correct_bias:
                    rate *= math.sqrt(1 - betas[1] ** calls) / (1 - betas[0] ** calls)
                theta[i] -= rate * first[i] / (math.sqrt(second[i]) + eps)
        path.append(theta.copy())
    return path


class PublishedSPAM(torch.optim.Optimizer):
    """The step of TianjinYellow/SPAM-Optimizer, galore_torch/SPAM.py (class AdamW), without sparse momentum.

    In its order and with its counters: decay comes after the update, and the warm-up is a scheduler that is put back
    at the end of the call before a reset.
    """

    def __init__(
        self,
        params,
        lr=1e-3,
        betas=(0.9, 0.999),
        eps=1e-6,
        weight_decay=0.0,
        correct_bias=True,
        warmup_steps=150,
        threshold=5000,
        DeltaT=500,
        grad_accu_steps=20,
    ):
        super().__init__(
            params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "correct_bias": correct_bias}
        )
        self.warmup, self.threshold, self.gap, self.grad_accu_steps = warmup_steps, threshold, DeltaT, grad_accu_steps
        self.total_step, self.current_step = 0, warmup_steps + 1

    def scale(self):
        if self.current_step >= self.warmup:
            return 1.0
        return 1 - 0.99 * (1 + math.cos(math.pi * self.current_step / (self.warmup + 1))) / 2

    @torch.no_grad()
    def step(self):
        scale = self.scale()
        self.total_step += 1
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                grad, state = p.grad.clone(), self.state[p]
                if "step" not in state:
                    state["step"] = 0
                state["step"] += 1
                if "exp_avg" not in state or self.total_step % self.gap == 0:
                    state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(grad), torch.zeros_like(grad)
                exp_avg, exp_avg_sq = state["exp_avg"], state["exp_avg_sq"]
                beta1, beta2 = group["betas"]
                begun = self.total_step >= self.grad_accu_steps
                if self.threshold != 0 and begun and self.total_step % self.gap >= self.grad_accu_steps:
                    mask = grad**2 > self.threshold * exp_avg_sq
                    grad[mask] = grad[mask].sign() * torch.sqrt(exp_avg_sq[mask] * self.threshold)
                exp_avg.mul_(beta1).add_(grad, alpha=1 - beta1)
                exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
                denom = exp_avg_sq.sqrt().add_(group["eps"])
                step_size = group["lr"]
                if group["correct_bias"]:
                    step_size *= math.sqrt(1 - beta2 ** state["step"]) / (1 - beta1 ** state["step"])
                p.addcdiv_(exp_avg, denom, value=-step_size * scale)
                if group["weight_decay"] > 0:
                    p.add_(p, alpha=-group["lr"] * group["weight_decay"])
        self.current_step += 1
        if (self.total_step + 1) % self.gap == 0:
            self.current_step = 0
