"""The recipe that an order was made for: written into `order.npz` by `datatools order`, trained by `train --order`.

An order is estimated for one way of training: one model, one optimizer with its warm-up, one learning rate. The
prediction says nothing of another way. So the file carries the recipe, `train` takes it over, and a setting that was
given and contradicts it is an error.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, Field, ValidationError

from datatools import DataError, Order, UsageError, files
from pipelines.rows.rows import Rows
from pipelines.runs.messages import say, warn
from pipelines.settings.base import Columns, Seed, Settings
from pipelines.settings.order import OrderConfig
from pipelines.settings.parts import LoraConfig, TrainingConfig
from pipelines.settings.train import TrainConfig

_UNUSED = {"zo"}  # settings of a training run without a say where gradients are of back-propagation


class ModelRecipe(Settings):
    """What of `model` decides on tokens and arithmetic; a template in a file is known by the tokens that it makes."""

    dtype: Literal["float32"]
    attention: Literal["sdpa", "eager"]
    max_length: int | None = Field(ge=2, le=2**20)
    on_long: Literal["truncate", "skip", "error"]
    chat: Literal["auto", "tulu"] | None


class Reading(Settings):
    """How rows are read, taken over where `train` is not told: what comes of it is compared row by row."""

    on_bad_row: Literal["error", "skip", "quarantine"]
    source_key: str = Field(min_length=1, max_length=256)
    columns: Columns | None
    preference: Literal["chosen"] | None


class OrderRecipe(Settings):
    """One way of training, in plain values."""

    format: Literal[1] = 1
    training: TrainingConfig
    lora: LoraConfig | None
    seed: Seed
    model: ModelRecipe
    reading: Reading
    digests: dict[str, str]
    """Of the model's files."""
    rows: dict[str, str]
    """Id of each row of the batches and of the warm-up -> digest of its tokens and labels."""
    warm_up: list[list[str]]
    """The ids of each step that is taken before the order begins, at the learning rate of its first step."""
    optimizer: list[dict[str, Any]]
    """`described` of the optimizer."""


def of(
    config: OrderConfig,
    rows: Rows,
    batches: Sequence[Sequence[int]],
    warm_up: Sequence[Sequence[int]],
    digests: Mapping[str, str],
    optimizer: Any,
) -> dict[str, Any]:
    """The recipe of a run of `datatools order`, for `Order.recipe`."""
    used = dict.fromkeys(row for batch in [*batches, *warm_up] for row in batch)
    model: dict[str, Any] = {name: getattr(config.model, name) for name in ModelRecipe.model_fields}
    chat = model["chat"] if model["chat"] in ("auto", "tulu") else None
    recipe = OrderRecipe(
        training=TrainingConfig.model_validate(config.training.model_dump()),
        lora=config.lora,
        seed=config.seed,
        model=ModelRecipe.model_validate(model | {"dtype": "float32", "chat": chat}),
        reading=Reading.model_validate({name: getattr(config.data, name) for name in Reading.model_fields}),
        digests=dict(digests),
        rows={rows.pool.ids[row]: rows.keys[row] for row in used},
        warm_up=[[rows.pool.ids[row] for row in batch] for batch in warm_up],
        optimizer=described(optimizer),
    )
    return recipe.model_dump(mode="json")


def described(optimizer: Any) -> list[dict[str, Any]]:
    """The param groups of an optimizer as plain values: rule with all its settings, rates, and whose they are."""
    found = [
        {
            "rule": group["rule"].describe(),
            "lr": float(group["lr"]),
            "weight_decay": float(group["weight_decay"]),
            "parameters": files.digest("\n".join(group["param_names"]).encode()),
        }
        for group in optimizer.param_groups
    ]
    plain: list[dict[str, Any]] = json.loads(json.dumps(found))
    return plain


def read(path: Path) -> tuple[Order, OrderRecipe | None]:
    """An order and its recipe, None where the file carries none. Raises: DataError for a file that is no order."""
    order = Order.load(path)
    if order.recipe is None:
        return order, None
    try:
        return order, OrderRecipe.model_validate(dict(order.recipe))
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise DataError(
            f"order {path}: its recipe cannot be used ({where}: {first['msg']}): another version of datatools wrote "
            "it; make the order again"
        ) from error


def adopt(config: TrainConfig, recipe: OrderRecipe | None) -> TrainConfig:
    """`config` with the recipe of its order in place of the settings that were not given.

    Raises: UsageError for settings that were given and contradict it, with both values.
    """
    if recipe is None:
        warn(
            f"--order {config.order} carries no recipe (an older version, or other code, wrote it): this run trains by "
            "its own settings, and what was estimated for the order holds only if they are those of `datatools order`"
        )
        return config
    wrong = list(_contradictions(config, recipe))
    if wrong:
        shown = "; ".join(f"{name} is {_shown(mine)} here and {_shown(theirs)} there" for name, mine, theirs in wrong)
        raise UsageError(
            f"--order {config.order} was made for another recipe: {shown}. An order holds for the recipe that it was "
            "estimated for: leave these settings out to train by it, or make an order for yours with `datatools order`"
        )
    model = {name: value for name in ModelRecipe.model_fields if (value := getattr(recipe.model, name)) is not None}
    reading = {name: getattr(recipe.reading, name) for name in Reading.model_fields}
    kept = config.data.model_fields_set
    return config.model_copy(
        update={
            "training": recipe.training,
            "lora": recipe.lora,
            "seed": recipe.seed,
            "model": config.model.model_copy(update=model),
            "data": config.data.model_copy(update={k: v for k, v in reading.items() if k not in kept}),
        }
    )


def _contradictions(config: TrainConfig, recipe: OrderRecipe) -> Iterator[tuple[str, object, object]]:
    """(setting, its value here, the recipe's) of those that were given: on the command line, by --set or in YAML."""
    yield from _differing("training.", config.training, recipe.training)
    if "lora" in config.model_fields_set and (config.lora is None or recipe.lora is None):
        if config.lora is not recipe.lora:
            here, there = (0 if lora is None else lora.rank for lora in (config.lora, recipe.lora))
            yield "lora.rank", here, there
    elif config.lora is not None and recipe.lora is not None:
        yield from _differing("lora.", config.lora, recipe.lora)
    yield from _differing("model.", config.model, recipe.model)
    if "seed" in config.model_fields_set and config.seed != recipe.seed:
        yield "seed", config.seed, recipe.seed


def _differing(prefix: str, mine: BaseModel, theirs: BaseModel) -> Iterator[tuple[str, object, object]]:
    known = type(theirs).model_fields
    for name in type(mine).model_fields:
        if name in mine.model_fields_set and name in known and name not in _UNUSED:
            here, there = getattr(mine, name), getattr(theirs, name)
            if not _agree(name, here, there):
                yield prefix + name, here, there


def _agree(name: str, here: object, there: object) -> bool:
    if name in ("dtype", "chat") and (here == "auto" or there is None):
        return True
    if isinstance(here, Mapping) and isinstance(there, Mapping):  # of options single ones are given
        return all(key in there and _plain(value) == _plain(there[key]) for key, value in here.items())
    return _plain(here) == _plain(there)


def _plain(value: object) -> object:
    return json.loads(json.dumps(value, default=str))


def _shown(value: object) -> str:
    text = "none" if value is None else value if isinstance(value, str) else json.dumps(value, default=str)
    return text if len(text) <= 120 else f"{text[:117]}..."


def check(order: Path, recipe: OrderRecipe, rows: Rows, digests: Mapping[str, str]) -> None:
    """Raise DataError unless model and rows are those that the order was made for, saying which are not."""
    for name in sorted({*recipe.digests, *digests}):
        if recipe.digests.get(name) != digests.get(name):
            raise DataError(
                f"--order {order} was made for another model: {name} is {digests.get(name, 'not there')} here and "
                f"{recipe.digests.get(name, 'not there')} there; train the model that `datatools order` was given"
            )
    here = {rows.pool.ids[row]: rows.keys[row] for row in range(len(rows)) if rows.pool.ids[row] in recipe.rows}
    other = [identity for identity, key in recipe.rows.items() if here.get(identity, key) != key]
    if other:
        raise DataError(
            f"--order {order}: row {other[0]!r} (and {len(other) - 1} more) has other tokens than the order was "
            "estimated with: the data, the chat template or how its columns are read differs; give `datatools train` "
            "what `datatools order` was given"
        )


def check_optimizer(order: Path, recipe: OrderRecipe, optimizer: Any) -> None:
    """Raise DataError unless an optimizer built here steps as the one that the order was estimated with."""
    here = described(optimizer)
    for number, (mine, theirs) in enumerate(zip(here, recipe.optimizer, strict=False), start=1):
        for key in mine:
            if mine[key] != theirs.get(key):
                raise DataError(
                    f"--order {order}: this version builds another optimizer of its recipe (group {number}: {key} is "
                    f"{_shown(mine[key])} here and {_shown(theirs.get(key))} there); make the order again"
                )
    if len(here) != len(recipe.optimizer):
        raise DataError(
            f"--order {order}: this version builds another optimizer of its recipe ({len(here)} param groups here and "
            f"{len(recipe.optimizer)} there); make the order again"
        )


def announce(order: Path, recipe: OrderRecipe) -> None:
    """Say what is trained, and that it is the order's."""
    t = recipe.training
    clip = "no clipping" if t.gradient_clip is None else f"clipping at {t.gradient_clip:g}"
    what = "all weights" if recipe.lora is None else f"adapters of rank {recipe.lora.rank}"
    warm = f", after {len(recipe.warm_up)} warm-up steps on other rows" if recipe.warm_up else ""
    say(
        f"--order {order}: trains by the recipe that the order was estimated for: {t.optimizer}, learning rate "
        f"{t.learning_rate:g}, schedule {t.schedule}, weight decay {t.weight_decay:g}, {clip}, {what} in "
        f"{recipe.model.dtype}, seed {recipe.seed}{warm}"
    )


def warm_up_of(recipe: OrderRecipe) -> Order | None:
    """The steps before the order begins, in an order of their own."""
    if not recipe.warm_up:
        return None
    return Order(tuple(map(tuple, recipe.warm_up)), tuple(range(len(recipe.warm_up))))
