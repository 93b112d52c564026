"""Curvature for rules that read a Hessian diagonal (Sophia, AdaHessian): Hessian-vector products, estimates, `refresh`.

    loss = loss_fn()
    loss.backward()
    curvature.refresh(optimizer, loss_fn)  # before the step; does nothing when it is not due, or no rule wants it
    optimizer.step()

The rules themselves only read what `refresh` left in their state.
"""

from optim.curvature.diagonals import draw, gauss_newton, hutchinson
from optim.curvature.losses import Loss, Parts, mix, private
from optim.curvature.products import hvp
from optim.curvature.rule import CurvatureRule, absorb, refresh

__all__ = [
    "CurvatureRule",
    "Loss",
    "Parts",
    "absorb",
    "draw",
    "gauss_newton",
    "hutchinson",
    "hvp",
    "mix",
    "private",
    "refresh",
]
