"""Curvature for rules that read a Hessian diagonal (Sophia, AdaHessian): products, estimates and `refresh`.

    loss = loss_fn()
    loss.backward()
    curvature.refresh(optimizer, loss_fn)  # before the step; does nothing if it is not due or no rule needs it
    optimizer.step()

The rules themselves only read what `refresh` wrote to their state.
"""

from optim.curvature.gauss_newton import NoCrossEntropy, gauss_newton, gauss_newton_product
from optim.curvature.hutchinson import draw, hutchinson
from optim.curvature.hvp import hvp
from optim.curvature.losses import Loss, Parts, graph_leaves, mix, private
from optim.curvature.refresh import CurvatureRule, absorb, refresh

__all__ = [
    "CurvatureRule",
    "Loss",
    "NoCrossEntropy",
    "Parts",
    "absorb",
    "draw",
    "gauss_newton",
    "gauss_newton_product",
    "graph_leaves",
    "hutchinson",
    "hvp",
    "mix",
    "private",
    "refresh",
]
