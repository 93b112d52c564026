"""The parameters whose gradients become features, by layer and by module."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from datatools import DataError
from pipelines.models.losses import seen_parameters
from pipelines.settings.select import FeaturesConfig

_NUMBER = re.compile(r"\.(\d+)\.")
_OF_ADAPTERS = frozenset({"base_model", "model", "lora_A", "lora_B", "default", "weight", "bias"})


def covered_by(module: Any, params: Mapping[str, Tensor], features: FeaturesConfig) -> list[str]:
    """Return the parameters of a model from which features are made, by their method and by layer and module.

    Args:
        module: The model.
        params: The candidates by name.
        features: The settings.

    Raises:
        DataError: As `chosen`.
    """
    return chosen(seen_parameters(module, params, features.method), features)


def chosen(names: Sequence[str], features: FeaturesConfig) -> list[str]:
    """Return the parameters that `features.layers` and `features.modules` keep, in the same order.

    The layer of a parameter is the first number in its name. Parameters without one (embeddings, the last norm) belong
    to no layer.

    Args:
        names: The parameters to choose from.
        features: The settings.

    Raises:
        DataError: A layer or a module that the settings name has none of these parameters.

    Example:
        >>> names = ["model.embed.weight", *(f"model.layers.{i}.{p}_proj.weight" for i in range(4) for p in "qv")]
        >>> chosen(names, FeaturesConfig(layers="last-2", modules=["v_proj"]))
        ['model.layers.2.v_proj.weight', 'model.layers.3.v_proj.weight']
    """
    kept = list(names)
    if features.layers is not None:
        layers = _layers(kept, features.layers)
        kept = [name for name in kept if _layer(name) in layers]
    if features.modules is not None:
        for module in features.modules:
            if not any(_within(name, module) for name in kept):
                parts = sorted({part for name in kept for part in name.split(".") if not part.isdigit()} - _OF_ADAPTERS)
                raise DataError(
                    f"features.modules: no parameter that features cover is in a module {module!r}"
                    f"{'' if features.layers is None else f' of features.layers={features.layers}'}; "
                    f"the parts of their names are {', '.join(parts)}"
                )
        kept = [name for name in kept if any(_within(name, module) for module in features.modules)]
    return kept


def _layers(names: Sequence[str], wanted: str | list[int]) -> set[int]:
    """Return the numbers of the layers that the setting means."""
    there = sorted({layer for name in names if (layer := _layer(name)) is not None})
    if not there:
        raise DataError(
            f"features.layers={wanted}: no parameter that features cover has the number of a layer in its name, such "
            f"as model.layers.3.mlp.weight (first: {names[0] if names else 'none'}); use features.modules"
        )
    if isinstance(wanted, list):
        numbers = {layer + there[-1] + 1 if layer < 0 else layer for layer in wanted}
        if missing := sorted(numbers - set(there)):
            raise DataError(
                f"features.layers={wanted}: layer {missing[0]} has no parameter that features cover; "
                f"the layers are {', '.join(map(str, there))}"
            )
        return numbers
    where, count = wanted.split("-")
    if int(count) > len(there):
        raise DataError(f"features.layers={wanted}: features cover {len(there)} layers")
    start = {"first": 0, "middle": (len(there) - int(count)) // 2, "last": len(there) - int(count)}[where]
    return set(there[start : start + int(count)])


def _layer(name: str) -> int | None:
    found = _NUMBER.search(name)
    return int(found[1]) if found else None


def _within(name: str, module: str) -> bool:
    return f".{module}." in f".{name}."
