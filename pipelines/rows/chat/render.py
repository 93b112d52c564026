"""A Jinja chat template, rendered in the sandbox of transformers in a process with limits."""

import re
from collections.abc import Hashable, Mapping, Sequence
from functools import lru_cache
from typing import Any

from datatools import DataError
from pipelines.rows.chat.marks import CLOSE, OPEN, mark_of
from pipelines.rows.chat.messages import for_template
from pipelines.rows.chat.process import SECONDS, asked_as, worker
from pipelines.rows.chat.refusals import RowError, TooSlow
from pipelines.rows.formats.contents import characters
from pipelines.rows.formats.shape import Message
from pipelines.rows.jsonl import shown

_GENERATION = re.compile(r"\{%([-+]?)\s*(end)?generation\s*([-+]?)%\}")
_SLOW_ROWS = 3  # after this many slow rows, the template is refused
_TOGETHER = 64  # renderings per message to the process
_LARGE = 1 << 20  # characters; a rendering that may be longer is asked for by itself
_TEMPLATE_BYTES = 1 << 16  # what a template may add to a conversation, and to every turn

# With a template that prints today's date, the tokens of a row would change daily. It gets this day instead (the one
# that Llama 3's template uses by default), by a macro of the same name, which takes precedence over the function.
_DAY = {
    "%Y": "2024",
    "%m": "07",
    "%d": "26",
    "%b": "Jul",
    "%B": "July",
    "%a": "Fri",
    "%A": "Friday",
    "%y": "24",
    "%j": "208",
    "%H": "00",
    "%M": "00",
    "%S": "00",
    "%p": "AM",
    "%I": "12",
    "%Z": "",
    "%z": "",
}
_STRFTIME = (
    "{%- macro strftime_now(format) -%}{{ format"
    + "".join(f" | replace('{code}', '{text}')" for code, text in _DAY.items())
    + " }}{%- endmacro %}\n"
)


def _key(written: Sequence[Message], tools: Sequence[Any], template: str | None) -> Hashable:
    """Return what identifies a rendering of plain turns, at less cost than its request; None if it is not plain."""
    if tools or not all(value is None or type(value) is str for message in written for value in message.values()):
        return None
    return template, tuple(tuple(message.items()) for message in written)


class Renderer:
    """Renders one template with the special tokens of its tokenizer.

    Args:
        tokenizer: The tokenizer.
        template: The template's text.
        name: What errors call the template.
        settings: Further variables of the template.

    Attributes:
        text: The template as it is rendered, with a fixed day if it prints the date.
        has_blocks: Whether the template defines the loss by {% generation %} blocks.
    """

    def __init__(self, tokenizer: Any, template: str, name: str, settings: Mapping[str, Any]) -> None:
        self._tokenizer = tokenizer
        self._name = name
        self._settings = settings
        self.text = _STRFTIME + template if "strftime_now" in template else template
        self.has_blocks = _GENERATION.search(template) is not None
        self.with_marked_blocks = lru_cache(maxsize=2)(self._mark_blocks)
        self._ahead: dict[Hashable, tuple[int, str, str]] = {}  # what was asked -> limit and result
        self._slow = 0  # the number of rows for which the template took too long

    def render(
        self,
        written: Sequence[Message],
        tools: Sequence[Any],
        *,
        template: str | None = None,
        add_generation_prompt: bool = False,
    ) -> str:
        """Return the text of a conversation.

        Args:
            written: The messages, in a form that the template understands.
            tools: Definitions of tools.
            template: A template text to use instead of `self.text`.
            add_generation_prompt: Whether to end with the prompt for the assistant's next turn.

        Raises:
            RowError: The template refuses the conversation, or needs too much time or memory for it.
            DataError: The template is not valid, or it took too long for several rows.
        """
        if not written:
            raise RowError("template_refuses", "a conversation without a turn")
        key = None if add_generation_prompt else _key(written, tools, template)
        if key is not None and key in self._ahead:
            limit, kind, text = self._ahead.pop(key)
        else:
            limit, arguments = self._request(written, tools, template, add_generation_prompt)
            asked = asked_as(limit, arguments)
            if asked in self._ahead:
                limit, kind, text = self._ahead.pop(asked)
            else:
                kind, text = worker.render(limit, arguments)
        if kind == "invalid":
            raise DataError(f"the chat template {self._name} is not valid: {text}")
        if kind == "slow":
            self._slow += 1
            if self._slow >= _SLOW_ROWS:
                raise DataError(
                    f"the chat template {self._name} ran longer than {SECONDS:g} s of processor time for "
                    f"each of {self._slow} rows and may be in a loop; use another one (--chat-template)"
                )
            raise TooSlow("template_too_slow", f"the chat template ran longer than {SECONDS:g} s of processor time")
        if kind == "large":
            raise RowError("template_too_large", "the chat template exceeded its memory limit")
        if kind == "refused":
            raise RowError("template_refuses", f"the chat template says: {shown(text, 120)}")
        if kind == "long":
            raise RowError("template_output_too_long", f"the chat template wrote more than {limit} characters")
        return text

    def ahead(self, wanted: Sequence[tuple[Sequence[Message], Sequence[Any], str | None]]) -> None:
        """Render conversations together, for calls of `render` that follow; what was not asked for is forgotten.

        Args:
            wanted: Messages, definitions of tools, and the template text, as in `render`.
        """
        asked: list[tuple[Hashable, int, bytes]] = []
        special = self._special()
        for written, tools, template in wanted:
            if written:
                limit, arguments = self._request(written, tools, template, False, special)
                if limit <= _LARGE:
                    request = asked_as(limit, arguments)
                    asked.append((_key(written, tools, template) or request, limit, request))
        self._ahead = {}
        for start in range(0, len(asked), _TOGETHER):
            some = asked[start : start + _TOGETHER]
            results = worker.render_all([request for _, _, request in some])
            for (key, limit, _), (kind, text) in zip(some, results, strict=False):
                self._ahead[key] = limit, kind, text

    def _special(self) -> dict[str, str]:
        return {name: str(token) for name, token in self._tokenizer.special_tokens_map.items()}

    def _request(
        self,
        written: Sequence[Message],
        tools: Sequence[Any],
        template: str | None,
        add_generation_prompt: bool,
        special: dict[str, str] | None = None,
    ) -> tuple[int, dict[str, Any]]:
        """Return the maximum number of characters, and the arguments of transformers' `render_jinja_template`."""
        limit = _TEMPLATE_BYTES * (len(written) + 1) + 4 * characters([list(written), list(tools), self._settings])
        return limit, {
            **self._settings,
            "conversations": [[for_template(message) for message in written]],
            "tools": list(tools) or None,
            "documents": None,
            "chat_template": template or self.text,
            "return_assistant_tokens_mask": False,
            "continue_final_message": False,
            "add_generation_prompt": add_generation_prompt,
            **(self._special() if special is None else special),
        }

    def _mark_blocks(self, window: int) -> str:
        """Return the template with marks instead of its {% generation %} tags; a `with` block has the same scope."""
        first, last = (mark_of(window, end, 0) for end in (OPEN, CLOSE))

        def instead(tag: re.Match[str]) -> str:
            left, closes, right = tag.groups()
            word, mark = ("endwith", last) if closes else ("with", first)
            return f"{{%{left} {word} %}}{mark}{{% {word} {right}%}}"

        return _GENERATION.sub(instead, self.text)
