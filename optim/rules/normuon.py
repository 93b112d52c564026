"""NorMuon: Muon whose rows are scaled to equal size by a second moment per row."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from optim.checks import check_choice, check_non_negative, check_positive, check_unit_interval
from optim.moments import moment_dtype
from optim.param_groups import NamedParams
from optim.rule import OfParam, State
from optim.rules.matrices import MatrixOptimizer
from optim.rules.muon import MuonRule

CONVENTIONS: dict[str, dict[str, Any]] = {
    "code": {},
    "paper": {"nesterov": False, "update_scale": "match_rms", "row_eps": 1e-8},
    "dion": {
        "momentum_form": "heavy_ball",
        "nesterov": False,
        "scale": "spectral_norm",
        "ns_coefficients": "polar_express",
        "ns_eps": 1e-8,
        "row_eps": 1e-8,
    },
}
"""The published forms as settings of `NorMuonRule`: zichongli5/NorMuon, the paper's algorithm 1, and microsoft/dion.
Their learning rates and weight decays are: code 0.02 and 0, paper 4e-4 and 0.1, dion 0.01 and 0.01."""


@dataclass(frozen=True, kw_only=True)
class NorMuonRule(MuonRule):
    """NorMuon: Muon whose rows are scaled to equal size by a second moment per row.

        u = f c O~,  O~ = O / (sqrt(v) + row_eps),  c = |O|_F / |O~|_F

    Here O = NS(d) as in `MuonRule` and v <- b2 v + (1 - b2) q, where q is the mean of O^2 over each row. The factor c
    restores the norm of Muon's update.

    Args:
        momentum_form, scale: See `MuonRule`.
        beta2: b2, the decay rate of v.
        row_eps: Added to the square root of v.
        update_scale: "preserve_norm" is as above. "match_rms" is u = 0.2 sqrt(m n) O~ / |O~|_F without f (the paper's
            algorithm 1): the entries have the root mean square `rms`, so that a learning rate of AdamW can be used.
        rms: The root mean square of the entries under "match_rms".
        conv_scale: "matrix" uses the rows and norms of the flattened matrix. "kernel" follows the published code: v has
            the shape [out, in, kh, 1], means are over the kernel's width, and norms are those of each kernel.

    Shapes:
        As for `MuonRule`; v has one number per row. Norms are those of the whole matrix, on whatever rank its rows are.

    State:
        4 bytes per parameter and 4 bytes per row (a float32 buffer and a float32 v per row), and a step count.

    Source:
        Li et al. 2025, arXiv 2510.05491; zichongli5/NorMuon, which is the default. `CONVENTIONS` has the others.

    Differs:
        For 16-bit parameters v is float32, and the output of NS is cast to its dtype, where the published code fails
        for float32 parameters. The Dion port uses norms of the local shard, so that its steps depend on the number of
        ranks.
    """

    name: ClassVar[str] = "normuon"

    momentum_form: str = "ema"
    scale: str = "original"
    beta2: float = 0.95
    row_eps: float = 1e-10
    update_scale: str = "preserve_norm"
    rms: float = 0.2

    def __post_init__(self) -> None:
        super().__post_init__()
        check_unit_interval("NorMuonRule", beta2=self.beta2)
        check_non_negative("NorMuonRule", row_eps=self.row_eps)
        check_positive("NorMuonRule", rms=self.rms)
        check_choice("NorMuonRule", ("preserve_norm", "match_rms"), update_scale=self.update_scale)

    def _by_kernel(self, param: Tensor) -> bool:
        return self.conv_scale == "kernel" and param.ndim == 4

    def init(self, param: OfParam) -> State:
        """Return Muon's state and a zero second moment per row: the parameter's shape with 1 for its inputs."""
        state = super().init(param)
        shape = list(param.shape)
        if self.transposed:  # the first dimension of each matrix is its inputs
            if self.batched is True:
                shape[1] = 1
            else:
                shape[0] = self.matrix_shape(shape)[0]
        else:
            first = 3 if self._by_kernel(param) else 2 if self.batched is True else 1
            shape[first:] = [1] * (param.ndim - first)
        return state | {"row_second_moment": param.new_zeros(shape, dtype=moment_dtype(param), requires_grad=False)}

    def update(self, grad: OfParam, state: State, param: OfParam) -> tuple[OfParam, State]:
        """Return the direction u of the class docstring, in the buffer's dtype, and the new state."""
        d, buffer = self.momentum_direction(grad, state)
        v = state["row_second_moment"]
        stacks, moments = [], []
        for x, v_x in zip(self.stacks(d), [v] if self._by_kernel(param) else self.stacks(v), strict=True):
            o = self.orthogonalised(x, param)
            seen = o.reshape(d.shape) if self._by_kernel(param) else o
            v_x = self.beta2 * v_x + (1 - self.beta2) * seen.square().mean(-1, keepdim=True)
            rows = seen / (v_x.sqrt() + self.row_eps)
            size = torch.linalg.matrix_norm(rows, keepdim=True) + self.row_eps
            if self.update_scale == "match_rms":
                scale = self.rms * (rows.shape[-2] * rows.shape[-1]) ** 0.5 / size
            else:
                scale = self.factor(x, param) * torch.linalg.matrix_norm(seen, keepdim=True) / size
            stacks.append((scale * rows).reshape(o.shape))
            moments.append(v_x)
        new_v = moments[0] if self._by_kernel(param) else self.joined(moments, v.shape)
        new = {"step": state["step"] + 1, "momentum_buffer": buffer, "row_second_moment": new_v}
        return self.directed(stacks, d.shape), new


class NorMuon(MatrixOptimizer):
    """NorMuon for hidden matrices and AdamW for embeddings, heads, norms and biases.

    Args:
        named_parameters: The model or its named parameters, as for `MatrixOptimizer`.
        lr: Learning rate of the hidden matrices.
        weight_decay: Decoupled weight decay of the hidden matrices.
        convention: A key of `CONVENTIONS`; options that are fields of `NorMuonRule` override it.
        options: Fields of `NorMuonRule`, and the keywords of `MatrixOptimizer`. Without `adamw_lr` the rest uses `lr`
            if `update_scale` is "match_rms", and otherwise 0.015 `lr`, the published ratio of 3e-4 to 0.02.

    Example:
        >>> import torch
        >>> from optim import NorMuon
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Linear(8, 4)
        >>> optimizer = NorMuon(model.named_parameters(), lr=1e-3)
        >>> model(torch.ones(2, 8)).square().sum().backward()
        >>> optimizer.step()
        >>> sorted(optimizer.state[model.weight])
        ['momentum_buffer', 'row_second_moment', 'step']
    """

    def __init__(
        self,
        named_parameters: NamedParams,
        lr: float | Tensor = 0.02,
        weight_decay: float = 0.0,
        *,
        convention: str = "code",
        **options: Any,
    ) -> None:
        check_choice("NorMuon", tuple(CONVENTIONS), convention=convention)
        usual: dict[str, Any] = {"adamw_betas": (0.9, 0.95), "adamw_eps": 1e-10}
        options = usual | CONVENTIONS[convention] | options
        if options.get("adamw_lr") is None and options.get("update_scale", "preserve_norm") == "preserve_norm":
            options["adamw_lr"] = 0.015 * lr
        super().__init__(named_parameters, NorMuonRule, lr, weight_decay, **options)
