"""SGD-SaI in float64 numpy from the paper's algorithm 1, and the published PyTorch code."""

import numpy as np
import torch


def run(start, grads, *, lr, weight_decay, momentum=0.9, eps=1e-8):
    """Parameters after every gradient; a gradient that is None is no step."""
    theta = np.array(start, dtype=np.float64)
    buffer, gain, path = None, None, []
    for g in grads:
        if g is not None:
            theta = theta * (1 - lr * weight_decay)
            if gain is None and np.any(g):
                spread = np.std(g, ddof=1) if g.size > 1 else 0.0
                gain = np.linalg.norm(g) / (spread + eps) if spread else 1.0
            if gain is not None:
                buffer = np.array(g) if buffer is None or momentum == 0 else momentum * buffer + (1 - momentum) * g
                theta = theta - lr * gain * buffer
        path.append(theta.copy())
    return path


class PublishedSGDSaI(torch.optim.Optimizer):
    """The step of AnonymousAlethiometer/SGD_SaI, sgd_sai.py 1.0.3: in its order, in place."""

    def __init__(self, params, lr=1e-2, momentum=0.9, eps=1e-8, weight_decay=1e-2):
        super().__init__(params, {"lr": lr, "momentum": momentum, "eps": eps, "weight_decay": weight_decay})
        self.has_warmup = False

    @torch.no_grad()
    def warmup_step(self):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    sigma = p.grad.std().nan_to_num()
                    self.state[p]["gsnr"] = p.grad.norm() / (sigma + group["eps"])
        self.has_warmup = True

    @torch.no_grad()
    def step(self):
        if not self.has_warmup:
            self.warmup_step()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if "momentum_buffer" not in state:
                    state["momentum_buffer"] = p.grad.clone()
                else:
                    state["momentum_buffer"].mul_(group["momentum"]).add_(p.grad, alpha=1 - group["momentum"])
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.sub_(group["lr"] * state["gsnr"] * state["momentum_buffer"])
