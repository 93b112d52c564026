"""What serves a trained model afterwards: its chat template and tokenizer."""

import json

import pytest
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from pipelines.models import load as models
from pipelines.settings.parts import LoraConfig, ModelConfig, TrainingConfig
from pipelines.settings.train import TrainConfig
from pipelines.training import train
from tests.tiny import TEMPLATE

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft")

# ------------------------------------------------------------------------------------------- what serves it afterwards


def jinja(world):
    path = world.folder / "mine.jinja"
    path.write_text(TEMPLATE.replace("<|im_start|>", "[").replace("<|im_end|>", "<|endoftext|>"))
    return str(path)


@pytest.mark.parametrize("chat", ["auto", "tulu", "file"])
@pytest.mark.parametrize("lora", [LoraConfig(rank=2), None])
def test_the_chat_template_of_training_is_saved_with_what_was_trained(world, tmp_path, chat, lora):
    """The tokenizer that stands beside the weights writes a conversation as training did, token by token."""
    config = TrainConfig(
        model=ModelConfig(name=str(world.model), chat=jinja(world) if chat == "file" else chat),
        data={"paths": [str(world.test)]},
        out=tmp_path / "run",
        lora=lora,
        training=TrainingConfig(max_steps=1),
    )
    run = train.run(config)
    folder = run / ("model" if lora is None else "adapter")
    served = AutoTokenizer.from_pretrained(folder)
    tokenizer = models.load(config.model, tokenizer_only=True).tokenizer
    from pipelines.rows.prepare import prepare

    rows = prepare(config.data, config.model, tokenizer, cache=tmp_path / "cache", label="rows")
    for line, i in zip(world.test.read_text().splitlines(), range(4), strict=True):
        messages = json.loads(line)["messages"]
        assert served.apply_chat_template(messages)["input_ids"] == rows.item(i)[0]
        prompt = served.apply_chat_template(messages[:1], add_generation_prompt=True)["input_ids"]
        assert prompt == rows.item(i)[0][: len(prompt)]
    if lora is not None:
        beside = ModelConfig(name=str(world.model), adapter=folder)  # the template goes with the adapter
        own = models.load(beside, tokenizer_only=True).tokenizer
        assert own.apply_chat_template(messages)["input_ids"] == rows.item(3)[0]
        PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(world.model), folder)


def test_a_template_for_tulu_writes_the_tokens_that_the_tokenizer_adds(world):
    """Chat templates are tokenised without them."""
    from tokenizers.processors import TemplateProcessing

    from pipelines.rows.encode import Encoder

    tokenizer = AutoTokenizer.from_pretrained(world.model)
    tokenizer.bos_token = "<|endoftext|>"
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", tokenizer.bos_token_id)]
    )
    from pipelines.rows.row import Row

    messages = ({"role": "system", "content": " be brief "}, {"role": "user", "content": "hi"},
                {"role": "assistant", "content": "yes"}, {"role": "user", "content": "?"},
                {"role": "assistant", "content": "no "})  # fmt: skip
    encoder = Encoder(tokenizer, chat="tulu", max_length=512)
    wanted = encoder(Row("i", "s", "f", 1, b"", messages)).input_ids
    assert wanted[0] == tokenizer.bos_token_id
    assert encoder.trained_tokenizer().apply_chat_template(list(messages))["input_ids"] == wanted
