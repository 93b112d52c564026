"""Gradient features on disk: rows are grouped into units, and each unit is committed by its sidecar.

A store is a folder:

    plan.json              meta, dim, dtype, and the files of keys with the size of their units; new ones are appended
    keys-DIGEST.bin        the keys of the rows, and a digest of the keys of each unit
    part-00000.safetensors tensors `features` [n, dim or packed], `norms` [n], for integer dtypes `scale` [n]
    part-00000.json        the sidecar, written last: digests of the payload and of the keys, statuses, info

A unit without a sidecar does not exist. All files are replaced atomically, and their bytes depend only on what was
written (not on time, host or process), so a run that was killed and resumed ends with the same bytes as one that was
not. Every byte is covered by a digest: a damaged unit is detected before its rows are used, moved aside as `*.broken`,
and counts as missing. Several processes may fill one store if they write different units, for example those of
`missing_units(rank, world)`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from datatools import files
from datatools.compact import FullKeys, Names
from datatools.errors import DataError, EnvironmentProblem, UsageError, did_you_mean
from datatools.features import plan as plans
from datatools.features import ranges
from datatools.features import units as payloads
from datatools.features.encodings import ENCODINGS
from datatools.features.keys import packed
from datatools.features.unit_files import UnitFiles


class Block(NamedTuple):
    """Consecutive rows of a store.

    Attributes:
        keys: the content hash of each row, [n].
        features: float32 [n, dim], unit rows; zeros where the status is not "ok".
        norms: float32 [n], norms of the features before they were normalized; 0 where the status is not "ok".
        status: [n], each one of "ok", "empty" (a zero gradient) and "nonfinite".

    """

    keys: Sequence[str]
    features: Float[Tensor, "n dim"]
    norms: Float[Tensor, " n"]
    status: list[str]


class Rows(NamedTuple):
    """All rows of a store without their features.

    Attributes:
        keys: the content hash of each row, [n].
        norms: float32 [n], as in `Block`.
        status: [n], as in `Block`.

    """

    keys: Sequence[str]
    norms: Float[Tensor, " n"]
    status: Sequence[str]


class GradientFeatures(UnitFiles):
    """Features [n, dim] of rows identified by content hash, stored as unit vectors with their norms and statuses.

    Use `create_or_open` or `open` to get one. Reading and writing hold one block in memory; the store uses n * dim *
    bits / 8 bytes of disk space.

    Args:
        folder: folder of the store.
        plan: content of its plan.json.
        verify: check a unit's digest when its rows are first read.

    Attributes:
        folder: folder of the store.
        meta: what determines the features, besides the rows.
        dim: feature dimension.
        dtype: a key of `ENCODINGS`.

    Example:
        >>> import tempfile
        >>> from datatools import GradientFeatures, files
        >>> keys = [files.digest(text) for text in (b"a row", b"another")]
        >>> store = GradientFeatures.create_or_open(tempfile.mkdtemp(), meta={"model": "m"}, dim=4, keys=keys)
        >>> store.write_unit(0, torch.eye(2, 4))
        >>> store.take(keys[1:])
        tensor([[0., 1., 0., 0.]])

    """

    @classmethod
    def create_or_open(
        cls,
        folder: str | os.PathLike[str],
        *,
        meta: Mapping[str, Any],
        dim: int,
        dtype: str = "float16",
        keys: Sequence[str],
        rows_per_unit: int | None = None,
        verify: bool = True,
    ) -> GradientFeatures:
        """Open the store in `folder` for writing, and plan units for the `keys` that are not in it yet.

        Args:
            folder: folder of the store; created if missing.
            meta: what determines the features, besides the rows: any JSON.
            dim: feature dimension.
            dtype: a key of `ENCODINGS`.
            keys: 32 hex characters each, unique, in the order in which rows are stored. Keys that are planned already
                stay in their unit, and new ones become new units at the end; planned keys that are not in `keys` keep
                their rows.
            rows_per_unit: size of the new units; by default a 64th of the new keys, at least 16 rows and at most 32 MiB
                of float32.
            verify: check a unit's digest when its rows are first read.

        Returns:
            The store.

        Raises:
            OtherFeatures: if the store has another `meta`, `dim` or `dtype`; names the field, the old and the new
                value.
            UsageError: if `dtype` is unknown.
            ValueError: if `dim` or `rows_per_unit` is below 1, or keys are malformed or repeated.
            EnvironmentProblem: if another process created the store at the same time.

        Example:
            >>> import tempfile, torch
            >>> from datatools import GradientFeatures, files
            >>> keys = [files.digest(text) for text in (b"a row", b"another")]
            >>> folder = tempfile.mkdtemp()
            >>> store = GradientFeatures.create_or_open(folder, meta={"model": "m"}, dim=4, keys=keys)
            >>> store.write_unit(0, torch.tensor([[3.0, 0, 4, 0], [0, 0, 0, 0]]))
            >>> block = next(GradientFeatures.open(folder).iter_blocks())
            >>> block.norms.tolist(), block.status
            ([5.0, 0.0], ['ok', 'empty'])

        """
        if dtype not in ENCODINGS:
            raise UsageError(f"unknown feature dtype '{dtype}'{did_you_mean(dtype, ENCODINGS)}")
        if dim < 1 or (rows_per_unit is not None and rows_per_unit < 1):
            raise ValueError(f"a feature store needs dim >= 1 and rows_per_unit >= 1; got {dim} and {rows_per_unit}")
        given = plans.checked(keys)
        path = files.make_folder(folder)
        head = {"format": plans.FORMAT, "meta": json.loads(files.json_bytes(meta)), "dim": dim, "dtype": dtype}
        with files.folder_mutex(path):
            files.remove_leftovers(path)
            there = (path / plans.NAME).exists()
            plan = plans.read(path) if there else {**head, "ranges": []}
            head["format"] = plan["format"]
            if differing := list(plans.differences(plans.head_of(plan), head)):
                raise plans.OtherFeatures(plans.refusal(path, differing))
            new = given.some(ranges.absent(plans.units_of(path, plan), given).nonzero()[0])
            if len(new) or not there:
                size = rows_per_unit or max(16, min(-(-len(new) // 64), (32 << 20) // (4 * dim)))
                plan = plans.extended(path, plan, new, size)
                if there:
                    files.write_bytes(path / plans.NAME, plans.seal(plan), seal=False)
                elif not files.write_new(
                    path / plans.NAME, plans.seal(plan)
                ):  # this file system does not support flock
                    raise EnvironmentProblem(f"{path} was created by another process at the same time; run again")
        return cls(path, plan, verify)

    @classmethod
    def open(cls, folder: str | os.PathLike[str], *, verify: bool = True) -> GradientFeatures:
        """Open the store in `folder` for reading.

        Args:
            folder: folder of the store.
            verify: check a unit's digest when its rows are first read.

        Returns:
            The store.

        Raises:
            DataError: if there is no store, or it has another format.

        """
        path = Path(folder)
        if not (path / plans.NAME).exists():
            raise DataError(f"{path} contains no gradient features (there is no {plans.NAME}); check the path")
        return cls(path, plans.read(path), verify)

    def __len__(self) -> int:
        """Return the number of planned rows."""
        return self._units.count

    def missing_units(self, rank: int = 0, world: int = 1) -> list[int]:
        """List the missing units of one rank, including those with a damaged sidecar, which are moved aside first.

        Args:
            rank: rank of this process.
            world: number of processes; unit u belongs to rank u mod world.

        Returns:
            Numbers of units, ascending.

        """
        missing = []
        for unit in range(rank, self.units, world):
            if not self._path(unit, "json").exists():
                self._forget(unit)
                missing.append(unit)
                continue
            try:
                self._sidecar(unit)
            except payloads.Damaged:
                self._quarantine(unit)
                missing.append(unit)
        return missing

    def info(self, unit: int) -> dict[str, Any]:
        """Return the `info` that was passed to `write_unit`.

        Args:
            unit: number of the unit.

        Returns:
            A copy of the mapping.

        Raises:
            DataError: if the unit is missing or damaged.

        """
        with self._quarantining(unit):
            return dict(self._sidecar(unit)["info"])

    def write_unit(
        self,
        unit: int,
        features: Float[Tensor, "n dim"],
        status: Sequence[str] | None = None,
        info: Mapping[str, Any] | None = None,
    ) -> None:
        """Write the rows of a unit, in the order of `unit_keys`.

        Args:
            unit: number of the unit.
            features: floating dtype [n, dim], not normalized, on any device.
            status: [n] of "ok", "empty", "nonfinite"; the "ok" of rows that are zero or not finite is corrected. Rows
                that are not ok are stored as zeros.
            info: JSON kept in the sidecar; it must be the same on every run.

        Raises:
            ValueError: if shapes or statuses are wrong.
            EnvironmentProblem: if the file system reports an error, such as a full disk.

        """
        n = self.unit_rows(unit)
        if features.shape != (n, self.dim) or not features.is_floating_point():
            raise ValueError(
                f"unit {unit} of {self.folder} needs float features [{n}, {self.dim}]; "
                f"got {features.dtype} {list(features.shape)}"
            )
        states = ["ok"] * n if status is None else list(status)
        if len(states) != n or not set(states) <= set(payloads.STATUSES):
            raise ValueError(f"unit {unit} of {self.folder} needs {n} statuses, each one of {payloads.STATUSES}")
        sidecar = self._path(unit, "json")
        files.remove(sidecar)  # a unit that is overwritten counts as missing until its new payload is complete
        self._forget(unit)
        payload = self._path(unit, "safetensors")
        digest = files.write_pieces(payload, payloads.pieces(features, states, self.dtype), seal=False)
        body = {
            "format": self._format,
            "unit": unit,
            "rows": n,
            "store": self._meta_digest,
            "payload": {"file": payload.name, "bytes": payloads.payload_bytes(self.dtype, self.dim, n), "xxh3": digest},
            "status": {state: [i for i in range(n) if states[i] == state] for state in payloads.STATUSES[1:]},
            "info": json.loads(files.json_bytes(info or {})),
            "keys": self._units.mark(unit),
        }
        files.write_bytes(sidecar, plans.seal(body), seal=False)

    def iter_blocks(self, rows: int = 4096) -> Iterator[Block]:
        """Iterate over all rows in the order of the plan. A block does not cross units.

        Args:
            rows: largest number of rows per block.

        Yields:
            The blocks.

        Raises:
            ValueError: if `rows` is below 1.
            DataError: if units are missing or damaged; damaged ones are moved aside and count as missing from then on.

        """
        if rows < 1:
            raise ValueError(f"iter_blocks needs rows >= 1; got {rows}")
        self._require_complete()
        for unit in range(self.units):
            keys = self.unit_keys(unit)
            with self._quarantining(unit), self._mapped(unit) as view:
                status = view.status
                for start in range(0, len(keys), rows):
                    part = slice(start, start + rows)
                    block = Block(
                        FullKeys(keys.data[part]), view.features(part), view.norms[part].clone(), status[part]
                    )
                    view.release(part)
                    yield block

    def rows(self) -> Rows:
        """Read keys, norms and statuses of all rows in the order of the plan, without their features.

        Returns:
            The rows.

        Raises:
            DataError: if units are missing or damaged; damaged ones are moved aside and count as missing from then on.

        """
        self._require_complete()
        n, start = len(self), 0
        keys, norms, status = np.empty((n, 16), np.uint8), torch.empty(n), np.empty(n, np.int32)
        for unit in range(self.units):
            part = slice(start, start := start + self.unit_rows(unit))
            with self._quarantining(unit), self._mapped(unit) as view:
                norms[part] = view.norms
                status[part] = [payloads.STATUSES.index(state) for state in view.status]
            keys[part] = self.unit_keys(unit).data
        return Rows(FullKeys(keys), norms, Names(status, payloads.STATUSES))

    def take(self, keys: Sequence[str]) -> Float[Tensor, "n dim"]:
        """Read the features of some rows. Only their units must be complete.

        Args:
            keys: keys of n rows.

        Returns:
            float32 [n, dim], in the order of `keys`.

        Raises:
            DataError: if a key is not in the store, or a unit is missing or damaged.

        """
        out = torch.empty(len(keys), self.dim)
        gone = next(key for key in keys if packed([key]) is None) if packed(keys) is None else None
        units, rows = self._index.find(FullKeys.of(keys if gone is None else []))
        if (units < 0).any():
            gone = keys[int((units < 0).argmax())]
        if gone is not None:
            raise DataError(f"{self.folder} has no row {gone}; extract the features of the current data again")
        order = np.argsort(units, kind="stable")
        wanted, first = np.unique(units[order], return_index=True)
        for unit, places in zip(wanted.tolist(), np.split(order, first[1:]), strict=False):
            with self._quarantining(unit), self._mapped(unit) as view:
                for start in range(0, len(places), 4096):
                    part = places[start : start + 4096]
                    out[torch.from_numpy(part)] = view.features(rows[part])
        return out

    def verify(self) -> list[tuple[int, str]]:
        """Read every byte of every written unit, and move damaged units aside as `*.broken`.

        Call it before `missing_units` to repair a store: exactly the damaged units are then recomputed.

        Returns:
            (number of the unit, reason) for each damaged unit.

        """
        damaged = []
        for unit in range(self.units):
            if self._path(unit, "json").exists():
                self._forget(unit)
                try:
                    self._check_payload(unit)
                except payloads.Damaged as error:
                    damaged.append((unit, str(error)))
                    self._quarantine(unit)
        return damaged
