"""Encoding rows as tokens in the chat format, with loss only on what the assistant says."""

import copy
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from datatools import DataError, UsageError, files
from pipelines.models.limits import ModelLimits
from pipelines.rows.chat.refusals import RowError
from pipelines.rows.chat.template import ChatTemplate
from pipelines.rows.encoded import Encoded
from pipelines.rows.formats.contents import REASONING_TAG, strings
from pipelines.rows.formats.shape import Message
from pipelines.rows.jsonl import shown
from pipelines.rows.labels import labels_of
from pipelines.rows.row import Row

ON_LONG = ("truncate", "skip", "error")
_VERSION = "4"  # of the encoding; increase it when the same row gives other tokens or labels
_SPACE = (" ", "\n", "\t")
_SHORT = 1 << 16  # characters; shorter texts are tokenised as a whole
_MARGIN = 64  # tokens at the end of a piece of a text that the cut may have changed
_TULU = (
    "{{- BEFORE }}{% for message in messages %}{{- '<|' + message['role'] + '|>\n' + message['content'] | trim }}"
    "{% if message['role'] == 'assistant' %}{{- eos_token }}{% endif %}{{- '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{- '<|assistant|>\n' }}{% endif %}"
)


class Encoder:
    """An encoder from rows to token ids and labels, which depend only on the row, the tokenizer and the settings.

    Loss is on assistant turns: on what they say, including reasoning and tool calls, and on the end-of-turn token
    (`ChatTemplate.read`). Templates with {% generation %} blocks define the loss themselves. The whole text is
    tokenised once; the offsets of the tokenizer map characters to tokens, and a token that overlaps a trained span is
    trained. "tulu" also trains the newline after the end token, as LESS does. A plain prompt and its completion are
    joined (by a space, if neither has one there) and end with the end-of-sequence token, with loss after the prompt.
    Plain text has loss on every token. A text that already begins with the tokenizer's beginning-of-sequence token, or
    ends with its end-of-sequence token, does not get a second one.

    A control token of the tokenizer (such as <|im_start|>) in the text of a turn would become the token itself, so
    that the text could fake another turn. Such rows are refused (control_token_in_text), also if only the tokenizer's
    normaliser turns the text into a control token (full-width letters under NFKC, another letter case). Plain text may
    contain control tokens; it is flagged.

    If a row has more than `max_length` tokens, `on_long` decides: "truncate" cuts the end, "skip" refuses the row, and
    "error" raises DataError. A row with a token that the model's embedding does not have (token_beyond_vocabulary), or
    without a trained token (no_supervised_token), is always refused.

    Args:
        tokenizer: A fast tokenizer of transformers.
        chat: "auto" (the tokenizer's own template), "tulu" (the format of LESS, spec/less.md section 3), or the path
            of a Jinja file.
        max_length: The maximum number of tokens of a row; None is the limit of the model.
        on_long: What happens to longer rows, one of `ON_LONG`.
        limits: The limits of the model.

    Raises:
        UsageError: A setting is not valid.
        DataError: The tokenizer has no offsets, or it needs a chat template and has none.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        chat: str | Path = "auto",
        max_length: int | None = None,
        on_long: str = "truncate",
        limits: ModelLimits = ModelLimits(),
    ) -> None:
        self._made_with = tokenizer, str(chat), max_length, on_long, limits
        if on_long not in ON_LONG:
            raise UsageError(f"on_long is {on_long!r}; expected one of {', '.join(ON_LONG)}")
        if max_length is not None and max_length < 2:
            raise UsageError(f"max_length is {max_length}; a row needs at least 2 tokens, one to predict the other")
        if not getattr(tokenizer, "is_fast", False):
            raise DataError(
                f"the tokenizer {type(tokenizer).__name__} does not report which characters a token represents; "
                "use a model with a tokenizer.json"
            )
        self._tokenizer = tokenizer
        self.max_length = limits.longest(max_length)
        """Maximum number of tokens of a row."""
        self._limits = limits
        self._what = "max_length" if self.max_length == max_length else "the positions of the model"
        self._on_long = on_long
        self._chat = str(chat)
        self._template: ChatTemplate | None = None
        self._with_tools: ChatTemplate | None = None
        self._template_text = ""
        if self._chat != "tulu":
            self._template_text, with_tools, name = _find_template(tokenizer, self._chat)
            if self._template_text:
                self._template = self._with_tools = ChatTemplate(tokenizer, self._template_text, name)
            if with_tools:
                self._with_tools = ChatTemplate(tokenizer, with_tools, "of the tokenizer for tools")
                self._template_text += with_tools
        control = _control_tokens(tokenizer, self._template_text)
        self._control = re.compile("|".join(map(re.escape, control)) or "(?!)")
        self._merges = type(tokenizer.backend_tokenizer.model).__name__ == "BPE"
        unknown = getattr(tokenizer.backend_tokenizer.model, "unk_token", None)
        ends = {tokenizer.bos_token, tokenizer.eos_token}
        self.control_ids = {
            tokenizer.convert_tokens_to_ids(text): text
            for text in control
            if text in ends or text not in (tokenizer.unk_token, unknown)
        }
        """Ids of control tokens -> their texts."""

    def __call__(self, row: Row) -> Encoded:
        """Return the tokens of a row.

        Args:
            row: The row.

        Raises:
            RowError: The row cannot be encoded; the error has a reason code.
            DataError: As described for the class.
        """
        flags: tuple[str, ...] = ()
        if row.text is not None:
            found = self._tokenise(row.text, special=True)
            ids, labels = found[0], list(found[0])
            flags = ("control_token_in_text",) if self._control.search(row.text) or self._made(row.text, *found) else ()
        elif row.messages:
            self._refuse_control(_said(row.messages, [*row.tools, row.settings]))
            ids, labels, flags = self._tulu(row) if self._chat == "tulu" else self._templated(row)
        else:
            ids, labels = self._pair(row)
        cut = max(0, len(ids) - self.max_length)
        if cut and self._on_long != "truncate":
            detail = f"{len(ids)} tokens; the limit is {self.max_length} ({self._what})"
            if self._on_long == "error":
                advice = "raise max_length, or change on_long" if self._what == "max_length" else "change on_long"
                raise DataError(f"{row.file}:{row.line}: {detail}; {advice}")
            raise RowError("too_long", detail)
        encoded = Encoded(ids[: self.max_length], labels[: self.max_length], cut, flags)
        vocabulary = self._limits.vocabulary
        if vocabulary is not None and encoded.input_ids and max(encoded.input_ids) >= vocabulary:
            worst = max(encoded.input_ids)
            raise RowError(
                "token_beyond_vocabulary",
                f"token {worst} ({shown(self._tokenizer.decode([worst]), 30)}), "
                f"but the model's embedding has {vocabulary} rows: the tokenizer has tokens that the model "
                "does not; use the model's own tokenizer, or resize its embedding (resize_token_embeddings)",
            )
        if not encoded.supervised:
            why = "no token has loss"
            if cut:
                why = f"the answer starts after the first {self.max_length} tokens ({self._what})"
            raise RowError("no_supervised_token", why)
        return encoded

    def ahead(self, rows: Sequence[Row]) -> None:
        """Have the template render rows together that are encoded next, one by one, which saves most of the time.

        Args:
            rows: The rows.
        """
        found: dict[int, tuple[ChatTemplate, list[Row]]] = {}
        for row in rows:
            if row.messages and (template := self._template_of(row)) is not None:
                found.setdefault(id(template), (template, []))[1].append(row)
        for template, chosen in found.values():
            template.ahead([(row.messages, row.tools) for row in chosen])

    def __reduce__(self) -> tuple[Any, ...]:  # for other processes that encode in the same way
        return _again, self._made_with

    def trained_tokenizer(self) -> Any:
        """Return the tokenizer with the chat template that the rows were written with, for models trained on them.

        Its `apply_chat_template` gives the text and the tokens of training; for "tulu", the template writes the same
        text. A template that prints the date prints the fixed day that was used in training.
        """
        found = copy.deepcopy(self._tokenizer)
        if self._chat == "tulu":
            found.chat_template = _TULU.replace("BEFORE", json.dumps(_special_tokens_before(found)))
        elif self._template is not None and (self._chat != "auto" or self._template.text != self._template_text):
            found.chat_template = self._template.text
        return found

    def fingerprint(self) -> dict[str, str]:
        """Return the facts on which the tokens depend besides the rows; hashes are xxh3-128."""
        return {
            "encoding": _VERSION,
            "tokenizer": _tokenizer_digest(self._tokenizer),
            "chat": self._chat if self._chat in {"auto", "tulu"} else "file",
            "template": files.digest(self._template_text.encode()) if self._template_text else "none",
            "max_length": str(self.max_length),
            "on_long": self._on_long,
        }

    def identity(self) -> dict[str, str]:
        """Return all facts on which the tokens of a row, or its refusal, depend besides the row and the code."""
        found = {
            "class": type(self._tokenizer).__name__,
            "vocabulary": str(self._limits.vocabulary),
            "longest": self._what,
        }
        return self.fingerprint() | found

    def _template_of(self, row: Row) -> ChatTemplate | None:
        tools = row.tools or any("tool_calls" in turn for turn in row.messages)
        template = self._with_tools if tools else self._template
        return template.given(row.settings) if template is not None and row.settings else template

    def _templated(self, row: Row) -> tuple[list[int], list[int], tuple[str, ...]]:
        template = self._template_of(row)
        if template is None:
            raise DataError(
                f"{row.file}:{row.line} is a conversation, but the tokenizer has no chat template; "
                "give one with --chat-template FILE, or 'tulu'"
            )
        rendered = template.read(row.messages, row.tools, row.masked)
        ids, offsets = self._tokenise(rendered.text, special=False)
        self._refuse_made(rendered.text, ids, offsets)
        return ids, labels_of(ids, offsets, rendered.spans), rendered.flags

    def _tulu(self, row: Row) -> tuple[list[int], list[int], tuple[str, ...]]:
        if row.tools or any("tool_calls" in turn or turn["role"] == "tool" for turn in row.messages):
            raise RowError("tool_turn", "the format 'tulu' does not support tools; use a chat template that does")
        text, spans = "", []
        for k, turn in enumerate(row.messages):
            text += f"<|{turn['role']}|>\n"
            start = len(text)
            text += turn["content"].strip() + (self._eos() if turn["role"] == "assistant" else "") + "\n"
            if turn["role"] == "assistant" and k not in row.masked:
                spans.append((start, len(text)))
        ids, offsets = self._tokenise(text, special=True, closed=True)
        self._refuse_made(text, ids, offsets)
        dropped = any("reasoning" in turn for turn in row.messages)
        return ids, labels_of(ids, offsets, spans), ("reasoning_dropped",) if dropped else ()

    def _pair(self, row: Row) -> tuple[list[int], list[int]]:
        assert row.prompt is not None and row.completion is not None
        eos, bos = self._eos(), self._tokenizer.bos_token
        prompt, completion = row.prompt, row.completion.removesuffix(eos) or row.completion
        self._refuse_control((prompt.removeprefix(bos) if bos else prompt, completion))
        joint = "" if prompt.endswith(_SPACE) or completion.startswith(_SPACE) else " "
        text = prompt + joint + completion + eos
        ids, offsets = self._tokenise(text, special=True, closed=True)
        self._refuse_made(text, ids, offsets)
        return ids, labels_of(ids, offsets, [(len(prompt), len(text))])

    def _tokenise(self, text: str, special: bool, closed: bool = False) -> tuple[list[int], list[tuple[int, int]]]:
        """Return ids and offsets.

        `special` adds the tokens that the tokenizer puts around a text, unless the text already has them. `closed`
        means that the text has its own end and gets no other.

        A tokenizer takes 300 bytes of memory per character. Of a text that is much longer than `max_length` tokens,
        therefore only the beginning is tokenised, if the rest cannot change the tokens that are kept. This is certain
        if these tokens belong to words (of the pre-tokenizer) that have ended; for BPE, whose merges work from the
        left, it is assumed if a beginning that is 1.5 times as long has the same tokens.
        """
        size = max(_SHORT, 6 * self.max_length)
        kept = self.max_length + 1  # one more, to notice that the row is too long
        while len(text) > 2 * size:
            ids, offsets, words = self._whole(text[:size], special, closed)
            if len(ids) >= kept + _MARGIN:
                sure = len(set(words[kept:-_MARGIN]) - {words[kept - 1], None}) > 1
                if not sure and self._merges:
                    more = self._whole(text[: size + size // 2 + 1], special, closed)
                    sure = ids[:kept] == more[0][:kept] and offsets[:kept] == more[1][:kept]
                if sure:
                    return ids[:-_MARGIN], offsets[:-_MARGIN]
            size *= 2
        ids, offsets, _ = self._whole(text, special, closed)
        return ids, offsets

    def _whole(
        self, text: str, special: bool, closed: bool
    ) -> tuple[list[int], list[tuple[int, int]], list[int | None]]:
        encoded = self._tokenizer(
            text,
            add_special_tokens=special,
            return_offsets_mapping=True,
            truncation=False,
            padding=False,
            return_attention_mask=False,
            return_special_tokens_mask=True,
            verbose=False,
        )
        ids, offsets, words = encoded["input_ids"], encoded["offset_mapping"], encoded.word_ids()
        if not special:
            return ids, offsets, words
        added = [
            bool(mark) and start == end
            for mark, (start, end) in zip(encoded["special_tokens_mask"], offsets, strict=True)
        ]
        first = next((t for t, yes in enumerate(added) if not yes), len(ids))
        last = next((t for t in reversed(range(len(ids))) if not added[t]), -1)
        start, end = first, last + 1
        if first <= last:
            n = first  # tokens put before the text; those after it
            start = first if n and ids[first : first + n] == ids[:n] else 0
            m = len(ids) - 1 - last
            end = last + 1 if m and (closed or ids[last + 1 - m : last + 1] == ids[last + 1 :]) else len(ids)
            return ids[start:end], offsets[start:end], words[start:end]
        return ids, offsets, words

    def _eos(self) -> str:
        eos = self._tokenizer.eos_token
        if not eos:
            raise DataError(
                "the tokenizer has no end-of-sequence token, which this format needs after an answer; "
                "use a chat template"
            )
        return str(eos)

    def _made(self, text: str, ids: list[int], offsets: Sequence[tuple[int, int]]) -> str:
        """Return a part of `text` that became a control token only through normalisation; "" if there is none."""
        control = self.control_ids
        for t in [t for t, token in enumerate(ids) if token in control]:
            start, end = offsets[t]
            if start < end and text[start:end].strip() != control[ids[t]].strip():
                return text[start:end]
        return ""

    def _refuse_made(self, text: str, ids: list[int], offsets: Sequence[tuple[int, int]]) -> None:
        if found := self._made(text, ids, offsets):
            raise RowError(
                "control_token_in_text",
                f"the tokenizer's normaliser turns {shown(found)} into a control token, which could fake a turn",
            )

    def _refuse_control(self, texts: Any) -> None:
        for text in texts:
            if found := self._control.search(text):
                raise RowError(
                    "control_token_in_text",
                    f"{shown(found.group())} is a control token of this tokenizer; in a text it could fake a turn",
                )


def _again(tokenizer: Any, chat: str, max_length: int | None, on_long: str, limits: ModelLimits) -> Encoder:
    return Encoder(tokenizer, chat=chat, max_length=max_length, on_long=on_long, limits=limits)


def _said(messages: Sequence[Message], tools: Sequence[Any]) -> Iterator[str]:
    """Yield every text of a conversation. Reasoning tags in an answer may be the template's own and are skipped."""
    for message in messages:
        if message["role"] == "assistant":
            yield from REASONING_TAG.sub("\0", message["content"]).split("\0")
            yield message.get("reasoning", "")
            yield from strings(message.get("tool_calls", ()))
        else:
            yield message["content"]
    yield from strings(tools)


def _find_template(tokenizer: Any, chat: str) -> tuple[str, str, str]:
    """Return the template's text ("" if there is none), the text of a template for tools, and its name for messages."""
    if chat == "auto":
        template = getattr(tokenizer, "chat_template", None)
        if isinstance(template, dict):
            return template.get("default") or "", template.get("tool_use") or "", "of the tokenizer"
        return template or "", "", "of the tokenizer"
    path = Path(chat)
    if not path.is_file():
        raise UsageError(f"chat is {shown(chat, 200)}; expected 'auto', 'tulu' or the path of a Jinja template")
    try:
        return files.read_bytes(path, limit=1 << 20).decode("utf-8"), "", chat
    except UnicodeDecodeError as error:
        raise DataError(f"the chat template {chat} is not UTF-8: {error.reason} at byte {error.start}") from error


def _control_tokens(tokenizer: Any, template: str) -> list[str]:
    """Return the tokenizer's special tokens, and other added tokens that the template writes (roles, ends of turns).

    Marks of reasoning and tools are text that an assistant may write. Very short tokens are words, not control tokens.
    """
    special = set(tokenizer.all_special_tokens)
    found = []
    for token in tokenizer.added_tokens_decoder.values():
        plain = re.search("think|tool|function", token.content) is not None
        if token.special or token.content in special or (token.content in template and not plain):
            found.append(token.content)
    return sorted({text for text in found if len(text) > 2}, key=len, reverse=True)


def _special_tokens_before(tokenizer: Any) -> str:
    """Return what the tokenizer puts before a text with special tokens, which a chat template must write itself."""
    whole = tokenizer("a", return_attention_mask=False)["input_ids"]
    inner = tokenizer("a", add_special_tokens=False, return_attention_mask=False)["input_ids"]
    at = next((i for i in range(len(whole)) if whole[i : i + len(inner)] == inner), 0)
    return "".join(tokenizer.convert_ids_to_tokens(whole[:at]))


def _tokenizer_digest(tokenizer: Any) -> str:
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    for name in ("truncation", "padding"):  # set and unset by calls
        state.pop(name, None)
    special = {name: str(token) for name, token in sorted(tokenizer.special_tokens_map.items())}
    return files.digest(json.dumps([state, special], sort_keys=True).encode())
