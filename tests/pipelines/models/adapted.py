"""Adapters and runs of a user's own."""

import torch
from peft import LoraConfig as PeftLora
from peft import get_peft_model
from transformers import AutoModelForCausalLM

from pipelines.models import load as models
from pipelines.settings.parts import ModelConfig

IDS = torch.arange(3, 20)[None]
TARGETS = ["q_proj", "v_proj"]


def moved(model):
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.05 * torch.randn_like(p))
    return model


def saved_adapter(base, folder, **options):
    """(the folder, the logits of the model that was saved, the names of its trained parameters)."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = AutoModelForCausalLM.from_pretrained(base)
        wrapped = get_peft_model(model, PeftLora(task_type="CAUSAL_LM", r=4, **{"target_modules": TARGETS} | options))
        moved(wrapped).eval().save_pretrained(folder)
    trained = [name for name, p in wrapped.named_parameters() if p.requires_grad]
    return folder, wrapped(input_ids=IDS).logits.detach(), trained


KINDS = {
    "plain": {},
    "pissa": {"init_lora_weights": "pissa"},
    "olora": {"init_lora_weights": "olora"},
    "eva": {"init_lora_weights": "eva"},
    "dora": {"use_dora": True, "use_rslora": True},
    "patterns": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 3}, "layers_to_transform": [1]},
    "head": {"target_modules": [*TARGETS, "lm_head"]},
    "embedding": {"target_modules": [*TARGETS, "embed_tokens"]},
    "both": {"target_modules": [*TARGETS, "embed_tokens", "lm_head"]},
    "both as one": {"target_modules": [*TARGETS, "embed_tokens"], "ensure_weight_tying": True},
    "whole head": {"modules_to_save": ["lm_head"]},
    "whole embedding": {"modules_to_save": ["embed_tokens"]},
    "whole norms": {"modules_to_save": ["norm", "input_layernorm"]},
    "tokens": {"trainable_token_indices": [3, 5]},
    "biases": {"bias": "all"},
}


def rows_of(world, path):
    from pipelines.rows.prepare import prepare
    from pipelines.settings.parts import DataConfig

    config = ModelConfig(name=str(world.model))
    tokenizer = models.load(config, tokenizer_only=True).tokenizer
    return prepare(DataConfig(paths=[str(path)]), config, tokenizer, cache=world.folder / "cache", label="rows")
