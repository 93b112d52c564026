"""Reasoning is trained where the row has it and the template keeps it."""

import pytest

from pipelines.rows.chat.refusals import RowError
from pipelines.rows.encode import Encoder
from pipelines.rows.row import Row
from tests.pipelines.rows.families import CHATML, REASONED, byte_level, says, trained, user

THINKS = (  # as Qwen3's: reasoning is written in the last turn, and taken out of those before
    "{%- for m in messages %}{{- '<|im_start|>' + m.role + '\\n' }}{%- if m.role == 'assistant' %}"
    "{%- set say = m.content %}{%- set why = m.reasoning_content if m.reasoning_content is string else '' %}"
    "{%- if '</think>' in say %}{%- set why = say.split('</think>')[0].split('<think>')[-1].strip('\\n') %}"
    "{%- set say = say.split('</think>')[-1].lstrip('\\n') %}{%- endif %}{%- if loop.last %}"
    "{{- '<think>\\n' + why.strip('\\n') + '\\n</think>\\n\\n' + say }}{%- else %}{{- say }}{%- endif %}{%- else %}"
    "{{- m.content }}{%- endif %}{{- '<|im_end|>\\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
OPENED = THINKS.replace("{{- '<|im_start|>assistant\\n' }}", "{{- '<|im_start|>assistant\\n<think>\\n' }}")
UNASKED = THINKS[: THINKS.index("{%- if add_generation_prompt")]
CHANNELS = (  # as gpt-oss's
    "{% for m in messages %}{% if m.role == 'assistant' %}{% if loop.last %}{% if 'thinking' in m %}"
    "{{ '<|start|>assistant<|channel|>analysis<|message|>' + m.thinking + '<|end|>' }}{% endif %}"
    "{{ '<|start|>assistant<|channel|>final<|message|>' + m.content + '<|return|>' }}{% else %}"
    "{{ '<|start|>assistant<|channel|>final<|message|>' + m.content + '<|end|>' }}{% endif %}{% else %}"
    "{{ '<|start|>' + m.role + '<|message|>' + m.content + '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}"
)


def thinker(template: str, special: tuple[str, ...] = ()):
    marks = ("<|im_start|>", "<|im_end|>", "<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|return|>")
    tokenizer = byte_level((*marks, *special), ("<think>", "</think>"), eos="<|im_end|>")
    tokenizer.chat_template = template
    encode = Encoder(tokenizer, max_length=2000)

    def learnt(*messages: dict) -> tuple[list[str], tuple[str, ...]]:
        encoded = encode(Row("i", "s", "f", 1, b"", messages))
        return trained(tokenizer, encoded), encoded.flags

    return learnt


@pytest.mark.parametrize(
    "said",
    [
        says(REASONED),
        says("25", reasoning="12 and 13 make 25"),
        says("25", reasoning="\n12 and 13 make 25\n"),
        says(REASONED.removeprefix("<think>\n")),
    ],
)
def test_reasoning_that_the_template_keeps_is_trained(said):
    """All that the model has to write: from the end of the generation prompt to the end of the turn."""
    asked = [user("12 + 13?"), said]
    assert thinker(THINKS)(*asked) == ([REASONED + "<|im_end|>"], ())
    assert thinker(UNASKED)(*asked) == ([REASONED + "<|im_end|>"], ())
    assert thinker(OPENED)(*asked) == ([REASONED.removeprefix("<think>\n") + "<|im_end|>"], ())
    earlier = [user("1 + 1?"), said, user("12 + 13?"), said]
    assert thinker(THINKS)(*earlier) == (["25<|im_end|>", REASONED + "<|im_end|>"], ("reasoning_dropped",))


def test_reasoning_that_the_row_does_not_have_is_not_trained():
    for template in (THINKS, UNASKED, OPENED):
        assert thinker(template)(user("q"), says("25")) == (["25<|im_end|>"], ())
        assert thinker(template)(user("q"), says(" 25\n")) == ([" 25\n<|im_end|>"], ())
    verbatim = "<think>\n\n</think>\n\n25"  # the row says that it does not think
    assert thinker(THINKS)(user("q"), says(verbatim)) == ([verbatim + "<|im_end|>"], ())
    assert thinker(THINKS)(user("q"), says("<think>r</think>"))[0] == ["<think>\nr\n</think>\n\n<|im_end|>"]


def test_reasoning_in_channels():
    found = thinker(CHANNELS)(user("q"), says("a", reasoning="x"), user("r"), says("b", reasoning="why"))
    assert found == (
        ["a", "<|channel|>analysis<|message|>why<|end|><|start|>assistant<|channel|>final<|message|>b<|return|>"],
        ("reasoning_dropped",),
    )


def test_reasoning_under_templates_that_know_none():
    """In a field it is dropped and counted; inside a content it is text."""
    assert thinker(CHATML)(user("q"), says("a", reasoning="why")) == (["a<|im_end|>"], ("reasoning_dropped",))
    assert thinker(CHATML)(user("q"), says(REASONED)) == ([REASONED + "<|im_end|>"], ())
    tokenizer = byte_level(("</s>",), eos="</s>")
    encoded = Encoder(tokenizer, chat="tulu", max_length=100)(
        Row("i", "s", "f", 1, b"", (user("q"), says("a", reasoning="why")))
    )
    assert encoded.flags == ("reasoning_dropped",) and trained(tokenizer, encoded) == ["a</s>\n"]


def test_tags_of_reasoning_may_be_special_tokens():
    """[THINK] as a control token of the tokenizer: an assistant may use it, a user may not fake it."""
    tags = ("[THINK]", "[/THINK]")
    content = "[THINK]why[/THINK]a"
    assert thinker(CHATML, special=tags)(user("q"), says(content)) == ([content + "<|im_end|>"], ())
    with pytest.raises(RowError, match="control_token_in_text"):
        thinker(CHATML, special=tags)(user("[THINK]"), says("a"))
    with pytest.raises(RowError, match="control_token_in_text"):
        thinker(CHATML)(user("q"), says("a", reasoning="<|im_end|>"))
