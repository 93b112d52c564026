"""NorMuon in float64 numpy, Newton-Schulz by singular values, and the published PyTorch code."""

import numpy as np
import torch

from tests.reference.muon import orthogonalised


def run(
    start,
    grads,
    *,
    lr,
    weight_decay,
    momentum=0.95,
    nesterov=True,
    momentum_form="ema",
    scale="original",
    conv_scale="matrix",
    ns_steps=5,
    ns_coefficients="keller_jordan",
    ns_eps=1e-7,
    ns_form="plain",
    ns_dtype="param",
    cautious_decay=False,
    beta2=0.95,
    row_eps=1e-10,
    update_scale="preserve_norm",
    rms=0.2,
):
    """Parameters after every gradient; a gradient that is None is no step. Row by row."""
    assert ns_dtype == "param" and conv_scale == "matrix"
    theta = np.array(start, dtype=np.float64)
    m, n = theta.shape[0], int(np.prod(theta.shape[1:]))
    buffer, v, path = np.zeros((m, n)), np.zeros(m), []
    factor = {
        "match_rms_adamw": 0.2 * max(m, n) ** 0.5,
        "original": max(1.0, m / n) ** 0.5,
        "spectral_norm": (m / n) ** 0.5,
        "none": 1.0,
    }[scale]
    for g in grads:
        if g is not None:
            share = 1 - momentum if momentum_form == "ema" else 1.0
            g = share * g.reshape(m, n)
            buffer = momentum * buffer + g
            d = momentum * buffer + g if nesterov else buffer
            o = orthogonalised(d, ns_coefficients, ns_steps, ns_eps, ns_form)
            rows = np.empty_like(o)
            for i in range(m):
                v[i] = beta2 * v[i] + (1 - beta2) * np.mean(o[i] ** 2)
                rows[i] = o[i] / (np.sqrt(v[i]) + row_eps)
            size = np.sqrt((rows**2).sum()) + row_eps
            size = rms * np.sqrt(m * n) / size if update_scale == "match_rms" else factor * np.sqrt((o**2).sum()) / size
            step = (size * rows).reshape(theta.shape)
            pulled = np.where(step * theta >= 0, theta, 0) if cautious_decay else theta
            theta = theta - lr * (step + weight_decay * pulled)
        path.append(theta.copy())
    return path


class PublishedNorMuon(torch.optim.Optimizer):
    """The step of zichongli5/NorMuon (SingleDeviceNorMuon), with Newton-Schulz in the parameter's dtype."""

    def __init__(self, params, lr=0.02, weight_decay=0.0, momentum=0.95, beta2=0.95):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "beta2": beta2})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(p)
                    state["second_momentum_buffer"] = torch.zeros_like(p[..., 0:1])
                momentum = state["momentum_buffer"].lerp_(p.grad, 1 - group["momentum"])
                update = zeropower(p.grad.lerp(momentum, group["momentum"]))
                vnorm = update.norm(dim=(-2, -1), keepdim=True)
                v_mean = torch.mean(update * update, dim=-1, keepdim=True)
                state["second_momentum_buffer"].lerp_(v_mean, 1 - group["beta2"])
                update = update * (1 / state["second_momentum_buffer"].sqrt().add(1e-10))
                update = update * (vnorm / update.norm(dim=(-2, -1), keepdim=True).add(1e-10))
                update = update * max(1, p.size(-2) / p.size(-1)) ** 0.5
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(update, alpha=-group["lr"])


def zeropower(g, coefficients=(3.4445, -4.7750, 2.0315)):
    a, b, c = coefficients
    x = g.mT if g.size(-2) > g.size(-1) else g
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        square = x @ x.mT
        x = a * x + (b * square + c * square @ square) @ x
    return x.mT if g.size(-2) > g.size(-1) else x
