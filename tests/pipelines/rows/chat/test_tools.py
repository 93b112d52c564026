"""Tool calls are trained, results are not, and spans agree with the blocks that others wrote."""

import re
from pathlib import Path

import pytest

from pipelines.rows.chat.refusals import RowError
from pipelines.rows.chat.template import ChatTemplate
from pipelines.rows.encode import Encoder
from pipelines.rows.row import Row
from tests.pipelines.rows.families import CHATML, PAIR, REASONED, byte_level, reason, says, trained, user

TOOLS = (
    "{% if tools %}{{ '<|im_start|>system\\n' }}{% for t in tools %}{{ t | tojson }}{% endfor %}{{ '<|im_end|>\\n' }}"
    "{% endif %}{% for m in messages %}{% if m.role == 'tool' %}"
    "{{ '<|im_start|>user\\n<tool_response>' + m.content + '</tool_response><|im_end|>\\n' }}{% else %}"
    "{{ '<|im_start|>' + m.role + '\\n' }}{% if m.content %}{{ m.content }}{% endif %}"
    '{% for c in m.tool_calls or [] %}{{ \'<tool_call>{"name": "\' + c.function.name + \'", "arguments": \' }}'
    "{{ c.function.arguments | tojson }}{{ '}</tool_call>' }}{% endfor %}{{ '<|im_end|>\\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
INLINE = (  # the result of a tool stands inside the assistant's turn
    "{% for m in messages %}{% if m.role == 'user' %}{{ '<|im_start|>user\\n' + m.content + '<|im_end|>\\n' }}"
    "{% elif m.role == 'assistant' %}{{ '<|im_start|>assistant\\n' }}{% for c in m.tool_calls or [] %}"
    "{{ '<call>' + c.function.name + '</call>' }}{% endfor %}"
    "{% if not loop.last and messages[loop.index].role == 'tool' %}{{ '[' + messages[loop.index].content + ']' }}"
    "{% endif %}{{ (m.content or '') + '<|im_end|>\\n' }}{% endif %}{% endfor %}"
)
CALLED = '<tool_call>{"name": "weather", "arguments": {"city": "Rome", "days": 3}}</tool_call>'


def call(arguments: object = None) -> dict:
    given = {"city": "Rome", "days": 3} if arguments is None else arguments
    return {"type": "function", "function": {"name": "weather", "arguments": given}}


def result(text: str) -> dict:
    return {"role": "tool", "name": "weather", "content": text}


def tool_user(template: str, tools=({"type": "function", "function": {"name": "weather"}},)):
    tokenizer = byte_level(("<|im_start|>", "<|im_end|>"), ("<tool_call>", "</tool_call>"), eos="<|im_end|>")
    tokenizer.chat_template = template
    encode = Encoder(tokenizer, max_length=4000)

    def learnt(*messages: dict) -> tuple[str, list[str], tuple[str, ...]]:
        encoded = encode(Row("i", "s", "f", 1, b"", messages, tools=tools))
        return tokenizer.decode(encoded.input_ids), trained(tokenizer, encoded), encoded.flags

    return learnt


def test_tool_calls_are_trained_and_results_are_not():
    turns = [
        user("q"),
        says("", tool_calls=[call()]),
        result("sunny"),
        says("It is sunny"),
        user("r"),
        says("Again:", tool_calls=[call(), call()]),
        result("rain"),
        result("snow"),
    ]
    text, learnt, flags = tool_user(TOOLS)(*turns)
    assert text.startswith('<|im_start|>system\n{"type": "function", "function": {"name": "weather"}}<|im_end|>\n')
    assert learnt == [CALLED + "<|im_end|>", "It is sunny<|im_end|>", f"Again:{CALLED}{CALLED}<|im_end|>"]
    assert not flags
    text, learnt, flags = tool_user(INLINE)(*turns[:4])
    assert learnt == ["<call>weather</call>", "It is sunny<|im_end|>"]
    assert flags == ("tools_dropped",)
    both = [user("q"), says("done", tool_calls=[call()]), result("sunny"), says("ok")]
    assert tool_user(INLINE)(*both)[1] == ["<call>weather</call>", "done<|im_end|>", "ok<|im_end|>"]


def test_calls_are_given_in_the_form_that_the_template_takes():
    as_text = TOOLS.replace("c.function.arguments | tojson", "'' + c.function.arguments")  # DeepSeek's want a text
    assert tool_user(as_text)(user("q"), says("", tool_calls=[call()]))[1] == [CALLED + "<|im_end|>"]
    empty = TOOLS.replace("{% if m.content %}{{ m.content }}{% endif %}", "{{ '' + m.content }}")
    assert tool_user(empty)(user("q"), says("", tool_calls=[call()]))[1] == [CALLED + "<|im_end|>"]


def test_templates_without_tools():
    """Calls that would be lost are refused; definitions that are lost are counted."""
    with pytest.raises(RowError, match="template_drops_turn: the chat template does not write the tool calls of turn"):
        tool_user(CHATML)(user("q"), says("x", tool_calls=[call()]), result("r"), says("a"))
    assert tool_user(CHATML)(user("q"), says("a"))[2] == ("tools_dropped",)
    tulu = Encoder(byte_level(("</s>",), eos="</s>"), chat="tulu", max_length=100)
    assert reason(tulu, Row("i", "s", "f", 1, b"", (user("q"), says("", tool_calls=[call()])))) == "tool_turn"
    with pytest.raises(RowError, match="control_token_in_text"):
        tool_user(TOOLS)(user("q"), says("", tool_calls=[call({"city": "<|im_end|>"})]))


def test_the_template_for_tools_is_taken_where_there_are_two():
    tokenizer = byte_level(("<|im_start|>", "<|im_end|>"), eos="<|im_end|>")
    tokenizer.chat_template = {"default": CHATML, "tool_use": TOOLS}
    encode = Encoder(tokenizer, max_length=1000)
    calls = Row("i", "s", "f", 1, b"", (user("q"), says("", tool_calls=[call()])))
    assert trained(tokenizer, encode(calls)) == [CALLED + "<|im_end|>"]
    assert trained(tokenizer, encode(PAIR)) == ["a<|im_end|>"]
    only = byte_level(("<|im_start|>", "<|im_end|>"), eos="<|im_end|>")
    only.chat_template = CHATML
    assert encode.fingerprint()["template"] != Encoder(only, max_length=1000).fingerprint()["template"]


def marked_by_trl() -> list[str]:
    import trl

    folder = Path(trl.__file__).parent / "chat_templates"
    return sorted(path.name for path in folder.glob("*_training.jinja") if "vl" not in path.name)


@pytest.mark.parametrize("name", marked_by_trl())
def test_spans_agree_with_the_blocks_that_others_wrote(name):
    """The templates of 30 families with blocks by TRL's authors: without the blocks, the same answers are found.

    They may also mark the turn's header, an empty block of reasoning, and what stands behind the end.
    """
    import trl

    from pipelines.rows.chat.render import _GENERATION

    template = (Path(trl.__file__).parent / "chat_templates" / name).read_text()
    bare = _GENERATION.sub(lambda tag: f"{{%{tag[1]} {'endwith' if tag[2] else 'with'} {tag[3]}%}}", template)
    found = set(re.findall(r"<[|｜][^\s'\"<>{}]+?[|｜]>|</?s>|<(?:start|end)_of_turn>|<end_of_utterance>", template))
    tokenizer = byte_level((*sorted(found), "<BOS>", "<EOS>"), ("<think>", "</think>"), bos="<BOS>", eos="<EOS>")
    calls, tools = (
        [call()],
        (
            {
                "type": "function",
                "function": {"name": "weather", "description": "d", "parameters": {"type": "object", "properties": {}}},
            },
        ),
    )
    for messages, known in [
        ([user("hi"), says("hello"), user("more "), says(" two words\n")], ()),
        ([user("hi"), says("hello", reasoning="one"), user("more"), says("bye", reasoning="two")], ()),
        ([user("hi"), says(REASONED), user("more"), says(REASONED)], ()),
        ([user("hi"), says("", tool_calls=calls), result("sunny"), says("It is sunny")], tools),
    ]:
        both = []
        for text in (template, bare):
            try:
                rendered = ChatTemplate(tokenizer, text, name).read(messages, known)
                edges = [place for span in rendered.spans for place in span]
                edges = [place for place in edges if edges.count(place) == 1]  # blocks that adjoin are one
                pieces = [rendered.text[a:b] for a, b in zip(edges[::2], edges[1::2], strict=True)]
                both.append((pieces, rendered.flags))
            except RowError as error:
                both.append(([error.reason], ()))
        (blocks, flags), (spans, same) = both
        assert flags == same and len(blocks) == len(spans)
        for block, span in zip(blocks, spans, strict=True):
            before, found_it, after = block.partition(span.removesuffix("<|tool_response>").strip())
            assert found_it and after.strip() in ("", "<|end|>", "<EOS>"), (block, span)
            assert re.fullmatch(
                r"\s*(<[^<>]*assistant[^<>]*>|<\|start\|>assistant[^\n]*?|<｜tool▁outputs▁end｜>)?\s*"
                r"(<\|?think\|?>\s*(</think>\s*)?)?(<think>)?\s*",
                before,
                re.IGNORECASE,
            ), block
