"""Files that a later step believes, each under a digest of its own (so not in a run folder's `seals`).

A flipped byte, a truncation or an edit shows when the file is read, as `Damaged`: what can be made again is, and the
rest is refused by name. A seal detects accidents and edits; it is no defence against somebody who writes a new one.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import xxhash

from datatools import files
from datatools.errors import DataError

if TYPE_CHECKING:
    from torch import Tensor

_SEAL = "seal"


class Damaged(DataError):
    """A file that does not hold what datatools wrote into it, or that was written before files had a seal."""


def write_json(path: files.PathLike, value: Mapping[str, Any]) -> None:
    """`files.write_json` of a mapping, with its digest as the last entry, `seal`. Raises: DataError as that does."""
    try:
        data = files.json_bytes(dict(value))
    except (TypeError, ValueError) as error:
        raise DataError(f"cannot write {path} as JSON: {error}") from error
    files.write_bytes(path, files.json_bytes({**value, _SEAL: files.digest(data)}), seal=False)


def read_json(path: files.PathLike) -> dict[str, Any]:
    """What `write_json` wrote. Raises: Damaged for anything else, DataError where there is no such file."""
    raw = files.read_bytes(path)
    try:
        value: dict[str, Any] = json.loads(raw)
        seal = value.pop(_SEAL, None)
        data = files.json_bytes(value)
    except (ValueError, RecursionError, AttributeError, TypeError) as error:
        raise Damaged(f"{path} is damaged: no JSON that datatools wrote ({error})") from error
    _compare(path, seal, files.digest(data))
    return value


def write_tensors(path: files.PathLike, tensors: Mapping[str, Tensor]) -> None:
    """A safetensors file with the digest of its tensors in the header, whole or not at all.

    Tensors are written one after the other, without a second copy of all of them.
    Raises: EnvironmentProblem when the disk refuses, as `files` says it.
    """
    flat = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    names = sorted(flat, key=lambda name: (-flat[name].element_size(), name))  # each at a multiple of its element
    header: dict[str, Any] = {"__metadata__": {_SEAL: _digest(flat)}}
    end = 0
    for name in names:
        begin, end = end, end + flat[name].nbytes
        described = {"dtype": _type(flat[name]), "shape": list(flat[name].shape), "data_offsets": [begin, end]}
        header[name] = described
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)

    def pieces() -> Iterator[bytes | memoryview]:
        yield len(text).to_bytes(8, "little") + text
        for name in names:
            if flat[name].numel():
                yield _bytes(flat[name])

    files.write_pieces(path, pieces(), seal=False)


def read_tensors(path: files.PathLike) -> dict[str, Tensor]:
    """What `write_tensors` wrote, on the CPU. Raises: Damaged for anything else, DataError for no such file."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(Path(path), "pt") as saved:
            seal = (saved.metadata() or {}).get(_SEAL)
            tensors: dict[str, Tensor] = {name: saved.get_tensor(name) for name in saved.keys()}  # noqa: SIM118
    except OSError as error:
        raise files.explain(error, path, "read") from error
    except (SafetensorError, ValueError, RuntimeError) as error:
        raise Damaged(f"{path} is damaged ({str(error).splitlines()[0][:200]})") from error
    _compare(path, seal, _digest(tensors))
    return tensors


def _compare(path: files.PathLike, seal: object, found: str) -> None:
    if seal is None:
        raise Damaged(f"{path} has no seal: it was edited, or an older version of datatools wrote it")
    if seal != found:
        raise Damaged(f"{path} is damaged or was edited: it does not have the digest that it was written with")


def _digest(tensors: Mapping[str, Tensor]) -> str:
    total = xxhash.xxh3_128()
    for name in sorted(tensors):
        total.update(json.dumps([name, _type(tensors[name]), list(tensors[name].shape)]).encode())
        total.update(_bytes(tensors[name]))
    return total.hexdigest()


def _bytes(tensor: Tensor) -> memoryview:
    import torch

    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data


def _type(tensor: Tensor) -> str:
    """The name that safetensors has for a dtype."""
    kind = str(tensor.dtype).removeprefix("torch.")
    if kind in ("bool", "bfloat16"):
        return "BOOL" if kind == "bool" else "BF16"
    return kind.replace("uint", "U").replace("int", "I").replace("float", "F")
