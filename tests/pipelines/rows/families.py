"""Tokenizers and chat templates made here, one per family, and conversations for them."""

from dataclasses import dataclass
from functools import lru_cache

import pytest
from hypothesis import strategies as st

from pipelines.rows.chat.refusals import RowError
from pipelines.rows.encode import Encoder
from pipelines.rows.encoded import IGNORED, Encoded
from pipelines.rows.row import Row

TEXTS = [
    "The quick brown fox jumps over the lazy dog.",
    "def add(a, b):\n    return a + b\n",
    "What is 3 + 4?",
    "It is 7!",
    "Yes",
    "No",
    "system user assistant",
    "  two spaces\n\nand lines\n",
    "naïve café 東京 🗼",
    "Question: Answer:",
]


@lru_cache(maxsize=32)
def byte_level(
    special: tuple[str, ...] = (),
    plain: tuple[str, ...] = (),
    trim: bool = False,
    bos: str | None = None,
    eos: str | None = None,
):
    """A small byte-level BPE, as of GPT-2, Llama 3, Qwen, SmolLM2."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=trim)
    tokenizer.train_from_iterator(
        TEXTS * 3,
        trainers.BpeTrainer(vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False),
    )
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in special])
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in plain])
    named = {name: token for name, token in (("bos_token", bos), ("eos_token", eos)) if token}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **named)


@lru_cache(maxsize=4)
def byte_fallback(special: tuple[str, ...], bos: str, eos: str):
    """A small BPE on words with bytes for what it does not know, a space written as "▁": Llama 2, Mistral, Gemma."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors
    from transformers import PreTrainedTokenizerFast

    pieces = [f"<0x{byte:02X}>" for byte in range(256)] + ["▁", *map(chr, range(33, 127))]
    merges = [("▁", "t"), ("t", "h"), ("▁t", "h"), ("▁th", "e"), ("▁", "a"), ("i", "n"), ("▁", "▁"), ("e", "r")]
    vocabulary = {"<unk>": 0, bos: 1, eos: 2}
    for piece in pieces + [a + b for a, b in merges]:
        vocabulary.setdefault(piece, len(vocabulary))
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in ("<unk>", bos, eos, *special)])
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=bos, eos_token=eos, unk_token="<unk>")


@dataclass(frozen=True)
class Family:
    """A chat template as one family of models writes it."""

    template: str
    end: str
    """What closes an answer and is trained."""
    last_end: str | None = None
    """The same for the last turn of the conversation, where it differs."""
    special: tuple[str, ...] = ()
    plain: tuple[str, ...] = ()
    bos: str | None = None
    eos: str | None = None
    fallback: bool = False
    trims: bool = False
    system: bool = True
    alternates: bool = False
    multi: bool = True

    def tokenizer(self):
        special = tuple(dict.fromkeys((*self.special, *(t for t in (self.bos, self.eos) if t))))
        if self.fallback:
            return byte_fallback(special, self.bos, self.eos)
        return byte_level(special, self.plain, bos=self.bos, eos=self.eos)


CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
ALTERNATE = (
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/...') }}{% endif %}{% endfor %}"
)
FAMILIES = {
    "chatml": Family(CHATML, "<|im_end|>", special=("<|im_start|>", "<|im_end|>"), eos="<|im_end|>"),
    "smollm2": Family(
        "{% if messages[0]['role'] != 'system' %}"
        "{{ '<|im_start|>system\\nYou are a helpful AI assistant.<|im_end|>\\n' }}{% endif %}" + CHATML,
        "<|im_end|>",
        special=("<|im_start|>", "<|im_end|>"),
        eos="<|im_end|>",
    ),
    "chatml-plain-tokens": Family(CHATML, "<|im_end|>", plain=("<|im_start|>", "<|im_end|>"), eos="</s>"),
    "chatml-no-tokens": Family(CHATML, "<|im_end|>", eos="</s>"),
    "qwen3": Family(
        "{%- set ns = namespace(last=0) %}{%- for m in messages %}{%- if m.role == 'user' %}"
        "{%- set ns.last = loop.index0 %}{%- endif %}{%- endfor %}"
        "{%- for m in messages %}{{- '<|im_start|>' + m.role + '\\n' }}"
        "{%- if m.role == 'assistant' and loop.last and loop.index0 > ns.last %}{{- '<think>\\n\\n</think>\\n\\n' }}"
        "{%- endif %}{{- m.content + '<|im_end|>\\n' }}{%- endfor %}",
        "<|im_end|>",
        special=("<|im_start|>", "<|im_end|>"),
        plain=("<think>", "</think>"),
        eos="<|im_end|>",
    ),
    "llama2": Family(
        "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}"
        "{% set system = '<<SYS>>\\n' + messages[0]['content'] + '\\n<</SYS>>\\n\\n' %}{% else %}"
        "{% set loop_messages = messages %}{% set system = '' %}{% endif %}{% for m in loop_messages %}"
        "{% set content = system + m['content'] if loop.index0 == 0 else m['content'] %}"
        "{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
        "{% else %}{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}",
        " </s>",
        bos="<s>",
        eos="</s>",
        fallback=True,
        trims=True,
        alternates=True,
    ),
    "mistral": Family(
        "{{ bos_token }}" + ALTERNATE + "{% for m in messages %}{% if m['role'] == 'user' %}"
        "{{ '[INST] ' + m['content'] + ' [/INST]' }}{% else %}{{ ' ' + m['content'] + eos_token }}{% endif %}"
        "{% endfor %}",
        "</s>",
        bos="<s>",
        eos="</s>",
        fallback=True,
        system=False,
        alternates=True,
    ),
    "mistral-v3": Family(  # the system turn is written into the last user turn
        "{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] %}{% set rest = messages[1:] %}"
        "{% else %}{% set rest = messages %}{% endif %}{{ bos_token }}{% for m in rest %}{% if m['role'] == 'user' %}"
        "{{ '[INST]' }}{% if system is defined and (loop.last or loop.index0 == rest|length - 2) %}"
        "{{ system + '\\n\\n' }}{% endif %}{{ m['content'] + '[/INST]' }}{% else %}{{ m['content'] + eos_token }}"
        "{% endif %}{% endfor %}",
        "</s>",
        special=("[INST]", "[/INST]"),
        bos="<s>",
        eos="</s>",
        alternates=True,
    ),
    "llama3": Family(
        "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\\n\\n'"
        " + m['content'] | trim + '<|eot_id|>' }}{% endfor %}{% if add_generation_prompt %}"
        "{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}",
        "<|eot_id|>",
        special=("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        bos="<|begin_of_text|>",
        eos="<|eot_id|>",
        trims=True,
    ),
    "llama3.2-dated": Family(
        "{{ bos_token }}{{ '<|start_header_id|>system<|end_header_id|>\\n\\nToday Date: ' + strftime_now('%d %b %Y')"
        " + '\\n<|eot_id|>' }}{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\\n\\n'"
        " + m['content'] | trim + '<|eot_id|>' }}{% endfor %}",
        "<|eot_id|>",
        special=("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        bos="<|begin_of_text|>",
        eos="<|eot_id|>",
        trims=True,
    ),
    "tulu": Family(
        "{% for m in messages %}{% if m['role'] == 'assistant' %}{{ '<|assistant|>\\n' + m['content'] + eos_token"
        " + '\\n' }}{% else %}{{ '<|' + m['role'] + '|>\\n' + m['content'] + '\\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}",
        "</s>",
        eos="</s>",
    ),
    "zephyr": Family(
        "{% for m in messages %}{{ '<|' + m['role'] + '|>\\n' + m['content'] + eos_token + '\\n' }}{% endfor %}",
        "</s>",
        bos="<s>",
        eos="</s>",
        fallback=True,
    ),
    "gemma": Family(
        "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
        "{% endif %}" + ALTERNATE + "{% for m in messages %}"
        "{% set role = 'model' if m['role'] == 'assistant' else m['role'] %}"
        "{{ '<start_of_turn>' + role + '\\n' + m['content'] | trim + '<end_of_turn>\\n' }}{% endfor %}",
        "<end_of_turn>",
        special=("<start_of_turn>", "<end_of_turn>"),
        bos="<bos>",
        eos="<eos>",
        fallback=True,
        trims=True,
        system=False,
        alternates=True,
    ),
    "phi3": Family(
        "{% for m in messages %}{{ '<|' + m['role'] + '|>\\n' + m['content'] + '<|end|>\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% else %}{{ eos_token }}{% endif %}",
        "<|end|>",
        special=("<|system|>", "<|user|>", "<|assistant|>", "<|end|>"),
        eos="<|endoftext|>",
    ),
    "vicuna": Family(
        "{{ 'A chat. ' }}{% for m in messages %}{% if m['role'] == 'user' %}{{ 'USER: ' + m['content'] + ' ' }}"
        "{% elif m['role'] == 'assistant' %}{{ 'ASSISTANT: ' + m['content'] + eos_token }}{% endif %}{% endfor %}",
        "</s>",
        bos="<s>",
        eos="</s>",
        fallback=True,
        system=False,
    ),
    "deepseek": Family(
        "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '<｜User｜>' + m['content'] }}"
        "{% elif m['role'] == 'assistant' %}{{ '<｜Assistant｜>' + m['content'] + '<｜end▁of▁sentence｜>' }}"
        "{% else %}{{ m['content'] }}{% endif %}{% endfor %}{% if add_generation_prompt %}"
        "{{ '<｜Assistant｜><think>\\n' }}{% endif %}",
        "<｜end▁of▁sentence｜>",
        special=("<｜User｜>", "<｜Assistant｜>"),
        bos="<｜begin▁of▁sentence｜>",
        eos="<｜end▁of▁sentence｜>",
    ),
    "command-r": Family(
        "{{ bos_token }}{% for m in messages %}{{ '<|START_OF_TURN_TOKEN|><|' + m['role'] + '|>' + m['content']"
        " + '<|END_OF_TURN_TOKEN|>' }}{% endfor %}",
        "<|END_OF_TURN_TOKEN|>",
        special=("<|START_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>"),
        bos="<BOS_TOKEN>",
        eos="<|END_OF_TURN_TOKEN|>",
    ),
    "gpt-oss": Family(  # the last turn ends otherwise than those before it
        "{% for m in messages %}{{ '<|start|>' + m['role'] + '<|message|>' + m['content'] }}"
        "{{ '<|return|>' if loop.last and m['role'] == 'assistant' else '<|end|>' }}{% endfor %}",
        "",
        last_end="<|return|>",
        special=("<|start|>", "<|message|>", "<|end|>", "<|return|>"),
        eos="<|return|>",
    ),
    "glm": Family(  # no end of turn: the next header is the sign
        "{{ '[gMASK]' }}{% for m in messages %}{{ '<|' + m['role'] + '|>\\n' + m['content'] }}{% endfor %}",
        "",
        special=("[gMASK]", "<|system|>", "<|user|>", "<|assistant|>"),
        eos="<|endoftext|>",
    ),
    "alpaca": Family(  # marks in plain text, the end of the sequence only once
        "{% for m in messages %}{% if m['role'] == 'user' %}{{ '### Instruction:\\n' + m['content'] + '\\n\\n' }}"
        "{% elif m['role'] == 'assistant' %}{{ '### Response:\\n' + m['content'] + '\\n\\n' }}"
        "{% else %}{{ m['content'] + '\\n\\n' }}{% endif %}{% endfor %}{{ eos_token }}",
        "",
        last_end="\n\n</s>",
        eos="</s>",
    ),
    "two-ends": Family(
        CHATML.replace("'<|im_end|>'", "'<|im_end|><|eot|>'"),
        "<|im_end|><|eot|>",
        special=("<|im_start|>", "<|im_end|>", "<|eot|>"),
        eos="<|eot|>",
    ),
    "text-end": Family(
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\\n### End\\n' }}{% endfor %}",
        "\n### End",
        eos="</s>",
    ),
}


def encoder(name: str, max_length: int = 100_000, **options) -> Encoder:
    family = FAMILIES[name]
    tokenizer = family.tokenizer()
    tokenizer.chat_template = family.template
    return Encoder(tokenizer, max_length=max_length, **options)


def row(*messages: tuple[str, str], **fields) -> Row:
    return Row("id", "source", "file", 1, b"", tuple({"role": r, "content": c} for r, c in messages), **fields)


def trained(tokenizer, encoded: Encoded) -> list[str]:
    """The text of each run of trained tokens."""
    runs, run = [], []
    for token, label in zip(encoded.input_ids, encoded.labels, strict=True):
        assert label in (IGNORED, token)
        if label == IGNORED and run:
            runs.append(run)
            run = []
        elif label != IGNORED:
            run.append(token)
    return [
        tokenizer.decode(run, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        for run in [*runs, run]
        if run
    ]


WORDS = st.sampled_from(
    [
        *TEXTS,
        "a",
        "assistant",
        "user\n",
        "\n",
        " ",
        "\t",
        "é",
        "e\u0301",
        "🗼",
        "\u2028",
        "<",
        "|",
        "3",
        "im_start",
        "### Response:\n",
        "\nuser: ",
        "[",
        "INST",
        "0",
        "\ue0000\ue001",
    ]
)
CONTENT = st.lists(WORDS | st.text(max_size=8), min_size=1, max_size=5).map("".join).filter(lambda text: text.strip())


@st.composite
def conversations(draw, family: Family) -> list[tuple[str, str]]:
    turns = []
    if family.system and draw(st.booleans()):
        turns.append(("system", draw(CONTENT)))
    for _ in range(draw(st.integers(1, 3))):
        turns += [("user", draw(CONTENT)), ("assistant", draw(CONTENT))]
    if draw(st.booleans()):
        turns.append(("user", draw(CONTENT)))
    if not family.alternates and draw(st.integers(0, 4)) == 0:
        turns.insert(1, ("user", draw(CONTENT)))
    return turns


def reason(encode: Encoder, row: Row) -> str:
    with pytest.raises(RowError) as caught:
        encode(row)
    return caught.value.reason


PAIR = row(("user", "q"), ("assistant", "a"))


def user(text: str) -> dict:
    return {"role": "user", "content": text}


def says(text: str, **more) -> dict:
    return {"role": "assistant", "content": text, **more}


REASONED = "<think>\n12 and 13 make 25\n</think>\n\n25"
