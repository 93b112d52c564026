"""ROOT: Muon with clipped outliers and Newton-Schulz coefficients fitted to each shape."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypeAlias

import torch
from torch import Tensor

from optim.checks import check_non_negative, check_positive_counts, check_positive_share
from optim.linalg import newton_schulz
from optim.moments import moment_dtype
from optim.param_groups import NamedParams
from optim.rules.matrices import MatrixOptimizer
from optim.rules.muon import MuonRule
from optim.sharding import replicated

Triple: TypeAlias = tuple[float, float, float]
Table: TypeAlias = tuple[tuple[tuple[int, int], Triple], ...]

PUBLISHED: Table = (
    ((2048, 2048), (3.4916, -4.8224, 2.1095)),
    ((2048, 16384), (3.1943, -3.8221, 1.5322)),
    ((2048, 3072), (3.4509, -4.5790, 1.9325)),
    ((2048, 8192), (2.9794, -3.6674, 1.6207)),
)
"""Entries ((smaller side, larger side), (a, b, c)), as in the published code."""


@dataclass(frozen=True, kw_only=True)
class ROOTRule(MuonRule):
    """ROOT: Muon with clipped outliers and Newton-Schulz coefficients fitted to each shape.

        u = f NS(clamp(d, -e, e)),  e = quantile of |d| + 1e-9

    Here d and f are those of `MuonRule`, and NS uses the coefficients of the matrix's shape. Clamping removes the
    soft-thresholded outliers from d; the momentum keeps them.

    Args:
        ns_dtype: See `MuonRule`; "auto" is the dtype of the moments for shapes with fitted coefficients.
        quantile: Which quantile of |d| to use, interpolated linearly between the order statistics of the matrix. None
            sets e = `threshold` (the paper's algorithm, which has no Nesterov momentum either).
        threshold: The value of e if `quantile` is None.
        shape_coefficients: Entries ((smaller side, larger side), (a, b, c)), one per shape. Other shapes use
            `ns_coefficients`. `fit_coefficients` computes the triple of a shape.

    Shapes:
        As for `MuonRule`.

    State:
        4 bytes per parameter (one float32 buffer) and a step count.

    Source:
        arXiv 2511.20626, 2025; and its code.

    Differs:
        Products and the quantile are in the dtype of the moments (in the published code, products are in the
        parameter's dtype and the quantile is in float32). The published code warns about a shape that its table lacks;
        here `shape_coefficients` lists the shapes.
    """

    name: ClassVar[str] = "root"

    ns_dtype: str = "param"
    shape_coefficients: Table = PUBLISHED
    quantile: float | None = 0.9
    threshold: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "shape_coefficients", _checked(self.shape_coefficients))
        if (self.quantile is None) == (self.threshold is None):
            raise ValueError("ROOTRule: set either quantile or threshold, and None for the other")
        if self.quantile is not None:
            check_positive_share("ROOTRule", quantile=self.quantile)
        if self.threshold is not None:
            check_non_negative("ROOTRule", threshold=self.threshold)

    def orthogonalised(self, x: Tensor, param: Tensor) -> Tensor:
        """Return NS of a stack of matrices without outliers, with the coefficients of their shape."""
        m, n = x.shape[-2:]
        if x.numel():
            if self.quantile is None:
                limit = x.new_full((), self.threshold or 0.0)
            else:
                limit = _quantile(replicated(x.abs()).flatten(1), self.quantile)[:, None, None] + 1e-9
            x = torch.clamp(x, -limit, limit)
        triple = dict(self.shape_coefficients).get((min(m, n), max(m, n)))
        if triple is None:
            return super().orthogonalised(x, param)
        dtype = moment_dtype(param) if self.ns_dtype in ("param", "auto") else getattr(torch, self.ns_dtype)
        return newton_schulz(
            x, coefficients=(triple,), steps=self.ns_steps, eps=self.ns_eps, form=self.ns_form, dtype=dtype
        )


def _quantile(x: Tensor, q: float) -> Tensor:
    """Return the quantile of each row of x [k, n] as torch.quantile does, but of more than 16 million entries too."""
    place = q * (x.shape[-1] - 1)
    low = int(place)
    below = x.kthvalue(low + 1).values
    return below if low == place else below.lerp(x.kthvalue(low + 2).values, place - low)


def _checked(table: Any) -> Table:
    try:
        found = []
        for (m, n), (a, b, c) in table:
            found.append(((min(int(m), int(n)), max(int(m), int(n))), (float(a), float(b), float(c))))
        return tuple(found)
    except (TypeError, ValueError):
        raise ValueError(
            f"ROOTRule: shape_coefficients = {table!r}; expected entries such as ((768, 3072), (3.4, -4.6, 1.9))"
        ) from None


def fit_coefficients(
    m: int, n: int, *, recorded: Sequence[Tensor] = (), steps: int = 5, seed: int = 0, samples: int = 4
) -> Triple:
    """Fit Newton-Schulz coefficients that bring the singular values of matrices [m, n] close to 1.

    The fit uses the spectra of Gaussian and recorded matrices. It minimises the mean of (s - 1)^2 over all of them plus
    the largest such mean of a single matrix, starting from Muon's triple, and is deterministic. Sides above 1024 are
    scaled down, which does not change the spectrum of a Gaussian matrix.

    Args:
        m: The number of rows of the matrices.
        n: The number of columns of the matrices.
        recorded: Recorded momenta [m, n] whose spectra are included (the authors use three Gaussian matrices per
            recorded one).
        steps: The number of Newton-Schulz steps.
        seed: The seed of the Gaussian matrices.
        samples: The number of Gaussian matrices.

    Returns:
        The triple (a, b, c).

    Raises:
        ValueError: If one of the numbers is not an integer of at least 1.

    Source:
        arXiv 2511.20626, which fits offline; the search method (Nelder-Mead) is our choice.

    Example:
        >>> from optim.rules.root import fit_coefficients
        >>> a, b, c = fit_coefficients(16, 32, samples=1)
        >>> a > 1 and b < 0 and c > 0
        True
    """
    check_positive_counts("fit_coefficients", m=m, n=n, samples=samples, steps=steps)
    shrink = max(1.0, max(m, n) / 1024)
    sides = max(1, round(m / shrink)), max(1, round(n / shrink))
    generator = torch.Generator().manual_seed(seed)
    drawn = [torch.randn(sides, generator=generator, dtype=torch.float64) for _ in range(samples)]
    spectra = []
    for x in (*drawn, *(r.detach().double().reshape(r.shape[0], -1) for r in recorded)):
        s = torch.linalg.svdvals(x)
        # scaled to the full size: the Frobenius norm is proportional to the square root of the smaller side
        spectra.append(s / s.norm() * (len(s) / min(m, n)) ** 0.5)
    flat = torch.cat(spectra)
    sizes = [len(s) for s in spectra]

    def loss(triple: Tensor) -> float:
        a, b, c = triple.unbind()
        s = flat
        for _ in range(steps):
            s = s * (a + s.square() * (b + c * s.square()))
        off = (s - 1).square()
        worst = max(float(part.mean()) for part in torch.split(off, sizes))
        found = float(off.mean()) + worst
        return found if found == found else float("inf")

    a, b, c = _nelder_mead(loss, torch.tensor([3.4445, -4.7750, 2.0315], dtype=torch.float64)).tolist()
    return a, b, c


def _nelder_mead(loss: Any, start: Tensor, rounds: int = 300) -> Tensor:
    points = [start] + [start + 0.1 * start[i] * torch.eye(len(start), dtype=start.dtype)[i] for i in range(len(start))]
    simplex = sorted(((loss(x), x) for x in points), key=lambda entry: entry[0])
    for _ in range(rounds):
        centre = torch.stack([x for _, x in simplex[:-1]]).mean(0)
        worst = simplex[-1][1]

        def tried(step: float, centre: Tensor = centre, worst: Tensor = worst) -> tuple[float, Tensor]:
            x = centre + step * (worst - centre)
            return loss(x), x

        new = tried(-1.0)
        if new[0] < simplex[0][0]:
            new = min(new, tried(-2.0), key=lambda entry: entry[0])
        elif new[0] >= simplex[-2][0]:
            new = tried(0.5)
            if new[0] >= simplex[-1][0]:
                best = simplex[0][1]
                shrunk = [best + 0.5 * (x - best) for _, x in simplex[1:]]
                simplex = [simplex[0], *((loss(x), x) for x in shrunk)]
                simplex.sort(key=lambda entry: entry[0])
                continue
        simplex[-1] = new
        simplex.sort(key=lambda entry: entry[0])
    return simplex[0][1]


class ROOT(MatrixOptimizer):
    """ROOT for hidden matrices and AdamW for the rest, with equal learning rates.

    Args:
        named_parameters: The model or its named parameters, as for `MatrixOptimizer`.
        lr: Learning rate of the hidden matrices.
        weight_decay: Decoupled weight decay of the hidden matrices.
        options: Fields of `ROOTRule`, and the keywords of `MatrixOptimizer`.

    Example:
        >>> import torch
        >>> from optim import ROOT
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Linear(8, 4)
        >>> optimizer = ROOT(model.named_parameters(), lr=1e-3)
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
        **options: Any,
    ) -> None:
        usual: dict[str, Any] = {"adamw_betas": (0.9, 0.95), "adamw_eps_before_correction": True}
        super().__init__(named_parameters, ROOTRule, lr, weight_decay, **(usual | options))
