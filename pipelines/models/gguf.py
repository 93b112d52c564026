"""GGUF files, converted to safetensors once, in the user's cache, and sealed.

`complete.json` is written last and has a digest of every file. A folder without it, with another digest, or with an
extra file is converted again. Digests are compared whenever a process opens the model; the fingerprint of a store is
made from the same digests, and `files.seal_once` reads each file once for both.
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
"""A part of the folder's name, which changes with the conversion."""

SEAL = "complete.json"


def cache_folder() -> Path:
    """Return the folder of converted models: $DATATOOLS_CACHE, $XDG_CACHE_HOME/datatools or ~/.cache/datatools."""
    if chosen := os.environ.get("DATATOOLS_CACHE"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "datatools"


def converted(gguf: Path) -> Path:
    """Return a GGUF file as a safetensors folder, which is created at first use and again if it is damaged.

    Args:
        gguf: The GGUF file. The name of the folder depends on its content.

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
        say(f"the converted model in {target} is damaged ({wrong}); it is created again")
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
            f"{gguf.name}: cannot be converted into {target}: {error}; set DATATOOLS_CACHE to a folder with free space"
        ) from error
    if (wrong := fault(target)) is not None:
        raise EnvironmentProblem(f"{target}: damaged immediately after it was written ({wrong}); check the disk")
    return target


class _Made(Exception):
    """The folder has been created by another process."""


def fault(folder: Path) -> str | None:
    """Return what is wrong with a converted folder; None if every file is as it was written.

    Args:
        folder: The folder.
    """
    if not folder.is_dir():
        return "it is missing"
    try:
        sealed = files.read_json(folder / SEAL)
        listed = sealed["files"]
        found = {path.name for path in folder.iterdir()} - {SEAL}
        if found != set(listed):
            return f"{sorted(found ^ set(listed))[0]} is missing or unexpected"
        for name, digest in listed.items():
            if files.seal_once(folder / name).digest != digest:
                return f"{name} has changed"
    except (DatatoolsError, OSError, KeyError, TypeError, AttributeError):
        return f"{SEAL} cannot be read"
    return None


def _check(path: Path) -> None:
    """Check that a file begins like a GGUF file.

    Raises:
        DataError: It does not.
    """
    try:
        with open(path, "rb") as file:
            begin = file.read(4)
        if begin != b"GGUF":
            what = "is empty" if not begin else "does not begin with 'GGUF'"
            raise DataError(f"{path}: not a GGUF file: it {what}; copy or download it again")
    except OSError as error:
        raise files.explain(error, path, "read") from error


def _convert(gguf: Path, folder: Path) -> None:
    """Write model and tokenizer as safetensors into `folder`.

    A model that transformers has read from GGUF cannot be saved with `save_pretrained`, so its weights are first moved
    to a new model.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source: dict[str, Any] = {
        "pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name, "trust_remote_code": False
    }  # fmt: skip
    try:
        with quiet():
            with redirect_stderr(io.StringIO()):  # its progress bar ignores the settings of transformers
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
    except Exception as error:  # an unknown file, read by third-party code
        raise DataError(
            f"{gguf}: not readable as a GGUF model: {first_line(error)}; copy or download it again"
        ) from error
