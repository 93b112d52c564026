"""The number of parameters of a model, without its weights: from a size such as 8B, or from its configuration."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

from datatools import DataError, EnvironmentProblem, UsageError
from pipelines.models.named import find
from pipelines.models.quiet import quiet
from pipelines.settings.plan import SUFFIXES, amount
from pipelines.texts import first_line

_SIZE = re.compile(r"[\d.]+(?:e\d+)?[a-zA-Z]{0,3}", re.IGNORECASE)


def parameters(name: str) -> float:
    """Return the number of parameters of a model.

    Args:
        name: A size such as "8B", "135M" or "1.5e9", or a model: a folder, a hub name, or a GGUF file.

    Raises:
        UsageError: The text is no size, and there is no such model.
        DataError: The model's configuration cannot be read.
        EnvironmentProblem: The hub cannot be reached, or a package is missing.

    Example:
        >>> parameters("135M")
        135000000.0
    """
    if _SIZE.fullmatch(name) and not Path(name).exists():
        found = amount(name)
        if found is None or not 1e3 <= found <= 1e14:
            number = re.match(r"[\d.]+", name)
            near = f"; did you mean '{number[0]}B'?" if number is not None else ""
            raise UsageError(
                f"--model {name}: no size of a model{near}; give one such as 135M, 8B or 1T, or a folder or hub name"
                if found is None
                else f"--model {name}: {found:,.0f} parameters; give a size from 1k to 100T, such as 135M or 8B"
            )
        return found
    found_model = find(name)
    if isinstance(found_model, Path) and found_model.is_file():
        return _of_gguf(found_model)
    return _of_config(name, str(found_model))


def _of_gguf(path: Path) -> float:
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise EnvironmentProblem(
            f"--model {path}: reading it needs gguf: pip install gguf, or give its size"
        ) from error
    try:
        return float(sum(math.prod(int(n) for n in tensor.shape) for tensor in GGUFReader(path).tensors))
    except Exception as error:  # the reader checks little, and raises whatever comes
        raise DataError(f"--model {path}: cannot be read as GGUF ({first_line(error)})") from error


def _of_config(name: str, source: str) -> float:
    import torch

    with quiet():
        from transformers import AutoConfig, AutoModelForCausalLM

        try:
            config: Any = AutoConfig.from_pretrained(source, trust_remote_code=False)
            with torch.device("meta"):
                model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
        except Exception as error:  # of a library, whatever is wrong with the folder or the hub
            kind = DataError if Path(source).is_dir() else EnvironmentProblem
            raise kind(
                f"--model {name}: its size cannot be read ({first_line(error)}); give the number of parameters "
                f"instead, such as --model 8B (suffixes: {', '.join(letter.upper() for letter in SUFFIXES)})"
            ) from error
    return float(sum(p.numel() for p in model.parameters()))
