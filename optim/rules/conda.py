"""Conda: Adam in the singular basis of the first moment."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from optim.checks import check_non_negative, check_positive_counts, checked_betas
from optim.moments import correction, moment_dtype, zero_moment, zero_step
from optim.param_groups import NamedParams
from optim.rule import OfParam, State
from optim.rules.matrices import MatrixOptimizer, MatrixRule
from optim.sharding import check_whole


@dataclass(frozen=True, kw_only=True)
class CondaRule(MatrixRule):
    """Conda: Adam in the singular basis of the first moment.

        u = scale sqrt(c2) / c1 back(N),  N = M' / (sqrt(v) + eps),  c = 1 - b^t

    Here M <- b1 M + (1 - b1) G and v <- b2 v + (1 - b2) G'^2. For m >= n, G' = G P, M' = M P and back(N) = N P^T;
    otherwise they are P^T G, P^T M and P N.

    P [p, p], with p = min(m, n), contains the singular vectors of M on its smaller side. `update` only reads P.
    `Optimizer.step` computes it from the new M, at a tensor's first step and then every `update_proj_gap` steps; v is
    not transformed to the new basis. Before the first step P is the identity, and the rule is Adam.

    Args:
        betas: (b1, b2), the decay rates of the two moments.
        eps: Added to the denominator.
        update_proj_gap: The number of steps from one basis to the next.
        scale: A factor of the direction.

    Shapes:
        Matrices [m, n]; not elementwise, and not divided (`split_sizes`, `num_heads`).

    State:
        At most 12 bytes per parameter, of which 8 are for two float32 moments and 4 p / q for P (4 p^2 per matrix). In
        addition, a step count.

    Cost:
        6 p^2 q FLOP per step, with q = max(m, n), and an SVD of about 20 p^2 q every `update_proj_gap` steps.

    Source:
        arXiv 2509.24218, 2025; and its code, mode "std". Recipes: betas (0.9, 0.99), gap 2000, scale 0.25; lr 0.01 for
        Llama, 3e-3 to 6e-3 for GPT-2.

    Differs:
        If M is zero, the basis is kept. Decay acts on the old weights and not on the updated ones. The other modes of
        the published code fail for matrices that are not square, and do not exist here.
    """

    name: ClassVar[str] = "conda"
    divides: ClassVar[str] = "none"

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    update_proj_gap: int = 2000
    scale: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "betas", checked_betas("CondaRule", self.betas))
        check_non_negative("CondaRule", eps=self.eps, scale=self.scale)
        check_positive_counts("CondaRule", update_proj_gap=self.update_proj_gap)

    def init(self, param: OfParam) -> State:
        """Return zero moments, a zero step count, and the identity as the basis."""
        self.check_layout(param)
        count, *sides = self.matrix_shape(param.shape)
        side = min(sides)
        basis = torch.eye(side, dtype=moment_dtype(param), device=param.device)
        return {
            "step": zero_step(),
            "exp_avg": zero_moment(param),
            "exp_avg_sq": zero_moment(param),
            "basis": basis.expand(count, side, side).clone() if self.batched else basis,
        }

    def share(self, grads: Sequence[Tensor], states: Sequence[State], group: Sequence[State]) -> None:
        """Compute the bases that are due; tensors do not share anything.

        Raises:
            TypeError: For sharded tensors.
        """
        check_whole("CondaRule", grads)
        for grad, state in zip(grads, states, strict=True):
            if int(state["step"]) % self.update_proj_gap == 0:
                m = self.stacks(self._first(grad, state))[0]
                u, s, vt = torch.linalg.svd(m, full_matrices=False)
                found = (vt.mT if m.shape[-2] >= m.shape[-1] else u).reshape(state["basis"].shape)
                if s.numel():
                    lives = (s[..., :1, None] > 0).reshape(*state["basis"].shape[:-2], 1, 1)
                    state["basis"].copy_(torch.where(lives, found, state["basis"]))

    def _first(self, grad: Tensor, state: State) -> Tensor:
        return state["exp_avg"].lerp(grad.to(state["exp_avg"].dtype), 1 - self.betas[0])

    @property
    def uncodable(self) -> str:
        """Why the state cannot be stored as codes: it contains a basis."""
        return "without a basis of singular vectors, which is no running average and cannot be coded"

    @property
    def coupled(self) -> bool:
        """Whether tensors share something: they do not, because `share` computes each basis separately."""
        return False

    def update(self, grad: OfParam, state: State, param: OfParam) -> tuple[OfParam, State]:
        """Return the direction u of the class docstring, in the moments' dtype, and the new state."""
        b1, b2 = self.betas
        t, p = state["step"] + 1, state["basis"]
        moment = self._first(grad, state)
        dtype = moment.dtype
        (g,), (m,), (v,) = (self.stacks(x) for x in (grad.to(dtype), moment, state["exp_avg_sq"]))
        right = m.shape[-2] >= m.shape[-1]
        g_in, m_in = (x @ p if right else p.mT @ x for x in (g, m))
        v = (b2 * v).addcmul(g_in, g_in, value=1 - b2)
        n = m_in / (v.sqrt() + self.eps)
        direction = self.scale * (correction(b2, t).sqrt() / correction(b1, t)) * (n @ p.mT if right else p @ n)
        new = {"step": t, "exp_avg": moment, "exp_avg_sq": self.joined([v], param.shape), "basis": p}
        return self.directed([direction.to(dtype)], param.shape), new


class Conda(MatrixOptimizer):
    """Conda for hidden matrices and AdamW for the rest, with equal learning rate, betas and eps unless given.

    Args:
        named_parameters: The model or its named parameters, as for `MatrixOptimizer`.
        lr: Learning rate of the hidden matrices.
        weight_decay: Decoupled weight decay of the hidden matrices.
        betas, eps: See `CondaRule`.
        options: Other fields of `CondaRule`, and the keywords of `MatrixOptimizer`.

    Example:
        >>> import torch
        >>> from optim import Conda
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Linear(8, 4)
        >>> optimizer = Conda(model.named_parameters(), lr=1e-3)
        >>> model(torch.ones(2, 8)).square().sum().backward()
        >>> optimizer.step()
        >>> sorted(optimizer.state[model.weight])
        ['basis', 'exp_avg', 'exp_avg_sq', 'step']
    """

    def __init__(
        self,
        named_parameters: NamedParams,
        lr: float | Tensor = 1e-3,
        weight_decay: float = 0.0,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        **options: Any,
    ) -> None:
        usual: dict[str, Any] = {
            "betas": betas, "eps": eps, "adamw_betas": betas, "adamw_eps": eps, "adamw_eps_before_correction": True
        }  # fmt: skip
        super().__init__(named_parameters, CondaRule, lr, weight_decay, **(usual | options))
