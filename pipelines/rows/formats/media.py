"""Pictures, sound and video beside the text of a row, which a model of text does not get."""

import re
from collections.abc import Mapping
from typing import Any

from pipelines.rows.formats.shape import Shape
from pipelines.rows.jsonl import Malformed, shown

_COLUMNS = ("images", "image", "videos", "video", "audios", "audio")
"""The columns in which TRL, LLaMA-Factory and ms-swift have them."""
_PLACE = re.compile(r"<\|?(?:image|video|audio)(?:_pad|_\d+)?\|?>", re.IGNORECASE)


def media_flags(row: Mapping[str, Any], shape: Shape) -> tuple[str, ...]:
    """Return the flag `media_dropped` if a row has media in a column of its own.

    Args:
        row: The JSON object.
        shape: What was read from it.

    Raises:
        Malformed: The text also says where the media belong, so that it is not a text by itself.
    """
    column = next((name for name in _COLUMNS if isinstance(row.get(name), str | list | dict) and row[name]), None)
    if column is None:
        return ()
    for text in (shape.text, shape.prompt, shape.completion, *(turn["content"] for turn in shape.messages)):
        if found := _PLACE.search(text or ""):
            raise Malformed(
                "media",
                f"{shown(found[0])} in the text is the place of what the column {column!r} holds, and a model of text "
                "does not get it; leave such rows out",
            )
    return ("media_dropped",)
