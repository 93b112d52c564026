"""A sketch of both sides of a matrix, which projects a gradient from its factors without computing the gradient."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float, Float32
from torch import Size, Tensor

from datatools.gradients.factors import Factors, Picks, Product
from datatools.projectors.base import Projector, TensorCache, bits, key

_TILE = 1 << 22  # coordinates at a time
_TOKENS = 1 << 24  # numbers in the spectra of the tokens at a time
_CACHE = TensorCache()


@dataclass(frozen=True)
class Factored(Projector):
    """(Px)_j = sum over (o, i) with h(o) + h'(i) = j modulo dim of s(o) s'(i) x_oi, where h and h' are random buckets.

    A parameter of more than two dimensions is a matrix whose rows are those of its first dimension. The sketch of an
    outer product is the circular convolution of the sketches of its two vectors, so that plain gradients are projected
    from the inputs and output gradients of a layer, without a matrix per row. Other updates are projected entry by
    entry by the same map, so that both kinds of features can be compared.

    Cost: for plain gradients of linear layers and embeddings, two Fourier transforms of `dim` numbers per token;
    otherwise one multiplication and one addition per coordinate, as for `sjlt`.
    Unbiased. Inner products of gradients of many tokens vary as with `sjlt`; where a gradient is a single outer
    product, the variance is up to three times as large.

    Source:
        Pham & Pagh 2013, "Fast and scalable polynomial kernels via explicit feature maps" (TensorSketch).

    Example:
        >>> projector = Factored(dim=64, seed=0)
        >>> projector.project({"w": torch.ones(5, 30, 20)}).shape
        torch.Size([5, 64])

    """

    name: ClassVar[str] = "factored"
    takes_factors: ClassVar[bool] = True

    def accumulate(self, out: Float32[Tensor, "b dim"], name: str, grad: Float[Tensor, " b *shape"]) -> None:
        """Add the projection of one parameter's gradients, entry by entry.

        Args:
            out: float32 [b, dim], changed in place.
            name: name of the parameter.
            grad: its gradients, any floating dtype [b, *shape].

        """
        shape = grad.shape[1:]
        step = max(1, _TILE // max(1, shape[1:].numel()))
        for start in range(0, shape[0] if shape else 1, step):
            part = grad[:, start : start + step] if shape else grad[:, None]
            self.accumulate_part(out, name, shape, start, part)

    def accumulate_part(
        self, out: Float32[Tensor, "b dim"], name: str, shape: Size, start: int, grad: Float[Tensor, "b some *rest"]
    ) -> None:
        """Add the projection of some rows of a parameter's gradients.

        Args:
            out: float32 [b, dim], changed in place.
            name: name of the parameter.
            shape: its shape.
            start: number of the first row.
            grad: gradients of these rows, any floating dtype [b, some, *rest].

        """
        (h, s), (h2, s2) = self._sides(name, shape, grad.device)
        stop = start + grad.shape[1]
        bucket = (h[start:stop, None] + h2) % self.dim
        sign = s[start:stop, None] * s2
        out.index_add_(1, bucket.reshape(-1), (grad.float().flatten(2) * sign if grad.ndim > 2 else
                                               grad.float()[..., None] * sign).flatten(1))  # fmt: skip

    def accumulate_factors(self, out: Float32[Tensor, "b dim"], factors: Factors) -> None:
        """Add the projection of one matrix's gradients, from their factors.

        Args:
            out: float32 [b, dim], changed in place.
            factors: the gradients.

        """
        (h, s), (h2, s2) = self._sides(factors.name, factors.shape, out.device)
        for term in factors.terms:
            if isinstance(term, Picks):
                bucket = (h[term.ids][..., None] + h2) % self.dim
                values = term.columns.float() * s2 * s[term.ids][..., None]
                out.scatter_add_(1, bucket.flatten(1), values.flatten(1))
            else:
                out += torch.fft.irfft(self._spectrum(term, (h, s), (h2, s2)), n=self.dim)

    def _spectrum(self, term: Product, left: tuple[Tensor, Tensor], right: tuple[Tensor, Tensor]) -> Tensor:
        b, n, _ = term.rows.shape
        total: Tensor | None = None
        step = max(1, _TOKENS // max(1, b * self.dim))
        for start in range(0, n, step):
            spectra = []
            for vectors, (bucket, sign) in ((term.rows, left), (term.columns, right)):
                some = vectors[:, start : start + step].float() * sign
                sketch = torch.zeros(*some.shape[:2], self.dim, device=some.device)
                spectra.append(torch.fft.rfft(sketch.index_add_(2, bucket, some)))
            part = (spectra[0] * spectra[1]).sum(1)
            total = part if total is None else total + part
        assert total is not None
        return total

    def _sides(self, name: str, shape: Size, device: torch.device) -> list[tuple[Tensor, Tensor]]:
        """Return the bucket, int64, and the sign, float32, of each row and of each column."""
        asked = (self.seed, self.dim, name, tuple(shape), device)
        kept = _CACHE.get(asked)
        if kept is None:
            made: list[Tensor] = []
            for side, count in (("rows", shape[0] if shape else 1), ("columns", shape[1:].numel())):
                z = bits(torch.arange(count, device=device), key(self.seed, f"{name}/{side}", shape))
                made += [((z >> 1) & ((1 << 62) - 1)) % self.dim, 1.0 - 2.0 * (z & 1).float()]
            kept = _CACHE.put(asked, tuple(made))
        return [(kept[0], kept[1]), (kept[2], kept[3])]
