"""Features that `datatools select` has written, checked and read for the rows of a training run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from datatools import PROJECTORS, DataError, FeatureTable, GradientFeatures
from pipelines.settings.train import CoresetConfig

_NAME = "features"
BLOCK = 2048


def read(
    settings: CoresetConfig,
    keys: Mapping[int, str],
    *,
    model: Mapping[str, str] | Callable[[Mapping[str, str]], Mapping[str, str]],
    where: Callable[[int], object],
    seed: int,
    encoding: Mapping[str, object] | None = None,
) -> FeatureTable:
    """Return the stored features of the rows of a run, with at most `kept_dim` numbers per row.

    Gradients get their length back, because a mean of gradients depends on it; hidden states stay unit vectors.

    Args:
        settings: The settings of coresets, with a store.
        keys: The number of each row -> its content key.
        model: The digests of the model that will be trained; or a function that returns them, given those of the store.
        where: A row's number -> its name in errors.
        seed: The seed of the projection.
        encoding: How rows become tokens; None if that is not known.

    Raises:
        DataError: The folder has no features, or those of another model, of other rows, or not of all of them.
    """
    folder = Path(settings.store or "")
    if not (folder / "plan.json").is_file():
        raise DataError(f"coreset.store: {folder} has no features (no plan.json){_inside(folder)}")
    store = GradientFeatures.open(folder)
    _same_model(store, model)
    if encoding is not None and store.meta.get("encoding") not in (None, dict(encoding)):
        raise DataError(
            f"coreset.store: the features in {folder} were computed with another chat template, tokenizer or "
            "max_length; select again with the settings of this run"
        )
    there = {key for unit in range(store.units) for key in store.unit_keys(unit)}
    missing = [number for number, key in keys.items() if key not in there]
    if missing:
        raise DataError(
            f"coreset.store: {folder} has no features of {len(missing):,} of the {len(keys):,} rows (the first is "
            f"{where(missing[0])}): it was made for other rows; select on this data first, or train on that data"
        )
    if gone := store.missing_units():
        raise DataError(
            f"coreset.store: {len(gone)} of the {store.units} units of {folder} are missing or damaged; run the "
            "selection again, which computes them"
        )
    held = store.rows()
    lengths = dict(zip(held.keys, held.norms.tolist(), strict=True))
    bad = {key for key, status in zip(held.keys, held.status, strict=True) if status == "nonfinite"}
    table = FeatureTable(list(keys))
    for start in range(0, len(keys), BLOCK):
        numbers = list(keys)[start : start + BLOCK]
        names = [keys[number] for number in numbers]
        features = store.take(names)
        if "gradient" in store.meta:
            features = features * torch.tensor([lengths[name] for name in names])[:, None]
        features[torch.tensor([name in bad for name in names])] = torch.nan  # such rows are drawn at random
        table.put(numbers, shortened(features, settings.kept_dim, seed=seed), step=0)
    return table


def shortened(features: Tensor, dim: int, *, seed: int) -> Tensor:
    """Return features with at most `dim` numbers, by a random projection that preserves inner products.

    Args:
        features: float32 [n, d].
        dim: The largest number.
        seed: The seed of the projection.
    """
    if features.shape[1] <= dim:
        return features
    sketch = PROJECTORS["sjlt"].of({_NAME: features.shape[1:]}, dim=dim, seed=seed)
    return sketch.project({_NAME: features})


def _same_model(
    store: GradientFeatures, model: Mapping[str, str] | Callable[[Mapping[str, str]], Mapping[str, str]]
) -> None:
    """Refuse features of another model; the error names the files that differ."""
    theirs = store.meta.get("model")
    if not isinstance(theirs, Mapping):
        raise DataError(f"coreset.store: {store.folder} does not say which model its features are of; select again")
    if callable(model):
        model = model(theirs)
    if dict(theirs) == dict(model):
        return
    differing = sorted(name for name in {*theirs, *model} if theirs.get(name) != model.get(name))
    raise DataError(
        f"coreset.store: the features in {store.folder} are of another model ({_some(differing)} differ); select with "
        "the model that this run trains"
    )


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _inside(folder: Path) -> str:
    """Name the stores in or below a folder that is none itself, such as that of a run."""
    if not folder.is_dir():
        return "; there is no such folder" if not folder.exists() else ""
    found = sorted(path.parent for path in [*folder.glob("*/plan.json"), *folder.glob("*/*/plan.json")])
    return f"; it contains {', '.join(map(str, found[:4]))}: name one of them" if found else ""
