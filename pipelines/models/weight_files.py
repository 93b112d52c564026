"""Loading weights: every weight of the model comes from the files, and every weight of the files is used.

If they do not match, transformers only warns, continues with random values, and `quiet` silences its warnings. Such a
model has a loss without meaning. Therefore files and keys are compared here, and differences are errors.
"""

from __future__ import annotations

import re
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
    """Return the model of `AutoModelForCausalLM.from_pretrained(name, **options)`, after checking that it is complete.

    Tied weights, computed buffers, and weights that the model's class declares optional are not counted.

    Args:
        name: The folder or hub name.
        **options: Options of `from_pretrained`.

    Raises:
        DataError: Weights are missing, unexpected or of another shape; the message names the first and their number.
    """
    from transformers import AutoModelForCausalLM

    folder = Path(name)
    if folder.is_dir():
        check_settings(folder, trusted=bool(options.get("trust_remote_code")))
        check_files(folder)
    # other shapes are reported below by name; transformers' own error does not name them
    options |= {"output_loading_info": True, "ignore_mismatched_sizes": True}
    model, report = AutoModelForCausalLM.from_pretrained(name, **options)
    refuse(name, model, report)
    return model


def refuse(name: str, model: Any, report: Mapping[str, Any]) -> None:
    """Refuse a model if transformers' report on loading it shows that weights did not match.

    Args:
        name: The name of the model, for the message.
        model: The model.
        report: The loading info of transformers.

    Raises:
        DataError: Weights did not match.
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
        parts.append(f"{counted(extra, 'has', 'have')} no place in the model ({few(extra)})")
    if parts:
        raise DataError(
            f"{name}: the weights in the files do not match {kind}: {'; '.join(parts)}. Give the model from which they "
            "were saved; if this is intended, first save the model completely as a causal language model "
            "(AutoModelForCausalLM ... save_pretrained)"
        )
    if messages := report.get("error_msgs"):
        raise DataError(f"{name}: the weights in the files do not match {kind}: {str(next(iter(messages)))[:300]}")


def counted(keys: Collection[object], one: str, many: str) -> str:
    """Return a number of weights with its verb: `1 weight has`, `3 weights have`.

    Args:
        keys: The weights.
        one: The verb in the singular.
        many: The verb in the plural.
    """
    return f"{len(keys)} weight{'' if len(keys) == 1 else 's'} {one if len(keys) == 1 else many}"


def few(keys: list[str]) -> str:
    """Return the first of some names, and the number of the others.

    Args:
        keys: The names.
    """
    more = f" and {len(keys) - _SHOWN} more" if len(keys) > _SHOWN else ""
    return ", ".join(keys[:_SHOWN]) + more


def _shapes(entry: Any) -> str:
    if not isinstance(entry, tuple):
        return str(entry)
    name, saved, wanted = entry
    return f"{name} {list(saved)}, not {list(wanted)}"


def check_files(folder: Path) -> None:
    """Check the safetensors files of a model's folder: an index names files in its folder, and each can be opened.

    Args:
        folder: The folder.

    Raises:
        DataError: A file is damaged or missing, or contains weights as integers; the message names it.
    """
    index = folder / INDEX
    single = folder / "model.safetensors"
    names = ["model.safetensors"] if single.is_file() else _indexed(index) if index.is_file() else []
    quantised = "quantization_config" in _settings(folder)
    for name in names:
        keys(folder / name)
        if not quantised and (found := integers(folder / name)):
            raise DataError(
                f"{folder / name}: {counted(found, 'is', 'are')} saved as integers ({few(found)}), and config.json has "
                "no quantization_config that says how to read them; give the model before it was quantised, or restore "
                "config.json"
            )


def _indexed(index: Path) -> list[str]:
    """Return the shards that an index names. Only plain names of safetensors files are allowed."""
    table = files.read_json(index)
    placed = table.get("weight_map") if isinstance(table, dict) else None
    if not isinstance(placed, dict) or not placed or not all(isinstance(name, str) for name in placed.values()):
        raise DataError(f"{index}: is not an index of shards: expected weight_map, an object of weight: file")
    for weight, name in placed.items():
        if Path(name).name != name or "\\" in name or name in ("", ".", ".."):
            raise DataError(f"{index}: puts {weight!r} into {name!r}, which is not a file in its folder")
        if not name.endswith(".safetensors"):
            raise DataError(f"{index}: puts {weight!r} into {name!r}; only .safetensors files are read, never pickles")
        if not (index.parent / name).is_file():
            raise DataError(f"{index}: names the shard {name}, which is missing; copy the whole folder again")
    return sorted(set(placed.values()))


def keys(path: Path) -> list[str]:
    """Return the names of the tensors in a safetensors file.

    Args:
        path: The file.

    Raises:
        DataError: The header is damaged, or the file is truncated.
    """
    try:
        with safe_open(path, "pt") as saved:
            return sorted(saved.keys())
    except (SafetensorError, OSError, ValueError) as error:
        raise DataError(
            f"{path}: not readable as safetensors: {first_line(error)}; the file may be truncated"
        ) from error


def integers(path: Path) -> list[str]:
    """Return the names of the matrices in a safetensors file that are saved as integers.

    A cast reads them as other weights. Vectors and scalars may be counters.

    Args:
        path: The file.
    """
    with safe_open(path, "pt") as saved:
        slices = {name: saved.get_slice(name) for name in saved.keys()}  # noqa: SIM118
    return sorted(
        name
        for name, part in slices.items()
        if len(part.get_shape()) > 1 and re.fullmatch(r"[IU]\d+|BOOL", part.get_dtype())
    )


def _settings(folder: Path) -> Mapping[str, Any]:
    found = files.read_json(folder / "config.json", limit=_MOST_BYTES) if (folder / "config.json").is_file() else {}
    return found if isinstance(found, dict) else {}


def check_settings(folder: Path, *, trusted: bool) -> None:
    """Check that the small JSON files of a model's or tokenizer's folder are objects and request no code.

    transformers runs attention code of a hub repository that config.json names ("owner/repository") without asking.

    Args:
        folder: The folder.
        trusted: Whether the user allowed code on this command line.

    Raises:
        DataError: A file is not a JSON object; the message names it.
        UsageError: A file requests code.
    """
    for name in _SETTINGS:
        path = folder / name
        if not path.is_file():
            continue
        value = files.read_json(path, limit=_MOST_BYTES)
        if not isinstance(value, dict):
            raise DataError(f"{path}: contains {_kind(value)}; expected a JSON object, as written by save_pretrained")
        if name == "config.json" and not trusted and (kernel := _kernel(value)) is not None:
            raise UsageError(
                f"{path}: requests attention code of the hub repository {kernel!r}, which is not run unless this "
                "command allows it; if you trust it, add --trust-remote-code"
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
