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
    """A file whose content is not what datatools wrote, or that was written before files had seals."""


def write_json(path: files.PathLike, value: Mapping[str, Any]) -> None:
    """Write a mapping as JSON with `files.write_json`, with its digest as the last entry, `seal`.

    Args:
        path: file to write; its folder must exist.
        value: a mapping that JSON can represent.

    Raises:
        DataError: if JSON cannot represent `value`.
        EnvironmentProblem: if the file system reports an error, such as a full disk.

    """
    try:
        data = files.json_bytes(dict(value))
    except (TypeError, ValueError) as error:
        raise DataError(f"cannot write {path} as JSON: {error}") from error
    files.write_bytes(path, files.json_bytes({**value, _SEAL: files.digest(data)}), seal=False)


def read_json(path: files.PathLike) -> dict[str, Any]:
    """Read a file that `write_json` wrote.

    Args:
        path: file to read.

    Returns:
        The mapping, without its seal.

    Raises:
        Damaged: if the content is not what `write_json` wrote.
        DataError: if the file does not exist.

    """
    raw = files.read_bytes(path)
    try:
        value: dict[str, Any] = json.loads(raw)
        seal = value.pop(_SEAL, None)
        data = files.json_bytes(value)
    except (ValueError, RecursionError, AttributeError, TypeError) as error:
        raise Damaged(f"{path} is damaged: it is not JSON that datatools wrote ({error})") from error
    _compare(path, seal, files.digest(data))
    return value


def write_tensors(path: files.PathLike, tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file with the digest of its tensors in the header, whole or not at all.

    Tensors are written one after the other, without a second copy of all of them.

    Args:
        path: file to write; its folder must exist.
        tensors: name -> tensor of any shape, dtype and device.

    Raises:
        EnvironmentProblem: if the file system reports an error, such as a full disk.

    """
    flat = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    names = sorted(flat, key=lambda name: (-flat[name].element_size(), name))  # keeps every tensor aligned
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
    """Read a file that `write_tensors` wrote.

    Args:
        path: file to read.

    Returns:
        Name -> tensor, on the CPU, with the shape and dtype that it was written with.

    Raises:
        Damaged: if the content is not what `write_tensors` wrote.
        DataError: if the file does not exist.

    """
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
        raise Damaged(f"{path} is damaged or was edited: its digest does not match")


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
    """Return safetensors' name for a dtype."""
    kind = str(tensor.dtype).removeprefix("torch.")
    if kind in ("bool", "bfloat16"):
        return "BOOL" if kind == "bool" else "BF16"
    return kind.replace("uint", "U").replace("int", "I").replace("float", "F")
