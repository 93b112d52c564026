"""What templates refuse, what they do to contents, and the blocks that they write themselves."""

import copy
from dataclasses import replace

import pytest

from datatools import DataError, UsageError
from pipelines.rows.chat.template import ChatTemplate
from pipelines.rows.encode import Encoder
from pipelines.rows.formats.table import read_shape
from pipelines.rows.jsonl import Malformed
from pipelines.rows.row import Row
from tests.pipelines.rows.families import CHATML, FAMILIES, PAIR, byte_level, encoder, reason, row, trained

# ---------------------------------------------------------------- what templates refuse and do


def with_template(template: str, special=("<|im_start|>", "<|im_end|>"), **options) -> Encoder:
    tokenizer = byte_level(special, eos="<|im_end|>")
    tokenizer.chat_template = template
    return Encoder(tokenizer, **{"max_length": 1000, **options})


def test_template_refusals_have_reasons():
    assert reason(encoder("gemma"), row(("system", "s"), ("user", "q"), ("assistant", "a"))) == "template_refuses"
    assert reason(encoder("mistral"), row(("user", "q"), ("user", "q"), ("assistant", "a"))) == "template_refuses"
    assert reason(encoder("gemma"), row(("assistant", "a"), ("user", "q"))) == "template_refuses"
    assert encoder("chatml")(row(("assistant", "a"), ("user", "q"))).supervised == 2  # it renders, so it is kept
    upper = CHATML.replace("m['content']", "m['content'] | upper")
    assert reason(with_template(upper), PAIR) == "template_changes_text"
    assert reason(with_template("{{ messages[0]['content'] }}"), PAIR) == "template_drops_turn"
    assert reason(with_template(CHATML + CHATML), PAIR) == "template_repeats_turn"
    assert reason(with_template("{{ messages.foo.bar }}"), PAIR) == "template_refuses"
    assert reason(with_template("{{ 'x' * 10000000 }}" + CHATML), PAIR) == "template_output_too_long"
    assert reason(with_template("{{ ''.__class__.__mro__ }}"), PAIR) == "template_refuses"  # the sandbox
    with pytest.raises(DataError, match="of the tokenizer is not valid"):
        with_template("{% for %}")(PAIR)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("'<|im_end|>'", "('<|im_end|>' if m['content'] != 'odd' else '<|im_odd|>')"),  # of the same length
        ("{% endfor %}", "{% endfor %}{{ 'more' if messages[-1]['content'] == 'odd' else '' }}"),
        ("'<|im_start|>'", "('<|im_start|>' if m['content'] != 'odd' else '<|im_odd|>')"),
    ],
)
def test_structure_that_depends_on_a_content_is_refused(old, new):
    encode = with_template(CHATML.replace(old, new, 1))
    assert encode(PAIR).supervised == 2
    assert reason(encode, row(("user", "q"), ("assistant", "odd"))) == "template_changes_text"


def test_reasoning_taken_out_by_the_template_is_counted():
    template = CHATML.replace("m['content']", "m['content'].split('</think>')[-1]")
    tokenizer = byte_level(("<|im_start|>", "<|im_end|>"), eos="<|im_end|>")
    encoded = with_template(template)(row(("user", "q"), ("assistant", "<think>r</think>a")))
    assert trained(tokenizer, encoded) == ["a<|im_end|>"] and encoded.flags == ("reasoning_dropped",)
    assert with_template(template)(PAIR).flags == ()


def test_system_turn_left_out_is_flagged():
    encoded = encoder("vicuna")(row(("system", "s"), ("user", "q"), ("assistant", "a")))
    assert encoded.flags == ("system_dropped",)
    assert encoded.input_ids == encoder("vicuna")(PAIR).input_ids


def test_generation_markers_are_used():
    template = (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' }}{% if m['role'] == 'assistant' %}"
        "{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}{% else %}"
        "{{ m['content'] + '<|im_end|>' }}{% endif %}{{ '\\n' }}{% endfor %}"
    )
    turns = row(("user", "What is 3 + 4?"), ("assistant", "It is 7!"), ("user", "Yes"), ("assistant", "a\n\nb"))
    assert with_template(template)(turns) == with_template(CHATML)(turns)
    markers = template.replace(
        "m['content'] + '<|im_end|>' }}{% endgeneration %}",
        "m['content'].split('</think>')[-1] + '<|im_end|>' }}{% endgeneration %}",
    )
    encoded = with_template(markers)(row(("user", "q"), ("assistant", "<think>r</think>a")))
    tokenizer = byte_level(("<|im_start|>", "<|im_end|>"), eos="<|im_end|>")
    assert trained(tokenizer, encoded) == ["a<|im_end|>"]
    later = with_template(template)(replace(turns, masked=frozenset({1})))  # markers know nothing of such turns
    assert trained(tokenizer, later) == ["a\n\nb<|im_end|>"]


def test_the_date_of_the_day_does_not_change_tokens():
    encode = encoder("llama3.2-dated")
    text = FAMILIES["llama3.2-dated"].tokenizer().decode(encode(PAIR).input_ids)
    assert "Today Date: 26 Jul 2024\n" in text
    dated = ChatTemplate(FAMILIES["chatml"].tokenizer(), "\n{{ strftime_now('%Y-%m-%d %H:%M') }}", "x")
    assert dated.render(PAIR.messages) == "\n2024-07-26 00:00"


def test_missing_or_unreadable_templates(tmp_path):
    tokenizer = byte_level(eos="</s>", special=("</s>",))
    tokenizer.chat_template = None
    with pytest.raises(DataError, match="no chat template; give one with --chat-template"):
        Encoder(tokenizer, max_length=100)(PAIR)
    assert Encoder(tokenizer, max_length=100)(Row("i", "s", "f", 1, b"", text="needs no template")).supervised > 3
    (tmp_path / "chatml.jinja").write_text(CHATML)
    assert Encoder(tokenizer, chat=tmp_path / "chatml.jinja", max_length=100)(PAIR).supervised > 1
    with pytest.raises(UsageError, match="expected 'auto', 'tulu' or the path"):
        Encoder(tokenizer, chat="chatml", max_length=100)
    (tmp_path / "bad.jinja").write_bytes(b"\xff")
    with pytest.raises(DataError, match="is not UTF-8"):
        Encoder(tokenizer, chat=tmp_path / "bad.jinja", max_length=100)
    with pytest.raises(DataError, match="does not report which characters"):
        Encoder(object(), max_length=100)
    with pytest.raises(UsageError, match="at least 2"):
        Encoder(tokenizer, max_length=1)
    with pytest.raises(UsageError, match="on_long is 'cut'"):
        Encoder(tokenizer, max_length=10, on_long="cut")


# ---------------------------------------------------------------- normalisers, and the template's own blocks


BLOCKS = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{{ '<|im_start|>assistant\\n' }}{% generation %}"
    "{{ m.content }}{% endgeneration %}{{ '<|im_end|>\\n' }}{% else %}"
    "{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endif %}{% endfor %}"
)


def normalisers() -> dict:
    from tokenizers import Regex, normalizers

    return {
        "nfc": normalizers.NFC(),
        "nfd": normalizers.NFD(),
        "nfkc": normalizers.NFKC(),
        "nfkd": normalizers.NFKD(),
        "lowercase": normalizers.Lowercase(),
        "bert": normalizers.BertNormalizer(),
        "no accents": normalizers.Sequence([normalizers.NFD(), normalizers.StripAccents()]),
        "no zero width": normalizers.Replace(Regex("[\u200b\u200e]"), ""),
        "longer": normalizers.Replace("a", "bbb"),
        "shorter": normalizers.Replace("an", ""),
        "one space": normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(Regex(r"\s+"), " ")]),
    }


@pytest.mark.parametrize("name", normalisers())
@pytest.mark.parametrize("trim", [None, False, True])
def test_normalised_text_has_the_loss_of_its_own_characters(name, trim):
    """A normaliser drops, joins and multiplies characters: neither the user's turns nor the answer's end move."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.BPE({c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, []))
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    if trim is not None:
        inner.post_processor = processors.ByteLevel(trim_offsets=trim)
    inner.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    inner.normalizer = normalisers()[name]
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<|im_end|>")
    for template, end in ((BLOCKS, ""), (CHATML, "<|im_end|>")):
        tokenizer.chat_template = template
        encode = Encoder(tokenizer, max_length=1000)
        for answer in [
            "Ja",
            "Ja ",
            " Ja",
            "Ja\n",
            "Cafe\u0301",
            "\u0301x",
            "Ja\u200b",
            "\u200eJa",
            "ﬁ",
            "banana",
            "x  y  ",
            "\t\tx",
            "🗼",
            "\u1112\u1161\u11ab",
            "İ",
            "ﷺ",
            "½",
            "a\u00ad",
        ]:
            for question in ("pin 77", "e", "a\u200b", "e\u0301 "):
                turns = row(
                    ("user", question),
                    ("assistant", answer),
                    ("user", "bye"),
                    ("assistant", answer),
                    ("user", question),
                )
                want = inner.normalizer.normalize_str(answer) + end
                assert trained(tokenizer, encode(turns)) == [want, want], (template, answer, question)


def test_blocks_stand_where_the_template_says():
    """Blocks inside macros, with white space control, and with names of their own that do not leave the block."""
    special = ("<|im_start|>", "<|im_end|>")
    tokenizer = byte_level(special, eos="<|im_end|>")
    macro = (
        "{% macro say(m) %}\n<|im_start|>{{ m.role }}\n"
        "  {%- generation -%}\n  {% set x = m.content %}{{ x + '<|im_end|>' }}\n  {%- endgeneration %}\n"
        "{% endmacro %}{% for m in messages %}{% if m.role == 'assistant' %}{{ say(m) }}{{ x }}{% else %}"
        "{{ m.content }}{% endif %}{% endfor %}"
    )
    encoded = with_template(macro)(row(("user", "q"), ("assistant", " a\n"), ("user", "r"), ("assistant", "b")))
    assert trained(tokenizer, encoded) == [" a\n<|im_end|>", "b<|im_end|>"]
    turns = [("user", "q"), ("assistant", "a "), ("user", "r"), ("assistant", "b")]
    assert trained(tokenizer, with_template(BLOCKS)(row(*turns, masked=frozenset({1})))) == ["b"]
    assert trained(tokenizer, with_template(BLOCKS)(row(*turns, masked=frozenset({3})))) == ["a "]
    empty = BLOCKS.replace("m.content }}{% endg", "'' }}{% endg")
    assert reason(with_template(empty), row(*turns)) == "template_drops_turn"  # nothing of the answer is left


def test_a_turn_that_the_template_looks_at_is_read():
    """A template may ask what a user's turn begins with, as Qwen3's does for the results of tools."""
    template = CHATML.replace("m['content']", "('[' + m.content + ']' if m.content.startswith('<r>') else m.content)")
    tokenizer = byte_level(("<|im_start|>", "<|im_end|>"), eos="<|im_end|>")
    encoded = with_template(template)(row(("user", "<r>x"), ("assistant", " a ")))
    assert "[<r>x]" in tokenizer.decode(encoded.input_ids) and trained(tokenizer, encoded) == [" a <|im_end|>"]


@pytest.mark.parametrize("how", ["strip()", "strip('\\n')", "lstrip()", "rstrip()"])
def test_templates_that_trim_train_what_they_leave(how):
    template = CHATML.replace("m['content']", f"m['content'].{how}")
    tokenizer = byte_level(("<|im_start|>", "<|im_end|>"), eos="<|im_end|>")
    for answer in ["a", " a", "a ", "\n\na\n", " \na\n ", "  a b  "]:
        encoded = with_template(template)(row(("user", " q\n"), ("assistant", answer), ("user", "\nr")))
        assert trained(tokenizer, encoded) == [eval(f"answer.{how}") + "<|im_end|>"], answer


def test_marks_leave_the_characters_of_a_row_alone():
    """Rows may hold characters for private use: the marks are made of others."""
    tokenizer = byte_level(("<|im_start|>", "<|im_end|>"), eos="<|im_end|>")
    odd = "\U00100000\U001007fe\U001007ff\U000f0000a"
    encoded = encoder("chatml")(row(("user", odd), ("assistant", odd)))
    assert trained(tokenizer, encoded) == [odd + "<|im_end|>"]
    everywhere = "".join(chr(c) for c in [*range(0xF0000, 0x10FFFF, 0x400)])
    assert reason(encoder("chatml"), row(("user", everywhere), ("assistant", "a"))) == "private_use"


# ---------------------------------------------------------------- tools


def test_the_template_of_a_file_is_the_one_that_is_saved(tmp_path):
    """What serves a model trained on rows in a template of the user's own has that template, not the tokenizer's."""
    tokenizer = copy.deepcopy(byte_level(eos="<|end|>", special=("<|end|>",)))
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    text = "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}{{ eos_token }}{% endfor %}"
    (tmp_path / "mine.jinja").write_text(text)
    saved = Encoder(tokenizer, chat=tmp_path / "mine.jinja", max_length=50).trained_tokenizer()
    assert saved.chat_template == text
    assert Encoder(tokenizer, chat="auto", max_length=50).trained_tokenizer().chat_template == tokenizer.chat_template


VARIED = CHATML + "{% if enable_thinking is defined and not enable_thinking %}<off>{% endif %}{{ extra }}"


def test_a_row_sets_variables_of_its_template():
    """transformers, TRL and vLLM pass `chat_template_kwargs` to the template."""
    encode = with_template(VARIED)
    plain = row(("user", "hi"), ("assistant", "yes"))
    cases = {"none": {}, "off": {"enable_thinking": False}, "on": {"enable_thinking": True}, "extra": {"extra": "more"},
             "unknown": {"other": 1}}  # fmt: skip
    texts = {}
    for name, settings in cases.items():
        one = replace(plain, settings=settings)
        alone = encode(one)
        texts[name] = encode._tokenizer.decode(alone.input_ids)
        encode.ahead([plain, one])
        assert encode(one) == alone
        turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]
        assert texts[name] == encode._tokenizer.apply_chat_template(turns, tokenize=False, **settings)
    assert texts["none"] == texts["on"] == texts["unknown"] == texts["off"].replace("<off>", "")
    assert "<off>" in texts["off"] and texts["extra"].endswith("more")
    assert reason(encode, replace(plain, settings={"extra": "<|im_start|>user"})) == "control_token_in_text"


@pytest.mark.parametrize("given", [{"enable_thinking": False, "x": None}, '{"enable_thinking": false}'])
def test_variables_of_a_row_are_read(given):
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]
    assert read_shape({"messages": turns, "chat_template_kwargs": given}).settings == {"enable_thinking": False}
    for wrong in ({"add_generation_prompt": True}, {"eos_token": "x"}, [1], "[]"):
        with pytest.raises(Malformed, match="chat_template_kwargs"):
            read_shape({"messages": turns, "chat_template_kwargs": wrong})
