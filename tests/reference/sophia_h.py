"""Sophia-H in float64 numpy from the paper's algorithms 1 and 3, and another implementation of it."""

import numpy as np
import torch


def run(start, grads, *, lr, weight_decay, betas=(0.96, 0.99), gamma=0.01, eps=1e-12, refresh_every=10, estimates=None):
    """Parameters after every gradient; a gradient that is None is no step.

    estimates: z H z before each step, None where nothing is refreshed.
    """
    theta = np.array(start, dtype=np.float64)
    m, h, path = np.zeros_like(theta), np.zeros_like(theta), []
    for t, g in enumerate(grads):
        if estimates is not None and estimates[t] is not None:
            h = betas[1] * h + (1 - betas[1]) * estimates[t]
        if g is not None:
            m = betas[0] * m + (1 - betas[0]) * g
            theta = theta * (1 - lr * weight_decay)
            theta = theta - lr * np.clip(m / np.maximum(gamma * h, eps), -1, 1)
        path.append(theta.copy())
    return path


class OtherSophiaH(torch.optim.Optimizer):
    """The update of `SophiaH` in kozistr/pytorch_optimizer (Apache-2.0): lr m / max(h, eps), clipped at p.

    Ours is this one with lr / gamma, p = gamma, eps / gamma and decay gamma. absorb: an estimate z H z, given for all
    parameters.
    """

    def __init__(self, params, lr=6e-2, betas=(0.96, 0.99), weight_decay=0.0, p=1e-2, eps=1e-12):
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay, "p": p, "eps": eps})

    def _state_of(self, p):
        state = self.state[p]
        if len(state) == 0:
            state["momentum"] = torch.zeros_like(p)
            state["hessian_moment"] = torch.zeros_like(p)
        return state

    @torch.no_grad()
    def absorb(self, estimates):
        for group in self.param_groups:
            _, beta2 = group["betas"]
            for p in group["params"]:
                self._state_of(p)["hessian_moment"].mul_(beta2).add_(estimates[p], alpha=1.0 - beta2)

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            beta1, _ = group["betas"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self._state_of(p)
                p.mul_(1.0 - group["weight_decay"] * group["lr"])
                momentum = state["momentum"]
                momentum.mul_(beta1).add_(p.grad, alpha=1.0 - beta1)
                update = (momentum / state["hessian_moment"].clip(min=group["eps"])).clamp_(-group["p"], group["p"])
                p.add_(update, alpha=-group["lr"])
