"""GGUF files converted to safetensors once, in the user's cache, and sealed: what a later run finds is what was made.

`complete.json` is written last and holds a digest of every file. A folder without it, with another digest, or with a
file too many is made again. Digests are compared whenever a process opens the model; a store's fingerprint is made of
the same ones, and `files.seal_once` reads each file once for both.
"""

from __future__ import annotations

import io
import os
from contextlib import redirect_stderr, suppress
from pathlib import Path
from typing import Any

import torch

from datatools import DataError, DatatoolsError, EnvironmentProblem, files
from pipelines.models import weight_files
from pipelines.models.quiet import quiet
from pipelines.runs.messages import say
from pipelines.texts import first_line

FORMAT = "2"
"""Part of the folder's name: another one when the conversion changes."""

SEAL = "complete.json"


def cache_folder() -> Path:
    """Where converted models are kept: $DATATOOLS_CACHE, else $XDG_CACHE_HOME/datatools, else ~/.cache/datatools."""
    if chosen := os.environ.get("DATATOOLS_CACHE"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "datatools"


def converted(gguf: Path) -> Path:
    """The GGUF file as a safetensors folder, keyed by the file's content; made on first use, and again when damaged.

    Raises:
        DataError: The file is not a GGUF model.
        EnvironmentProblem: The folder cannot be written.
    """
    key = files.seal_once(gguf).digest
    home = cache_folder() / "gguf"
    target = home / f"{gguf.stem}-{key[:16]}-v{FORMAT}"
    wrong = fault(target)
    if wrong is None:
        return target
    _check(gguf)
    if target.is_dir():
        say(f"the converted model in {target} is damaged ({wrong}); it is made again")
    try:
        files.make_folder(home)
        files.remove_leftovers(home)
        with suppress(_Made), files.atomic_folder(target) as aside:
            _convert(gguf, aside)
            sealed = {path.name: files.digest_file(path) for path in sorted(aside.iterdir())}
            files.write_json(aside / SEAL, {"gguf": gguf.name, "digest": key, "format": FORMAT, "files": sealed})
            if fault(target) is None:  # another process was first, and may be reading its folder
                raise _Made
    except (OSError, EnvironmentProblem) as error:
        raise EnvironmentProblem(
            f"{gguf.name}: could not be converted into {target}: {error}; set DATATOOLS_CACHE to a folder with space"
        ) from error
    if (wrong := fault(target)) is not None:
        raise EnvironmentProblem(f"{target}: damaged as soon as it was written ({wrong}); check the disk")
    return target


class _Made(Exception):
    """The folder is there by now."""


def fault(folder: Path) -> str | None:
    """What is wrong with a converted folder; None when every file is as it was written."""
    if not folder.is_dir():
        return "it is not there"
    try:
        sealed = files.read_json(folder / SEAL)
        listed = sealed["files"]
        found = {path.name for path in folder.iterdir()} - {SEAL}
        if found != set(listed):
            return f"{sorted(found ^ set(listed))[0]} is missing or too many"
        for name, digest in listed.items():
            if files.seal_once(folder / name).digest != digest:
                return f"{name} has changed"
    except (DatatoolsError, OSError, KeyError, TypeError, AttributeError):
        return f"{SEAL} cannot be read"
    return None


def _check(path: Path) -> None:
    """Does the file begin as GGUF? Raises: DataError."""
    try:
        with open(path, "rb") as file:
            begin = file.read(4)
        if begin != b"GGUF":
            what = "is empty" if not begin else "does not begin as one"
            raise DataError(f"{path}: no GGUF file: it {what}; copy or download it again")
    except OSError as error:
        raise files.explain(error, path, "read") from error


def _convert(gguf: Path, folder: Path) -> None:
    """Write model and tokenizer as safetensors into `folder`.

    A model that transformers read from GGUF refuses `save_pretrained`, so its weights move to a fresh model first.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source: dict[str, Any] = {
        "pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name, "trust_remote_code": False
    }  # fmt: skip
    try:
        with quiet():
            with redirect_stderr(io.StringIO()):  # its bar is drawn whatever transformers' settings say
                read, report = AutoModelForCausalLM.from_pretrained(
                    **source, dtype=torch.float32, output_loading_info=True, ignore_mismatched_sizes=True
                )
            weight_files.refuse(str(gguf), read, report)
            config = read.config
            if hasattr(config, "quantization_config"):
                del config.quantization_config
            fresh = type(read)(config)
            fresh.load_state_dict(read.state_dict())
            fresh.tie_weights()
            fresh.save_pretrained(folder)
            AutoTokenizer.from_pretrained(**source).save_pretrained(folder)
    except (DatatoolsError, OSError, MemoryError):
        raise
    except Exception as error:  # a file from anywhere, read by other people's code
        raise DataError(
            f"{gguf}: not readable as a GGUF model: {first_line(error)}; copy or download it again"
        ) from error
