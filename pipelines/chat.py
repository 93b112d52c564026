"""Which characters of a rendered conversation the assistant wrote: spans, found from the template's own structure.

A template is rendered once for each sequence of roles with a mark in place of every content. What stands between the
marks is the template's; a row's text must be exactly these pieces with its contents between them, or it is refused.
So no content can be mistaken for structure, nothing is searched for, and no prefix is tokenised twice.
"""

import os.path
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from datatools import DataError
from pipelines.formats import Message
from pipelines.jsonl import Malformed, shown

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_TEMPLATE_BYTES = 1 << 16  # what a template may add to a conversation, and again for every turn

# A template that prints today's date would give a row other tokens tomorrow. It gets this day instead (the one that
# Llama 3's template falls back on), through a macro of the same name, which takes precedence over the function.
_DAY = {"%Y": "2024", "%m": "07", "%d": "26", "%b": "Jul", "%B": "July", "%a": "Fri", "%A": "Friday", "%y": "24",
        "%j": "208", "%H": "00", "%M": "00", "%S": "00", "%p": "AM", "%I": "12", "%Z": "", "%z": ""}
_STRFTIME = ("{%- macro strftime_now(format) -%}{{ format"
             + "".join(f" | replace('{code}', '{text}')" for code, text in _DAY.items()) + " }}{%- endmacro %}\n")


class RowError(Malformed):
    """A row that cannot be encoded: `reason` (too_long, no_supervised_token, template_refuses, ...) and `detail`."""


@dataclass(frozen=True, slots=True)
class Turn:
    """Where the content of message `index` stands in the text, in characters; `end` also covers the end-of-turn text
    behind an assistant's content.
    """

    index: int
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class _Layout:
    """What a template writes around the contents of one sequence of roles: pieces[0] content pieces[1] content ..."""

    pieces: tuple[str, ...]
    order: tuple[int, ...]  # the message whose content stands behind piece j; a template may leave the system turn out
    ends: tuple[str, ...]  # the end-of-turn text at the start of piece j + 1, for assistants


class ChatTemplate:
    """A Jinja chat template with its tokenizer, rendered in the sandbox of transformers."""

    def __init__(self, tokenizer: Any, template: str, name: str) -> None:
        self._tokenizer = tokenizer
        self._name = name
        self._template = _STRFTIME + template if "strftime_now" in template else template
        self.has_markers = _GENERATION.search(template) is not None
        """Does the template itself mark what the assistant writes, by {% generation %}?"""
        added = sorted((token.content for token in tokenizer.added_tokens_decoder.values()), key=len, reverse=True)
        self._token = re.compile("|".join(map(re.escape, added)) or "(?!)")
        self._layout = lru_cache(maxsize=256)(self._find_layout)

    def render(self, messages: Sequence[Message]) -> str:
        """The text of the conversation. Raises: RowError if the template refuses it, DataError if it is broken."""
        text = self._apply(messages, tokenize=False)
        limit = sum(len(m["content"]) for m in messages) + _TEMPLATE_BYTES * (len(messages) + 1)
        if not isinstance(text, str) or len(text) > limit:
            raise RowError("template_output_too_long", f"the chat template wrote more than {limit} characters")
        return text

    def marked(self, messages: Sequence[Message]) -> tuple[list[int], list[bool]]:
        """Token ids, and which of them stand in {% generation %} blocks."""
        encoded = self._apply(messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True,
                              tokenizer_kwargs={"verbose": False})
        return list(encoded["input_ids"]), [bool(x) for x in encoded["assistant_masks"]]

    def turns(self, messages: Sequence[Message]) -> tuple[str, list[Turn], bool]:
        """The text, the turns in the order in which they stand there, and whether every message is among them.

        Raises: RowError if the text is not the template's pieces with the contents between them.
        """
        layout = self._layout(tuple(message["role"] for message in messages))
        text = self.render(messages)
        turns: list[Turn] = []
        at = len(layout.pieces[0])
        if not text.startswith(layout.pieces[0]):
            raise self._differs(0)
        for index, piece, end in zip(layout.order, layout.pieces[1:], layout.ends, strict=True):
            content = messages[index]["content"]
            for candidate in dict.fromkeys((content, content.strip(), content.rstrip(), content.lstrip())):
                stop = at + len(candidate)
                if text.startswith(candidate, at) and text.startswith(piece, stop):
                    break
            else:
                raise self._differs(index)
            turns.append(Turn(index, at, stop + len(end)))
            at = stop + len(piece)
        if at != len(text):
            raise self._differs(len(messages) - 1)
        return text, turns, len(turns) == len(messages)

    def _differs(self, index: int) -> RowError:
        return RowError("template_changes_text", f"the chat template does more with turn {index + 1} than write it "
                        "down (it rewrites contents, or depends on them), so what the assistant said cannot be told "
                        "apart; use a template with {% generation %} markers")

    def _find_layout(self, roles: tuple[str, ...]) -> _Layout:
        marks = [f"\ue000{k}\ue001" for k in range(len(roles))]  # private use: in no template
        text = self.render([{"role": role, "content": mark} for role, mark in zip(roles, marks, strict=True)])
        places = [(match.start(), int(match[1])) for match in re.finditer("\ue000([0-9]+)\ue001", text)]
        order = tuple(k for _, k in places)
        if len(set(order)) != len(order):
            raise RowError("template_repeats_turn", "the chat template writes a turn twice")
        missing = [k for k in range(len(roles)) if k not in order and roles[k] != "system"]
        if missing:
            raise RowError("template_drops_turn", f"the chat template leaves out turn {missing[0] + 1} "
                           f"({roles[missing[0]]})")
        pieces, at = [], 0
        for start, k in places:
            pieces.append(text[at:start])
            at = start + len(marks[k])
        pieces.append(text[at:])
        last = max(k for k, role in enumerate(roles) if role == "assistant")
        # what closes an answer when nothing follows it: only that much can be its end, not the next turn's header
        closing = pieces[-1] if order[-1] == last else self._layout(roles[:last + 1]).pieces[-1]
        ends = tuple(self._turn_end(closing, piece) if roles[k] == "assistant" else ""
                     for k, piece in zip(order, pieces[1:], strict=True))
        return _Layout(tuple(pieces), order, ends)

    def _turn_end(self, closing: str, following: str) -> str:
        """The end-of-turn text that `following` starts with: through its first special token, with those that adjoin;
        without one, all of `closing` but the white space at its end.
        """
        common = os.path.commonprefix([closing, following])
        found = self._token.search(common)
        if found:
            end = found.end()
            while more := self._token.match(common, end):
                end = more.end()
            return common[:end]
        whole = closing.rstrip()
        return whole if following.startswith(whole) else ""

    def _apply(self, messages: Sequence[Message], **options: Any) -> Any:
        import jinja2

        try:
            return self._tokenizer.apply_chat_template(list(messages), chat_template=self._template, **options)
        except jinja2.TemplateSyntaxError as error:
            raise DataError(f"the chat template {self._name} is not valid: {error}") from error
        except Exception as error:  # a template is a program: it refuses, or fails, in any way
            first = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise RowError("template_refuses", f"the chat template says: {shown(first, 120)}") from None
