"""RMNP: momentum with rows normalised to equal length, instead of Muon's Newton-Schulz iterations."""

import math
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from optim.checks import check_choice, check_flag, check_unit_interval
from optim.moments import zero_moment
from optim.param_groups import NamedParams
from optim.rule import OfParam, State
from optim.rules.matrices import MatrixOptimizer, MatrixRule

SCALES = ("match_rms", "original", "none")


@dataclass(frozen=True, kw_only=True)
class RMNPRule(MatrixRule):
    """RMNP: momentum with rows normalised to equal length, instead of Muon's Newton-Schulz iterations.

        u = f d / |d|,  B <- momentum B + G,  d = G + momentum B with nesterov, else B

    |d| is the norm of each row, that is of the weights of one output. A zero row stays zero.

    Args:
        momentum: The decay rate of B.
        nesterov: Whether to use Nesterov momentum.
        scale: The factor f for a matrix [m, n]. "match_rms" is 0.2 sqrt(n), which gives u a root mean square of 0.2, so
            that AdamW's learning rate can be used unchanged; "original" is sqrt(max(1, m / n)), as in the published
            code; "none" is 1.

    Shapes:
        Matrices [m, n] in one of the layouts of `MatrixRule`; not elementwise.

    State:
        4 bytes per parameter (one float32 buffer) and a step count, which the update does not use.

    Source:
        arXiv 2603.20527, 2026; Dominator-Index/RMNP, whose scale is "original" and learning rate 0.02.

    Differs:
        The published code rounds u to bfloat16.
    """

    name: ClassVar[str] = "rmnp"

    momentum: float = 0.95
    nesterov: bool = True
    scale: str = "match_rms"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_unit_interval("RMNPRule", momentum=self.momentum)
        check_flag("RMNPRule", nesterov=self.nesterov)
        check_choice("RMNPRule", SCALES, scale=self.scale)

    def init(self, param: OfParam) -> State:
        """Return a zero buffer and a zero step count.

        Raises:
            ValueError: For a vector or scalar.
        """
        return super().init(param) | {"momentum_buffer": zero_moment(param)}

    def update(self, grad: OfParam, state: State, param: OfParam) -> tuple[OfParam, State]:
        """Return the direction u of the class docstring, in the buffer's dtype, and the new state."""
        g = grad.to(state["momentum_buffer"].dtype)
        buffer = g.add(state["momentum_buffer"], alpha=self.momentum)
        d = g.add(buffer, alpha=self.momentum) if self.nesterov else buffer
        stacks = [
            self._factor(x) * x / x.square().sum(-1, keepdim=True).sqrt().clamp(min=1e-12) for x in self.stacks(d)
        ]
        return self.directed(stacks, d.shape), {"step": state["step"] + 1, "momentum_buffer": buffer}

    def _factor(self, x: Tensor) -> float:
        """Return f for the matrices of a stack [k, m, n]."""
        rows, columns = x.shape[-2:]
        if self.scale == "match_rms":
            return 0.2 * math.sqrt(columns)
        return math.sqrt(max(1.0, rows / max(columns, 1))) if self.scale == "original" else 1.0


class RMNP(MatrixOptimizer):
    """RMNP for hidden matrices and AdamW for the rest.

    Args:
        named_parameters: The model or its named parameters, as for `MatrixOptimizer`.
        lr: Learning rate of the hidden matrices.
        weight_decay: Decoupled weight decay of the hidden matrices.
        options: Fields of `RMNPRule`, and the keywords of `MatrixOptimizer`. Without `adamw_lr` the rest uses `lr`,
            which is only suitable for the scale "match_rms"; with another scale `adamw_lr` must be given.

    Raises:
        ValueError: If there is no matrix, or if `adamw_lr` is needed and missing.

    Example:
        >>> import torch
        >>> from optim import RMNP
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Linear(8, 4)
        >>> optimizer = RMNP(model.named_parameters(), lr=1e-3)
        >>> model(torch.ones(2, 8)).square().sum().backward()
        >>> optimizer.step()
        >>> sorted(optimizer.state[model.weight])
        ['momentum_buffer', 'step']
    """

    def __init__(
        self, named_parameters: NamedParams, lr: float | Tensor = 1e-3, weight_decay: float = 0.0, **options: Any
    ) -> None:
        options = {"adamw_betas": (0.9, 0.95)} | options
        scale = options.get("scale", RMNPRule().scale)
        if options.get("adamw_lr") is None and scale != "match_rms" and options.get("match_rms") is None:
            options["adamw_lr_missing"] = f"with scale {scale!r}"
        super().__init__(named_parameters, RMNPRule, lr, weight_decay, **options)
