"""What a projector is, and the counter-based bits that all random ones share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import xxhash
from torch import Size, Tensor

from optim import UpdateMap

GENERATOR_VERSION = "splitmix64-1"
"""Stands in every store's metadata: features made with other bits are refused, never mixed."""


@dataclass(frozen=True)
class Projector(ABC):
    """A linear map from gradients, name -> [b, *shape], to features [b, dim]: one matrix per parameter, summed over
    names.

    To add one, write a file with a frozen dataclass that sets `name` and defines `accumulate`, and one line in
    `PROJECTORS`.

    The matrix of a parameter depends on (seed, name, shape, dim) alone: not on the device, the batch, the tiling, or
    the other parameters. Random ones are scaled so that inner products are unbiased: E <Px, Py> = <x, y>, with a
    standard deviation of about |x| |y| / sqrt(dim).

    Attributes:
        dim: number of features.
        seed: of the random matrices.
        name: as in `PROJECTORS`.

    """

    dim: int
    seed: int = 0
    name: ClassVar[str]

    def __post_init__(self) -> None:
        if self.dim < 1:
            raise ValueError(f"projector {self.name}: dim={self.dim}; it must be at least 1")

    @classmethod
    def of(cls, shapes: Mapping[str, Size], dim: int, seed: int) -> Projector:
        """The projector for parameters of these shapes.

        Args:
            shapes: name -> shape of each parameter; a projector whose dimension depends on them overrides this method.
            dim: number of features.
            seed: of the random matrices.

        Example:
            >>> from datatools import PROJECTORS
            >>> projector = PROJECTORS["sjlt"].of({"w": torch.Size((30, 20))}, dim=64, seed=0)
            >>> projector.project({"w": torch.ones(5, 30, 20)}).shape
            torch.Size([5, 64])

        """
        return cls(dim=dim, seed=seed)

    @abstractmethod
    def accumulate(self, out: Tensor, name: str, grad: Tensor) -> None:
        """Add the projection of one parameter's gradients.

        Args:
            out: float32 [b, dim], added to.
            name: of the parameter.
            grad: [b, *shape], its gradients, of any floating dtype.

        """

    def accumulate_updates(self, out: Tensor, updates: UpdateMap, name: str, grad: Tensor) -> None:
        """Add the projected updates of one parameter.

        A projector may override this to make and project an update in one step, without storing it.

        Args:
            out: float32 [b, dim], added to.
            updates: the optimizer at a checkpoint.
            name: of the parameter.
            grad: [b, *shape], its gradients.

        """
        self.accumulate(out, name, updates.per_sample({name: grad})[name])

    def block(self, name: str, grad: Tensor) -> Tensor:
        """The projection [b, dim], float32, of one parameter's gradients [b, *shape]."""
        out = torch.zeros(len(grad), self.dim, device=grad.device)
        self.accumulate(out, name, grad)
        return out

    def project(self, grads: Mapping[str, Tensor]) -> Tensor:
        """The features [b, dim], float32, of gradients name -> [b, *shape]."""
        first = next(iter(grads.values()))
        out = torch.zeros(len(first), self.dim, device=first.device)
        for name, grad in grads.items():
            self.accumulate(out, name, grad)
        return out

    def metadata(self) -> dict[str, Any]:
        """What must agree before two feature sets may be compared."""
        return {"name": self.name, "dim": self.dim, "seed": self.seed, "generator": GENERATOR_VERSION}


def _signed(value: int) -> int:
    """A 64-bit pattern as torch's int64."""
    return value - (1 << 64) if value >= 1 << 63 else value


_GOLDEN = _signed(0x9E3779B97F4A7C15)
_MIX1 = _signed(0xBF58476D1CE4E5B9)
_MIX2 = _signed(0x94D049BB133111EB)


def key(seed: int, name: str, shape: Size | tuple[int, ...]) -> int:
    """The 64-bit key of one parameter's random bits."""
    return _signed(xxhash.xxh3_64_intdigest(f"{seed}/{name}/{tuple(shape)}".encode()))


def bits(counter: Tensor, key: int) -> Tensor:
    """64 random bits per counter: splitmix64 of key + counter, the same on every device.

    int64 products wrap around like unsigned ones; a right shift must drop the copies of the sign bit.

    Args:
        counter: int64, of any shape.
        key: as `key` makes it.

    Source:
        Steele, Lea & Flood 2014, "Fast splittable pseudorandom number generators".

    """
    z = (counter + 1) * _GOLDEN + key
    z = (z ^ ((z >> 30) & ((1 << 34) - 1))) * _MIX1
    z = (z ^ ((z >> 27) & ((1 << 37) - 1))) * _MIX2
    return z ^ ((z >> 31) & ((1 << 33) - 1))


@dataclass
class TensorCache:
    """Keeps the most recently used tensors, `capacity` bytes at most: hashes of a LoRA model are made once a run."""

    capacity: int = 256 << 20
    _kept: OrderedDict[Any, tuple[Tensor, ...]] = field(default_factory=OrderedDict)
    _bytes: int = 0

    def get(self, key: Any) -> tuple[Tensor, ...] | None:
        """The tensors stored under `key`, now the most recently used, or None."""
        if key in self._kept:
            self._kept.move_to_end(key)
            return self._kept[key]
        return None

    def put(self, key: Any, tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Store `tensors` under `key` unless they alone are too large; returns them."""
        size = sum(t.nbytes for t in tensors)
        if size <= self.capacity // 4:
            self._kept[key] = tensors
            self._bytes += size
            while self._bytes > self.capacity:
                _, dropped = self._kept.popitem(last=False)
                self._bytes -= sum(t.nbytes for t in dropped)
        return tensors
