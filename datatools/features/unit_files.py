"""The files of one feature store: where each unit is, whether it is intact, and how damaged ones are moved aside."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cached_property
from pathlib import Path
from typing import Any

from datatools import files
from datatools.errors import DataError
from datatools.features import plan as plans
from datatools.features import units as payloads


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
        self._units: list[str] = plan["units"]  # keys joined by spaces: a third of the memory of separate strings
        self._meta_digest = plans.meta_digest(plan)
        self._verify = verify
        self._sound: set[int] = set()  # units whose payload digest this object has verified
        self._sidecars: dict[int, dict[str, Any]] = {}

    @property
    def units(self) -> int:
        """Number of planned units."""
        return len(self._units)

    def unit_keys(self, unit: int) -> list[str]:
        """Return the keys of a unit, in the order of its rows.

        Args:
            unit: number of the unit.

        Returns:
            The keys.

        """
        return self._units[unit].split()

    @cached_property
    def _place(self) -> dict[str, tuple[int, int]]:
        return {key: (unit, row) for unit, keys in enumerate(self._units) for row, key in enumerate(keys.split())}

    def written(self, unit: int) -> bool:
        """Return whether a unit is committed, also by another process; its content is not read.

        Args:
            unit: number of the unit.

        Returns:
            Whether it is.

        """
        return self._path(unit, "json").exists()

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
        del body["keys"]  # they are in the plan
        self._sidecars[unit] = body
        return body

    def _check_payload(self, unit: int) -> None:
        """Compare the whole payload with its digest; raises Damaged."""
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
