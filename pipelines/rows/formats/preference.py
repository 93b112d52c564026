"""The format preference: a chosen and a rejected answer, read as the prompt with the chosen answer.

For the gradients of pairs, the same rows are read with the rejected answer.
"""

import re
from dataclasses import replace

from pipelines.rows.formats.contents import first_of
from pipelines.rows.formats.pair import from_pair
from pipelines.rows.formats.prompt_completion import from_prompt
from pipelines.rows.formats.record import TEXTS_OR_LISTS, Format, Given, WrongColumns
from pipelines.rows.formats.shape import Message, Shape
from pipelines.rows.formats.turns import ROLES
from pipelines.rows.jsonl import Malformed

_SPEAKER = re.compile(r"\s*+(Human|Assistant):")


def _read(given: Given, _: tuple[str, ...]) -> Shape:
    """Return the prompt with the chosen answer. An implicit prompt is the common beginning of both conversations."""
    if given.preference is None:
        raise WrongColumns(
            "preference_row",
            "the row has a chosen and a rejected answer; --preference chosen reads it as its prompt and the chosen one",
        )
    if given.preference == "rejected":  # the other answer of each pair, for `select --objective dpo`
        one, other = (given.names.get(name, name) for name in ("chosen", "rejected"))
        given = replace(given, row={**given.row, one: given.get("rejected"), other: given.get("chosen")})
    get, columns = given.get, given.names
    chosen, rejected = ([turns] if isinstance(turns, dict) else turns for turns in (get("chosen"), get("rejected")))
    prompt = get("prompt")
    if prompt is None and isinstance(get("conversations"), list):
        prompt = get("conversations")
    if prompt is None and isinstance(chosen, str) and isinstance(rejected, str) and _SPEAKER.match(chosen):
        chosen, rejected = dialogue(chosen), dialogue(rejected)
    if isinstance(chosen, list):
        first = next((first_of(turn, "role", "from") for turn in chosen if isinstance(turn, dict)), None)
        whole = isinstance(first, str) and ROLES.get(first.strip().lower()) != "assistant"
        if isinstance(prompt, list):
            return from_prompt(prompt, chosen[len(prompt) :] if chosen[: len(prompt)] == prompt else chosen, columns)
        if whole:  # the prompt is in the conversation, and perhaps also in a column
            pairs = zip(chosen, rejected if isinstance(rejected, list) else [], strict=False)
            shared = next((k for k, (a, b) in enumerate(pairs) if a != b), 0)
            shared = shared or len(chosen) - 1
            return from_prompt(chosen[:shared], chosen[shared:], columns)
    if not isinstance(prompt, list):
        ask = next(
            (name for name in ("prompt", "question", "instruction", "query", "input") if get(name) is not None),
            "prompt",
        )
        if ask == "prompt" and get("system") is None and not isinstance(chosen, list):
            if prompt is None:
                raise Malformed(
                    "null_prompt",
                    "chosen and rejected are texts, but there is no prompt; add a prompt column",
                )
            return from_prompt(prompt, chosen, columns)
        if not isinstance(chosen, list):
            return from_pair(given, (ask, "chosen"))
        prompt = [{"role": "user", "content": get(ask)}]
    if not isinstance(chosen, list):
        chosen = [{"role": "assistant", "content": chosen}]
    return from_prompt(prompt, chosen, columns)


def dialogue(text: str) -> list[Message]:
    """Return a conversation that is written as one text, as in Anthropic's hh-rlhf.

    Args:
        text: The text.
    """
    turns: list[tuple[str, int, int]] = []  # who, and where the turn begins with its name, and where the name ends
    reached = 0
    for name in re.finditer("(Human|Assistant):", text):
        before = text[reached : name.start()]
        said = before.rstrip()
        if "\n\n" in before[len(said) :] or (not reached and not said):
            turns.append((name[1].lower(), name.start(), name.end()))
        reached = name.end()
    ends = [start for _, start, _ in turns[1:]] + [len(text)]
    return [
        {"role": speaker, "content": text[begin:end].strip()}
        for (speaker, _, begin), end in zip(turns, ends, strict=True)
    ]


PREFERENCE = Format(
    name="preference",
    title="chosen, rejected",
    learned="loss on the chosen answer, with --preference chosen",
    example='{"prompt": "2 + 2 =", "chosen": "4", "rejected": "5"}',
    used_by="TRL, LLaMA-Factory; texts, or lists of messages with the prompt in a column or in both",
    rendering=TEXTS_OR_LISTS,
    columns=(("chosen", "rejected"),),
    read=_read,
)
