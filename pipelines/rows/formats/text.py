"""The format text: plain text, with loss on every token."""

from pipelines.rows.formats.contents import checked_text, emptiness, text_flags, visible
from pipelines.rows.formats.record import PLAIN, Format, Given
from pipelines.rows.formats.shape import Shape
from pipelines.rows.jsonl import Malformed


def _read(given: Given, _: tuple[str, ...]) -> Shape:
    text = checked_text(given.get("text"), "text")
    if not visible(text):
        raise Malformed(f"{emptiness(text)}_text", "the text is empty")
    return Shape(text=text, flags=text_flags([text]))


TEXT = Format(
    name="text",
    title="text",
    learned="loss on every token",
    example='{"text": "Once upon a time"}',
    used_by="any",
    rendering=PLAIN,
    columns=(("text",),),
    read=_read,
)
