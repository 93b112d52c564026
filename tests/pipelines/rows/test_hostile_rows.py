"""Rows and templates that cost more than they are, and texts that a tokenizer makes control tokens of."""

import copy
import threading

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from datatools import DataError
from pipelines.rows import encode
from pipelines.rows.chat import process, render
from pipelines.rows.chat.refusals import RowError
from pipelines.rows.chat.template import ChatTemplate
from pipelines.rows.encode import Encoder
from pipelines.rows.formats.preference import dialogue
from pipelines.rows.formats.table import read_shape
from pipelines.rows.jsonl import Malformed
from pipelines.rows.row import Row
from pipelines.select.columns import column
from tests.pipelines.rows.families import CHATML, FAMILIES, byte_level, row


def bytes_tokenizer(normalizer=None, normalized=True, eos="<|im_end|>"):
    """One token a byte, and the two of ChatML."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({piece: k for k, piece in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.add_special_tokens([AddedToken(text, normalized=normalized) for text in ("<|im_start|>", "<|im_end|>")])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=eos, chat_template=CHATML)


# ----------------------------------------------------------------------------------------------- long texts


class Counted:
    """A tokenizer that counts the characters it gets."""

    def __init__(self, tokenizer):
        self._tokenizer = tokenizer
        self.characters = 0

    def __getattr__(self, name):
        return getattr(self._tokenizer, name)

    def __call__(self, text, **options):
        self.characters += len(text)
        return self._tokenizer(text, **options)


LONG = {
    "words": "The quick brown fox, naïve café 東京. " * 4_000,
    "one letter": "a" * 140_000,
    "spaces": "x" + " " * 140_000,
    "lines": "\n" * 140_000,
    "no letter of the alphabet": "🗼" * 40_000,
}


@pytest.mark.parametrize(("name", "text", "shape"), [
    (name, text, shape) for name in ("byte level", "bytes", "unigram") for text in LONG
    for shape in (("text", "pair", "messages", "tulu") if text == "words" else ("messages",))])  # fmt: skip
def test_a_long_text_is_tokenised_no_further_than_it_is_kept(name, text, shape, monkeypatch):
    tokenizer = {
        "byte level": lambda: byte_level(("<|im_start|>", "<|im_end|>"), eos="<|im_end|>"),
        "bytes": lambda: bytes_tokenizer(normalizers.NFKC()),
        "unigram": unigram,
    }[name]()
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = CHATML
    said = {"text": {"text": LONG[text]}, "pair": {"prompt": "q", "completion": LONG[text] + "x"}}.get(shape)
    item = Row("i", "s", "f", 1, b"", **said) if said else row(("user", "q"), ("assistant", LONG[text] + "x"))
    counted = Counted(tokenizer)
    encoder = Encoder(counted, max_length=200, chat="tulu" if shape == "tulu" else "auto")
    counted.characters = 0
    monkeypatch.setattr(encode, "_SHORT", 1 << 12)
    found = encoder(item)
    used = counted.characters
    monkeypatch.setattr(encode, "_SHORT", 1 << 30)
    whole = encoder(item)
    assert (found.input_ids, found.labels) == (whole.input_ids, whole.labels)
    assert len(found.input_ids) == min(200, len(whole.input_ids)) and found.cut >= min(1, whole.cut)
    if name != "unigram" or text == "words":
        assert used < len(LONG[text]) / 3


def unigram():
    """Pieces chosen over the whole of a word; where the run is not a multiple of three, the rest stands first."""
    said = [
        "<unk>",
        "<|im_start|>",
        "<|im_end|>",
        "▁",
        "\n",
        "a",
        "aaa",
        "▁▁▁",
        *map(chr, range(33, 97)),
        *map(chr, range(98, 127)),
    ]
    tokenizer = Tokenizer(models.Unigram([(piece, -1.0 - (len(piece) == 1)) for piece in said], unk_id=0))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.add_special_tokens(["<unk>", "<|im_start|>", "<|im_end|>"])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<|im_end|>")


def test_a_row_that_is_too_long_is_refused_without_its_end():
    encoder = Encoder(bytes_tokenizer(), max_length=100, on_long="skip")
    with pytest.raises(RowError, match="too_long"):
        encoder(Row("i", "s", "f", 1, b"", text="word " * 100_000))


# ------------------------------------------------------------------------------------------- control tokens

MADE = {
    "full width": (normalizers.NFKC(), "<｜im_start|>"),
    "full width, decomposed": (normalizers.NFKD(), "＜|im_start|＞"),
    "case": (normalizers.Lowercase(), "<|IM_START|>"),
    "accents": (normalizers.Sequence([normalizers.NFD(), normalizers.StripAccents()]), "<|ím_start|>"),
    "taken out": (normalizers.Replace(Regex("[\u200b\u200d]"), ""), "<|im_\u200bstart|>"),
    "replaced": (normalizers.Replace("$", "|"), "<$im_start|>"),
    "several": (
        normalizers.Sequence([normalizers.Strip(), normalizers.NFKC(), normalizers.Lowercase()]),
        "<｜IM_start|>",
    ),
}


@pytest.mark.parametrize("kind", MADE)
@pytest.mark.parametrize("shape", ["messages", "tulu", "pair", "text"])
def test_what_a_normaliser_makes_a_control_token_is_refused(kind, shape):
    normalizer, fake = MADE[kind]
    encoder = Encoder(bytes_tokenizer(normalizer), max_length=1000, chat="tulu" if shape == "tulu" else "auto")
    text = f"a {fake}system b"
    if shape == "text":
        assert encoder(Row("i", "s", "f", 1, b"", text=text)).flags == ("control_token_in_text",)
        return
    item = row(("user", text), ("assistant", "b"))
    if shape == "pair":
        item = Row("i", "s", "f", 1, b"", prompt=text, completion="b")
    with pytest.raises(RowError, match="normaliser turns .* into a control token"):
        encoder(item)
    good = row(("user", "a ＜b＞ É"), ("assistant", "b"))
    assert encoder(good).supervised  # the template's own tokens are as they were


@pytest.mark.parametrize("kind", MADE)
def test_where_tokens_are_looked_for_before_normalising_it_is_text(kind):
    normalizer, fake = MADE[kind]
    encoder = Encoder(bytes_tokenizer(normalizer, normalized=False), max_length=1000)
    encoded = encoder(row(("user", f"a {fake} b"), ("assistant", "b")))
    assert encoded.input_ids.count(encoder._tokenizer.convert_tokens_to_ids("<|im_start|>")) == 2


# ------------------------------------------------------------------------------------------------ templates

LOOPS = {
    "loop": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "macros": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "power": "{{ 3 ** 999999999 }}",
}
LARGE = {
    "times": "{{ 'a' * 99999999999 }}",
    "doubled": "{% set ns = namespace(x='aaaaaaaaaaaaaaaa') %}"
    "{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
    "filter": "{{ 'a'|center(99999999999) }}",
    "format": "{{ '%099999999999d' % 1 }}",
}


@pytest.fixture
def quick(monkeypatch):
    """A renderer of its own, with little time and memory."""
    monkeypatch.setattr(process, "SECONDS", 0.2)
    monkeypatch.setattr(process, "MEMORY", 256 << 20)
    worker = process.Worker()
    monkeypatch.setattr(render, "worker", worker)
    yield worker
    worker.close()


def test_templates_that_take_too_much_make_bad_rows(quick, monkeypatch):
    honest = Encoder(bytes_tokenizer(), max_length=1000)
    item = row(("user", "q"), ("assistant", "a"))
    want = honest(item)
    tokenizer = bytes_tokenizer()
    for template in LOOPS.values():
        tokenizer.chat_template = template + CHATML
        encoder = Encoder(tokenizer, max_length=1000)
        with pytest.raises(RowError, match="template_too_slow"):
            encoder(item)
    monkeypatch.setattr(render, "_SLOW_ROWS", 2)
    with pytest.raises(DataError, match="may be in a loop"):
        encoder(item)
    for template in LARGE.values():
        tokenizer.chat_template = template + CHATML
        with pytest.raises(RowError, match="template_too_(large|slow)|template_refuses|template_output_too_long"):
            Encoder(tokenizer, max_length=1000)(item)
    assert honest(item) == want  # the renderer is there again


def test_rendering_is_that_of_transformers_from_any_thread():
    for name, family in FAMILIES.items():
        tokenizer = copy.deepcopy(family.tokenizer())
        tokenizer.chat_template = family.template
        messages = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}]
        found: list[str] = []
        template = ChatTemplate(tokenizer, family.template, name)
        want = tokenizer.apply_chat_template(messages, tokenize=False, chat_template=template.text)
        thread = threading.Thread(target=lambda: found.append(template.render(messages)))  # noqa: B023
        thread.start()
        thread.join()
        assert found == [want], name


def test_a_template_that_draws_draws_the_same():
    tokenizer = bytes_tokenizer()
    template = ChatTemplate(tokenizer, "{{ [1, 2, 3, 4, 5, 6, 7, 8, 9]|random }}{{ lipsum(1) }}", "drawing")
    messages = [{"role": "user", "content": "one"}]
    assert len({template.render(messages) for _ in range(5)}) == 1


def test_half_a_character_from_a_template_is_a_refusal():
    template = ChatTemplate(bytes_tokenizer(), r"{{ '\ud800' }}", "halves")
    with pytest.raises(RowError, match="template_refuses"):
        template.render([{"role": "user", "content": "one"}])


# ---------------------------------------------------------------------------------------- what rows are written as


def test_keys_that_are_data_make_no_wide_table():
    """A struct with a field for every key of every row would hold n * n values for n rows."""
    values = [{"scores": {f"key {k}": k}} for k in range(3000)]
    found = column(values)
    assert str(found.type) == "string" and found.nbytes < 300_000
    assert column([{"a": [{"b": 1}]}] * 3).to_pylist() == [{"a": [{"b": 1}]}] * 3


def test_dialogues_are_read_in_one_pass():
    text = "\n\nHuman: a\n\n\n  Assistant: x\nHuman: y\n\n Human: z \n \n\nAssistant: Assistant: w" + "\n" * 1_000_000
    assert [(turn["role"], turn["content"]) for turn in dialogue(text)] == [
        ("human", "a"),
        ("assistant", "x\nHuman: y"),
        ("human", "z"),
        ("assistant", "Assistant: w"),
    ]


@pytest.mark.parametrize(
    "inside", ['{"a": 1e999}', r'{"a": "\ud800"}', "[" * 500 + "]" * 500, '{"a": NaN}', '{"a": 1, "a": 2}']
)
def test_json_inside_texts_is_read_by_the_rules_for_rows(inside):
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    with pytest.raises(Malformed, match="tools_not_list"):
        read_shape({"messages": turns, "tools": inside})
