"""Optimizer states and weights as trainers save them.

They may be one file, shards of torch.distributed.checkpoint (FSDP), 8-bit states of bitsandbytes, or DeepSpeed's
universal layout. Only plain values are unpickled: files are read with `weights_only`, and the index of a sharded
checkpoint as inert records. Unreadable files are refused by name, and the message gives the conversion.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor

from datatools import DataError, files
from pipelines.models import inert
from pipelines.texts import first_line, named

_FILES = ("optimizer.pt", "optimizer.bin")
_SHARDS = ("optimizer_0", "optimizer")
_WEIGHT_SHARDS = ("pytorch_model_fsdp_0", "pytorch_model_fsdp", "model")

_DAMAGED = (UnpicklingError, RuntimeError, EOFError, ValueError, KeyError, TypeError, AttributeError, IndexError,
            ImportError, OSError, AssertionError, OverflowError)  # fmt: skip


def find(folder: Path) -> Path | None:
    """Return the optimizer state in a checkpoint's folder: a file, or the folder of its shards; None if there is none.

    Args:
        folder: The folder of the checkpoint.
    """
    for name in _FILES:
        if (folder / name).is_file():
            return folder / name
    for name in _SHARDS:
        if (folder / name / ".metadata").is_file():
            return folder / name
    return _universal(folder)


def _universal(folder: Path) -> Path | None:
    found = sorted(path for path in folder.glob("*/zero") if path.is_dir())
    return found[-1] if found else None


def weights(folder: Path) -> Path | None:
    """Return the folder of a checkpoint's weight shards; None if the weights are in safetensors or missing.

    Args:
        folder: The folder of the checkpoint.
    """
    if any(folder.glob("*.safetensors")):
        return None
    for name in _WEIGHT_SHARDS:
        if (folder / name / ".metadata").is_file():
            return folder / name
    return _universal(folder)


def refusal(folder: Path) -> str:
    """Return what a checkpoint without a readable state contains instead, and what to do.

    Args:
        folder: The folder of the checkpoint.
    """
    if any(folder.glob("optimizer_*rank*.bin")):
        return (
            "contains an optimizer state in one file per process; train with fsdp_state_dict_type FULL_STATE_DICT or "
            "SHARDED_STATE_DICT"
        )
    if shards := sorted(path for path in folder.glob("global_step*") if path.is_dir()):
        return (
            f"contains DeepSpeed's ZeRO shards ({shards[-1].name}); convert them once: python -m "
            f"deepspeed.checkpoint.ds_to_universal --input_folder {shards[-1]} --output_folder {shards[-1]}_universal"
        )
    return "contains no optimizer.pt; LESS needs the optimizer's moments (train with save_only_model off)"


def read(path: Path) -> dict[str, Any]:
    """Return an optimizer's state dict, with AdamW's entries under torch's names.

    Args:
        path: The file or folder that `find` returned.

    Raises:
        DataError: The state is damaged, would run code, or belongs to an unknown optimizer.
    """
    try:
        return _read(path)
    except _DAMAGED as error:
        raise DataError(f"{path}: not the state_dict of an optimizer ({named(error)}); save it again") from error


def _read(path: Path) -> dict[str, Any]:
    if path.is_dir():
        saved = _from_universal(path) if path.name == "zero" else _nested(path).get("optimizer")
    else:
        saved = _plain(path)
    if not isinstance(saved, dict) or not {"state", "param_groups"} <= set(saved):
        raise DataError(f"{path}: not an optimizer's state_dict: expected `state` and `param_groups`")
    state = {key: _decoded(path, entries) for key, entries in saved["state"].items()}
    eight_bit = any(state[key] is not entries for key, entries in saved["state"].items())
    groups = [{**group, "params": _listed(group["params"])} for group in _listed(saved["param_groups"])]
    if eight_bit:
        groups = [{"amsgrad": False} | group for group in groups]
    entries = {key for value in state.values() for key, part in value.items() if isinstance(part, Tensor)}
    ours = all(isinstance(group.get("rule"), Mapping) for group in groups)  # Adafactor and CAME are rules here too
    if not ours and {"exp_avg_sq_row", "exp_avg_sq_col"} & entries:
        raise DataError(
            f"{path}: is Adafactor's state, which is not supported; use AdamW (optim='adamw_torch') or an optimizer "
            "of this suite: optim.hf.resolve, `datatools ls optimizers`"
        )
    return {"state": state, "param_groups": groups}


def _plain(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except _DAMAGED as error:
        text = str(error)
        if "torchao" in text:
            raise DataError(
                f"{path}: is a state of torchao's 8-bit or 4-bit optimizers, whose classes are not loaded; convert "
                "it once: python -c \"import torch, torchao.optim; f = 'optimizer.pt'; s = torch.load(f); "
                "s['state'] = {k: {n: v.dequantize() if hasattr(v, 'dequantize') else v for n, v in e.items()} "
                "for k, e in s['state'].items()}; torch.save(s, f)\""
            ) from error
        raise DataError(
            f"{path}: not readable as plain tensors, and nothing else is loaded: {_reason(error)}"
        ) from error


def _reason(error: BaseException) -> str:
    """Return torch's message without its advice to load the file anyway, which would run its code."""
    asked = re.search(r"(?:Unsupported global|unsupported GLOBAL|GLOBAL)[: ]+(?:GLOBAL )?([\w.]+)", str(error))
    if asked:
        return f"it needs {asked[1]}, which would run code"
    if "eights only load failed" in str(error):
        return "it was not written by torch.save, or is damaged"
    return first_line(error)


# ------------------------------------------------------------------------------------------------------ bitsandbytes


def _decoded(path: Path, entries: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a parameter's state of bitsandbytes with AdamW's moments in float32; other states are unchanged."""
    inner = entries.get("__bnb_optimizer_quant_state__")
    if isinstance(inner, Mapping):
        entries = {**{key: value for key, value in entries.items() if not key.startswith("__")}, **inner}
    if "state1" not in entries:
        return entries
    if "state2" not in entries:
        raise DataError(
            f"{path}: is a state of bitsandbytes with one moment (Lion, RMSprop or SGD) and no optimizer name; "
            "train with optim='adamw_bnb_8bit', or with `datatools train --optimizer lion_8bit`"
        )
    step = torch.tensor(float(entries.get("step", 0)))
    return {"step": step, "exp_avg": _moment(path, entries, "1"), "exp_avg_sq": _moment(path, entries, "2")}


def _moment(path: Path, entries: Mapping[str, Any], which: str) -> Tensor:
    codes: Tensor = entries[f"state{which}"]
    if codes.dtype != torch.uint8:  # small tensors are kept as they are
        return codes.float()
    book, scales = entries.get(f"qmap{which}"), entries.get(f"absmax{which}")
    if book is None or scales is None:
        raise DataError(
            f"{path}: is a state of bitsandbytes with one scale per tensor (block_wise=False), which is not supported; "
            "train with the default (blocks)"
        )
    sizes = [size for size in (256, 512, 1024, 2048, 4096) if -(-codes.numel() // size) == scales.numel()]
    if not sizes:
        raise DataError(f"{path}: {scales.numel()} scales of {codes.numel()} 8-bit codes match no block size")
    values: Tensor = book.float()[codes.flatten().long()]
    values *= scales.float().repeat_interleave(sizes[0])[: values.numel()]
    return values.reshape(codes.shape)


# ------------------------------------------------------------------------------------- torch.distributed.checkpoint


_META = "torch.distributed.checkpoint.metadata"
_KNOWN = {
    "collections.OrderedDict",
    "torch.Size",
    "torch.serialization._get_layout",
    "torch.distributed.checkpoint.filesystem._StorageInfo",
    *(f"{_META}.{name}" for name in ("Metadata", "MetadataIndex", "TensorStorageMetadata", "BytesStorageMetadata",
                                     "ChunkStorageMetadata", "TensorProperties", "StorageMeta",
                                     "_MEM_FORMAT_ENCODING")),
    *(f"torch.{name}" for name, value in vars(torch).items() if isinstance(value, torch.dtype)),
    *(f"pathlib{part}.{name}" for part in ("", "._local") for name in ("Path", "PosixPath", "PurePosixPath")),
}  # fmt: skip


def _sharded(folder: Path) -> tuple[Any, dict[str, Any]]:
    """Return (flat name -> its path in nested containers, flat name -> value) of a torch.distributed checkpoint.

    Tensors are assembled from their shards.
    """
    try:
        index = inert.read(files.read_bytes(folder / ".metadata"), _KNOWN).state
        pieces: dict[str, list[tuple[tuple[int, ...], Any]]] = {}
        for place, info in index["storage_data"].items():
            pieces.setdefault(place.state["fqn"], []).append((_size(place.state.get("offset")), info.state))
        found: dict[str, Any] = {}
        for name, about in index["state_dict_metadata"].items():
            values = [(offset, _piece(folder, info)) for offset, info in pieces[name]]
            if about.name != f"{_META}.TensorStorageMetadata":
                found[name] = values[0][1]
                continue
            dtype = getattr(torch, about.state["properties"].state[0].name.removeprefix("torch."))
            whole = torch.empty(_size(about.state["size"]), dtype=dtype)
            held = 0
            for offset, value in values:
                corner = offset or (0,) * value.dim()
                whole[tuple(slice(lo, lo + n) for lo, n in zip(corner, value.shape, strict=True))] = value
                held += value.numel()
            if held < whole.numel():
                raise ValueError(f"{name}: shards contain {held} of {whole.numel()} numbers")
            found[name] = whole
    except OSError as error:
        raise DataError(f"{folder}: a shard cannot be read: {error}") from error
    except _DAMAGED as error:
        raise DataError(
            f"{folder}: not readable as a sharded checkpoint of plain tensors: {first_line(error)}"
        ) from error
    return index.get("planner_data"), found


def _size(saved: Any) -> tuple[int, ...]:
    """Return a torch.Size from its record in the index."""
    return tuple(saved.args[0]) if isinstance(saved, inert.Inert) and saved.args else ()


def _piece(folder: Path, info: Mapping[str, Any]) -> Any:
    if compressed := info.get("transform_descriptors"):
        raise ValueError(f"its shards are compressed ({', '.join(compressed)}); save them plainly")
    path = (folder / info["relative_path"]).resolve()
    if path.parent != folder.resolve():
        raise ValueError(f"its index names a file elsewhere: {info['relative_path']}")
    with open(path, "rb") as stream:
        stream.seek(info["offset"])
        return torch.load(io.BytesIO(stream.read(info["length"])), map_location="cpu", weights_only=True)


def _nested(folder: Path) -> dict[str, Any]:
    """Return the values as they were saved: flat names are moved back into nested dictionaries and lists."""
    planned, flat = _sharded(folder)
    paths: Mapping[str, tuple[Any, ...]] = planned if isinstance(planned, Mapping) else {}
    root: dict[Any, Any] = {}
    for name, value in flat.items():
        *above, last = paths.get(name, (name,))
        place = root
        for key in above:
            place = place.setdefault(key, {})
        place[last] = value
    return root


def _listed(value: Any) -> list[Any]:
    """Return a list that may have been restored as a dictionary by position."""
    return [value[i] for i in sorted(value)] if isinstance(value, Mapping) else list(value)


# --------------------------------------------------------------------------------------------------------- DeepSpeed


class _Nothing:
    """A placeholder for an object of a class that is not loaded; it has the pickled data and does nothing."""


def _from_universal(folder: Path) -> dict[str, Any]:
    """Return AdamW's state in DeepSpeed's universal layout: zero/NAME/{exp_avg,exp_avg_sq,step}.pt and settings."""
    path = folder / "optimizer_state.pt"
    if not path.is_file():
        raise DataError(f"{folder}: optimizer_state.pt is missing; convert the checkpoint again (ds_to_universal)")
    state = {}
    for home in sorted(p for p in folder.iterdir() if p.is_dir()):
        if not all((home / f"{key}.pt").is_file() for key in ("exp_avg", "exp_avg_sq", "step")):
            raise DataError(f"{home}: contains no AdamW state (exp_avg, exp_avg_sq, step); train with AdamW")
        step = _value(_plain(home / "step.pt"))
        entries = {key: _value(_plain(home / f"{key}.pt")).float() for key in ("exp_avg", "exp_avg_sq")}
        state[home.name] = {"step": torch.tensor(float(step)), **entries}
    groups = _with_stand_ins(path).get("param_groups")
    settings = [{key: group.get(key) for key in ("betas", "eps")} for group in groups or [{}]]
    if settings[0]["betas"] is None or any(other != settings[0] for other in settings):
        raise DataError(f"{path}: its param_groups have no or several betas and eps; expected those of one AdamW")
    group = {**settings[0], "betas": tuple(settings[0]["betas"]), "amsgrad": False, "params": list(state)}
    return {"state": state, "param_groups": [group]}


def _value(saved: Any) -> Any:
    return saved["param"] if isinstance(saved, Mapping) else saved


def _with_stand_ins(path: Path) -> dict[str, Any]:
    """Read a file that has objects of DeepSpeed next to its tensors (its loss scaler); they become `_Nothing`."""
    try:
        unknown = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        stand_ins: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = [
            (type("_Nothing", (_Nothing,), {}), name) for name in unknown if name.startswith("deepspeed.")
        ]
        with torch.serialization.safe_globals(stand_ins):
            found = torch.load(path, map_location="cpu", weights_only=True)
    except _DAMAGED as error:
        raise DataError(
            f"{path}: not readable as plain tensors, and nothing else is loaded: {_reason(error)}"
        ) from error
    return found if isinstance(found, dict) else {}


# ----------------------------------------------------------------------------------------------------------- weights


def read_weights(folder: Path) -> dict[str, Tensor]:
    """Return the weights in the folder that `weights` returned, by name; in DeepSpeed's layout, only the trained ones.

    Args:
        folder: The folder.

    Raises:
        DataError: The weights cannot be read.
    """
    if folder.name == "zero":
        homes = sorted(p for p in folder.iterdir() if (p / "fp32.pt").is_file())
        return {home.name: _value(_plain(home / "fp32.pt")) for home in homes}
    saved = _nested(folder)
    held = saved["model"] if isinstance(saved.get("model"), dict) else saved
    return {name: value for name, value in held.items() if isinstance(value, Tensor)}
