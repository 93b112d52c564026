"""The base class of projectors, and the counter-based random bits that all random projectors share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import xxhash
from jaxtyping import Float, Float32, Int64, Shaped
from torch import Size, Tensor

from datatools.gradients.factors import Factors
from optim import UpdateMap

GENERATOR_VERSION = "splitmix64-1"
"""Recorded in every store's metadata, so that features projected with other random bits are refused."""


@dataclass(frozen=True)
class Projector(ABC):
    """A linear map from gradients, name -> [b, *shape], to features [b, dim]: one matrix per name, summed over names.

    To add one, write a file with a frozen dataclass that sets `name` and defines `accumulate`, and a line in
    `PROJECTORS`.

    The matrix of a parameter depends only on (seed, name, shape, dim): not on the device, the batch, the tiling, or the
    other parameters. Random matrices are scaled so that inner products are unbiased: E <Px, Py> = <x, y>, with a
    standard deviation of about |x| |y| / sqrt(dim).

    Attributes:
        dim: feature dimension.
        seed: seed of the random matrices.
        name: key in `PROJECTORS`.
        takes_factors: whether `accumulate_factors` needs no gradient.

    Raises:
        ValueError: if `dim` is below 1.

    Example:
        >>> from datatools import PROJECTORS
        >>> projector = PROJECTORS["sjlt"].of({"w": torch.Size((30, 20))}, dim=64, seed=0)
        >>> projector.project({"w": torch.ones(5, 30, 20)}).shape
        torch.Size([5, 64])

    """

    dim: int
    seed: int = 0
    name: ClassVar[str]
    takes_factors: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.dim < 1:
            raise ValueError(f"projector {self.name}: dim={self.dim}; it must be at least 1")

    @classmethod
    def of(cls, shapes: Mapping[str, Size], dim: int, seed: int) -> Projector:
        """Create the projector for parameters of these shapes.

        Args:
            shapes: name -> shape of each parameter; a projector whose dimension depends on them overrides this method.
            dim: feature dimension.
            seed: seed of the random matrices.

        Returns:
            The projector.

        Example:
            >>> from datatools import PROJECTORS
            >>> PROJECTORS["sjlt"].of({"w": torch.Size((30, 20))}, dim=64, seed=0)
            SJLT(dim=64, seed=0)

        """
        return cls(dim=dim, seed=seed)

    @abstractmethod
    def accumulate(self, out: Float32[Tensor, "b dim"], name: str, grad: Float[Tensor, " b *shape"]) -> None:
        """Add the projection of one parameter's gradients to `out`.

        Args:
            out: float32 [b, dim], changed in place.
            name: name of the parameter.
            grad: its gradients, any floating dtype [b, *shape].

        """

    def accumulate_updates(
        self, out: Float32[Tensor, "b dim"], updates: UpdateMap, name: str, grad: Float[Tensor, " b *shape"]
    ) -> None:
        """Add the projected updates of one parameter to `out`.

        A projector may override this to compute and project an update in one step, without storing it.

        Args:
            out: float32 [b, dim], changed in place.
            updates: the optimizer at a checkpoint.
            name: name of the parameter.
            grad: its gradients, any floating dtype [b, *shape].

        """
        self.accumulate(out, name, updates.per_sample({name: grad})[name])

    def accumulate_part(
        self, out: Float32[Tensor, "b dim"], name: str, shape: Size, start: int, grad: Float[Tensor, "b some *rest"]
    ) -> None:
        """Add the projection of some rows of a parameter's gradients, as if all other rows were zero.

        A projector overrides this so that a gradient need not be in memory as a whole.

        Args:
            out: float32 [b, dim], changed in place.
            name: name of the parameter.
            shape: its shape.
            start: number of the first row.
            grad: gradients of these rows, any floating dtype [b, some, *rest].

        """
        whole = torch.zeros(len(grad), *shape, dtype=grad.dtype, device=grad.device)
        whole[:, start : start + grad.shape[1]] = grad
        self.accumulate(out, name, whole)

    def accumulate_factors(self, out: Float32[Tensor, "b dim"], factors: Factors) -> None:
        """Add the projection of one matrix's gradients, which are given as factors.

        Args:
            out: float32 [b, dim], changed in place.
            factors: the gradients.

        """
        self.accumulate(out, factors.name, factors.dense())

    def block(self, name: str, grad: Float[Tensor, " b *shape"]) -> Float32[Tensor, "b dim"]:
        """Project one parameter's gradients.

        Args:
            name: name of the parameter.
            grad: its gradients, any floating dtype [b, *shape].

        Returns:
            float32 [b, dim].

        """
        out = torch.zeros(len(grad), self.dim, device=grad.device)
        self.accumulate(out, name, grad)
        return out

    def project(self, grads: Mapping[str, Tensor]) -> Float32[Tensor, "b dim"]:
        """Project the gradients of several parameters.

        Args:
            grads: name -> gradients, any floating dtype [b, *shape].

        Returns:
            The features, float32 [b, dim].

        """
        first = next(iter(grads.values()))
        out = torch.zeros(len(first), self.dim, device=first.device)
        for name, grad in grads.items():
            self.accumulate(out, name, grad)
        return out

    def metadata(self) -> dict[str, Any]:
        """Describe the projection; two sets of features may be compared only if their descriptions agree.

        Returns:
            Plain values: name, dim, seed and the version of the random bits.

        """
        return {"name": self.name, "dim": self.dim, "seed": self.seed, "generator": GENERATOR_VERSION}


def _signed(value: int) -> int:
    """Convert an unsigned 64-bit number to the int64 with the same bits."""
    return value - (1 << 64) if value >= 1 << 63 else value


_GOLDEN = _signed(0x9E3779B97F4A7C15)
_MIX1 = _signed(0xBF58476D1CE4E5B9)
_MIX2 = _signed(0x94D049BB133111EB)


def key(seed: int, name: str, shape: Size | tuple[int, ...]) -> int:
    """Derive the 64-bit key of one parameter's random bits.

    Args:
        seed: seed of the projector.
        name: name of the parameter.
        shape: shape of the parameter.

    Returns:
        The key, as a signed integer.

    Example:
        >>> key(0, "w", (3, 2)) == key(0, "w", (2, 3))
        False

    """
    return _signed(xxhash.xxh3_64_intdigest(f"{seed}/{name}/{tuple(shape)}".encode()))


def bits(counter: Int64[Tensor, "*shape"], key: int) -> Int64[Tensor, "*shape"]:
    """Generate 64 random bits per counter: splitmix64 of key + counter, the same on every device.

    int64 products wrap around like unsigned ones; right shifts must clear the copies of the sign bit.

    Args:
        counter: int64 [*shape].
        key: result of `key`.

    Returns:
        int64 [*shape].

    Source:
        Steele, Lea & Flood 2014, "Fast splittable pseudorandom number generators".

    Example:
        >>> bits(torch.arange(2), key=0)
        tensor([-2152535657050944081,  7960286522194355700])

    """
    z = (counter + 1) * _GOLDEN + key
    z = (z ^ ((z >> 30) & ((1 << 34) - 1))) * _MIX1
    z = (z ^ ((z >> 27) & ((1 << 37) - 1))) * _MIX2
    return z ^ ((z >> 31) & ((1 << 33) - 1))


@dataclass
class TensorCache:
    """A cache of the most recently used tensors, so that the hashes of a LoRA model are computed once per run.

    Args:
        capacity: largest total size, in bytes.

    Example:
        >>> cache = TensorCache()
        >>> kept = cache.put("hashes", (torch.zeros(2),))
        >>> cache.get("hashes"), cache.get("others")
        ((tensor([0., 0.]),), None)

    """

    capacity: int = 256 << 20
    _kept: OrderedDict[Any, tuple[Tensor, ...]] = field(default_factory=OrderedDict)
    _bytes: int = 0

    def get(self, key: Any) -> tuple[Shaped[Tensor, " ..."], ...] | None:
        """Look up tensors and mark them as the most recently used.

        Args:
            key: any hashable value.

        Returns:
            The tensors, or None.

        """
        if key in self._kept:
            self._kept.move_to_end(key)
            return self._kept[key]
        return None

    def put(self, key: Any, tensors: tuple[Shaped[Tensor, " ..."], ...]) -> tuple[Shaped[Tensor, " ..."], ...]:
        """Store tensors, unless they alone exceed a quarter of the capacity.

        Args:
            key: any hashable value.
            tensors: tensors of any shape and dtype.

        Returns:
            The same tensors.

        """
        size = sum(t.nbytes for t in tensors)
        if size <= self.capacity // 4:
            self._kept[key] = tensors
            self._bytes += size
            while self._bytes > self.capacity:
                _, dropped = self._kept.popitem(last=False)
                self._bytes -= sum(t.nbytes for t in dropped)
        return tensors
