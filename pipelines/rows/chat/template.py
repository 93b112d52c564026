"""The characters of a rendered conversation that the assistant wrote: spans, found by rendering the row with marks.

Every row is rendered twice: unchanged, and with private-use characters around the texts of its turns (and around the
template's own {% generation %} blocks, if it has them). With the marks removed, the second text must equal the first,
and the assistant's texts must be unchanged between their marks; otherwise the row is refused. Therefore no content can
be mistaken for structure, no text is searched for, and templates may trim contents, depend on them, or remove
reasoning from them. The offsets of the tokenizer map characters to tokens (`pipelines.rows.encode`). A mask that a
library computes from the same characters is never used.
"""

import json
import os.path
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

from pipelines.rows.chat.ends import TurnEnds
from pipelines.rows.chat.marks import Marked, Part, free_window, parts_of, unmark, with_marks
from pipelines.rows.chat.messages import ways_to_write
from pipelines.rows.chat.refusals import RowError, TooSlow
from pipelines.rows.chat.render import Renderer
from pipelines.rows.formats.contents import REASONING_TAG
from pipelines.rows.formats.shape import Message

_VARIANTS = 256  # templates with the variables of rows that are kept


@dataclass(frozen=True, slots=True)
class Rendered:
    """A conversation as the template writes it, the character spans with loss (in order), and what was omitted."""

    text: str
    spans: list[tuple[int, int]]
    flags: tuple[str, ...] = ()
    """system_dropped, reasoning_dropped, tools_dropped: the template omits this part."""


class ChatTemplate:
    """A Jinja chat template with its tokenizer, rendered in the sandbox of transformers, in a process with limits.

    Attributes:
        text: The template as it is rendered, with a fixed day if it prints the date.
    """

    def __init__(
        self, tokenizer: Any, template: str, name: str, settings: Mapping[str, Any] = MappingProxyType({})
    ) -> None:
        self._made_with = tokenizer, template, name
        self._settings = settings
        self._variants: dict[str, ChatTemplate] = {}
        self._renderer = Renderer(tokenizer, template, name, settings)
        self._render = self._renderer.render
        self.text = self._renderer.text
        self._takes_tools = re.search(r"\btools\b", template) is not None
        self._ends = TurnEnds(tokenizer)
        self._prompts: dict[tuple[str, bool], str] = {}

    def given(self, settings: Mapping[str, Any]) -> "ChatTemplate":
        """Return this template with further variables; those that it does not mention change nothing.

        Args:
            settings: The variables of a row.
        """
        mine = {name: value for name, value in settings.items() if re.search(rf"\b{re.escape(name)}\b", self.text)}
        key = json.dumps(mine, sort_keys=True)
        if mine and key not in self._variants:
            if len(self._variants) == _VARIANTS:
                self._variants.pop(next(iter(self._variants)))
            self._variants[key] = ChatTemplate(*self._made_with, mine)
        return self._variants[key] if mine else self

    def render(self, messages: Sequence[Message], tools: Sequence[Any] = ()) -> str:
        """Return the text of a conversation.

        Args:
            messages: The turns.
            tools: Definitions of tools.

        Raises:
            RowError: The template refuses it.
            DataError: The template is not valid.
        """
        return self._render(next(ways_to_write(messages)), tools)

    def ahead(self, rows: Sequence[tuple[Sequence[Message], Sequence[Any]]]) -> None:
        """Have texts rendered together that `read` will ask for one by one: unchanged, and with the first marks.

        Args:
            rows: (messages, definitions of tools) of each row.
        """
        wanted: list[tuple[Sequence[Message], Sequence[Any], str | None]] = []
        for messages, tools in rows:
            try:
                window = free_window(messages, [*tools, self._settings])
            except RowError:
                continue
            written = next(ways_to_write(messages))
            wanted.append((written, tools, None))
            wanted.append((with_marks(written, parts_of(written, True, True), window), tools, None))
            if self._renderer.has_blocks:
                wanted.append((written, tools, self._renderer.with_marked_blocks(window)))
        self._renderer.ahead(wanted)

    def read(
        self, messages: Sequence[Message], tools: Sequence[Any] = (), masked: frozenset[int] = frozenset()
    ) -> Rendered:
        """Return the text, and the spans of the assistant's turns except those in `masked`.

        A span is the text of the turn and the end-of-turn text after it. It includes reasoning that the template
        keeps, with the text around it that the model has to write too (all text after the generation prompt), and tool
        calls. Templates with {% generation %} blocks define the loss themselves.

        Args:
            messages: The turns.
            tools: Definitions of tools.
            masked: Positions of assistant turns without loss.

        Raises:
            RowError: The template refuses the row, or changes an answer.
            DataError: The template is not valid.
        """
        window = free_window(messages, [*tools, self._settings])
        written, text = self._write(messages, tools, window)
        flags = set()
        if tools and not self._takes_tools:
            flags.add("tools_dropped")
        blocks = None
        if self._renderer.has_blocks:
            found = unmark(self._render(written, tools, template=self._renderer.with_marked_blocks(window)), [], window)
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
            # text that the template's author marked has loss, even if the template rewrites it
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
        """Return the messages in the form that this template understands, and their text.

        Templates differ in how they take a turn that only calls tools (no content, or empty content) and the arguments
        of a call (an object, or its JSON). The first form in which every call is rendered is used.
        """
        refused: RowError | None = None
        for written in ways_to_write(messages):
            try:
                text = self._render(written, tools)
                if any("tool_calls" in message for message in written):
                    calls = [part for part in parts_of(written, True, True) if part.kind == "call"]
                    marked = unmark(self._render(with_marks(written, calls, window), tools), calls, window)
                    missing = next((part for part in calls if part.start < 0), None)
                    if missing is not None or marked.text != text:
                        turn = (missing or calls[0]).turn + 1
                        raise RowError(
                            "template_drops_turn",
                            "the chat template does not write the tool calls of "
                            f"turn {turn}; use a template that takes tools",
                        )
                return written, text
            except TooSlow:
                raise
            except RowError as error:
                refused = refused or error
        assert refused is not None
        raise refused

    def _place(self, written: list[Message], tools: Sequence[Any], text: str, window: int) -> Marked:
        """Render the conversation with marks that change nothing, as far out as possible.

        White space at the ends of a content is inside the marks if the template keeps it. If that changes the text
        (the template strips it), the marks exclude it, and each side is tried separately. A user turn that the
        template inspects (`startswith`) has no marks.
        """

        def attempt(parts: list[Part]) -> Marked | None:
            try:
                found = unmark(self._render(with_marks(written, parts, window), tools), parts, window)
            except TooSlow:
                raise
            except RowError:
                return None
            return found if found.text == text else None

        for others in (True, False):
            for outside in (True, False):
                parts = parts_of(written, others, outside)
                found = attempt(parts)
                if found is not None:
                    return found if outside else self._widen(found, attempt)
        answers = [k for k, message in enumerate(written) if message["role"] == "assistant"]
        raise self._differs(answers[0])

    def _widen(self, found: Marked, attempt: Callable[[list[Part]], Marked | None]) -> Marked:
        """Extend the marks of each answer to its white space, on the sides where the template keeps it."""
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

    def _check(self, k: int, marked: Marked) -> None:
        """Refuse a turn whose answer is missing in the text, occurs twice, or differs from the row."""
        for i, part in enumerate(marked.parts):
            if part.turn != k or part.kind == "call":
                continue
            if part.start < 0 and part.kind == "answer":
                raise RowError("template_drops_turn", f"the chat template omits turn {k + 1} (assistant)")
            if i in marked.repeated:
                raise RowError("template_repeats_turn", f"the chat template writes turn {k + 1} twice")
            if part.start >= 0 and marked.text[part.start : part.end] != part.text:
                raise self._differs(k)

    def _left_out(self, written: list[Message], marked: Marked) -> set[str]:
        """Return what the template omits, as flags.

        Raises:
            RowError: It omits a turn of the user or of a tool.
        """
        flags = set()
        for part in marked.parts:
            role = written[part.turn]["role"]
            if part.start >= 0:
                continue
            if role == "system":
                flags.add("system_dropped")
            elif role != "assistant":
                raise RowError("template_drops_turn", f"the chat template omits turn {part.turn + 1} ({role})")
            elif part.key == "reasoning" or REASONING_TAG.search(part.before + part.after):
                flags.add("reasoning_dropped")
            else:
                flags.add("call_text_dropped")
        return flags

    def _spans(
        self, k: int, written: list[Message], tools: Sequence[Any], marked: Marked, window: int, *, wanted: bool
    ) -> list[tuple[int, int]]:
        """Return the spans of turn `k`, checked; several if it contains another turn (a tool's result)."""
        self._check(k, marked)
        said = sorted((p for p in marked.parts if p.turn == k and p.start >= 0), key=lambda part: part.start)
        others = sorted(p.start for p in marked.parts if p.turn != k and p.start >= 0)
        runs: list[list[Part]] = []
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
                start -= len(first.before)  # an empty block of reasoning that the row contains
            if last.kind != "call" and last.after.strip() and marked.text.startswith(last.after, end):
                end += len(last.after)
            following = marked.text[end : min((other for other in others if other >= end), default=None)]
            if n < len(runs) - 1 or last.kind != "answer":
                end += self._ends.of_call(self._closing(k, written, tools, marked, last, window), following)
            else:
                # the end of an answer is at most the text after the final answer; more would be the next header
                plain = [part for part in marked.parts if part.kind == "answer" and part.start >= 0]
                final = max(plain, key=lambda part: (part.turn, part.end))
                end += len(
                    self._ends.of_answer(self._closing(final.turn, written, tools, marked, final, window), following)
                )
            spans.append((start, end))
        return spans

    def _start(
        self, k: int, written: list[Message], tools: Sequence[Any], marked: Marked, first: Part, window: int
    ) -> int:
        """Return where a turn that begins with reasoning or a tool call begins: after the generation prompt.

        The model has to write the opening of its reasoning or its call, unless the prompt already contains it. An
        empty block of reasoning that the template adds by itself does not belong to the row.
        """
        text = marked.text
        edge = max((part.end for part in marked.parts if 0 <= part.end <= first.start and part.turn != k), default=0)
        gap = text[edge : first.start]
        prompt = self._prompt(k, written, tools)
        at = gap.rfind(prompt) if prompt else -1
        tags = list(REASONING_TAG.finditer(gap))
        if first.before.strip() and gap.endswith(first.before):  # the row's own reasoning tag
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
        """Return how much of `gap` is the header of turn `k`: the text that a plain answer in its place also has."""
        plain = [*written[:k], {"role": "assistant", "content": "."}]
        parts = parts_of(plain, True, True)
        try:
            text = unmark(self._render(with_marks(plain, parts, window), tools), parts, window).text
        except TooSlow:
            raise
        except RowError:
            return len(gap)
        place = parts[-1].start
        edge = max((part.end for part in parts[:-1] if 0 <= part.end <= place), default=0)
        return len(os.path.commonprefix([gap, text[edge:place]])) or len(gap)

    def _prompt(self, k: int, written: list[Message], tools: Sequence[Any]) -> str:
        """Return the text with which the template asks for turn `k`; "" if there is none."""
        key = (written[k - 1]["role"] if k else "", bool(tools))
        if key not in self._prompts:
            try:
                asked, plain = (self._render(written[:k], tools, add_generation_prompt=ask) for ask in (True, False))
            except TooSlow:
                raise
            except RowError:
                return ""
            self._prompts[key] = asked.removeprefix(plain) if asked.startswith(plain) else ""
        return self._prompts[key]

    def _closing(
        self, k: int, written: list[Message], tools: Sequence[Any], marked: Marked, last: Part, window: int
    ) -> str:
        """Return the text after the part `last` of turn `k` when the conversation ends with that turn."""
        if k < len(written) - 1:
            place = marked.parts.index(last)
            parts = [replace(part) for part in marked.parts if part.turn <= k]
            marked = unmark(self._render(with_marks(written[: k + 1], parts, window), tools), parts, window)
            last = marked.parts[place]
        if last.end < 0:
            return ""
        after = last.after if last.after.strip() and marked.text.startswith(last.after, last.end) else ""
        return marked.text[last.end + len(after) :]

    def _differs(self, index: int) -> RowError:
        return RowError(
            "template_changes_text",
            f"the chat template changes turn {index + 1} (it rewrites "
            "contents or depends on them), so that the assistant's words cannot be "
            "located; use a template with {% generation %} markers",
        )
