"""Sophia-G in float64 numpy from the paper's algorithm 3, and the published PyTorch code."""

import numpy as np
import torch


def run(start, grads, *, lr, weight_decay, betas=(0.965, 0.99), rho=0.04, eps=1e-15, refresh_every=10, estimates=None):
    """Parameters after every gradient; a gradient that is None is no step.

    estimates: B g~^2 before each step, None where nothing is refreshed.
    """
    theta = np.array(start, dtype=np.float64)
    m, h, path = np.zeros_like(theta), np.zeros_like(theta), []
    for t, g in enumerate(grads):
        if estimates is not None and estimates[t] is not None:
            h = betas[1] * h + (1 - betas[1]) * estimates[t]
        if g is not None:
            m = betas[0] * m + (1 - betas[0]) * g
            ratio = np.minimum(np.abs(m) / (rho * h + eps), 1)
            theta = theta * (1 - lr * weight_decay) - lr * np.sign(m) * ratio
        path.append(theta.copy())
    return path


class PublishedSophiaG(torch.optim.Optimizer):
    """`SophiaG` of Liuhong99/Sophia, sophia.py (MIT), transcribed line by line, without `maximize` and `capturable`.

    absorb: `update_hessian` with squared gradients, given for all parameters; the factor B is in `bs` there.
    """

    def __init__(self, params, lr=1e-4, betas=(0.965, 0.99), rho=0.04, weight_decay=1e-1):
        super().__init__(params, {"lr": lr, "betas": betas, "rho": rho, "weight_decay": weight_decay})

    def _state_of(self, p):
        state = self.state[p]
        if len(state) == 0:
            state["step"] = torch.tensor(0.0)
            state["exp_avg"] = torch.zeros_like(p)
            state["hessian"] = torch.zeros_like(p)
        return state

    @torch.no_grad()
    def absorb(self, squares):
        for group in self.param_groups:
            _, beta2 = group["betas"]
            for p in group["params"]:
                self._state_of(p)["hessian"].mul_(beta2).add_(squares[p], alpha=1 - beta2)

    @torch.no_grad()
    def step(self, bs=1):
        for group in self.param_groups:
            beta1, _ = group["betas"]
            for param in group["params"]:
                if param.grad is None:
                    continue
                state = self._state_of(param)
                exp_avg, hess = state["exp_avg"], state["hessian"]
                state["step"] += 1
                param.mul_(1 - group["lr"] * group["weight_decay"])
                exp_avg.mul_(beta1).add_(param.grad, alpha=1 - beta1)
                ratio = (exp_avg.abs() / (group["rho"] * bs * hess + 1e-15)).clamp(None, 1)
                param.addcmul_(exp_avg.sign(), ratio, value=-group["lr"])
