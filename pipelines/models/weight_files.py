"""Weights into a model: every weight of the model comes from the files, and every weight of the files has its place.

transformers warns when they do not match and goes on with what it draws at random, and `quiet` silences its warnings;
a model so made has a loss, and it means nothing. So files and keys are compared here, and what differs is an error.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from datatools import DataError, UsageError, files
from pipelines.texts import first_line

INDEX = "model.safetensors.index.json"
_SHOWN = 3
_SETTINGS = ("config.json", "generation_config.json", "tokenizer_config.json", "special_tokens_map.json")
_MOST_BYTES = 64 << 20


def read(name: str, **options: Any) -> Any:
    """What `AutoModelForCausalLM.from_pretrained(name, **options)` gives, once it is known to be complete.

    Weights that are tied to another, buffers that are computed, and what the model's class declares to be no loss are
    transformers' to know, and are not counted.

    Raises:
        DataError: Weights are missing, unexpected or of another shape; the message names the first, and their number.
    """
    from transformers import AutoModelForCausalLM

    folder = Path(name)
    if folder.is_dir():
        check_settings(folder, trusted=bool(options.get("trust_remote_code")))
        check_files(folder)
    # what has another shape is reported below, by name; transformers' own error does not name it
    options |= {"output_loading_info": True, "ignore_mismatched_sizes": True}
    model, report = AutoModelForCausalLM.from_pretrained(name, **options)
    refuse(name, model, report)
    return model


def refuse(name: str, model: Any, report: Mapping[str, Any]) -> None:
    """Refuse a model if transformers' report on loading it says that weights did not fit.

    Raises:
        DataError: They did not.
    """
    kind = type(model).__name__
    parts = []
    shapes = sorted(report.get("mismatched_keys") or ())
    if shapes:
        parts.append(f"{counted(shapes, 'has', 'have')} another shape ({few([_shapes(entry) for entry in shapes])})")
    missing = sorted(report.get("missing_keys") or ())
    if missing:
        parts.append(f"{counted(missing, 'is', 'are')} missing ({few(missing)})")
    extra = sorted(report.get("unexpected_keys") or ())
    if extra:
        parts.append(f"{counted(extra, 'has', 'have')} no place in it ({few(extra)})")
    if parts:
        raise DataError(
            f"{name}: the weights in the files are not those of {kind}: {'; '.join(parts)}. Give the model that they "
            "were saved from; a model that is meant to be so must first be saved whole, as a causal language model "
            "(AutoModelForCausalLM ... save_pretrained)"
        )
    if messages := report.get("error_msgs"):
        raise DataError(f"{name}: the weights in the files are not those of {kind}: {str(next(iter(messages)))[:300]}")


def counted(keys: Collection[object], one: str, many: str) -> str:
    """`1 weight has`, `3 weights have`."""
    return f"{len(keys)} weight{'' if len(keys) == 1 else 's'} {one if len(keys) == 1 else many}"


def few(keys: list[str]) -> str:
    """The first of the names, and how many there are besides."""
    more = f" and {len(keys) - _SHOWN} more" if len(keys) > _SHOWN else ""
    return ", ".join(keys[:_SHOWN]) + more


def _shapes(entry: Any) -> str:
    if not isinstance(entry, tuple):
        return str(entry)
    name, saved, wanted = entry
    return f"{name} {list(saved)}, not {list(wanted)}"


def check_files(folder: Path) -> None:
    """The safetensors files of a model's folder: an index names files beside it, and each of them can be opened.

    Raises:
        DataError: A file is damaged or missing; the message names it.
    """
    index = folder / INDEX
    single = folder / "model.safetensors"
    names = ["model.safetensors"] if single.is_file() else _indexed(index) if index.is_file() else []
    for name in names:
        keys(folder / name)


def _indexed(index: Path) -> list[str]:
    """The shards that an index names. Only plain names of safetensors files: it may not point anywhere else."""
    table = files.read_json(index)
    placed = table.get("weight_map") if isinstance(table, dict) else None
    if not isinstance(placed, dict) or not placed or not all(isinstance(name, str) for name in placed.values()):
        raise DataError(f"{index}: is no index of shards: expected weight_map, an object of weight: file")
    for weight, name in placed.items():
        if Path(name).name != name or "\\" in name or name in ("", ".", ".."):
            raise DataError(f"{index}: puts {weight!r} into {name!r}, which is not a file of its own folder")
        if not name.endswith(".safetensors"):
            raise DataError(f"{index}: puts {weight!r} into {name!r}; only .safetensors files are read, never a pickle")
        if not (index.parent / name).is_file():
            raise DataError(f"{index}: names the shard {name}, which is not there; copy the whole folder again")
    return sorted(set(placed.values()))


def keys(path: Path) -> list[str]:
    """The names of the tensors in a safetensors file.

    Raises:
        DataError: The header is damaged, or the file is cut off.
    """
    try:
        with safe_open(path, "pt") as saved:
            return sorted(saved.keys())
    except (SafetensorError, OSError, ValueError) as error:
        raise DataError(f"{path}: not readable as safetensors: {first_line(error)}; is the file whole?") from error


def check_settings(folder: Path, *, trusted: bool) -> None:
    """The small JSON files of a model's or tokenizer's folder are objects, and ask for no code.

    transformers runs attention code of a hub repository that config.json names ("owner/repository"), without asking.

    Args:
        folder: The folder.
        trusted: Whether the user allowed code on this command line.

    Raises:
        DataError: A file is not a JSON object; the message names it.
        UsageError: A file asks for code.
    """
    for name in _SETTINGS:
        path = folder / name
        if not path.is_file():
            continue
        value = files.read_json(path, limit=_MOST_BYTES)
        if not isinstance(value, dict):
            raise DataError(f"{path}: holds {_kind(value)}; expected a JSON object, as save_pretrained writes it")
        if name == "config.json" and not trusted and (kernel := _kernel(value)) is not None:
            raise UsageError(
                f"{path}: asks for attention code of the hub repository {kernel!r}, which is not run unless this "
                "command says so; if you trust it add --trust-remote-code"
            )


def _kernel(value: Any) -> str | None:
    if isinstance(value, dict):
        for key, inner in value.items():
            if key.strip("_").endswith("attn_implementation"):
                asked = inner.values() if isinstance(inner, dict) else [inner]
                found = next((text for text in asked if isinstance(text, str) and "/" in text), None)
            else:
                found = _kernel(inner)
            if found is not None:
                return found
    return None


def _kind(value: Any) -> str:
    return {list: "a list", str: "a text", type(None): "null"}.get(type(value), "a number")
