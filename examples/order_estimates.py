"""What would another order of training have done? One recorded run, estimates of other orders, a search, a check.

Run: python examples/order_estimates.py
"""

import tempfile

import torch

from datatools import order
from optim import create

draw = torch.Generator().manual_seed(0)
truth = torch.randn(4, generator=draw)


def batch(rows: int, noise: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs [rows, 4] and noisy answers [rows] of a linear problem."""
    inputs = torch.randn(rows, 4, generator=draw)
    return inputs, inputs @ truth + noise * torch.randn(rows, generator=draw)


def loss(params, rows):
    """The mean squared error of one batch, 0-d."""
    return (rows[0] @ params["w"] - rows[1]).square().mean()


batches = [batch(16, noise=0.2 * number) for number in range(8)]  # from clean to noisy
problem = order.Problem(loss, batches, [batch(64, noise=0.0)])
params = {"w": torch.zeros(4, requires_grad=True)}
recipe = order.Recipe.of(create("sgd", params.items(), lr=0.05), rates=[0.05] * len(batches))

with tempfile.TemporaryDirectory() as scratch:
    reference = order.record(problem, recipe, range(len(batches)), params, folder=scratch)
    surrogate = order.precompute("pairwise", reference, problem)
    best = order.search(surrogate, "local", budget=2_000).sequences[0]
    trained, _ = order.train(problem, recipe, best, params)
    print("proposed order:", list(best))
    print(f"held-out loss of the recorded order {float(surrogate.score(range(8))):.3f}")
    print(f"of the proposed one, estimated {float(surrogate.score(best)):.3f}")
    print(f"of the proposed one, trained {problem.held_out_loss(trained):.3f}")
