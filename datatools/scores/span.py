"""The span of the target's own gradients: a few exact coordinates in place of a random projection."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Float32, Float64
from torch import Tensor

from datatools.errors import DataError
from datatools.projectors import Projector

TOLERANCE = 1e-5
"""Singular values below this share of the largest are noise of float32 gradients, and are left out."""


def span_coefficients(
    gram: Float[Tensor, "m m"], rank: int | None = None, *, tolerance: float = TOLERANCE
) -> tuple[Float64[Tensor, "m k"], Float64[Tensor, " k"]]:
    """How the m target gradients G [m, d] are combined into an orthonormal basis of their span.

    With the singular value decomposition G = U S V^T, the matrix of inner products is G G^T = U S^2 U^T, so that
    W = U_k S_k^-1 gives the basis P = G^T W = V_k [d, k] without a decomposition of anything that has d columns.

    Args:
        gram: [m, m], G G^T, any floating dtype; float64 is needed for small singular values.
        rank: The most directions, those of the largest singular values; None is all of them.
        tolerance: Directions whose singular value is below this share of the largest are left out.

    Returns:
        W, float64 [m, k], and the singular values, float64 [k], largest first. The sign of each column is that which
        makes its largest entry positive.

    Raises:
        DataError: The gradients are all zero, or one is not finite.

    Source:
        GIST, arXiv 2602.18584: P = G^T U_k S_k^-1.

    Example:
        >>> target = torch.tensor([[3.0, 0.0, 0.0], [0.0, 2.0, 0.0], [3.0, 2.0, 0.0]])  # two directions
        >>> combined, singular = span_coefficients(target @ target.T)
        >>> basis = target.T.double() @ combined
        >>> torch.allclose(basis.T @ basis, torch.eye(2, dtype=torch.float64)), singular.square().sum().round().item()
        (True, 26.0)

    """
    inner = gram.double()
    if not inner.isfinite().all() or float(inner.diagonal().sum()) <= 0:
        raise DataError(
            f"span_coefficients: the {len(inner)} target gradients are all zero, or one is not finite; remove such "
            "target rows"
        )
    values, vectors = torch.linalg.eigh((inner + inner.T) / 2)
    singular, vectors = values.clamp_min(0).sqrt().flip(0), vectors.flip(1)
    kept = int((singular > tolerance * singular[0]).sum())
    kept = kept if rank is None else min(kept, rank)
    singular, vectors = singular[:kept], vectors[:, :kept]
    largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
    return vectors * largest.sign() / singular, singular


def gram_matrix(gradients: Mapping[str, Float[Tensor, " m *shape"]]) -> Float64[Tensor, "m m"]:
    """Inner products of m gradients that are given parameter by parameter.

    Args:
        gradients: Name of a parameter -> [m, *shape], any floating dtype.

    Returns:
        float64 [m, m].

    Example:
        >>> gram_matrix({"w": torch.ones(2, 3), "b": torch.tensor([[1.0], [0.0]])})
        tensor([[4., 3.],
                [3., 3.]], dtype=torch.float64)

    """
    flat = [grad.flatten(1).double() for grad in gradients.values()]
    return torch.stack([one @ one.T for one in flat]).sum(0)


@dataclass(frozen=True, eq=False)
class TargetSpan(Projector):
    """Coordinates in the span of some gradients: exact inner products with each of them, in a few numbers.

    Attributes:
        basis: Name of a parameter -> float32 [p, dim], its part of the orthonormal basis.
        facts: What the basis is a function of, for `metadata`.

    Example:
        >>> target = {"w": torch.tensor([[3.0, 0.0], [0.0, 2.0]])}
        >>> span = TargetSpan.spanned(target, span_coefficients(gram_matrix(target))[0], {"target": "a digest"})
        >>> (span.project({"w": torch.tensor([[1.0, 1.0]])}) @ span.project(target).T).round().tolist()
        [[3.0, 2.0]]

    """

    name: ClassVar[str] = "target-span"
    basis: Mapping[str, Tensor] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def spanned(
        cls,
        gradients: Mapping[str, Float[Tensor, " m *shape"]],
        coefficients: Float64[Tensor, "m k"],
        facts: Mapping[str, Any],
    ) -> TargetSpan:
        """The span of gradients, by the coefficients of `span_coefficients`.

        Args:
            gradients: Name of a parameter -> [m, *shape], any floating dtype.
            coefficients: float64 [m, k].
            facts: JSON that two spans share only if they are the same.

        Returns:
            The span, as a `TargetSpan`.
        """
        basis = {
            name: (grad.flatten(1).double().T @ coefficients.to(grad.device)).float()
            for name, grad in gradients.items()
        }
        return cls(dim=coefficients.shape[1], basis=basis, facts=dict(facts))

    def accumulate(self, out: Float32[Tensor, "b dim"], name: str, grad: Float[Tensor, " b *shape"]) -> None:
        """Add the coordinates of one parameter's gradients.

        Args:
            out: float32 [b, dim], changed in place.
            name: Of the parameter.
            grad: [b, *shape], its gradients, any floating dtype.

        """
        out += grad.flatten(1).float() @ self.basis[name]

    def metadata(self) -> dict[str, Any]:
        """What must agree before two feature sets may be compared."""
        return {"name": self.name, "dim": self.dim, **self.facts}
