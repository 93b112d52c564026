"""Stores that are filled with rows of a fixed seed."""

import hashlib

import torch

from datatools import GradientFeatures

META = {"model": "abc", "projector": {"dim": 8, "seed": 0}, "layers": [1, 2]}


def key(i: int) -> str:
    return hashlib.md5(str(i).encode(), usedforsecurity=False).hexdigest()


KEYS = [key(i) for i in range(300)]


def rows_of(keys, dim=8) -> torch.Tensor:
    return torch.stack([torch.randn(dim, generator=torch.Generator().manual_seed(int(k[:8], 16))) for k in keys])


def create(folder, n=20, dim=8, dtype="float32", per_unit=6, meta=META, keys=None) -> GradientFeatures:
    return GradientFeatures.create_or_open(
        folder, meta=meta, dim=dim, dtype=dtype, keys=keys or KEYS[:n], rows_per_unit=per_unit
    )


def fill(store: GradientFeatures) -> GradientFeatures:
    for unit in store.missing_units():
        store.write_unit(unit, rows_of(store.unit_keys(unit), store.dim), info={"unit": unit})
    return store
