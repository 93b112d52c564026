"""Features are made of every adapter matrix, whatever peft calls it: in one pass, with the numbers of one per row."""

import warnings

import pytest
import torch
from peft import LoraConfig, get_peft_model

from datatools import per_sample_grads
from pipelines.models.losses import row_losses, seen_parameters
from tests.zoo import build as zoo

LLAMA, MOE = "LlamaForCausalLM", "Qwen3MoeForCausalLM"
CASES = {
    "head": (LLAMA, {"target_modules": ["q_proj", "lm_head"]}),
    "embedding": (LLAMA, {"target_modules": ["q_proj", "embed_tokens"]}),
    "dora": (LLAMA, {"target_modules": ["q_proj"], "use_dora": True}),
    "conv1d": ("GPT2LMHeadModel", {"target_modules": "all-linear", "fan_in_fan_out": True}),
    "experts": (MOE, {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.gate_up_proj"]}),
    "tokens": (LLAMA, {"target_modules": ["q_proj"], "trainable_token_indices": [9, 10]}),
    "biases": (LLAMA, {"target_modules": ["q_proj"], "bias": "lora_only"}),
}


@pytest.mark.parametrize("case", CASES)
def test_every_matrix_of_an_adapter_is_seen(case):
    name, options = CASES[case]
    model = zoo.build(name)
    if name == MOE:
        model.set_experts_implementation("eager")  # grouped products have no float64
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = get_peft_model(model, LoraConfig(r=2, **options)).double().eval()
        for each, p in model.named_parameters():
            if "lora_" in each:
                torch.nn.init.normal_(p, std=0.3)
        ids = torch.randint(9, 60, (3, 6))
    params = {each: p for each, p in model.named_parameters() if p.requires_grad}
    labels = ids.clone()
    labels[:, :2], labels[1, 4:] = -100, -100
    batch = {"input_ids": ids, "labels": labels}
    names = seen_parameters(model, params, "hooks")
    assert names == list(params)
    want = per_sample_grads(row_losses, model, batch, names, method="loop")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        got = per_sample_grads(row_losses, model, batch, names)
    told = [str(each.message) for each in said if "per-sample gradients" in str(each.message)]
    assert not told
    for each in names:
        torch.testing.assert_close(got[each], want[each], rtol=1e-9, atol=1e-12)


def test_whole_heads_beside_an_adapter_are_left_out():
    model = get_peft_model(zoo.build(LLAMA), LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"]))
    params = {each: p for each, p in model.named_parameters() if p.requires_grad}
    assert set(params) - set(seen_parameters(model, params, "hooks")) == {
        "base_model.model.lm_head.modules_to_save.default.weight"
    }
