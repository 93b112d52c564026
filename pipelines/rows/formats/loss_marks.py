"""Marks in a row that say where it has loss: in its turns, and in lists beside them.

A mark of a known meaning is followed. Any other mark is refused by name: a row that trains what its author masked looks
like every other row afterwards.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

from pipelines.rows.formats.shape import Shape
from pipelines.rows.jsonl import Malformed, shown

LOSS = (
    "weight",
    "train",
    "training",
    "trainable",
    "train_on_turn",
    "loss",
    "loss_mask",
    "step_loss_mask",
    "loss_weight",
)
"""Keys with 1 for loss and 0 for none: OpenAI's and Mistral's, axolotl's, tinker's, ms-swift's and XTuner's, verl's,
slime's, and LLaMA-Factory's."""
NO_LOSS = ("masked",)
"""Keys with 1 for no loss: torchtune's."""
_MEANS_LOSS = dict.fromkeys(LOSS, True) | dict.fromkeys(NO_LOSS, False)

_CORE = frozenset(
    "loss losses mask masks masked masking unmasked train trained training trainable untrained weight weights "
    "supervise supervised learn learnable learned".split()
)
_AROUND = frozenset(
    "is no not do has use with in on for to of be the this only skip ignore exclude include compute calculate sft "
    "token tokens turn turns step message messages assistant response answer completion prompt target scale ratio "
    "flag value factor per".split()
)
_ROLES = ("assistant", "gpt", "bot", "model")
_ADVICE = (
    "say it with 'weight' in the turns of messages (1: loss, 0: none), or leave the column out to have loss on the "
    "answers (of a text: on all of it)"
)


@lru_cache(maxsize=4096)
def _is_mark(key: str) -> bool:
    """Return whether a key looks like a mark: it has a word such as loss or mask, and only words that go with it."""
    words = [word.lower() for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])", key)]
    return any(word in _CORE for word in words) and all(word in _CORE or word in _AROUND for word in words)


def has_no_loss(turn: Mapping[str, Any], k: int) -> bool:
    """Return whether an assistant turn says that it has no loss.

    Args:
        turn: The turn.
        k: Its position, for the message.

    Raises:
        Malformed: It says something else than yes or no, or under a key of an unknown meaning.
    """
    no = False
    for key, value in turn.items():
        if value is None or not isinstance(key, str):
            continue
        if key in _MEANS_LOSS:
            if value not in (0, 1):  # also False and True
                raise Malformed("turn_weight", f"turn {k + 1} has {key} {shown(repr(value), 30)}; expected 0 or 1")
            no = no or bool(value) is not _MEANS_LOSS[key]
        elif isinstance(value, bool | int | float | list) and _is_mark(key):
            raise Malformed(
                "turn_weight",
                f"turn {k + 1} has {shown(key, 30)} {shown(repr(value), 30)}, which may mean with loss or without; "
                + _ADVICE,
            )
    if parts := turn.get("train_detail"):
        raise Malformed(
            "turn_weight",
            f"turn {k + 1} has loss on parts of its text (train_detail: {shown(repr(parts), 40)}), which is not "
            "supported; split it into turns with and without loss (weight)",
        )
    return no


def with_lists(row: Mapping[str, Any], shape: Shape, used: Sequence[str] = ()) -> Shape:
    """Return the content of a row with the loss that lists beside its text say.

    A list with 0 or 1 for each turn is followed, whether it counts all turns, all but the system turn, or the answers
    alone. Lists that say what would happen anyway (loss on every token of a text, attention to every token) are
    allowed.

    Args:
        row: The JSON object.
        shape: Its content.
        used: Columns that the caller mapped to other meanings.

    Raises:
        Malformed: A list cannot be followed, or leaves nothing to learn.
    """
    masked, flags = set(shape.masked), []
    for key, value in row.items():
        if value is None or key in used or not isinstance(key, str):
            continue
        if key in ("label", "labels"):
            _refuse_labels(row, key, _list_in(value), shape)
        elif not _is_mark(key) and key != "attention_mask":
            continue
        elif (items := _list_in(value)) is not None:
            masked |= _masked_by(key, items, shape)
        elif isinstance(value, str) and key == "mask" and value.strip().lower() in _ROLES:
            raise Malformed("row_mask", f"the column mask is {shown(value, 30)}: no answer has loss")
        elif isinstance(value, bool | int | float) and key in _MEANS_LOSS and key != "loss":
            flags += ["row_weight_ignored"] * (bool(value) is not _MEANS_LOSS[key] or value not in (0, 1))
    if masked == shape.masked and not flags:
        return shape
    if all(k in masked for k, turn in enumerate(shape.messages) if turn["role"] == "assistant") and shape.messages:
        raise Malformed("no_trained_turn", "no assistant turn is left to train on")
    return replace(shape, masked=frozenset(masked), flags=(*shape.flags, *sorted(set(flags))))


def _list_in(value: Any) -> list[Any] | None:
    """Return a list, also one that a CSV file holds as text; None if there is none, or an empty one."""
    if isinstance(value, str) and value[:1] == "[" and value.rstrip()[-1:] == "]":
        try:
            value = json.loads(value)
        except ValueError:
            return None
    return value if isinstance(value, list) and value else None


def _masked_by(key: str, items: list[Any], shape: Shape) -> set[int]:
    """Return the positions of the answers that a list leaves out."""
    binary = all(item in (0, 1) for item in items)  # also False and True
    if key == "attention_mask":
        inside = "".join(str(int(item)) for item in items).strip("0") if binary else "0"
        if "0" in inside:
            raise Malformed(
                "row_mask", f"attention_mask hides tokens inside the row, which is not supported; {_ADVICE}"
            )
        return set()
    turns = [turn["role"] for turn in shape.messages]
    answers = [k for k, role in enumerate(turns) if role == "assistant"]
    counted = range(len(turns))
    for places in (list(counted), list(counted[1:]) if turns[:1] == ["system"] else [], answers):
        if key in _MEANS_LOSS and binary and len(items) == len(places) > 0:
            named = dict(zip(places, items, strict=True))
            return {k for k in answers if k in named and bool(named[k]) is not _MEANS_LOSS[key]}
    if not turns and binary and all(bool(item) is _MEANS_LOSS.get(key, True) for item in items) and shape.text:
        return set()
    much = f"{len(items)} values for {len(turns)} turns" if turns else f"{len(items)} values"
    raise Malformed(
        "row_mask",
        f"the column {shown(key, 30)} says where the row has loss ({much}), which cannot be followed; " + _ADVICE,
    )


def _refuse_labels(row: Mapping[str, Any], key: str, items: list[Any] | None, shape: Shape) -> None:
    if items is None:
        return
    numbers = all(isinstance(item, int) for item in items)
    answers = sum(turn["role"] == "assistant" for turn in shape.messages)
    by_answer = key == "label" and len(items) == answers and any(item in (0, False) for item in items)
    by_token = numbers and (
        -100 in items or (bool(shape.messages or shape.prompt) and items == _list_in(row.get("input_ids")))
    )
    if by_answer or by_token:
        raise Malformed("row_mask", f"the column {key} says which tokens or answers have loss; {_ADVICE}")
