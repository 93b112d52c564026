"""Content keys as 16 bytes each, and where they are among others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Int64
from numpy.typing import NDArray
from torch import Tensor

_DIGITS = 32


def packed(keys: Sequence[str]) -> NDArray[np.bytes_] | None:
    """Return keys of 32 hexadecimal characters as an array of bytes, which sorts as they do.

    Args:
        keys: [n]; a sequence with `data`, uint8 [n, 16], is not turned into texts.

    Returns:
        S16 [n]; None if a key is something else.

    Example:
        >>> packed(["00" * 15 + "ff"]).dtype, packed(["a name"]) is None
        (dtype('S16'), True)

    """
    data: Any = getattr(keys, "data", None)
    if data is None:
        if any(len(key) != _DIGITS for key in keys):
            return None
        try:
            data = np.frombuffer(bytes.fromhex("".join(keys)), np.uint8)
        except ValueError:
            return None
        if len(data) != len(keys) * _DIGITS // 2:  # fromhex skips spaces
            return None
    return np.ascontiguousarray(data).view("S16").reshape(-1)


class Places:
    """Where keys are among n keys, which may repeat: 24 bytes per key, if they are digests.

    Args:
        keys: [n].

    Example:
        >>> [part.tolist() for part in Places(["a", "b", "a"]).find(["c", "a"])]
        [[1, 1], [0, 2]]

    """

    def __init__(self, keys: Sequence[str]) -> None:
        codes = packed(keys)
        self._names: dict[str, list[int]] = {}
        if codes is None:
            for place, key in enumerate(keys):
                self._names.setdefault(key, []).append(place)
        self._order = np.zeros(0, np.int64) if codes is None else np.argsort(codes, kind="stable")
        self._codes = None if codes is None else codes[self._order]

    def find(self, keys: Sequence[str]) -> tuple[Int64[Tensor, " p"], Int64[Tensor, " p"]]:
        """Return the pairs of equal keys.

        Args:
            keys: [b].

        Returns:
            Positions in `keys`, and positions among the n keys.

        """
        codes = None if self._codes is None else packed(keys)
        if codes is None or self._codes is None:
            names = self._names
            pairs = [(i, place) for i, key in enumerate(keys) for place in names.get(key, ())]
            source, place = torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2).unbind(1)
            return source, place
        first = np.searchsorted(self._codes, codes, side="left")
        count = np.searchsorted(self._codes, codes, side="right") - first
        begin = np.repeat(first - np.concatenate([[0], np.cumsum(count)[:-1]]), count)
        at = self._order[begin + np.arange(int(count.sum()))]
        return torch.from_numpy(np.repeat(np.arange(len(codes)), count)), torch.from_numpy(at)
