"""Which characters of a rendered conversation the assistant wrote: spans, found by rendering the row with marks in it.

Every row is rendered twice: as it is, and with private-use characters around what its turns say (and around the
template's own {% generation %} blocks, where it has them). Taken out again, the marks must leave the first text to the
letter, and what an assistant says must stand between its marks unchanged; otherwise the row is refused. So no content
can be mistaken for structure, nothing is searched for by its text, and templates may trim contents, depend on them, or
take reasoning out of them. Characters become tokens by the tokenizer's offsets (`pipelines.rows.encode`); a mask that a
library computed from the same characters is never asked for.
"""

import json
import os.path
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import pairwise
from typing import Any

from datatools import DataError
from pipelines.rows.formats import REASONING_TAG, Message, strings
from pipelines.rows.jsonl import Malformed, shown
from pipelines.rows.template_process import SECONDS, worker

_GENERATION = re.compile(r"\{%([-+]?)\s*(end)?generation\s*([-+]?)%\}")
_SLOW_ROWS = 3  # at which a template takes too long for one row after another
_TEMPLATE_BYTES = 1 << 16  # what a template may add to a conversation, and again for every turn
_CONTROL_WORDS = re.compile("think|tool|function|reason", re.IGNORECASE)  # in added tokens that close no turn

# A template that prints today's date would give a row other tokens tomorrow. It gets this day instead (the one that
# Llama 3's template falls back on), through a macro of the same name, which takes precedence over the function.
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

# Marks are made of characters for private use, from the first window of them that a row's texts do not touch. A mark is
# three characters: which end it is, and the number of what it encloses, in two digits.
_WINDOW = 0x800
_WINDOWS: tuple[int, ...] = (*range(0x100000, 0x10F000, _WINDOW), *range(0xF0000, 0xFF000, _WINDOW))
_OPEN, _CLOSE, _BASE = 0x7FE, 0x7FF, 0x7F0  # in the window; digits are below the base
_REASONING_NAMES = ("reasoning_content", "thinking", "reasoning")  # what templates call it: Qwen, gpt-oss, others


class RowError(Malformed):
    """A row that cannot be encoded: `reason` (too_long, no_supervised_token, template_refuses, ...) and `detail`."""


class _TooSlow(RowError):
    """The template ran out of time: another try would, too."""


@dataclass(frozen=True, slots=True)
class Rendered:
    """A conversation as the template writes it, the character spans with loss (in order), and what was left out."""

    text: str
    spans: list[tuple[int, int]]
    flags: tuple[str, ...] = ()
    """system_dropped, reasoning_dropped, tools_dropped: the template does not write it."""


@dataclass(slots=True)
class _Part:
    """A stretch of what turn `turn` says, marked as one: `text`, which stands at `at` in the message's `key`."""

    turn: int
    kind: str  # "answer", "reasoning" (and text beside a call), "call" (its name), "other" (not an assistant's)
    key: str
    at: int  # a character, or which call
    text: str
    before: str = ""  # tags of reasoning, and white space, between this part and those beside it in the same content
    after: str = ""
    start: int = -1  # in the rendered text; -1: not there
    end: int = -1


@dataclass(slots=True)
class _Marked:
    """A rendered text without its marks again, and the parts that they enclosed, in the order of the conversation."""

    text: str
    parts: list[_Part]
    blocks: list[tuple[int, int]] = field(default_factory=list)
    repeated: set[int] = field(default_factory=set)


class ChatTemplate:
    """A Jinja chat template with its tokenizer, rendered in the sandbox of transformers, in a process with limits.

    text: the template as it is rendered, with a day of its own where it prints the date.
    """

    def __init__(self, tokenizer: Any, template: str, name: str) -> None:
        self._tokenizer = tokenizer
        self._name = name
        self.text = _STRFTIME + template if "strftime_now" in template else template
        self._has_blocks = _GENERATION.search(template) is not None
        self._takes_tools = re.search(r"\btools\b", template) is not None
        added = sorted((token.content for token in tokenizer.added_tokens_decoder.values()), key=len, reverse=True)
        self._token = re.compile("|".join(map(re.escape, added)) or "(?!)")
        ends = [text for text in added if not _CONTROL_WORDS.search(text)]
        self._end = re.compile("|".join(map(re.escape, ends)) or "(?!)")
        self._blocks_marked = lru_cache(maxsize=2)(self._mark_blocks)
        self._prompts: dict[tuple[str, bool], str] = {}
        self._slow = 0  # rows for which the template took too long

    def render(self, messages: Sequence[Message], tools: Sequence[Any] = ()) -> str:
        """The text of the conversation. Raises: RowError if the template refuses it, DataError if it is broken."""
        return self._render(next(_ways_to_write(messages)), tools)

    def read(
        self, messages: Sequence[Message], tools: Sequence[Any] = (), masked: frozenset[int] = frozenset()
    ) -> Rendered:
        """The text, and the spans of the assistant's turns but those in `masked`.

        A span is what the turn says, with the end-of-turn text behind it. Reasoning that the template keeps belongs to
        it, with what the template writes around it that the model has to write, too (all behind the generation
        prompt); so does a tool call. Templates with {% generation %} blocks say for themselves what has loss.

        Raises: RowError if the template refuses the row, or does more with an answer than write it down; DataError if
        the template is broken.
        """
        window = _window(messages, tools)
        written, text = self._write(messages, tools, window)
        flags = set()
        if tools and not self._takes_tools:
            flags.add("tools_dropped")
        blocks = None
        if self._has_blocks:
            found = _unmark(self._render(written, tools, template=self._blocks_marked(window)), [], window)
            blocks = found.blocks if found.text == text else None
        try:
            marked = self._place(written, tools, text, window)
            spans = [
                span
                for k, message in enumerate(written)
                if message["role"] == "assistant"
                for span in self._spans(k, written, tools, marked, window, wanted=k not in masked)
            ]
        except RowError as error:
            # what the template's author marked has loss, also where the template rewrites it
            if error.reason != "template_changes_text" or blocks is None or masked:
                raise
            return Rendered(text, blocks, tuple(sorted(flags)))
        flags |= self._left_out(written, marked)
        if blocks is not None:
            spans = [
                block
                for block in blocks
                if not masked or any(block[0] < end and start < block[1] for start, end in spans)
            ]
        return Rendered(text, sorted(spans), tuple(sorted(flags)))

    # ------------------------------------------------------------------------------------------------------- writing

    def _write(self, messages: Sequence[Message], tools: Sequence[Any], window: int) -> tuple[list[Message], str]:
        """The messages in the form that this template understands, and their text.

        Templates differ in what they take for a turn that only calls tools (no content, or an empty one) and for the
        arguments of a call (an object, or its JSON). The first form that is rendered with every call in it is taken.
        """
        refused: RowError | None = None
        for written in _ways_to_write(messages):
            try:
                text = self._render(written, tools)
                if any("tool_calls" in message for message in written):
                    calls = [part for part in _parts(written, True, True) if part.kind == "call"]
                    marked = _unmark(self._render(_with_marks(written, calls, window), tools), calls, window)
                    missing = next((part for part in calls if part.start < 0), None)
                    if missing is not None or marked.text != text:
                        turn = (missing or calls[0]).turn + 1
                        raise RowError(
                            "template_drops_turn",
                            "the chat template does not write the tool calls of "
                            f"turn {turn}; use a template that takes tools",
                        )
                return written, text
            except _TooSlow:
                raise
            except RowError as error:
                refused = refused or error
        assert refused is not None
        raise refused

    def _place(self, written: list[Message], tools: Sequence[Any], text: str, window: int) -> _Marked:
        """The conversation rendered with marks that change nothing: as far out as they can stand.

        White space at the ends of a content stands inside the marks where the template keeps it. Where that changes
        the text (the template strips it), the marks stand within, and each side is tried by itself; and a turn of the
        user that the template looks at (`startswith`) goes without.
        """

        def attempt(parts: list[_Part]) -> _Marked | None:
            try:
                found = _unmark(self._render(_with_marks(written, parts, window), tools), parts, window)
            except _TooSlow:
                raise
            except RowError:
                return None
            return found if found.text == text else None

        for others in (True, False):
            for outside in (True, False):
                parts = _parts(written, others, outside)
                found = attempt(parts)
                if found is not None:
                    return found if outside else self._widen(found, attempt)
        answers = [k for k, message in enumerate(written) if message["role"] == "assistant"]
        raise self._differs(answers[0])

    def _widen(self, found: _Marked, attempt: Callable[[list[_Part]], _Marked | None]) -> _Marked:
        """Put the marks of each answer around its white space, on the sides where the template keeps it."""
        for i, part in enumerate(found.parts):
            for side in ("before", "after"):
                space = getattr(part, side)
                if part.kind not in ("answer", "reasoning") or not space or space.strip() or part.start < 0:
                    continue
                around = found.text[part.start - 1] if side == "before" else found.text[part.end : part.end + 1]
                if around != (space[-1] if side == "before" else space[0]):
                    continue
                wider = [replace(p) for p in found.parts]
                if side == "before":
                    wider[i].text, wider[i].before = space + part.text, ""
                    wider[i].at -= len(space)
                else:
                    wider[i].text, wider[i].after = part.text + space, ""
                found = attempt(wider) or found
                part = found.parts[i]
        return found

    # --------------------------------------------------------------------------------------------------------- spans

    def _check(self, k: int, marked: _Marked) -> None:
        """Refuse a turn whose answer is not in the text, or is there twice, or is not what the row says."""
        for i, part in enumerate(marked.parts):
            if part.turn != k or part.kind == "call":
                continue
            if part.start < 0 and part.kind == "answer":
                raise RowError("template_drops_turn", f"the chat template leaves out turn {k + 1} (assistant)")
            if i in marked.repeated:
                raise RowError("template_repeats_turn", f"the chat template writes turn {k + 1} twice")
            if part.start >= 0 and marked.text[part.start : part.end] != part.text:
                raise self._differs(k)

    def _left_out(self, written: list[Message], marked: _Marked) -> set[str]:
        """What the template does not write, as flags. Raises: RowError if that is a turn of the user or a tool."""
        flags = set()
        for part in marked.parts:
            role = written[part.turn]["role"]
            if part.start >= 0:
                continue
            if role == "system":
                flags.add("system_dropped")
            elif role != "assistant":
                raise RowError("template_drops_turn", f"the chat template leaves out turn {part.turn + 1} ({role})")
            elif part.key == "reasoning" or REASONING_TAG.search(part.before + part.after):
                flags.add("reasoning_dropped")
            else:
                flags.add("call_text_dropped")
        return flags

    def _spans(
        self, k: int, written: list[Message], tools: Sequence[Any], marked: _Marked, window: int, *, wanted: bool
    ) -> list[tuple[int, int]]:
        """The spans of turn `k`, checked; several where the template writes another turn into it (a tool's result)."""
        self._check(k, marked)
        said = sorted((p for p in marked.parts if p.turn == k and p.start >= 0), key=lambda part: part.start)
        others = sorted(p.start for p in marked.parts if p.turn != k and p.start >= 0)
        runs: list[list[_Part]] = []
        for part in said:
            if runs and not any(runs[-1][-1].end <= start < part.start for start in others):
                runs[-1].append(part)
            else:
                runs.append([part])
        spans = []
        for n, run in enumerate(runs if wanted else []):
            first, last = run[0], max(run, key=lambda part: part.end)
            start, end = first.start, last.end
            if first.kind != "answer" and not n:
                start = self._start(k, written, tools, marked, first, window)
            elif first.before.strip() and marked.text.endswith(first.before, 0, start):
                start -= len(first.before)  # reasoning without a word in it, written out by the row
            if last.kind != "call" and last.after.strip() and marked.text.startswith(last.after, end):
                end += len(last.after)
            following = marked.text[end : min((other for other in others if other >= end), default=None)]
            if n < len(runs) - 1 or last.kind != "answer":
                end += self._call_end(self._closing(k, written, tools, marked, last, window), following)
            else:
                # what closes an answer when nothing follows it: only that much can be its end, not the next header
                plain = [part for part in marked.parts if part.kind == "answer" and part.start >= 0]
                final = max(plain, key=lambda part: (part.turn, part.end))
                end += len(self._turn_end(self._closing(final.turn, written, tools, marked, final, window), following))
            spans.append((start, end))
        return spans

    def _start(
        self, k: int, written: list[Message], tools: Sequence[Any], marked: _Marked, first: _Part, window: int
    ) -> int:
        """Where a turn that begins with reasoning or a tool call begins: behind the generation prompt.

        The model has to write what opens its reasoning or its call, unless the prompt already does. An empty block of
        reasoning that the template puts there by itself is not the row's.
        """
        text = marked.text
        edge = max((part.end for part in marked.parts if 0 <= part.end <= first.start and part.turn != k), default=0)
        gap = text[edge : first.start]
        prompt = self._prompt(k, written, tools)
        at = gap.rfind(prompt) if prompt else -1
        tags = list(REASONING_TAG.finditer(gap))
        if first.before.strip() and gap.endswith(first.before):  # the row's own mark of reasoning
            begin = len(gap) - len(first.before)
            if at >= 0:
                begin = max(begin, at + len(prompt))
        elif at >= 0:
            begin = at + len(prompt)
        elif first.kind == "reasoning" and tags and not tags[-1]["close"]:
            begin = tags[-1].start()
        else:
            begin = self._header(k, written, tools, gap, window)
        closed = [tag for tag in tags if tag["close"] and tag.start() >= begin]
        if closed:
            rest = gap[closed[-1].end() :]
            begin = len(gap) - len(rest.lstrip())
        return first.start - len(gap) + begin

    def _header(self, k: int, written: list[Message], tools: Sequence[Any], gap: str, window: int) -> int:
        """How much of `gap` is the header of turn `k`: what a plain answer in its place would have, too."""
        plain = [*written[:k], {"role": "assistant", "content": "."}]
        parts = _parts(plain, True, True)
        try:
            text = _unmark(self._render(_with_marks(plain, parts, window), tools), parts, window).text
        except _TooSlow:
            raise
        except RowError:
            return len(gap)
        place = parts[-1].start
        edge = max((part.end for part in parts[:-1] if 0 <= part.end <= place), default=0)
        return len(os.path.commonprefix([gap, text[edge:place]])) or len(gap)

    def _prompt(self, k: int, written: list[Message], tools: Sequence[Any]) -> str:
        """What the template writes to ask for turn `k`; "" if it does not."""
        key = (written[k - 1]["role"] if k else "", bool(tools))
        if key not in self._prompts:
            try:
                asked, plain = (self._render(written[:k], tools, add_generation_prompt=ask) for ask in (True, False))
            except _TooSlow:
                raise
            except RowError:
                return ""
            self._prompts[key] = asked.removeprefix(plain) if asked.startswith(plain) else ""
        return self._prompts[key]

    def _closing(
        self, k: int, written: list[Message], tools: Sequence[Any], marked: _Marked, last: _Part, window: int
    ) -> str:
        """What stands behind the part `last` of turn `k` when the conversation ends with that turn."""
        if k < len(written) - 1:
            place = marked.parts.index(last)
            parts = [replace(part) for part in marked.parts if part.turn <= k]
            marked = _unmark(self._render(_with_marks(written[: k + 1], parts, window), tools), parts, window)
            last = marked.parts[place]
        if last.end < 0:
            return ""
        after = last.after if last.after.strip() and marked.text.startswith(last.after, last.end) else ""
        return marked.text[last.end + len(after) :]

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

    def _call_end(self, closing: str, following: str) -> int:
        """How far a turn goes on behind its last name of a tool, or its reasoning: through the token behind which only
        such tokens follow. What stands between may hold tokens, too (those of a call).
        """
        common = os.path.commonprefix([closing, following])
        cut = next(
            (token.start() for token in self._token.finditer(following) if token.start() < len(common) < token.end()),
            len(common),
        )
        common = common[:cut]
        tokens = list(self._end.finditer(common))
        if not tokens:  # a part of what closes the turn is none of it
            return len(common.rstrip() if common == closing else common[: _last_word(common)])
        first = len(tokens) - 1
        if common[tokens[first].end() :].strip():
            return len(common.rstrip())
        while first and not common[tokens[first - 1].end() : tokens[first].start()].strip():
            first -= 1
        end = tokens[first].end()
        for before, after in pairwise(tokens[first:]):
            if before.end() != after.start():
                break
            end = after.end()
        return end

    def _differs(self, index: int) -> RowError:
        return RowError(
            "template_changes_text",
            f"the chat template does more with turn {index + 1} than write it "
            "down (it rewrites contents, or depends on them), so what the assistant said cannot be told "
            "apart; use a template with {% generation %} markers",
        )

    # ----------------------------------------------------------------------------------------------------- rendering

    def _mark_blocks(self, window: int) -> str:
        """The template with marks in place of its {% generation %} tags; a `with` block has the same scope."""
        first, last = (_mark(window, end, 0) for end in (_OPEN, _CLOSE))

        def instead(tag: re.Match[str]) -> str:
            left, closes, right = tag.groups()
            word, mark = ("endwith", last) if closes else ("with", first)
            return f"{{%{left} {word} %}}{mark}{{% {word} {right}%}}"

        return _GENERATION.sub(instead, self.text)

    def _render(
        self,
        written: Sequence[Message],
        tools: Sequence[Any],
        *,
        template: str | None = None,
        add_generation_prompt: bool = False,
    ) -> str:
        limit = _TEMPLATE_BYTES * (len(written) + 1) + 4 * sum(map(len, strings([list(written), list(tools)])))
        if not written:
            raise RowError("template_refuses", "a conversation without a turn")
        special = {name: str(token) for name, token in self._tokenizer.special_tokens_map.items()}
        kind, text = worker.render(
            limit,
            {
                "conversations": [[_for_template(message) for message in written]],
                "tools": list(tools) or None,
                "documents": None,
                "chat_template": template or self.text,
                "return_assistant_tokens_mask": False,
                "continue_final_message": False,
                "add_generation_prompt": add_generation_prompt,
                **special,
            },
        )
        if kind == "invalid":
            raise DataError(f"the chat template {self._name} is not valid: {text}")
        if kind == "slow":
            self._slow += 1
            if self._slow >= _SLOW_ROWS:
                raise DataError(
                    f"the chat template {self._name} ran longer than {SECONDS:g} s of processor time for "
                    f"each of {self._slow} rows; does it loop? Use another one (--chat-template)"
                )
            raise _TooSlow("template_too_slow", f"the chat template ran longer than {SECONDS:g} s of processor time")
        if kind == "large":
            raise RowError("template_too_large", "the chat template took more memory than it may")
        if kind == "refused":
            raise RowError("template_refuses", f"the chat template says: {shown(text, 120)}")
        if kind == "long":
            raise RowError("template_output_too_long", f"the chat template wrote more than {limit} characters")
        return text


# ----------------------------------------------------------------------------------------------------------- messages


def _last_word(text: str) -> int:
    """Behind the last character that is a letter, a digit or a closing bracket."""
    return next((k + 1 for k in range(len(text) - 1, -1, -1) if text[k].isalnum() or text[k] in "_}])>"), 0)


def _for_template(message: Message) -> dict[str, Any]:
    """A message as chat templates know it; reasoning under each of the names in use."""
    known = {
        key: message[key]
        for key in ("role", "content", "tool_calls", "tool_call_id", "name")
        if message.get(key) is not None
    }  # transformers leaves out what is None, too
    return known | dict.fromkeys(_REASONING_NAMES if "reasoning" in message else (), message.get("reasoning"))


def _ways_to_write(messages: Sequence[Message]) -> Iterator[list[Message]]:
    if not any("tool_calls" in message for message in messages):
        yield list(messages)
        return
    for as_text in (False, True):
        for empty in (None, ""):
            written = []
            for message in messages:
                message = dict(message)
                if "tool_calls" in message:
                    message["content"] = message["content"] or empty
                    message["tool_calls"] = [_written_call(call, as_text) for call in message["tool_calls"]]
                written.append(message)
            yield written


def _written_call(call: dict[str, Any], as_text: bool) -> dict[str, Any]:
    function = dict(call["function"])
    if as_text and not isinstance(function["arguments"], str):
        function["arguments"] = json.dumps(function["arguments"], ensure_ascii=False)
    return {**call, "function": function}


def _window(messages: Sequence[Message], tools: Sequence[Any]) -> int:
    """The first window of private use with no character of the row's texts."""
    whole = "".join(strings([list(messages), list(tools)]))
    if whole.isascii() or max(whole) < "\U000f0000":
        return _WINDOWS[0]
    used = {ord(c) // _WINDOW * _WINDOW for c in whole}
    for window in _WINDOWS:
        if window not in used:
            return window
    raise RowError("private_use", "the texts hold characters for private use all over U+F0000 to U+10FFFF")


def _mark(window: int, end: int, number: int) -> str:
    return "".join(chr(window + digit) for digit in (end, *divmod(number, _BASE)))


def _parts(written: Sequence[Message], others: bool, outside: bool) -> list[_Part]:
    """What is marked: all that assistants say, and, if `others`, the contents of the other turns.

    outside: white space at the ends of a content is within its marks.
    """
    parts: list[_Part] = []
    for k, message in enumerate(written):
        content = message["content"] or ""
        if message["role"] != "assistant":
            if others and content.strip():
                parts.append(_part(k, "other", "content", content, outside))
            continue
        calls = message.get("tool_calls", ())
        if message.get("reasoning", "").strip():
            parts.append(_part(k, "reasoning", "reasoning", message["reasoning"], outside))
        parts += _content_parts(k, content, "reasoning" if calls else "answer", outside)
        parts += [_Part(k, "call", "tool_calls", n, call["function"]["name"]) for n, call in enumerate(calls)]
    return parts


def _part(turn: int, kind: str, key: str, text: str, outside: bool) -> _Part:
    if outside:
        return _Part(turn, kind, key, 0, text)
    core = text.strip()
    at = text.index(core)
    return _Part(turn, kind, key, at, core, text[:at], text[at + len(core) :])


def _content_parts(turn: int, content: str, kind: str, outside: bool) -> list[_Part]:
    """The texts between the tags of reasoning in a content; those before the last closing tag are reasoning."""
    tags = list(REASONING_TAG.finditer(content))
    thought_ends = max((tag.start() for tag in tags if tag["close"]), default=-1)
    edges = [0, *(edge for tag in tags for edge in tag.span()), len(content)]
    spans = [(start, end) for start, end in zip(edges[::2], edges[1::2], strict=True) if content[start:end].strip()]
    parts: list[_Part] = []
    behind = 0  # the last part's end
    for n, (start, end) in enumerate(spans):
        if not (outside and start == 0):
            start += len(content[start:end]) - len(content[start:end].lstrip())
        if not (outside and end == len(content)):
            end = start + len(content[start:end].rstrip())
        here = "reasoning" if end <= thought_ends else kind
        parts.append(_Part(turn, here, "content", start, content[start:end], before=content[behind:start]))
        if n:
            parts[-2].after = parts[-1].before
        behind = end
    if parts:
        parts[-1].after = content[behind:]
    return parts


def _with_marks(written: Sequence[Message], parts: Sequence[_Part], window: int) -> list[Message]:
    """The messages with marks around each of `parts`; part i has the number i + 1 (0 is the generation blocks')."""
    result = [dict(message) for message in written]
    for number, part in reversed(list(enumerate(parts, start=1))):  # from the end, so that places stay
        message = result[part.turn]
        marked = f"{_mark(window, _OPEN, number)}{part.text}{_mark(window, _CLOSE, number)}"
        if part.key == "tool_calls":
            calls = list(message["tool_calls"])
            calls[part.at] = {**calls[part.at], "function": {**calls[part.at]["function"], "name": marked}}
            message["tool_calls"] = calls
        else:
            text = message[part.key]
            message[part.key] = text[: part.at] + marked + text[part.at + len(part.text) :]
    return result


def _unmark(text: str, parts: list[_Part], window: int) -> _Marked:
    """`text` without marks; where the marks stood is written into `parts`."""
    digit = f"[{chr(window)}-{chr(window + _BASE - 1)}]"
    marks = re.compile(f"[{chr(window + _OPEN)}{chr(window + _CLOSE)}]{digit}{digit}")
    pieces: list[str] = []
    blocks: list[tuple[int, int]] = []
    repeated: set[int] = set()
    length = at = opened = 0
    for part in parts:
        part.start = part.end = -1
    for mark in marks.finditer(text):
        pieces.append(text[at : mark.start()])
        length += len(pieces[-1])
        at = mark.end()
        end, high, low = (ord(c) - window for c in mark[0])
        opens, number = end == _OPEN, high * _BASE + low
        if not number:
            if opens:
                opened = length
            elif opened < length:
                blocks.append((opened, length))
        elif number <= len(parts):
            part = parts[number - 1]
            if opens and part.start < 0:
                part.start = length
            elif opens:
                repeated.add(number - 1)
            elif part.end < 0 <= part.start:
                part.end = length
    pieces.append(text[at:])
    for part in parts:
        if part.end < 0:  # cut in two: only one of its marks is left
            part.start = -1
    return _Marked("".join(pieces), parts, blocks, repeated)
