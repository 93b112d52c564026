"""AdaHessian in float64 numpy from the paper's algorithm 1, and the published PyTorch code."""

import numpy as np
import torch


def averaged(x, variant="instruction", spatial_average_block_size=(-1, -1, -1, -1)):
    """The spatial average, written with loops over blocks."""
    x = np.asarray(x, dtype=np.float64)
    if x.ndim == 0 or x.size == 0:
        return x
    out, size = x.copy(), spatial_average_block_size[min(x.ndim, 4) - 1]
    if variant == "image":
        lead, size = (2 if x.ndim == 4 else x.ndim), -1
    else:
        lead = {1: 1, 2: 1}.get(x.ndim, 2)
    if size > 0:
        flat = out.reshape(-1)
        for i in range(0, flat.size, size):
            flat[i : i + size] = flat[i : i + size].mean()
    else:
        for index in np.ndindex(x.shape[:lead]):
            out[index] = x[index].mean()
    return out


def run(
    start,
    grads,
    *,
    lr,
    weight_decay,
    betas=(0.9, 0.999),
    eps=1e-4,
    hessian_power=1.0,
    variant="instruction",
    spatial_average_block_size=(-1, -1, -1, -1),
    refresh_every=1,
    estimates=None,
):
    """Parameters after every gradient; a gradient that is None is no step.

    estimates: z H z before each step, None where nothing is refreshed.
    """
    theta = np.array(start, dtype=np.float64)
    m, v, path, t, n = np.zeros_like(theta), np.zeros_like(theta), [], 0, 0
    for k, g in enumerate(grads):
        if estimates is not None and estimates[k] is not None:
            n += 1
            d = averaged(np.abs(estimates[k]), variant, spatial_average_block_size)
            v = betas[1] * v + (1 - betas[1]) * d * d
        if g is not None:
            t += 1
            m = betas[0] * m + (1 - betas[0]) * g
            below = (np.sqrt(v) / np.sqrt(1 - betas[1] ** n)) ** hessian_power + eps if n else 1.0
            theta = theta - lr * (m / (1 - betas[0] ** t) / below + weight_decay * theta)
        path.append(theta.copy())
    return path


class PublishedAdaHessian(torch.optim.Optimizer):
    """`Adahessian.step` of amirgholami/adahessian, image_classification/optim_adahessian.py (MIT), transcribed.

    absorb: what its `get_trace` returns for vectors and matrices, |H z|, is given before each step.
    """

    def __init__(self, params, lr=0.15, betas=(0.9, 0.999), eps=1e-4, weight_decay=0.0, hessian_power=1.0):
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "hessian_power": hessian_power}
        super().__init__(params, defaults)

    def absorb(self, traces):
        self.hut_traces = {p: trace.abs() for p, trace in traces.items()}

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                grad, hut_trace, state = p.grad, self.hut_traces[p], self.state[p]
                if len(state) == 0:
                    state["step"] = 0
                    state["exp_avg"] = torch.zeros_like(p)
                    state["exp_hessian_diag_sq"] = torch.zeros_like(p)
                exp_avg, exp_hessian_diag_sq = state["exp_avg"], state["exp_hessian_diag_sq"]
                beta1, beta2 = group["betas"]
                state["step"] += 1
                exp_avg.mul_(beta1).add_(grad, alpha=1 - beta1)
                exp_hessian_diag_sq.mul_(beta2).addcmul_(hut_trace, hut_trace, value=1 - beta2)
                bias_correction1 = 1 - beta1 ** state["step"]
                bias_correction2 = 1 - beta2 ** state["step"]
                k = group["hessian_power"]
                denom = (exp_hessian_diag_sq.sqrt() ** k / (bias_correction2**0.5) ** k).add_(group["eps"])
                p.sub_(group["lr"] * (exp_avg / bias_correction1 / denom + group["weight_decay"] * p))
