"""A classifier to take curvature of."""

import torch
from torch import Tensor
from torch.nn import Parameter, functional

from tests.optim.harness import randn


def classifier(reduction: str = "mean"):
    """Softmax regression with ignored labels, and the diagonal of its Gauss-Newton matrix, which is its Hessian's."""
    w = Parameter(randn((3, 2), 1))
    x, y = randn((7, 2), 2), torch.tensor([0, 2, -100, 1, 1, -100, 0])

    def loss() -> Tensor:
        total = functional.cross_entropy(x @ w.T, y, reduction=reduction)
        return total if reduction == "mean" else total.sum() / 5

    kept = x[y != -100]
    chance = (kept @ w.detach().T).softmax(-1)
    diagonal = torch.einsum("nc,nd->cd", chance * (1 - chance), kept**2) / len(kept)
    return w, loss, diagonal
