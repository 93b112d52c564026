"""Gradient features on disk: rows in units, each committed by its sidecar.

A store is a folder:

    plan.json              meta, dim, dtype, and which keys belong to which unit; fixed but for new units at its end
    part-00000.safetensors tensors `features` [n, dim or packed], `norms` [n], for integer dtypes `scale` [n]
    part-00000.json        the commit, written last: digest of the payload, keys, statuses, info

Without a sidecar a unit does not exist. All files are replaced atomically, and their bytes are a function of what was
written (no time, host or process), so a run that was killed and restarted ends with the same bytes as one that was not.
Every byte is under a digest: a damaged unit is found before its rows are used, set aside as `*.broken`, and is missing
again. Two processes may fill one store as long as they write different units, for example `missing_units(rank, world)`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from datatools import files
from datatools.errors import DataError, EnvironmentProblem, UsageError, did_you_mean
from datatools.features import plan as plans
from datatools.features import units as payloads
from datatools.features.encodings import ENCODINGS


class Block(NamedTuple):
    """Consecutive rows of a store."""

    keys: list[str]
    features: Tensor
    """float32 [n, dim]; unit rows, zeros where the status is not "ok"."""
    norms: Tensor
    """float32 [n], of the features before they were normalised; 0 where the status is not "ok"."""
    status: list[str]
    """[n], each one of "ok", "empty" (a zero gradient) and "nonfinite"."""


class Rows(NamedTuple):
    """All rows of a store but for their features."""

    keys: list[str]
    norms: Tensor
    status: list[str]


class GradientFeatures:
    """Features [n, dim] of rows named by content hash, as unit vectors with their norms and statuses.

    Made by `create_or_open` or `open`. Writing and reading hold one block in memory; the store takes n * dim * bits / 8
    bytes on the disk.

    Attributes:
        folder: of the store.
        meta: what the features are a function of, besides the rows.
        dim: number of features.
        dtype: a key of `ENCODINGS`.

    """

    def __init__(self, folder: Path, plan: Mapping[str, Any], verify: bool) -> None:
        self.folder = folder
        self.meta: dict[str, Any] = plan["meta"]
        self.dim: int = plan["dim"]
        self.dtype: str = plan["dtype"]
        self._units: list[str] = plan["units"]  # keys joined by spaces: a third of the memory of separate strings
        self._meta_digest = plans.meta_digest(plan)
        self._verify = verify
        self._sound: set[int] = set()  # units whose payload digest was right since this object was made
        self._sidecars: dict[int, dict[str, Any]] = {}

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
        """Open the store in `folder` for writing, planning the units of the `keys` it does not know yet.

        Args:
            folder: made where it is missing.
            meta: what the features are a function of, besides the rows: any JSON.
            dim: number of features.
            dtype: a key of `ENCODINGS`.
            keys: 32 hex characters each, unique, in the order in which rows are to be stored. Keys that are planned
                already stay in their unit, new ones become new units after the others, and planned ones that are not in
                `keys` keep their rows.
            rows_per_unit: of the new units; by default a 64th of the new keys, at least 16 and at most 32 MiB of
                float32.
            verify: check a unit's digest when its rows are first read.

        Raises:
            OtherFeatures: The store has another `meta`, `dim` or `dtype`; names the field, the old and the new value.
            UsageError: There is no such `dtype`.
            ValueError: Keys that are impossible.

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
            raise UsageError(f"there is no feature dtype '{dtype}'{did_you_mean(dtype, ENCODINGS)}")
        if dim < 1 or (rows_per_unit is not None and rows_per_unit < 1):
            raise ValueError(f"a feature store needs dim >= 1 and rows_per_unit >= 1; got {dim} and {rows_per_unit}")
        plans.check_keys(keys)
        path = files.make_folder(folder)
        head = {"format": plans.FORMAT, "meta": json.loads(files.json_bytes(meta)), "dim": dim, "dtype": dtype}
        with files.folder_mutex(path):
            files.remove_leftovers(path)
            plan = plans.read(path) if (path / plans.NAME).exists() else {**head, "units": []}
            if differing := list(plans.differences(plans.head_of(plan), head)):
                raise plans.OtherFeatures(plans.refusal(path, differing))
            planned = {key for unit in plan["units"] for key in unit.split()}
            new = [key for key in keys if key not in planned]
            size = rows_per_unit or max(16, min(-(-len(new) // 64), (32 << 20) // (4 * dim)))
            added = [" ".join(new[start : start + size]) for start in range(0, len(new), size)]
            if added or not (path / plans.NAME).exists():
                plan = {**plan, "units": [*plan["units"], *added]}
                if (path / plans.NAME).exists():
                    files.write_bytes(path / plans.NAME, plans.seal(plan), seal=False)
                elif not files.write_new(
                    path / plans.NAME, plans.seal(plan)
                ):  # flock excludes nobody on this file system
                    raise EnvironmentProblem(f"{path} was created by another process at the same time; run again")
        return cls(path, plan, verify)

    @classmethod
    def open(cls, folder: str | os.PathLike[str], *, verify: bool = True) -> GradientFeatures:
        """Open the store in `folder` for reading.

        Raises:
            DataError: There is no store, or it has another format.

        """
        path = Path(folder)
        if not (path / plans.NAME).exists():
            raise DataError(f"{path} holds no gradient features (there is no {plans.NAME}); check the path")
        return cls(path, plans.read(path), verify)

    def __len__(self) -> int:
        """Planned rows."""
        return sum(map(self._rows, range(self.units)))

    @property
    def units(self) -> int:
        """Planned units."""
        return len(self._units)

    def unit_keys(self, unit: int) -> list[str]:
        """The keys of `unit`, in the order of its rows."""
        return self._units[unit].split()

    def missing_units(self, rank: int = 0, world: int = 1) -> list[int]:
        """Units with `unit % world == rank` that are not written; those with a damaged sidecar are set aside first."""
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
        """What was given as `info` to `write_unit`."""
        with self._quarantining(unit):
            return dict(self._sidecar(unit)["info"])

    def write_unit(
        self, unit: int, features: Tensor, status: Sequence[str] | None = None, info: Mapping[str, Any] | None = None
    ) -> None:
        """Write the rows of a unit, in `unit_keys` order.

        Args:
            unit: its number.
            features: [n, dim] of any floating dtype, not normalized, on any device.
            status: [n] of "ok", "empty", "nonfinite"; rows called ok that are zero or not finite are corrected. Rows
                that are not ok are stored as zeros.
            info: JSON kept in the sidecar; it must be the same on every run.

        Raises:
            ValueError: Wrong shapes or statuses.
            EnvironmentProblem: The disk refuses.

        """
        n = self._rows(unit)
        if features.shape != (n, self.dim) or not features.is_floating_point():
            raise ValueError(
                f"unit {unit} of {self.folder} takes float features [{n}, {self.dim}]; "
                f"got {features.dtype} {list(features.shape)}"
            )
        states = ["ok"] * n if status is None else list(status)
        if len(states) != n or not set(states) <= set(payloads.STATUSES):
            raise ValueError(f"unit {unit} of {self.folder} takes {n} statuses, each one of {payloads.STATUSES}")
        sidecar = self._path(unit, "json")
        files.remove(sidecar)  # a unit written again is uncommitted until its new payload is complete
        self._forget(unit)
        payload = self._path(unit, "safetensors")
        digest = files.write_pieces(payload, payloads.pieces(features, states, self.dtype), seal=False)
        body = {
            "format": plans.FORMAT,
            "unit": unit,
            "rows": n,
            "store": self._meta_digest,
            "payload": {"file": payload.name, "bytes": payloads.payload_bytes(self.dtype, self.dim, n), "xxh3": digest},
            "status": {state: [i for i in range(n) if states[i] == state] for state in payloads.STATUSES[1:]},
            "info": json.loads(files.json_bytes(info or {})),
            "keys": self._units[unit],
        }
        files.write_bytes(sidecar, plans.seal(body), seal=False)

    def iter_blocks(self, rows: int = 4096) -> Iterator[Block]:
        """All rows in the order of the plan, at most `rows` at a time; a block does not cross units.

        Raises:
            DataError: Units are missing or damaged; a damaged one is set aside and missing from then on.

        """
        if rows < 1:
            raise ValueError(f"iter_blocks takes rows >= 1; got {rows}")
        self._require_complete()
        for unit in range(self.units):
            keys = self.unit_keys(unit)
            with self._quarantining(unit), self._mapped(unit) as view:
                status = view.status
                for start in range(0, len(keys), rows):
                    part = slice(start, start + rows)
                    block = Block(keys[part], view.features(part), view.norms[part].clone(), status[part])
                    view.release(part)
                    yield block

    def rows(self) -> Rows:
        """Keys, norms and statuses of all rows in the order of the plan; reads no features.

        Raises: as `iter_blocks`.
        """
        self._require_complete()
        status, norms = [], [torch.zeros(0)]
        for unit in range(self.units):
            with self._quarantining(unit), self._mapped(unit) as view:
                norms.append(view.norms.clone())
                status.extend(view.status)
        return Rows([key for unit in self._units for key in unit.split()], torch.cat(norms), status)

    def take(self, keys: Sequence[str]) -> Tensor:
        """The features of some rows. Only their units must be there.

        Args:
            keys: of the rows.

        Returns:
            float32 [len(keys), dim], in that order.

        Raises:
            DataError: The store does not plan a key, and as `iter_blocks`.

        """
        out = torch.empty(len(keys), self.dim)
        wanted: dict[int, list[tuple[int, int]]] = {}
        for place, key in enumerate(keys):
            if key not in self._place:
                raise DataError(f"{self.folder} has no row {key}; extract the features of the current data again")
            unit, row = self._place[key]
            wanted.setdefault(unit, []).append((place, row))
        for unit, pairs in sorted(wanted.items()):
            with self._quarantining(unit), self._mapped(unit) as view:
                places, rows = zip(*pairs, strict=True)
                for start in range(0, len(rows), 4096):
                    out[list(places[start : start + 4096])] = view.features(np.array(rows[start : start + 4096]))
        return out

    def verify(self) -> list[tuple[int, str]]:
        """Read every byte of every written unit; (unit, reason) of each damaged one, which is set aside as `*.broken`.

        Call it before `missing_units` to repair a store: exactly the damaged units are then computed again.
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

    @cached_property
    def _place(self) -> dict[str, tuple[int, int]]:
        return {key: (unit, row) for unit, keys in enumerate(self._units) for row, key in enumerate(keys.split())}

    def _rows(self, unit: int) -> int:
        return (len(self._units[unit]) + 1) // 33  # 32 characters and a space

    def _path(self, unit: int, suffix: str) -> Path:
        return self.folder / f"part-{unit:05d}.{suffix}"

    def _forget(self, unit: int) -> None:
        self._sidecars.pop(unit, None)
        self._sound.discard(unit)

    def _require_complete(self) -> None:
        if missing := [unit for unit in range(self.units) if not self._path(unit, "json").exists()]:
            raise DataError(
                f"{self.folder}: {len(missing)} of {self.units} units are missing (the first: {missing[0]})"
                "; run the extraction again, it computes only these"
            )

    def _sidecar(self, unit: int) -> dict[str, Any]:
        """The sidecar of `unit`, checked against its seal and the plan. Raises: Damaged."""
        if unit in self._sidecars:
            return self._sidecars[unit]
        path = self._path(unit, "json")
        if not path.exists():
            raise payloads.Damaged(f"{path.name} is gone")
        try:
            body = plans.unseal(files.read_bytes(path))
        except ValueError as error:
            raise payloads.Damaged(f"{path.name}: {error}") from None
        expected = {
            "format": plans.FORMAT,
            "unit": unit,
            "rows": self._rows(unit),
            "store": self._meta_digest,
            "keys": self._units[unit],
        }
        for name, value in expected.items():
            if body.get(name) != value:
                raise payloads.Damaged(
                    f"{path.name} belongs to another store or unit: its '{name}' differs from {plans.NAME}"
                )
        del body["keys"]  # the plan has them
        self._sidecars[unit] = body
        return body

    def _check_payload(self, unit: int) -> None:
        """Compare the whole payload with its digest. Raises: Damaged."""
        payloads.check(self._path(unit, "safetensors"), self._sidecar(unit)["payload"])
        self._sound.add(unit)

    @contextmanager
    def _mapped(self, unit: int) -> Iterator[payloads.View]:
        if unit not in self._sound and self._verify:
            self._check_payload(unit)
        sidecar, n = self._sidecar(unit), self._rows(unit)
        with payloads.mapped(self._path(unit, "safetensors"), n, self.dim, self.dtype, sidecar["status"]) as view:
            yield view

    @contextmanager
    def _quarantining(self, unit: int) -> Iterator[None]:
        try:
            yield
        except payloads.Damaged as error:
            self._quarantine(unit)
            raise DataError(
                f"{self.folder}: unit {unit} is damaged ({error}); it was set aside as *.broken, run the "
                "extraction again to compute this unit anew"
            ) from error

    def _quarantine(self, unit: int) -> None:
        self._forget(unit)
        for suffix in ("json", "safetensors"):  # the sidecar first: from then on the unit is missing
            path = self._path(unit, suffix)
            broken = path.with_name(f"{path.name}.broken")
            if path.exists():
                files.remove(broken)
                with suppress(DataError):  # another process was quicker
                    files.move(path, broken)
