"""SWAN: the gradient with normalised rows, whitened, without state."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from optim.checks import check_counts, check_flag, check_non_negative, check_unit_interval
from optim.linalg import unit_rms, whiten
from optim.moments import moment_dtype
from optim.param_groups import NamedParams
from optim.rule import OfParam, State
from optim.rules.matrices import MatrixOptimizer, MatrixRule
from optim.sharding import check_whole


@dataclass(frozen=True, kw_only=True)
class SWANRule(MatrixRule):
    """SWAN: the gradient with normalised rows, whitened, without state.

        u = alpha |G1|_F W / |W|_F,  W = whiten(G1),  G1 = (G - mean) / std of each row

    See `optim.linalg.whiten`.

    Args:
        center: Whether the mean of each row is subtracted; otherwise, G1 = G / rms of each row. With centring, G1 has
            a rank of at most n - 1, the rows of the weights keep their means, and a matrix with a single column does
            not change.
        steps: The number of whitening steps.
        beta: With 0.5 (and `steps` = 14) W converges to U V^T; with 0.8 singular values end in about [0.56, 1.60].
        alpha: A factor of the direction.

    Shapes:
        Matrices [m, n]; not elementwise.

    State:
        0 bytes per parameter, and a step count.

    Source:
        Ma et al. 2024, arXiv 2412.13148; `steps` = 10, `beta` = 0.8 and `center` are those of its second version.

    Differs:
        `alpha` scales the update but not weight decay, which is not part of the method.
    """

    name: ClassVar[str] = "swan"

    alpha: float = 0.05
    steps: int = 10
    beta: float = 0.8
    center: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_non_negative("SWANRule", alpha=self.alpha)
        check_counts("SWANRule", steps=self.steps)
        check_unit_interval("SWANRule", beta=self.beta)
        check_flag("SWANRule", center=self.center)

    def update(self, grad: OfParam, state: State, param: OfParam) -> tuple[OfParam, State]:
        """Return the direction u of the class docstring and the new state.

        The direction is in float32, or in the parameter's dtype if that is larger.
        """
        check_whole("SWANRule", [grad])
        stacks = [self._whitened(x) for x in self.stacks(grad.to(moment_dtype(param)))]
        return self.directed([self.alpha * x for x in stacks], grad.shape), {"step": state["step"] + 1}

    def _whitened(self, g: Tensor) -> Tensor:
        if self.center:
            g = g - g.mean(-1, keepdim=True)
        g = unit_rms(g, dim=-1, eps=1e-8)
        white = whiten(g, steps=self.steps, beta=self.beta)
        norm: Tensor = torch.linalg.matrix_norm(white, keepdim=True)
        size: Tensor = torch.linalg.matrix_norm(g, keepdim=True)
        return white * (size / norm.clamp(min=torch.finfo(g.dtype).tiny))


class SWAN(MatrixOptimizer):
    """SWAN for hidden matrices, at `alpha` times the learning rate, and AdamW for the rest.

    Args:
        named_parameters: The model or its named parameters, as for `MatrixOptimizer`.
        lr: Learning rate of the hidden matrices.
        weight_decay: Decoupled weight decay of the hidden matrices.
        options: Fields of `SWANRule`, and the keywords of `MatrixOptimizer`.

    Example:
        >>> import torch
        >>> from optim import SWAN
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Linear(8, 4)
        >>> optimizer = SWAN(model.named_parameters(), lr=1e-3)
        >>> model(torch.ones(2, 8)).square().sum().backward()
        >>> optimizer.step()
        >>> sorted(optimizer.state[model.weight])
        ['step']
    """

    def __init__(
        self,
        named_parameters: NamedParams,
        lr: float | Tensor = 0.02,
        weight_decay: float = 0.0,
        **options: Any,
    ) -> None:
        super().__init__(named_parameters, SWANRule, lr, weight_decay, **options)
