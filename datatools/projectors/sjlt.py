"""Sparse Johnson-Lindenstrauss transform: each coordinate is added, with a random sign, to one random bucket."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float, Float32
from torch import Size, Tensor

from datatools.kernels.sjlt import Adam, add_sjlt, fits
from datatools.projectors.base import Projector, TensorCache, bits, key
from optim import AdamWRule, UpdateMap

_TILE = 1 << 22  # coordinates hashed at a time, which bounds memory for a full weight matrix
_CACHE = TensorCache()


@dataclass(frozen=True)
class SJLT(Projector):
    """(Px)_j = sum over coordinates i with bucket(i) = j of sign(i) x_i.

    Cost: one multiplication and one addition per coordinate, whatever `dim` is; a dense matrix costs `dim` of each.
    Memory: 12 bytes per coordinate for cached hashes (LoRA sizes; hashes of larger parameters are recomputed in tiles).
    Unbiased; the variance is at most (|x|^2 |y|^2 + <x,y>^2) / dim.

    Source:
        Kane & Nelson 2014, arXiv 1012.1577, with one non-zero per column, as in GraSS (arXiv 2505.18976).

    Example:
        >>> sjlt = SJLT(dim=4096, seed=0)
        >>> x = sjlt.project({"w": torch.ones(1, 8)})
        >>> float((x * x).sum())
        8.0

    """

    name: ClassVar[str] = "sjlt"

    def accumulate(self, out: Float32[Tensor, "b dim"], name: str, grad: Float[Tensor, " b *shape"]) -> None:
        """Add the signed bucket sums of one parameter's gradients; on a GPU by `datatools.kernels.sjlt`.

        Args:
            out: float32 [b, dim], changed in place.
            name: name of the parameter.
            grad: its gradients, any floating dtype [b, *shape].

        """
        stem = key(self.seed, name, grad.shape[1:])
        if fits(out, grad):
            return add_sjlt(out, grad, stem)
        self._add(out, stem, 0, grad)

    def accumulate_part(
        self, out: Float32[Tensor, "b dim"], name: str, shape: Size, start: int, grad: Float[Tensor, "b some *rest"]
    ) -> None:
        """Add the signed bucket sums of some rows of a parameter's gradients.

        Args:
            out: float32 [b, dim], changed in place.
            name: name of the parameter.
            shape: its shape.
            start: number of the first row.
            grad: gradients of these rows, any floating dtype [b, some, *rest].

        """
        self._add(out, key(self.seed, name, shape), start * shape[1:].numel(), grad)

    def _add(self, out: Tensor, stem: int, offset: int, grad: Tensor) -> None:
        flat = grad.reshape(len(grad), -1).float()
        for start in range(0, flat.shape[1], _TILE):
            stop = min(start + _TILE, flat.shape[1])
            bucket, sign = self._hashes(stem, offset + start, offset + stop, flat.device)
            out.index_add_(1, bucket, flat[:, start:stop] * sign)

    def accumulate_updates(
        self, out: Float32[Tensor, "b dim"], updates: UpdateMap, name: str, grad: Float[Tensor, " b *shape"]
    ) -> None:
        """Add the projected updates of one parameter. On a GPU, one kernel computes and projects AdamW's updates.

        Args:
            out: float32 [b, dim], changed in place.
            updates: the optimizer at a checkpoint.
            name: name of the parameter.
            grad: its gradients, any floating dtype [b, *shape].

        """
        rule, state = updates.rules[name], updates.states[name]
        if isinstance(rule, AdamWRule) and not rule.amsgrad:
            now = rule.scalars(int(state["step"]) + 1)
            moments = state["exp_avg"], state["exp_avg_sq"]
            adam = Adam(*moments, rule.betas, now.scale, now.shrink, rule.eps, rule.eps_root)
            if fits(out, grad, adam):
                return add_sjlt(out, grad, key(self.seed, name, grad.shape[1:]), adam)
        return super().accumulate_updates(out, updates, name, grad)

    def transposed(self, features: Float[Tensor, "b dim"], name: str, shape: Size) -> Float[Tensor, " b *shape"]:
        """Apply P^T for one parameter: coordinate i of the result is sign(i) y_bucket(i).

        P^T P x is an unbiased estimate of x with error |x| sqrt((p - 1) / dim), where p is the number of coordinates: a
        projection preserves inner products, not vectors.

        Args:
            features: floating dtype [b, dim].
            name: name of the parameter.
            shape: its shape.

        Returns:
            [b, *shape], in the dtype of `features`.

        """
        stem, size = key(self.seed, name, shape), shape.numel()
        out = torch.empty(len(features), size, dtype=features.dtype, device=features.device)
        for start in range(0, size, _TILE):
            stop = min(start + _TILE, size)
            bucket, sign = self._hashes(stem, start, stop, features.device)
            out[:, start:stop] = features[:, bucket] * sign
        return out.view(len(features), *shape)

    def _hashes(self, stem: int, start: int, stop: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Compute the bucket, int64 [n], and the sign, float32 [n], of coordinates start..stop."""
        asked = (stem, self.dim, start, stop, device)
        kept = _CACHE.get(asked)
        if kept is None:
            z = bits(torch.arange(start, stop, device=device), stem)
            bucket = (
                (z >> 1) & ((1 << 62) - 1)
            ) % self.dim  # 62 bits: the modulo's bias is below 1e-14 for any real dim
            kept = _CACHE.put(asked, (bucket, 1.0 - 2.0 * (z & 1).float()))
        return kept[0], kept[1]
