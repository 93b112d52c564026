"""The files of one feature store: where each unit is, whether it is intact, and how damaged ones are moved aside."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from datatools import files
from datatools.compact import FullKeys
from datatools.errors import DataError
from datatools.features import plan as plans
from datatools.features import ranges
from datatools.features import units as payloads

_KEPT = 64  # sidecars in memory


class UnitFiles:
    """The units of a store on disk; `GradientFeatures` reads and writes their rows.

    Args:
        folder: folder of the store.
        plan: content of its plan.json.
        verify: check a unit's digest when its rows are first read.

    """

    def __init__(self, folder: Path, plan: Mapping[str, Any], verify: bool) -> None:
        self.folder = folder
        self.meta: dict[str, Any] = plan["meta"]
        self.dim: int = plan["dim"]
        self.dtype: str = plan["dtype"]
        self._format: int = plan["format"]
        self._units = plans.units_of(folder, plan)
        self._meta_digest = plans.meta_digest(plan)
        self._verify = verify
        self._sound: set[int] = set()  # units whose payload digest this object has verified
        self._sidecars: dict[int, dict[str, Any]] = {}  # of the last few units

    @property
    def units(self) -> int:
        """Number of planned units."""
        return len(self._units)

    def unit_keys(self, unit: int) -> FullKeys:
        """Return the keys of a unit, in the order of its rows.

        Args:
            unit: number of the unit.

        Returns:
            The keys.

        Raises:
            DataError: if the file of keys is damaged.

        """
        return self._units.keys(unit)

    def unit_rows(self, unit: int) -> int:
        """Return the number of rows of a unit.

        Args:
            unit: number of the unit.

        Returns:
            The number.

        """
        return self._units.rows(unit)

    def absent(self, keys: Sequence[str]) -> NDArray[np.bool_]:
        """Find out which keys are not planned.

        Args:
            keys: n keys, each once.

        Returns:
            bool [n].

        """
        return ranges.absent(self._units, FullKeys.of(keys))

    @cached_property
    def _index(self) -> ranges.Index:
        return ranges.Index(self._units)

    def written(self, unit: int) -> bool:
        """Return whether a unit is committed, also by another process; its content is not read.

        Args:
            unit: number of the unit.

        Returns:
            Whether it is.

        """
        return self._path(unit, "json").exists()

    def _path(self, unit: int, suffix: str) -> Path:
        return self.folder / f"part-{unit:05d}.{suffix}"

    def _forget(self, unit: int) -> None:
        self._sidecars.pop(unit, None)
        self._sound.discard(unit)

    def _require_complete(self) -> None:
        if missing := [unit for unit in range(self.units) if not self._path(unit, "json").exists()]:
            raise DataError(
                f"{self.folder}: {len(missing)} of {self.units} units are missing (the first: {missing[0]})"
                "; run the extraction again, which computes only these"
            )

    def _sidecar(self, unit: int) -> dict[str, Any]:
        """Read the sidecar of `unit`, checked against its digest and the plan; raises Damaged."""
        if unit in self._sidecars:
            return self._sidecars[unit]
        path = self._path(unit, "json")
        if not path.exists():
            raise payloads.Damaged(f"{path.name} is missing")
        try:
            body = plans.unseal(files.read_bytes(path))
        except ValueError as error:
            raise payloads.Damaged(f"{path.name}: {error}") from None
        expected = {
            "format": self._format,
            "unit": unit,
            "rows": self.unit_rows(unit),
            "store": self._meta_digest,
            "keys": self._units.mark(unit),
        }
        for name, value in expected.items():
            if body.get(name) != value:
                raise payloads.Damaged(
                    f"{path.name} belongs to another store or unit: its '{name}' differs from {plans.NAME}"
                )
        while len(self._sidecars) >= _KEPT:
            self._sidecars.pop(next(iter(self._sidecars)))
        self._sidecars[unit] = {name: body[name] for name in ("payload", "status", "info")}
        return self._sidecars[unit]

    def _check_payload(self, unit: int) -> None:
        """Compare the whole payload with its digest; raises Damaged."""
        payloads.check(self._path(unit, "safetensors"), self._sidecar(unit)["payload"])
        self._sound.add(unit)

    @contextmanager
    def _mapped(self, unit: int) -> Iterator[payloads.View]:
        if unit not in self._sound and self._verify:
            self._check_payload(unit)
        sidecar, n = self._sidecar(unit), self.unit_rows(unit)
        with payloads.mapped(self._path(unit, "safetensors"), n, self.dim, self.dtype, sidecar["status"]) as view:
            yield view

    @contextmanager
    def _quarantining(self, unit: int) -> Iterator[None]:
        try:
            yield
        except payloads.Damaged as error:
            self._quarantine(unit)
            raise DataError(
                f"{self.folder}: unit {unit} is damaged ({error}); it was set aside as *.broken; run the "
                "extraction again to recompute this unit"
            ) from error

    def _quarantine(self, unit: int) -> None:
        self._forget(unit)
        for suffix in ("json", "safetensors"):  # the sidecar first, so that the unit counts as missing at once
            path = self._path(unit, suffix)
            broken = path.with_name(f"{path.name}.broken")
            if path.exists():
                files.remove(broken)
                with suppress(DataError):  # another process has moved it already
                    files.move(path, broken)
