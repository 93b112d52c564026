"""Stable-SPAM in float64 numpy from the paper's algorithm 1, and the published PyTorch code."""

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
    eps=1e-8,
    gamma1=0.7,
    gamma2=0.9,
    gamma3=0.999,
    total_T=None,
    eta_min=0.5,
    update_proj_gap=1000,
    separate_counters=False,
):
    """Parameters after every gradient; a gradient that is None is no step."""
    theta = np.array(start, dtype=np.float64)
    first, second = np.zeros_like(theta), np.zeros_like(theta)
    peak = norm = norm_sq = 0.0
    calls = since_reset = 0  # as published, the averages of norms are corrected by the moments' count
    path = []
    for g in grads:
        if g is not None:
            calls += 1
            since_reset += 1
            falls = 1.0
            if total_T is not None:
                falls = eta_min + (1 - eta_min) * (1 + math.cos(math.pi * calls / (total_T + 1))) / 2
            beta, gamma = betas[0] * falls, (betas[0] if gamma1 == -1 else gamma1) * falls
            t = calls if separate_counters else since_reset
            highest = np.abs(g).max()
            peak = gamma3 * peak + (1 - gamma3) * highest
            bar = peak / (1 - gamma3**t)
            g = np.where(np.abs(g) > bar, g / (highest or 1.0) * bar, g)
            length = math.sqrt((g**2).sum())
            norm = gamma * norm + (1 - gamma) * length
            norm_sq = gamma2 * norm_sq + (1 - gamma2) * length**2
            if length > 0:
                g = g / length * (norm / (1 - gamma**t)) / (math.sqrt(norm_sq / (1 - gamma2**t)) + eps)
            resets = update_proj_gap != 0 and calls % update_proj_gap == 0
            if resets:
                since_reset = 1
                if separate_counters:
                    first, second = 0 * first, 0 * second
            first = beta * first + (1 - beta) * g
            second = betas[1] * second + (1 - betas[1]) * g**2
            step = first / (1 - beta**since_reset) / (np.sqrt(second / (1 - betas[1] ** since_reset)) + eps)
            theta = theta * (1 - lr * weight_decay) - lr * step
            if resets and not separate_counters:
                first, second = 0 * first, 0 * second
        path.append(theta.copy())
    return path


class PublishedStableSPAM(torch.optim.Optimizer):
    """The step of TianjinYellow/StableSPAM, galore_torch/stablespam.py, without amsgrad: in its order, in place."""

    def __init__(
        self,
        params,
        lr=1e-3,
        betas=(0.9, 0.999),
        eps=1e-8,
        weight_decay=0.0,
        gamma1=0.7,
        gamma2=0.9,
        gamma3=0.999,
        total_T=None,
        eta_min=0.5,
        update_proj_gap=1000,
    ):
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self.gamma1 = betas[0] if gamma1 == -1 else gamma1
        self.gamma2, self.theta, self.total_T, self.eta_min = gamma2, gamma3, total_T, eta_min
        self.update_proj_gap, self.total_steps = update_proj_gap, 0

    @torch.no_grad()
    def step(self):
        self.total_steps += 1
        scale = 1.0
        if self.total_T is not None:
            angle = self.total_steps * math.pi / (self.total_T + 1)
            scale = self.eta_min + 0.5 * (1 - self.eta_min) * (1 + math.cos(angle))
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                grad, state = p.grad.clone(), self.state[p]
                if "exp_avg" not in state:
                    state.update(
                        step=0,
                        exp_avg=torch.zeros_like(grad),
                        exp_avg_sq=torch.zeros_like(grad),
                        m_norm_t=0,
                        v_norm_t=0,
                        m_max_t=0,
                    )
                exp_avg, exp_avg_sq = state["exp_avg"], state["exp_avg_sq"]
                beta1, beta2 = group["betas"]
                beta1 = beta1 * scale
                p.mul_(1 - group["lr"] * group["weight_decay"])
                state["step"] += 1
                max_gradient = grad.abs().max()
                state["m_max_t"] = self.theta * state["m_max_t"] + (1 - self.theta) * max_gradient
                m_max_hat = state["m_max_t"] / (1 - self.theta ** state["step"])
                mask = grad.abs() > m_max_hat
                if mask.any():
                    grad[mask] = grad[mask].div_(max_gradient).mul_(m_max_hat)
                grad_norm = torch.norm(grad)
                gamma1, gamma2 = self.gamma1 * scale, self.gamma2
                state["m_norm_t"] = gamma1 * state["m_norm_t"] + (1 - gamma1) * grad_norm
                state["v_norm_t"] = gamma2 * state["v_norm_t"] + (1 - gamma2) * grad_norm**2
                m_norm_hat = state["m_norm_t"] / (1 - gamma1 ** state["step"])
                v_norm_hat = state["v_norm_t"] / (1 - gamma2 ** state["step"])
                if grad_norm > 0:
                    grad.div_(grad_norm).mul_(m_norm_hat / (torch.sqrt(v_norm_hat) + group["eps"]))
                if self.update_proj_gap != 0 and self.total_steps % self.update_proj_gap == 0:
                    state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(grad), torch.zeros_like(grad)
                    state["step"] = 1
                exp_avg.mul_(beta1).add_(grad, alpha=1 - beta1)
                exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
                bias_correction1, bias_correction2 = 1 - beta1 ** state["step"], 1 - beta2 ** state["step"]
                denom = (exp_avg_sq.sqrt() / math.sqrt(bias_correction2)).add_(group["eps"])
                p.add_(exp_avg / denom, alpha=-group["lr"] / bias_correction1)
