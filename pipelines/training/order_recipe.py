"""The recipe of an order: saved in `order.npz` by `datatools order` and trained by `train --order`.

An order is estimated for one way of training: one model, one optimizer with its warm-up, one learning rate. The
prediction does not apply to another. Therefore the file contains the recipe, `train` uses it, and a given setting that
contradicts it is an error.
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
    """The settings of `model` that affect tokens and arithmetic; a template in a file is identified by its tokens."""

    dtype: Literal["float32"]
    attention: Literal["sdpa", "eager"]
    max_length: int | None = Field(ge=2, le=2**20)
    on_long: Literal["truncate", "skip", "error"]
    chat: Literal["auto", "tulu"] | None


class Reading(Settings):
    """How rows are read, used if `train` gets no such setting; the resulting rows are compared one by one."""

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
    """The digests of the model's files."""
    rows: dict[str, str]
    """The id of each row of the batches and of the warm-up -> digest of its tokens and labels."""
    warm_up: list[list[str]]
    """The row ids of each step before the order begins, which have the learning rate of its first step."""
    optimizer: list[dict[str, Any]]
    """The optimizer, from `described`."""


def of(
    config: OrderConfig,
    rows: Rows,
    batches: Sequence[Sequence[int]],
    warm_up: Sequence[Sequence[int]],
    digests: Mapping[str, str],
    optimizer: Any,
) -> dict[str, Any]:
    """Return the recipe of a run of `datatools order`, for `Order.recipe`.

    Args:
        config: The settings of the run.
        rows: The rows.
        batches: The rows of each batch.
        warm_up: The rows of each warm-up step.
        digests: The digests of the model's files.
        optimizer: The optimizer.
    """
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
    """Return the param groups of an optimizer as plain values: the rule with all settings, rates, and parameter names.

    Args:
        optimizer: The optimizer.
    """
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
    """Return an order and its recipe; None for the recipe if the file contains none.

    Args:
        path: The order file.

    Raises:
        DataError: The file is not an order, or its recipe cannot be used.
    """
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
            "it; create the order again"
        ) from error


def adopt(config: TrainConfig, recipe: OrderRecipe | None) -> TrainConfig:
    """Return the settings with the recipe of the order in place of those that were not given.

    Args:
        config: The settings of `datatools train`.
        recipe: The recipe of its order.

    Raises:
        UsageError: Given settings contradict the recipe; the message has both values.
    """
    if recipe is None:
        warn(
            f"--order {config.order} contains no recipe (an older version or other code wrote it): this run uses "
            "its own settings, and the estimates hold only if they equal those of `datatools order`"
        )
        return config
    wrong = list(_contradictions(config, recipe))
    if wrong:
        shown = "; ".join(f"{name} is {_shown(mine)} here and {_shown(theirs)} there" for name, mine, theirs in wrong)
        raise UsageError(
            f"--order {config.order} was made for another recipe: {shown}. An order is valid only for the recipe "
            "it was estimated for: omit these settings to use it, or create an order for yours with `datatools order`"
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
    """Yield (setting, its value here, the recipe's value) of the given settings that differ."""
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
    if isinstance(here, Mapping) and isinstance(there, Mapping):  # only some of the options may be given
        return all(key in there and _plain(value) == _plain(there[key]) for key, value in here.items())
    return _plain(here) == _plain(there)


def _plain(value: object) -> object:
    return json.loads(json.dumps(value, default=str))


def _shown(value: object) -> str:
    text = "none" if value is None else value if isinstance(value, str) else json.dumps(value, default=str)
    return text if len(text) <= 120 else f"{text[:117]}..."


def check(order: Path, recipe: OrderRecipe, rows: Rows, digests: Mapping[str, str]) -> None:
    """Check that model and rows are those for which the order was made.

    Args:
        order: The order file, for messages.
        recipe: Its recipe.
        rows: The rows.
        digests: The digests of the model's files.

    Raises:
        DataError: They differ; the message says which.
    """
    for name in sorted({*recipe.digests, *digests}):
        if recipe.digests.get(name) != digests.get(name):
            raise DataError(
                f"--order {order} was made for another model: {name} is {digests.get(name, 'missing')} here and "
                f"{recipe.digests.get(name, 'missing')} there; train the same model as `datatools order`"
            )
    here = {rows.pool.ids[row]: rows.keys[row] for row in range(len(rows)) if rows.pool.ids[row] in recipe.rows}
    other = [identity for identity, key in recipe.rows.items() if here.get(identity, key) != key]
    if other:
        raise DataError(
            f"--order {order}: row {other[0]!r} (and {len(other) - 1} more) has other tokens than when the order was "
            "estimated: the data, the chat template or the columns differ; give `datatools train` "
            "the same inputs as `datatools order`"
        )


def check_optimizer(order: Path, recipe: OrderRecipe, optimizer: Any) -> None:
    """Check that an optimizer that is built here equals the one with which the order was estimated.

    Args:
        order: The order file, for messages.
        recipe: Its recipe.
        optimizer: The optimizer.

    Raises:
        DataError: They differ.
    """
    here = described(optimizer)
    for number, (mine, theirs) in enumerate(zip(here, recipe.optimizer, strict=False), start=1):
        for key in mine:
            if mine[key] != theirs.get(key):
                raise DataError(
                    f"--order {order}: this version builds another optimizer from its recipe (group {number}: {key} is "
                    f"{_shown(mine[key])} here and {_shown(theirs.get(key))} there); make the order again"
                )
    if len(here) != len(recipe.optimizer):
        raise DataError(
            f"--order {order}: this version builds another optimizer from its recipe ({len(here)} groups here and "
            f"{len(recipe.optimizer)} there); make the order again"
        )


def announce(order: Path, recipe: OrderRecipe) -> None:
    """Print what is trained, and that it is the recipe of the order.

    Args:
        order: The order file.
        recipe: Its recipe.
    """
    t = recipe.training
    clip = "no clipping" if t.gradient_clip is None else f"clipping at {t.gradient_clip:g}"
    what = "all weights" if recipe.lora is None else f"adapters of rank {recipe.lora.rank}"
    warm = f", after {len(recipe.warm_up)} warm-up steps on other rows" if recipe.warm_up else ""
    say(
        f"--order {order}: trains with the recipe for which the order was estimated: {t.optimizer}, learning rate "
        f"{t.learning_rate:g}, schedule {t.schedule}, weight decay {t.weight_decay:g}, {clip}, {what} in "
        f"{recipe.model.dtype}, seed {recipe.seed}{warm}"
    )


def warm_up_of(recipe: OrderRecipe) -> Order | None:
    """Return the steps before the order begins, as a separate order; None if there are none.

    Args:
        recipe: The recipe.
    """
    if not recipe.warm_up:
        return None
    return Order(tuple(map(tuple, recipe.warm_up)), tuple(range(len(recipe.warm_up))))
