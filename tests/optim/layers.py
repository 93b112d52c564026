"""Names and shapes of the parameters of transformers."""

import pytest
import torch

LAYER = "model.layers.0."


def model_of(family):
    """A model of two layers without data, and its configuration."""
    transformers = pytest.importorskip("transformers")
    small = {"num_hidden_layers": 2, "hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 4,
             "vocab_size": 64, "pad_token_id": 0}  # fmt: skip
    if family in ("llama", "qwen2", "qwen3", "mistral", "phi3"):
        small |= {"num_key_value_heads": 2, "head_dim": 4}
    config = transformers.AutoConfig.for_model(family, **small)
    auto = transformers.AutoModelForMaskedLM if family == "bert" else transformers.AutoModelForCausalLM
    with torch.device("meta"):
        return auto.from_config(config), config


FAMILIES = ["llama", "gpt2", "qwen2", "qwen3", "phi", "phi3", "bert", "gpt_neox", "mistral"]


def shaped(shapes):
    return [(name, torch.nn.Parameter(torch.ones(shape))) for name, shape in shapes.items()]


def by_rule(optimizer):
    """name -> (rule, lr, weight decay)."""
    return {n: (g["rule"], float(g["lr"]), g["weight_decay"]) for g in optimizer.param_groups for n in g["param_names"]}


def meta_model(name):
    """A model of two layers without data."""
    transformers = pytest.importorskip("transformers")
    kind = getattr(transformers, name)
    config = kind.config_class()
    for key in ("num_hidden_layers", "num_layers", "num_decoder_layers", "encoder_layers", "decoder_layers"):
        if isinstance(getattr(config, key, None), int):
            setattr(config, key, 2)
    if isinstance(vars(config).get("layer_types"), list):
        config.layer_types = config.layer_types[-2:]
    with torch.device("meta"):
        return kind(config)
