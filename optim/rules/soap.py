"""SOAP: Adam in the eigenbasis of Shampoo's preconditioner."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from optim.checks import (
    check_choice,
    check_counts,
    check_non_negative,
    check_positive_counts,
    check_unit_interval,
    checked_betas,
)
from optim.moments import correction, moment_dtype, zero_step
from optim.param_groups import NamedParams
from optim.rule import OfParam, State
from optim.rules.matrices import MatrixOptimizer, MatrixRule
from optim.sharding import check_whole

VARIANTS = ("soap", "current", "kl")


@dataclass(frozen=True, kw_only=True)
class SOAPRule(MatrixRule):
    """SOAP: Adam in the eigenbasis of Shampoo's preconditioner.

        u = c Q_L (m / (sqrt(v) + eps)) Q_R^T,  c = sqrt(1 - b2^t) / (1 - b1^t)

    Here m and v are Adam's moments of Q_L^T G Q_R. Q_L [m, m] and Q_R [n, n] are eigenvectors of L, an average of
    G G^T, and of R, an average of G^T G. They are computed by an eigendecomposition once, and then updated by one step
    of power iteration with a QR decomposition; m is transformed to the new basis.

    Args:
        betas: (b1, b2), the decay rates of the two moments.
        eps: Added to the denominator; in the variants "current" and "kl" after the bias correction.
        shampoo_beta: The decay rate of L and R; None for b2.
        variant: "soap" is as published: the basis is updated every `precondition_frequency` steps, after the step, and
            the first step only initialises L and R. "current" updates it at every step with the current gradient, which
            removes the spikes that an outdated basis causes. "kl" does so with the factors of KL-Shampoo, where L
            averages G R^-1 G^T / n and R averages G^T L^-1 G / m.
        precondition_frequency: In the variant "soap", the number of steps from one basis to the next.
        max_precond_dim: In the variant "soap", sides longer than this keep the identity as their basis.

    Shapes:
        Matrices [m, n]; not elementwise, and not divided into parts of different sizes (`split_sizes`).

    State:
        24 bytes per parameter (for a square matrix: two float32 moments, and two matrices per side) and a step count.
        In general 8 + 8 m / n + 8 n / m bytes, where a side longer than `max_precond_dim` adds nothing.

    Cost:
        6 m n (m + n) FLOP per step, and 4 (m^3 + n^3) for each QR decomposition.

    Source:
        Vyas et al. 2024, arXiv 2409.11321; nikhilvyas/SOAP. The variant "kl": Lin et al. 2025, arXiv 2509.03378, as in
        NVIDIA-NeMo/Emerging-Optimizers (KlSoapV3), with a bias-corrected average of the factors.

    Differs:
        The published code steps vectors by Adam, and embeddings with a one-sided basis. Here AdamW steps both, unless
        `assign` says otherwise. In the variant "soap" decay acts on the old weights and not on the updated ones.
    """

    name: ClassVar[str] = "soap"
    divides: ClassVar[str] = "equal"

    betas: tuple[float, float] = (0.95, 0.95)
    eps: float = 1e-8
    shampoo_beta: float | None = None
    variant: str = "soap"
    precondition_frequency: int = 10
    max_precond_dim: int = 10000

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "betas", checked_betas("SOAPRule", self.betas))
        check_non_negative("SOAPRule", eps=self.eps)
        if self.shampoo_beta is not None:
            check_unit_interval("SOAPRule", shampoo_beta=self.shampoo_beta)
        check_choice("SOAPRule", VARIANTS, variant=self.variant)
        check_positive_counts("SOAPRule", precondition_frequency=self.precondition_frequency)
        check_counts("SOAPRule", max_precond_dim=self.max_precond_dim)
        if self.variant == "kl" and self.eps == 0:
            raise ValueError("SOAPRule: eps = 0; the variant 'kl' divides by eigenvalues of at least eps")

    def init(self, param: OfParam) -> State:
        """Return zero moments and factors, a zero step count, and identities as bases."""
        self.check_layout(param)
        (stack,) = self.stacks(param)
        dtype = moment_dtype(param)
        state: State = {"step": zero_step()}
        for key in ("exp_avg", "exp_avg_sq"):
            state[key] = torch.zeros(stack.shape, dtype=dtype, device=param.device)
        for side, size in zip(("left", "right"), stack.shape[-2:], strict=True):
            if size <= self.max_precond_dim or self.variant != "soap":
                eye = torch.eye(size, dtype=dtype, device=param.device)
                state[f"basis_{side}"] = eye.expand(len(stack), size, size).clone()
                state[f"factor_{side}"] = torch.zeros_like(state[f"basis_{side}"])
                if self.variant == "kl":
                    state[f"values_{side}"] = torch.zeros((len(stack), size), dtype=dtype, device=param.device)
        return state

    def share(self, grads: Sequence[Tensor], states: Sequence[State], group: Sequence[State]) -> None:
        """Compute the bases that are due between steps; tensors do not share anything.

        Raises:
            TypeError: For sharded tensors.
        """
        check_whole("SOAPRule", grads)
        for grad, state in zip(grads, states, strict=True):
            step = int(state["step"])
            if self.variant != "soap" and step == 0:
                (g,) = self.stacks(grad.to(state["exp_avg"].dtype))
                for key, value in self._factors(g, state, 0.0).items():
                    state[key].copy_(value)
                self._decompose(state)
            elif self.variant == "soap" and step == 1:
                self._decompose(state)
            elif self.variant == "soap" and step > 1 and (step - 1) % self.precondition_frequency == 0:
                for key, value in self._followed(state, reorder=True).items():
                    state[key].copy_(value)

    @property
    def coupled(self) -> bool:
        """Whether tensors share something: they do not, because `share` computes each basis separately."""
        return False

    @property
    def uncodable(self) -> str:
        """Why the state cannot be stored as codes: it contains bases."""
        return "without an eigenbasis, which is no running average and cannot be coded"

    def update(self, grad: OfParam, state: State, param: OfParam) -> tuple[OfParam, State]:
        """Return the direction u of the class docstring, in the moments' dtype, and the new state."""
        b1, b2 = self.betas
        beta = b2 if self.shampoo_beta is None else self.shampoo_beta
        dtype = state["exp_avg"].dtype
        (g,) = self.stacks(grad.to(dtype))
        t = state["step"] + 1
        new = dict(state)
        if self.variant == "soap":
            counted = state["step"]  # the first step only initialises the factors
            new |= self._factors(g, state, beta)
            used = state
        else:
            counted = t
            begins = (t == 1).to(g.device)
            weight = (1 - (1 - beta) / correction(beta, t)).to(dtype)
            fresh = new | self._factors(g, state, weight)
            fresh |= self._followed(fresh, reorder=False)
            new = {key: torch.where(begins, state[key], fresh[key]) if key != "step" else t for key in state}
            used = new
        n = _turned(g, used, back=False)
        m = used["exp_avg"].lerp(n, 1 - b1)
        v = (b2 * state["exp_avg_sq"]).addcmul(n, n, value=1 - b2)
        c2 = correction(b2, counted).sqrt()
        c = (c2 / correction(b1, counted.clamp(min=1))).to(dtype)
        eps = self.eps if self.variant == "soap" else (self.eps * c2).to(dtype)
        u = c * _turned(m / (v.sqrt() + eps), used, back=True)
        if self.variant == "soap":
            begins = (counted == 0).to(g.device)
            m, v, u = (torch.where(begins, 0.0, x) for x in (m, v, u))
        return self.directed([u], param.shape), new | {"step": t, "exp_avg": m, "exp_avg_sq": v}

    def decay(self, direction: OfParam, state: State, param: OfParam) -> OfParam:
        """Return the parameter, or zero at the first step of the variant "soap", which does not change it."""
        if self.variant != "soap":
            return param
        return torch.where((state["step"] <= 1).to(param.device), 0.0, param)

    def _factors(self, g: Tensor, state: State, beta: float | Tensor) -> State:
        """Return L and R after the gradient g [k, m, n]."""
        found: State = {}
        for side, x in (("left", g), ("right", g.mT)):
            key, other = f"factor_{side}", "right" if side == "left" else "left"
            if key in state:
                y = x
                if self.variant == "kl":  # y y^T = x Q diag(1 / values) Q^T x^T / length of the other side
                    y = x @ state[f"basis_{other}"]
                    y = y * (state[f"values_{other}"].clamp(min=self.eps) * x.shape[-1]).rsqrt().unsqueeze(-2)
                found[key] = beta * state[key] + (1 - beta) * (y @ y.mT)
        return found

    def _decompose(self, state: State) -> None:
        """Write the eigenvectors of the factors to the state, in the order of decreasing eigenvalues."""
        for side in ("left", "right"):
            if f"factor_{side}" in state and state[f"factor_{side}"].numel():
                values, vectors = torch.linalg.eigh(state[f"factor_{side}"])
                state[f"basis_{side}"].copy_(vectors.flip(-1))
                if self.variant == "kl":
                    state[f"values_{side}"].copy_(values.flip(-1))

    def _followed(self, state: State, *, reorder: bool) -> State:
        """Return bases after a step of power iteration, and the moments in them; `reorder` is the published order."""
        found: State = {}
        v = state["exp_avg_sq"]
        for side, dim in (("left", -2), ("right", -1)):
            if f"basis_{side}" not in state:
                continue
            q, factor = state[f"basis_{side}"], state[f"factor_{side}"]
            if reorder:  # sort columns by their estimated eigenvalues, together with v
                order = (q * (factor @ q)).sum(-2).argsort(dim=-1, descending=True)
                q = torch.take_along_dim(q, order.unsqueeze(-2), -1)
                v = torch.take_along_dim(v, order.unsqueeze(-1 if dim == -2 else -2), dim)
            q = torch.linalg.qr(factor @ q).Q
            if not reorder:
                values = (q * (factor @ q)).sum(-2)
                order = values.argsort(dim=-1, descending=True)
                q = torch.take_along_dim(q, order.unsqueeze(-2), -1)
                if self.variant == "kl":
                    found[f"values_{side}"] = torch.take_along_dim(values, order, -1)
            found[f"basis_{side}"] = q
        m = _turned(_turned(state["exp_avg"], state, back=True), state | found, back=False)
        return found | {"exp_avg": m, "exp_avg_sq": v}


def _turned(x: Tensor, state: State, *, back: bool) -> Tensor:
    """Return x [k, m, n] in the coordinates of the bases, or back; a side without a basis is not changed."""
    if "basis_left" in state:
        q = state["basis_left"]
        x = (q if back else q.mT) @ x
    if "basis_right" in state:
        q = state["basis_right"]
        x = x @ (q.mT if back else q)
    return x


class SOAP(MatrixOptimizer):
    """SOAP for hidden matrices and AdamW for the rest, with equal learning rate, betas and eps unless given.

    Args:
        named_parameters: The model or its named parameters, as for `MatrixOptimizer`.
        lr: Learning rate of the hidden matrices.
        weight_decay: Decoupled weight decay of the hidden matrices.
        betas, eps: See `SOAPRule`.
        options: Other fields of `SOAPRule`, and the keywords of `MatrixOptimizer`.

    Example:
        >>> import torch
        >>> from optim import SOAP
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Linear(8, 4)
        >>> optimizer = SOAP(model.named_parameters(), lr=3e-3)
        >>> model(torch.ones(2, 8)).square().sum().backward()
        >>> optimizer.step()
        >>> sorted(optimizer.state[model.weight])
        ['basis_left', 'basis_right', 'exp_avg', 'exp_avg_sq', 'factor_left', 'factor_right', 'step']
    """

    def __init__(
        self,
        named_parameters: NamedParams,
        lr: float | Tensor = 3e-3,
        weight_decay: float = 0.01,
        *,
        betas: tuple[float, float] = (0.95, 0.95),
        eps: float = 1e-8,
        **options: Any,
    ) -> None:
        usual: dict[str, Any] = {"betas": betas, "eps": eps, "adamw_betas": betas, "adamw_eps": eps}
        super().__init__(named_parameters, SOAPRule, lr, weight_decay, **(usual | options))
