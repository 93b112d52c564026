"""A question and an answer in separate columns, read as a conversation."""

from pipelines.rows.formats.contents import checked_text, visible
from pipelines.rows.formats.record import Given
from pipelines.rows.formats.shape import Message, Shape
from pipelines.rows.formats.turns import conversation
from pipelines.rows.jsonl import Malformed, json_type

ALONGSIDE = ("input", "context", "system", "history")
"""Further columns that a row with a question and an answer may have."""


def from_pair(given: Given, columns: tuple[str, ...]) -> Shape:
    """Return a question and an answer as a conversation.

    `input` and `context` follow the question on separate lines, and earlier pairs in `history` have loss too.

    Args:
        given: The row.
        columns: The column of the question, and that of the answer.

    Raises:
        Malformed: A text is missing or empty, or `history` is not a list of pairs.
    """
    get, (ask, say) = given.get, columns
    turns: list[Message] = []
    if get("system") is not None and visible(system := checked_text(get("system"), "system")):
        turns.append({"role": "system", "content": system})
    history = get("history")
    if history is not None and not isinstance(history, list):
        raise Malformed("history_not_list", f"history is {json_type(history)}, not a list of pairs")
    for pair in history or []:
        if not isinstance(pair, list) or len(pair) != 2:
            raise Malformed("history_not_list", "an entry of history is not a pair of instruction and output")
        turns.append({"role": "user", "content": checked_text(pair[0], "prompt")})
        turns.append({"role": "assistant", "content": checked_text(pair[1], "answer")})
    more = [checked_text(get(name), "prompt") for name in ("input", "context") if name != ask and get(name) is not None]
    more = [text for text in more if visible(text)]
    question = "" if get(ask) is None and more else checked_text(get(ask), "prompt")
    turns.append({"role": "user", "content": "\n".join([question, *more] if visible(question) else more or [question])})
    turns.append({"role": "assistant", "content": checked_text(get(say), "answer")})
    return conversation(turns, set(), set())
