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
import mmap
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from datatools import files
from datatools.errors import DataError, EnvironmentProblem, UsageError, did_you_mean
from datatools.features.encodings import ENCODINGS, decode, encode, normalize

FORMAT = 1
STATUSES = ("ok", "empty", "nonfinite")
_PLAN = "plan.json"
_KEY = re.compile(r"[0-9a-f]{32}")
_ENCODE_ROWS = 1024  # rows encoded at a time: 32 MiB of float32 at dim 8192
_ABSENT = object()


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


# ---------------------------------------------------------------- sealed json


def _seal(body: Mapping[str, Any]) -> bytes:
    return files.json_bytes({**body, "digest": files.digest(files.json_bytes(body))})


def _unseal(data: bytes) -> dict[str, Any]:
    """The body of `_seal`; ValueError unless `data` is exactly what `_seal` wrote, byte for byte."""
    try:
        body = json.loads(data)
        wanted = body.pop("digest")
        if _seal(body) != data or files.digest(files.json_bytes(body)) != wanted:
            raise ValueError
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise ValueError("its digest does not match") from None
    return dict(body)


def _differences(old: Any, new: Any, name: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(dotted name, old, new) of each leaf that differs."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for key in dict.fromkeys([*old, *new]):
            yield from _differences(old.get(key, _ABSENT), new.get(key, _ABSENT), f"{name}.{key}" if name else str(key))
    elif _value(old) != _value(new):  # as text: 1 and 1.0 are equal numbers but not the same setting
        yield name, old, new


def _value(value: Any) -> str:
    return "(absent)" if value is _ABSENT else json.dumps(value, sort_keys=True)


# ---------------------------------------------------------------- the store


class OtherFeatures(DataError):
    """A store in which features were made differently: of another model, with other settings."""


class GradientFeatures:
    """Features [n, dim] of rows named by content hash, as unit vectors with their norms and statuses.

    Made by `create_or_open` or `open`. Attributes: `folder`, `meta` (what the features are a function of, besides the
    rows), `dim`, `dtype`. Writing and reading hold one block in memory; disk bytes are n * dim * bits / 8.
    """

    def __init__(self, folder: Path, plan: Mapping[str, Any], verify: bool) -> None:
        self.folder = folder
        self.meta: dict[str, Any] = plan["meta"]
        self.dim: int = plan["dim"]
        self.dtype: str = plan["dtype"]
        self._units: list[str] = plan["units"]  # keys joined by spaces: a third of the memory of separate strings
        self._meta_digest = _meta_digest(plan)
        self._verify = verify
        self._sound: set[int] = set()  # units whose payload digest was right since this object was made
        self._sidecars: dict[int, dict[str, Any]] = {}

    # ------------------------------------------------------------ opening

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

        keys: 32 hex characters each, unique, in the order in which rows are to be stored. Keys already planned stay in
        their unit, new ones become new units behind the others, planned ones that are not in `keys` keep their rows.
        rows_per_unit: of the new units; by default a 64th of the new keys, at least 16 and at most 32 MiB of float32.
        meta: any JSON; opening with another `meta`, `dim` or `dtype` is refused.
        verify: check a unit's digest when its rows are first read.
        Raises: OtherFeatures that names the field that differs, the old and the new value; ValueError for impossible
            keys.
        """
        if dtype not in ENCODINGS:
            raise UsageError(f"there is no feature dtype '{dtype}'{did_you_mean(dtype, ENCODINGS)}")
        if dim < 1 or (rows_per_unit is not None and rows_per_unit < 1):
            raise ValueError(f"a feature store needs dim >= 1 and rows_per_unit >= 1; got {dim} and {rows_per_unit}")
        _check_keys(keys)
        path = files.make_folder(folder)
        head = {"format": FORMAT, "meta": json.loads(files.json_bytes(meta)), "dim": dim, "dtype": dtype}
        with files.folder_mutex(path):
            files.remove_leftovers(path)
            plan = _read_plan(path) if (path / _PLAN).exists() else {**head, "units": []}
            if differing := list(_differences(_head(plan), head)):
                raise OtherFeatures(_refusal(path, differing))
            planned = {key for unit in plan["units"] for key in unit.split()}
            new = [key for key in keys if key not in planned]
            size = rows_per_unit or max(16, min(-(-len(new) // 64), (32 << 20) // (4 * dim)))
            units = [" ".join(new[start : start + size]) for start in range(0, len(new), size)]
            if units or not (path / _PLAN).exists():
                plan = {**plan, "units": [*plan["units"], *units]}
                if (path / _PLAN).exists():
                    files.write_bytes(path / _PLAN, _seal(plan), seal=False)
                elif not files.write_new(path / _PLAN, _seal(plan)):  # flock excludes nobody on this file system
                    raise EnvironmentProblem(f"{path} was created by another process at the same time; run again")
        return cls(path, plan, verify)

    @classmethod
    def open(cls, folder: str | os.PathLike[str], *, verify: bool = True) -> GradientFeatures:
        """Open the store in `folder` for reading. Raises: DataError if there is none, or of a newer format."""
        path = Path(folder)
        if not (path / _PLAN).exists():
            raise DataError(f"{path} holds no gradient features (there is no {_PLAN}); check the path")
        return cls(path, _read_plan(path), verify)

    # ------------------------------------------------------------ units

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
            except _Damaged:
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
        """Write `features` [n, dim] (float, not normalised, any device) as the rows of `unit`, in `unit_keys` order.

        status: [n] of "ok", "empty", "nonfinite"; rows called ok that are zero or not finite are corrected. Rows that
        are not ok are stored as zeros. info: JSON kept in the sidecar; it must be the same on every run.
        Raises: ValueError for wrong shapes, EnvironmentProblem when the disk refuses.
        """
        n = self._rows(unit)
        if features.shape != (n, self.dim) or not features.is_floating_point():
            raise ValueError(
                f"unit {unit} of {self.folder} takes float features [{n}, {self.dim}]; "
                f"got {features.dtype} {list(features.shape)}"
            )
        states = ["ok"] * n if status is None else list(status)
        if len(states) != n or not set(states) <= set(STATUSES):
            raise ValueError(f"unit {unit} of {self.folder} takes {n} statuses, each one of {STATUSES}")
        encoding = ENCODINGS[self.dtype]
        norms, scales = np.zeros(n, dtype="<f4"), np.zeros(n, dtype="<f4")

        def pieces() -> Iterator[bytes | memoryview]:
            yield _header(self.dtype, self.dim, n)
            for start in range(0, n, _ENCODE_ROWS):
                part = slice(start, start + _ENCODE_ROWS)
                unit_rows, norm = normalize(features[part].detach().to("cpu", torch.float32).numpy())
                for i in np.flatnonzero(~(norm > 0) | ~np.isfinite(norm)).tolist():
                    if states[start + i] == "ok":
                        states[start + i] = "empty" if norm[i] == 0 else "nonfinite"
                bad = np.array([state != "ok" for state in states[part]], dtype=bool)
                unit_rows[bad], norm[bad] = 0, 0
                stored, scales[part] = encode(unit_rows, self.dtype)
                norms[part] = norm
                yield stored.tobytes()
            yield norms.tobytes()
            if encoding.levels:
                yield scales.tobytes()

        sidecar = self._path(unit, "json")
        files.remove(sidecar)  # a unit written again is uncommitted until its new payload is complete
        self._forget(unit)
        payload = self._path(unit, "safetensors")
        digest = files.write_pieces(payload, pieces(), seal=False)
        body = {
            "format": FORMAT,
            "unit": unit,
            "rows": n,
            "store": self._meta_digest,
            "payload": {"file": payload.name, "bytes": _payload_bytes(self.dtype, self.dim, n), "xxh3": digest},
            "status": {state: [i for i in range(n) if states[i] == state] for state in STATUSES[1:]},
            "info": json.loads(files.json_bytes(info or {})),
            "keys": self._units[unit],
        }
        files.write_bytes(sidecar, _seal(body), seal=False)

    # ------------------------------------------------------------ reading

    def iter_blocks(self, rows: int = 4096) -> Iterator[Block]:
        """All rows in the order of the plan, at most `rows` at a time; a block does not cross units.

        Raises: DataError if units are missing or damaged; a damaged one is set aside and missing from then on.
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
        """The features of `keys`, float32 [len(keys), dim], in that order. Only their units must be there.

        Raises: DataError for a key that the store does not plan, and as `iter_blocks`.
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
                except _Damaged as error:
                    damaged.append((unit, str(error)))
                    self._quarantine(unit)
        return damaged

    # ------------------------------------------------------------ inside

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
        """The sidecar of `unit`, checked against its seal and the plan. Raises: _Damaged."""
        if unit in self._sidecars:
            return self._sidecars[unit]
        path = self._path(unit, "json")
        if not path.exists():
            raise _Damaged(f"{path.name} is gone")
        try:
            body = _unseal(files.read_bytes(path))
        except ValueError as error:
            raise _Damaged(f"{path.name}: {error}") from None
        expected = {
            "format": FORMAT,
            "unit": unit,
            "rows": self._rows(unit),
            "store": self._meta_digest,
            "keys": self._units[unit],
        }
        for name, value in expected.items():
            if body.get(name) != value:
                raise _Damaged(f"{path.name} belongs to another store or unit: its '{name}' differs from {_PLAN}")
        del body["keys"]  # the plan has them
        self._sidecars[unit] = body
        return body

    def _check_payload(self, unit: int) -> None:
        """Compare the whole payload with its digest. Raises: _Damaged."""
        path, wanted = self._path(unit, "safetensors"), self._sidecar(unit)["payload"]
        try:
            size = path.stat().st_size
            if size != wanted["bytes"]:
                raise _Damaged(f"{path.name} has {size} bytes instead of {wanted['bytes']}")
            if files.digest_file(path) != wanted["xxh3"]:
                raise _Damaged(f"{path.name}: its digest does not match {self._path(unit, 'json').name}")
        except FileNotFoundError:
            raise _Damaged(f"{path.name} is gone") from None
        except OSError as error:
            raise files.explain(error, path, "read") from error
        self._sound.add(unit)

    @contextmanager
    def _mapped(self, unit: int) -> Iterator[_View]:
        if unit not in self._sound and self._verify:
            self._check_payload(unit)
        sidecar, n = self._sidecar(unit), self._rows(unit)
        path = self._path(unit, "safetensors")
        header, size = _header(self.dtype, self.dim, n), _payload_bytes(self.dtype, self.dim, n)
        if not path.exists():
            raise _Damaged(f"{path.name} is gone")
        with files.open_file(path) as file:
            if os.fstat(file.fileno()).st_size != size or file.read(len(header)) != header:
                raise _Damaged(f"{path.name} does not hold the tensors that {_PLAN} describes")
            try:
                mapped = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ)
            except OSError as error:
                raise files.explain(error, path, "read") from error
        view = _View(mapped, len(header), n, self.dim, self.dtype, sidecar)
        try:
            yield view
        finally:
            view.close()

    @contextmanager
    def _quarantining(self, unit: int) -> Iterator[None]:
        try:
            yield
        except _Damaged as error:
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


class _Damaged(Exception):
    """A unit's files are not what was written; the text says which file and why."""


class _View:
    """One unit's payload, mapped."""

    def __init__(self, mapped: mmap.mmap, start: int, n: int, dim: int, dtype: str, sidecar: Mapping[str, Any]) -> None:
        encoding = ENCODINGS[dtype]
        self._mapped, self._dim, self._dtype = mapped, dim, dtype
        width = encoding.width(dim)
        itemsize = np.dtype(encoding.element).itemsize
        self._start, self._stride = start, width * itemsize
        self._stored = np.frombuffer(mapped, encoding.element, n * width, start).reshape(n, width)
        tail = start + n * width * itemsize
        # copied: behind rows of odd length float32 values are not aligned
        self.norms = torch.from_numpy(np.frombuffer(mapped[tail : tail + 4 * n], "<f4").copy())
        scale = mapped[tail + 4 * n : tail + 8 * n] if encoding.levels else np.ones(n, dtype="<f4").tobytes()
        self._scale = np.frombuffer(scale, "<f4")
        self.status = ["ok"] * n
        for state, rows in sidecar["status"].items():
            for row in rows:
                self.status[row] = state

    def features(self, rows: slice | NDArray[np.int64]) -> Tensor:
        return decode(self._stored[rows], self._scale[rows], self._dtype, self._dim)

    def release(self, rows: slice) -> None:
        """Let the kernel drop the pages of rows that were read, so that memory stays flat."""
        if hasattr(mmap, "MADV_DONTNEED"):
            begin = (self._start + rows.start * self._stride) // mmap.PAGESIZE * mmap.PAGESIZE
            end = self._start + rows.stop * self._stride  # a last block that is shorter: madvise stops at the end
            self._mapped.madvise(mmap.MADV_DONTNEED, begin, end - begin)

    def close(self) -> None:
        del self._stored  # arrays into the map would keep it from closing
        self._mapped.close()


def _header(dtype: str, dim: int, n: int) -> bytes:
    """The safetensors header of a unit; padded with spaces so that the features start at a multiple of 64 bytes."""
    encoding = ENCODINGS[dtype]
    width = encoding.width(dim)
    end = n * width * np.dtype(encoding.element).itemsize
    tensors = {
        "features": {"dtype": encoding.tensor, "shape": [n, width], "data_offsets": [0, end]},
        "norms": {"dtype": "F32", "shape": [n], "data_offsets": [end, end + 4 * n]},
    }
    if encoding.levels:
        tensors["scale"] = {"dtype": "F32", "shape": [n], "data_offsets": [end + 4 * n, end + 8 * n]}
    text = json.dumps(tensors, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % 64)
    return len(text).to_bytes(8, "little") + text


def _payload_bytes(dtype: str, dim: int, n: int) -> int:
    encoding = ENCODINGS[dtype]
    row = encoding.width(dim) * np.dtype(encoding.element).itemsize + (8 if encoding.levels else 4)
    return len(_header(dtype, dim, n)) + n * row


def _head(plan: Mapping[str, Any]) -> dict[str, Any]:
    return {name: plan[name] for name in ("format", "meta", "dim", "dtype")}


def _meta_digest(plan: Mapping[str, Any]) -> str:
    return files.digest(files.json_bytes(_head(plan)))


def _read_plan(folder: Path) -> dict[str, Any]:
    path = folder / _PLAN
    try:
        plan = _unseal(files.read_bytes(path))
    except ValueError as error:
        raise DataError(f"{path} is damaged: {error}; remove the folder and extract the features again") from None
    if plan.get("format") != FORMAT:
        raise DataError(
            f"{path} has format {plan.get('format')}, written by another version of datatools; this one "
            f"reads format {FORMAT}: use that version, or extract into another folder"
        )
    return plan


def _refusal(folder: Path, differing: Sequence[tuple[str, Any, Any]]) -> str:
    def short(value: Any) -> str:
        text = _value(value)
        return text if len(text) <= 120 else f"{text[:100]}... ({len(text)} characters)"

    fields = ", ".join(
        f"{name.removeprefix('meta.')} was {short(old)} and is now {short(new)}" for name, old, new in differing[:3]
    )
    more = f", and {len(differing) - 3} more" if len(differing) > 3 else ""
    return (
        f"the features in {folder} were made differently: {fields}{more}; go back to the old setting, or write to "
        "another folder"
    )


def _check_keys(keys: Sequence[str]) -> None:
    seen: set[str] = set()
    for key in keys:
        if not _KEY.fullmatch(key):
            raise ValueError(f"a row's key is 32 hex characters (its content hash); got {key[:40]!r}")
        if key in seen:
            raise ValueError(f"key {key} is there twice; give each content once and map rows to keys outside")
        seen.add(key)
