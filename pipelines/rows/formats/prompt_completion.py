"""The format prompt and completion, as texts or as lists of messages."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from pipelines.rows.formats.contents import checked_text, emptiness, text_flags, visible
from pipelines.rows.formats.record import TEXTS_OR_LISTS, Format, Given
from pipelines.rows.formats.shape import Shape
from pipelines.rows.formats.turns import conversation, turns_of
from pipelines.rows.jsonl import Malformed, json_type


def from_prompt(prompt: Any, completion: Any, columns: Mapping[str, str]) -> Shape:
    """Return a prompt and its completion; in lists of messages, no turn of the prompt has loss.

    Args:
        prompt: The value of the prompt.
        completion: The value of the completion.
        columns: Our names of columns -> the data's.

    Raises:
        Malformed: One is a text and the other a list, or one of them is empty.
    """
    if isinstance(prompt, list) or isinstance(completion, list):
        if not isinstance(prompt, list) or not isinstance(completion, list):
            raise Malformed(
                "mixed_prompt",
                f"prompt is {json_type(prompt)}, completion is {json_type(completion)}; "
                "both must be texts, or both lists of messages",
            )
        before, _, flags = turns_of(prompt, columns)
        after, masked, more = turns_of(completion, columns)
        masked = {k + len(before) for k in masked} | {k for k, t in enumerate(before) if t["role"] == "assistant"}
        return conversation(before + after, masked, flags | more)
    question, answer = checked_text(prompt, "prompt"), checked_text(completion, "answer")
    if not visible(question):
        raise Malformed(f"{emptiness(question)}_prompt", "the prompt is empty; for plain text use a 'text' column")
    if not visible(answer):
        raise Malformed(f"{emptiness(answer)}_answer", "the completion is empty")
    return Shape(prompt=question, completion=answer, flags=text_flags([question, answer]))


def _read(given: Given, _: tuple[str, ...]) -> Shape:
    shape = from_prompt(given.get("prompt"), given.get("completion"), given.names)
    unwanted = given.row.get("label") is False or given.row.get("kto_tag") is False
    return replace(shape, flags=(*shape.flags, "unwanted_answer")) if unwanted else shape


PROMPT_COMPLETION = Format(
    name="prompt_completion",
    title="prompt, completion",
    learned="loss on the completion",
    example='{"prompt": "2 + 2 =", "completion": "4"}',
    used_by="TRL; both may also be lists of messages",
    rendering=TEXTS_OR_LISTS,
    columns=(("prompt", "completion"),),
    read=_read,
)
