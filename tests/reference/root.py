"""ROOT in float64 numpy: outliers by a sort, then Muon with the triple of the shape; and the published PyTorch code."""

import numpy as np
import torch

from tests.reference.muon import orthogonalised
from tests.reference.normuon import zeropower


def run(
    start,
    grads,
    *,
    lr,
    weight_decay,
    momentum=0.95,
    nesterov=True,
    ns_steps=5,
    ns_eps=1e-7,
    quantile=0.9,
    threshold=None,
    shape_coefficients=(),
    ns_coefficients="keller_jordan",
    num_heads=None,
):
    """Parameters after every gradient; a gradient that is None is no step."""
    theta = np.array(start, dtype=np.float64)
    m, n = theta.shape[0], int(np.prod(theta.shape[1:]))
    buffer, path = np.zeros((m, n)), []
    triples = [t for sides, t in shape_coefficients if sorted(sides) == sorted((m, n))] or ns_coefficients
    for g in grads:
        if g is not None:
            g = g.reshape(m, n)
            buffer = momentum * buffer + g
            d = g + momentum * buffer if nesterov else buffer
            e = threshold
            if quantile is not None:
                ordered = np.sort(np.abs(d).ravel())
                place = quantile * (len(ordered) - 1)
                low = int(np.floor(place))
                high = min(low + 1, len(ordered) - 1)
                e = ordered[low] + (place - low) * (ordered[high] - ordered[low]) + 1e-9
            outliers = np.sign(d) * np.maximum(np.abs(d) - e, 0)
            step = 0.2 * np.sqrt(max(m, n)) * orthogonalised(d - outliers, triples, ns_steps, ns_eps)
            theta = theta - lr * (step.reshape(theta.shape) + weight_decay * theta)
        path.append(theta.copy())
    return path


class PublishedROOT(torch.optim.Optimizer):
    """The step of the published ROOT for matrices whose shapes its table lacks."""

    def __init__(self, params, lr=1e-3, weight_decay=0.1, momentum=0.95):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                buf = self.state[p].setdefault("momentum_buffer", torch.zeros_like(p))
                buf.mul_(group["momentum"]).add_(p.grad)
                g = p.grad.add(buf, alpha=group["momentum"])
                limit = torch.quantile(g.abs().float(), 0.9) + 1e-9
                u = zeropower(g - g.sign() * torch.relu(g.abs() - limit))
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(u, alpha=-group["lr"] * 0.2 * max(p.shape) ** 0.5)
