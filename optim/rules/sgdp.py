"""SGDP: SGD with momentum that does not increase the norm of scale-invariant weights."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from optim.checks import check_flag, check_non_negative, check_share, check_unit_interval
from optim.moments import moment_dtype, scalar_moment, zero_moment, zero_step
from optim.optimizer import Optimizer, Params
from optim.radial import remove_radial
from optim.rule import OfParam, State, UpdateRule


@dataclass(frozen=True, kw_only=True)
class SGDPRule(UpdateRule):
    """SGDP: SGD that removes the radial part of the step for weights whose scale has no effect.

        u = P(b), or P(g + momentum b) with nesterov,  b <- momentum b + (1 - dampening) g

    P removes the part along the weights if the gradient is almost orthogonal to them (`optim.radial.remove_radial`);
    weight decay then acts with `wd_ratio` of its strength. Weight decay is always multiplied by 1 / (1 - momentum), the
    factor by which momentum increases the steps.

    Args:
        momentum: The factor of the buffer.
        dampening: The share of the gradient that is not added to the buffer.
        nesterov: Whether to use Nesterov momentum.
        eps: The smallest norm in the test of orthogonality.
        delta: The threshold of the cosine between gradient and weights.
        wd_ratio: The share of weight decay that remains after a projection.
        project_buffer: Whether the projected step is written to the buffer, as the published code does without
            nesterov; the buffer then loses the radial part permanently.

    Shapes:
        Tensors with two or more dimensions are treated as [dim 0, rest]; vectors and scalars get plain SGD. Not
        elementwise, because the projection depends on norms and inner products of rows and of the whole tensor.

    State:
        4 bytes per parameter (a float32 buffer; 0 with momentum 0), a step count, which the update does not use, and
        the share of weight decay of the last update.

    Source:
        Heo et al. 2020, arXiv 2006.08217; clovaai/AdamP (adamp 0.3.0).

    Differs:
        The paper only projects the step, and so does the published code with nesterov.
    """

    name: ClassVar[str] = "sgdp"
    elementwise: ClassVar[bool] = False

    momentum: float = 0.0
    dampening: float = 0.0
    nesterov: bool = False
    eps: float = 1e-8
    delta: float = 0.1
    wd_ratio: float = 0.1
    project_buffer: bool = False

    def __post_init__(self) -> None:
        check_unit_interval("SGDPRule", momentum=self.momentum)
        check_non_negative("SGDPRule", eps=self.eps, delta=self.delta, wd_ratio=self.wd_ratio)
        check_flag("SGDPRule", nesterov=self.nesterov, project_buffer=self.project_buffer)
        check_share("SGDPRule", dampening=self.dampening)
        if self.nesterov and self.project_buffer:
            raise ValueError("SGDPRule: project_buffer=True needs nesterov=False, where the step is the buffer")

    def init(self, param: OfParam) -> State:
        """Return a zero step count, full weight decay, and a zero buffer if there is momentum."""
        buffer = {"momentum_buffer": zero_moment(param)} if self.momentum else {}
        return {"step": zero_step(), "decay_share": scalar_moment(param, 1.0)} | buffer

    def update(self, grad: OfParam, state: State, param: OfParam) -> tuple[OfParam, State]:
        """Return the direction u of the class docstring, in the moments' dtype, and the new state."""
        dtype = moment_dtype(param)
        g = grad.to(dtype)
        b = (1 - self.dampening) * g
        if self.momentum:
            b = self.momentum * state["momentum_buffer"] + b
        step = g + self.momentum * b if self.nesterov else b
        direction, removed = remove_radial(step, g, param.to(dtype), delta=self.delta, eps=self.eps)
        share = 1 - (1 - self.wd_ratio) * removed.to(dtype)
        new = {"step": state["step"] + 1, "decay_share": share}
        if self.momentum:
            new["momentum_buffer"] = direction if self.project_buffer else b
        return direction, new

    def decay(self, direction: OfParam, state: State, param: OfParam) -> OfParam:
        """Return the parameter, or `wd_ratio` times the parameter after a projection, divided by 1 - momentum."""
        return state["decay_share"] / (1 - self.momentum) * param


class SGDP(Optimizer):
    """SGDP for all parameters; the first arguments are those of clovaai/AdamP.

    Args:
        params: The model, its parameters (with or without names), or param groups, as for `Optimizer`.
        lr: Learning rate.
        momentum, dampening: See `SGDPRule`.
        weight_decay: Decoupled weight decay.
        nesterov, eps, delta, wd_ratio, project_buffer: See `SGDPRule`.

    Example:
        >>> import torch
        >>> from optim import SGDP
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Linear(8, 4)
        >>> optimizer = SGDP(model.named_parameters(), lr=1e-3)
        >>> model(torch.ones(2, 8)).square().sum().backward()
        >>> optimizer.step()
        >>> sorted(optimizer.state[model.weight])
        ['decay_share', 'step']
    """

    def __init__(
        self,
        params: Params,
        lr: float | Tensor,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        eps: float = 1e-8,
        delta: float = 0.1,
        wd_ratio: float = 0.1,
        *,
        project_buffer: bool = False,
    ) -> None:
        rule = SGDPRule(
            momentum=momentum,
            dampening=dampening,
            nesterov=nesterov,
            eps=eps,
            delta=delta,
            wd_ratio=wd_ratio,
            project_buffer=project_buffer,
        )
        super().__init__(params, rule, lr=lr, weight_decay=weight_decay)
