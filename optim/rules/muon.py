"""Muon: momentum that is orthogonalised by Newton-Schulz iterations, for hidden matrices; AdamW for the rest."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from optim import backend
from optim.checks import check_choice, check_flag, check_non_negative, check_unit_interval
from optim.linalg import NEWTON_SCHULZ, newton_schulz
from optim.moments import moment_dtype, zero_moment
from optim.param_groups import NamedParams
from optim.rule import OfParam, State
from optim.rules.matrices import MatrixOptimizer, MatrixRule
from optim.torch_states import muon as torch_muon

_CHOICES = {
    "momentum_form": ("heavy_ball", "ema"),
    "scale": ("match_rms_adamw", "original", "spectral_norm", "none"),
    "conv_scale": ("matrix", "kernel"),
    "ns_form": ("plain", "torch"),
    "ns_dtype": ("auto", "bfloat16", "float16", "float32", "float64", "param"),
}

CONVENTIONS: dict[str, dict[str, Any]] = {
    "moonlight": {},
    "keller_jordan": {"momentum_form": "ema", "scale": "original", "conv_scale": "kernel"},
    "torch": torch_muon.CONVENTION,
    "dion": {"nesterov": False, "scale": "spectral_norm", "ns_coefficients": "polar_express", "ns_eps": 1e-8},
}
"""The four published codes as settings of `MuonRule`. Their official learning rates and weight decays are:
moonlight 1e-3 and 0.1, keller_jordan 0.02 and 0, torch 1e-3 and 0.1, dion 0.01 and 0.01."""

_ADAMW: dict[str, dict[str, Any]] = {
    "moonlight": {"adamw_eps_before_correction": True},
    "keller_jordan": {"adamw_eps": 1e-10},
}
"""How these codes' AdamW for the rest differs from `torch.optim.AdamW`; their betas are (0.9, 0.95)."""


@dataclass(frozen=True, kw_only=True)
class MuonRule(MatrixRule):
    """Muon: momentum that is orthogonalised by Newton-Schulz iterations.

        u = f NS(d),  B <- mu B + G,  d = G + mu B with nesterov, else B

    NS maps the singular values of d to about 1.

    Args:
        momentum: mu, the decay rate of B.
        nesterov: Whether to use Nesterov momentum.
        momentum_form: "heavy_ball" is as above. "ema" is B <- mu B + (1 - mu) G and d = (1 - mu) G + mu B, or d = B
            without nesterov. The two differ by a factor, which NS removes except for its eps.
        scale: The factor f. "match_rms_adamw" is 0.2 sqrt(max(m, n)) (Moonlight; Dion's rms_norm), "original" is
            sqrt(max(1, m / n)), "spectral_norm" is sqrt(m / n), and "none" is 1.
        conv_scale: Whether m and n in a convolution's f are those of the flattened matrix ("matrix"), or height and
            width of the kernel as in Keller Jordan's code ("kernel", where f = 1 for square kernels). NS uses the
            flattened matrix in both cases.
        ns_steps, ns_coefficients, ns_eps, ns_form: See `optim.linalg.newton_schulz`.
        ns_dtype: The dtype of the products in NS, "param" for the dtype of the moments, or "auto". Choose "float32" for
            small or structurally low-rank matrices, for which the rounding noise of bfloat16 becomes part of the
            update.
        cautious_decay: Whether weight decay only acts where it has the same sign as the update, u p >= 0 (Dion).

    Shapes:
        Matrices [m, n] in one of the layouts of `MatrixRule`; not elementwise.

    State:
        4 bytes per parameter (one float32 buffer) and a step count, which the update does not use.

    Source:
        Jordan et al. 2024 (KellerJordan/Muon), Liu et al. 2025 (Moonlight, arXiv 2502.16982), `torch.optim.Muon`,
        microsoft/dion. The defaults are Moonlight's, whose scale allows AdamW's learning rate and weight decay to be
        used unchanged. `CONVENTIONS` has the others: ``MuonRule(**CONVENTIONS["keller_jordan"])``.

    Differs:
        The published codes always multiply in bfloat16 (``ns_dtype="bfloat16"``). For parameters of 32 bits or fewer,
        "auto" does so if it is faster, which holds on GPUs and on CPUs with instructions for it. On other CPUs, where
        it is several times slower, products are in the dtype of the moments. Set a dtype to get equal steps on
        different machines.
    """

    name: ClassVar[str] = "muon"

    momentum: float = 0.95
    nesterov: bool = True
    momentum_form: str = "heavy_ball"
    scale: str = "match_rms_adamw"
    conv_scale: str = "matrix"
    ns_steps: int = 5
    ns_coefficients: str | tuple[tuple[float, float, float], ...] = "keller_jordan"
    ns_eps: float = 1e-7
    ns_form: str = "plain"
    ns_dtype: str = "auto"
    cautious_decay: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        own = type(self).__name__
        check_unit_interval(own, momentum=self.momentum)
        check_non_negative(own, ns_eps=self.ns_eps)
        check_flag(own, nesterov=self.nesterov, cautious_decay=self.cautious_decay)
        for key, choices in _CHOICES.items():
            check_choice(own, choices, **{key: getattr(self, key)})
        object.__setattr__(self, "ns_coefficients", _checked_coefficients(own, self.ns_coefficients))
        if isinstance(self.ns_steps, bool) or not isinstance(self.ns_steps, int) or not 1 <= self.ns_steps < 100:
            raise ValueError(f"{own}: ns_steps = {self.ns_steps!r}; it must be an integer from 1 to 99")

    def init(self, param: OfParam) -> State:
        """Return a zero buffer and a zero step count.

        Raises:
            ValueError: For a vector or scalar, which has nothing to orthogonalise.
        """
        return super().init(param) | {"momentum_buffer": zero_moment(param)}

    def update(self, grad: OfParam, state: State, param: OfParam) -> tuple[OfParam, State]:
        """Return the direction u of the class docstring, in the buffer's dtype, and the new state.

        A single NaN in `grad` fills the whole matrix with NaN.
        """
        d, buffer = self.momentum_direction(grad, state)
        stacks = [self.orthogonalised(x, param).mul_(self.factor(x, param)) for x in self.stacks(d)]
        return self.directed(stacks, d.shape), {"step": state["step"] + 1, "momentum_buffer": buffer}

    def momentum_direction(self, grad: Tensor, state: State) -> tuple[Tensor, Tensor]:
        """Return d of the class docstring and the new buffer.

        Args:
            grad: The gradient, of the parameter's shape.
            state: The state before this gradient.

        Returns:
            d and the buffer, of the parameter's shape and the buffer's dtype.
        """
        mu = self.momentum
        g = grad.to(state["momentum_buffer"].dtype)
        if self.momentum_form == "ema":
            g = (1 - mu) * g
        buffer = g.add(state["momentum_buffer"], alpha=mu)
        return g.add(buffer, alpha=mu) if self.nesterov else buffer, buffer

    def orthogonalised(self, x: Tensor, param: Tensor) -> Tensor:
        """Return NS of a stack of matrices.

        Args:
            x: The matrices, of shape [k, m, n].
            param: The parameter, whose dtype and device determine the dtype of the products.

        Returns:
            A tensor of x's shape and dtype.
        """
        chosen = self.ns_dtype
        if chosen == "auto":
            fast = param.element_size() < 8 and (param.device.type != "cpu" or backend.CPU_MULTIPLIES_BFLOAT16)
            chosen = "bfloat16" if fast else "param"
        return newton_schulz(
            x,
            coefficients=self.ns_coefficients,
            steps=self.ns_steps,
            eps=self.ns_eps,
            form=self.ns_form,
            dtype=moment_dtype(param) if chosen == "param" else getattr(torch, chosen),
        )

    def factor(self, x: Tensor, param: Tensor) -> float:
        """Return the factor f for the matrices of a stack.

        Args:
            x: The matrices, of shape [k, m, n].
            param: The parameter that contains them.

        Returns:
            The factor.
        """
        rows, cols = param.shape[-2:] if self.conv_scale == "kernel" and param.ndim == 4 else x.shape[-2:]
        if self.scale == "match_rms_adamw":
            return 0.2 * math.sqrt(max(rows, cols))
        if self.scale == "original":
            return math.sqrt(max(1.0, rows / max(cols, 1)))
        return math.sqrt(rows / max(cols, 1)) if self.scale == "spectral_norm" else 1.0

    def decay(self, direction: OfParam, state: State, param: OfParam) -> OfParam:
        """Return the parameter; under `cautious_decay`, entries that the update does not shrink are replaced by 0."""
        return torch.where(direction * param >= 0, param, 0) if self.cautious_decay else param


def _checked_coefficients(
    own: str, given: str | Sequence[Sequence[float]]
) -> str | tuple[tuple[float, float, float], ...]:
    if isinstance(given, str):
        if given in NEWTON_SCHULZ:
            return given
    elif given and all(len(triple) == 3 for triple in given):
        return tuple((float(a), float(b), float(c)) for a, b, c in given)
    known = ", ".join(NEWTON_SCHULZ)
    raise ValueError(f"{own}: ns_coefficients = {given!r}; it must be one of {known}, or triples of numbers")


class Muon(MatrixOptimizer):
    """Muon for hidden matrices and AdamW for embeddings, heads, norms and biases, as param groups of one `Optimizer`.

    Args:
        named_parameters: The model or its named parameters, as for `MatrixOptimizer`.
        lr: Learning rate of the hidden matrices.
        weight_decay: Decoupled weight decay of the hidden matrices.
        convention: A key of `CONVENTIONS`, one of the four published codes; options that are fields of `MuonRule`
            override it.
        options: Fields of `MuonRule`, and the keywords of `MatrixOptimizer`. Without `adamw_lr` the rest uses `lr`,
            which is only suitable for the scale "match_rms_adamw". With another scale `adamw_lr` must be given (Keller
            Jordan's are `lr` 0.02 and `adamw_lr` 3e-4). `split_fused` is False by default under the convention "torch".

    Raises:
        ValueError: If there is no matrix, or if `adamw_lr` is needed and missing.

    Example:
        >>> import torch
        >>> from optim import Muon
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Linear(8, 4)
        >>> optimizer = Muon(model.named_parameters(), lr=1e-3)
        >>> model(torch.ones(2, 8)).square().sum().backward()
        >>> optimizer.step()
        >>> sorted(optimizer.state[model.weight])
        ['momentum_buffer', 'step']
    """

    def __init__(
        self,
        named_parameters: NamedParams,
        lr: float | Tensor = 1e-3,
        weight_decay: float = 0.1,
        *,
        convention: str = "moonlight",
        **options: Any,
    ) -> None:
        check_choice("Muon", tuple(CONVENTIONS), convention=convention)
        usual: dict[str, Any] = {"adamw_betas": (0.9, 0.95)} | _ADAMW.get(convention, {})
        usual["split_fused"] = convention != "torch"  # which is there to equal `torch.optim.Muon`
        options = usual | CONVENTIONS[convention] | options
        scale = options.get("scale", MuonRule().scale)
        matched = scale == "match_rms_adamw" or options.get("match_rms") is not None
        if options.get("adamw_lr") is None and not matched:
            options["adamw_lr_missing"] = f"with scale {scale!r}"
        super().__init__(named_parameters, MuonRule, lr, weight_decay, **options)
