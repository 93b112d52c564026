"""Muon: momentum, orthogonalised by Newton-Schulz, for hidden matrices; AdamW for the rest."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from optim.linalg import NEWTON_SCHULZ, newton_schulz
from optim.optimizer import Optimizer
from optim.param_groups import split_matrices
from optim.rule import (
    State,
    UpdateRule,
    check_flag,
    check_non_negative,
    check_unit_interval,
    moment_dtype,
    zero_moment,
    zero_step,
)
from optim.rules.adamw import AdamWRule

_CHOICES = {
    "momentum_form": ("heavy_ball", "ema"),
    "scale": ("match_rms_adamw", "original", "spectral_norm", "none"),
    "conv_scale": ("matrix", "kernel"),
    "ns_form": ("plain", "torch"),
    "ns_dtype": ("bfloat16", "float16", "float32", "float64", "param"),
}

CONVENTIONS: dict[str, dict[str, Any]] = {
    "moonlight": {},
    "keller_jordan": {"momentum_form": "ema", "scale": "original", "conv_scale": "kernel"},
    "torch": {"momentum_form": "ema", "scale": "original", "ns_form": "torch"},
    "dion": {"nesterov": False, "scale": "spectral_norm", "ns_coefficients": "polar_express", "ns_eps": 1e-8},
}
"""The four published codes as settings of `MuonRule`; official learning rate and weight decay of each:
moonlight 1e-3 and 0.1, keller_jordan 0.02 and 0, torch 1e-3 and 0.1, dion 0.01 and 0.01."""


@dataclass(frozen=True, kw_only=True)
class MuonRule(UpdateRule):
    """u = f NS(d), with B <- mu B + G and d = G + mu B (nesterov) or B; NS makes d's singular values about 1.

    Shapes: matrices [m, n]; tensors of more dimensions are flattened to [dim 0, rest] for NS. Not elementwise.
    State: 4 bytes a parameter (one float32 buffer) and a step count, which the update does not use.
    Source: Jordan et al. 2024 (KellerJordan/Muon), Liu et al. 2025 (Moonlight, arXiv 2502.16982), `torch.optim.Muon`,
    microsoft/dion. The defaults are Moonlight's, whose scale lets AdamW's learning rate and weight decay be used
    unchanged; the others are `CONVENTIONS`: ``MuonRule(**CONVENTIONS["keller_jordan"])``.

    - `momentum_form`: "heavy_ball" as above, or "ema", B <- mu B + (1 - mu) G and d = (1 - mu) G + mu B or B. They
      differ by a factor, which NS removes but for its eps.
    - `scale` f: "match_rms_adamw" 0.2 sqrt(max(m, n)) (Moonlight; Dion's rms_norm), "original" sqrt(max(1, m / n)),
      "spectral_norm" sqrt(m / n), "none" 1.
    - `conv_scale`: m and n of a convolution's f are those of the flattened matrix ("matrix"), or the kernel's height
      and width as in Keller Jordan's code ("kernel", f = 1 for square kernels). NS uses the flattened matrix either
      way.
    - `ns_coefficients`, `ns_steps`, `ns_eps`, `ns_form`: see `optim.linalg.newton_schulz`.
    - `ns_dtype`: of its products, "bfloat16" in the published codes, or "param" for the moments' own. Choose
      "float32" for small or structurally low-rank matrices, where bfloat16 rounding noise becomes part of the update.
    - `cautious_decay`: weight decay only where it has the update's sign, u p >= 0 (Dion).
    """

    name: ClassVar[str] = "muon"
    elementwise: ClassVar[bool] = False

    momentum: float = 0.95
    nesterov: bool = True
    momentum_form: str = "heavy_ball"
    scale: str = "match_rms_adamw"
    conv_scale: str = "matrix"
    ns_steps: int = 5
    ns_coefficients: str | tuple[tuple[float, float, float], ...] = "keller_jordan"
    ns_eps: float = 1e-7
    ns_form: str = "plain"
    ns_dtype: str = "bfloat16"
    cautious_decay: bool = False

    def __post_init__(self) -> None:
        check_unit_interval("MuonRule", momentum=self.momentum)
        check_non_negative("MuonRule", ns_eps=self.ns_eps)
        check_flag("MuonRule", nesterov=self.nesterov, cautious_decay=self.cautious_decay)
        for key, choices in _CHOICES.items():
            if getattr(self, key) not in choices:
                raise ValueError(f"MuonRule: {key} = {getattr(self, key)!r}; it must be one of {', '.join(choices)}")
        object.__setattr__(self, "ns_coefficients", _checked_coefficients(self.ns_coefficients))
        if isinstance(self.ns_steps, bool) or not isinstance(self.ns_steps, int) or not 1 <= self.ns_steps < 100:
            raise ValueError(f"MuonRule: ns_steps = {self.ns_steps!r}; it must be an integer from 1 to 99")

    def init(self, param: Tensor) -> State:
        """A zero buffer and step count; ValueError for a vector or scalar, which has nothing to orthogonalise."""
        if param.ndim < 2:
            raise ValueError(
                f"MuonRule: a parameter of shape {tuple(param.shape)} is no matrix; give it another rule "
                "(create('muon', model.named_parameters(), ...) puts it in an AdamW group)"
            )
        return {"step": zero_step(), "momentum_buffer": zero_moment(param)}

    def update(self, grad: Tensor, state: State, param: Tensor) -> tuple[Tensor, State]:
        """The direction u of the class docstring, in the buffer's dtype. One NaN in `grad` fills the matrix."""
        mu = self.momentum
        g = grad.to(state["momentum_buffer"].dtype)
        if self.momentum_form == "ema":
            g = (1 - mu) * g
        buffer = mu * state["momentum_buffer"] + g
        d = g + mu * buffer if self.nesterov else buffer
        dtype = moment_dtype(param) if self.ns_dtype == "param" else getattr(torch, self.ns_dtype)
        matrix = newton_schulz(
            d.reshape(d.shape[0], math.prod(d.shape[1:])),
            coefficients=self.ns_coefficients,
            steps=self.ns_steps,
            eps=self.ns_eps,
            form=self.ns_form,
            dtype=dtype,
        )
        direction = self._factor(d.shape) * matrix.reshape(d.shape)
        return direction, {"step": state["step"] + 1, "momentum_buffer": buffer}

    def _factor(self, shape: torch.Size) -> float:
        rows, cols = shape[-2:] if self.conv_scale == "kernel" else (shape[0], math.prod(shape[1:]))
        if self.scale == "match_rms_adamw":
            return 0.2 * math.sqrt(max(rows, cols))
        if self.scale == "original":
            return math.sqrt(max(1.0, rows / max(cols, 1)))
        return math.sqrt(rows / max(cols, 1)) if self.scale == "spectral_norm" else 1.0

    def decay(self, direction: Tensor, state: State, param: Tensor) -> Tensor:
        """The parameter; with `cautious_decay` only its entries that the update shrinks."""
        return torch.where(direction * param >= 0, param, 0) if self.cautious_decay else param


def _checked_coefficients(
    given: str | Sequence[Sequence[float]],
) -> str | tuple[tuple[float, float, float], ...]:
    if isinstance(given, str):
        if given in NEWTON_SCHULZ:
            return given
    elif given and all(len(triple) == 3 for triple in given):
        return tuple((float(a), float(b), float(c)) for a, b, c in given)
    raise ValueError(f"MuonRule: ns_coefficients = {given!r}; it must be one of {', '.join(NEWTON_SCHULZ)}, or triples")


class Muon(Optimizer):
    """Muon for hidden matrices and AdamW for embeddings, heads, norms and biases: two param groups of one `Optimizer`.

    named_parameters: with names, by which `optim.param_groups.split_matrices` tells the two apart.
    lr, weight_decay: of the matrices.
    convention: a key of `CONVENTIONS`; further keywords are fields of `MuonRule` and override it.
    adamw_lr, adamw_weight_decay, adamw_betas, adamw_eps: of the rest. Without `adamw_lr` the rest uses `lr`; that
    fits the scale "match_rms_adamw" only, so with another scale it must be given (Keller Jordan: 0.02 and 3e-4).
    Raises: ValueError if there is no matrix, or if `adamw_lr` is missing where it is needed.
    """

    def __init__(
        self,
        named_parameters: Iterable[tuple[str, Tensor]],
        lr: float | Tensor = 1e-3,
        weight_decay: float = 0.1,
        *,
        convention: str = "moonlight",
        adamw_lr: float | Tensor | None = None,
        adamw_weight_decay: float | None = None,
        adamw_betas: tuple[float, float] = (0.9, 0.95),
        adamw_eps: float = 1e-8,
        **fields: Any,
    ) -> None:
        if convention not in CONVENTIONS:
            raise ValueError(f"Muon: convention {convention!r}; it must be one of {', '.join(CONVENTIONS)}")
        rule = MuonRule(**(CONVENTIONS[convention] | fields))
        matrices, rest = split_matrices(named_parameters)
        if not matrices:
            raise ValueError("Muon: none of the parameters is a hidden matrix; use another optimizer, such as AdamW")
        groups: list[dict[str, Any]] = [{"params": matrices}]
        if rest:
            if adamw_lr is None and rule.scale != "match_rms_adamw":
                raise ValueError(
                    f"Muon: with scale {rule.scale!r} the learning rate of the matrices does not fit the "
                    f"{len(rest)} other parameters ({rest[0][0]!r}, ...); give adamw_lr as well, such as 3e-4"
                )
            groups.append(
                {
                    "params": rest,
                    "rule": AdamWRule(betas=adamw_betas, eps=adamw_eps),
                    "lr": lr if adamw_lr is None else adamw_lr,
                    "weight_decay": weight_decay if adamw_weight_decay is None else adamw_weight_decay,
                }
            )
        super().__init__(groups, rule, lr=lr, weight_decay=weight_decay)
