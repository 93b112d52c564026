"""Greedy generation and option scores against the definition: one pass over whole rows, without cache and padding."""

import pytest
import torch

from pipelines.training.accuracy import generate, options
from tests.zoo.build import build

DECODERS = (
    "LlamaForCausalLM GPT2LMHeadModel GPTNeoXForCausalLM OPTForCausalLM Qwen2ForCausalLM Gemma2ForCausalLM "
    "MambaForCausalLM BloomForCausalLM JambaForCausalLM RwkvForCausalLM"
).split()
LENGTHS = (3, 7, 5, 12, 7)


def prompts_of(lengths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(8, 60, (n,), generator=generator).tolist() for n in lengths]


@torch.inference_mode()
def by_definition(model, prompt, count, stops=()):
    ids = list(prompt)
    for _ in range(count):
        token = int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax())
        if token in stops:
            break
        ids.append(token)
    return ids[len(prompt) :]


@pytest.mark.parametrize("name", DECODERS)
def test_batches_with_a_cache_give_the_tokens_of_whole_rows(name):
    """Batched equals single, padded on the left equals not padded, cached equals not cached."""
    model, prompts = build(name).eval(), prompts_of(LENGTHS)
    want = [by_definition(model, prompt, 8) for prompt in prompts]
    for budget in (1, 45, 1000):  # one prompt, two, all in a batch
        assert generate.greedy(model, prompts, longest=8, stops=[], pad=0, token_budget=budget) == want
    stop = want[0][2]
    want = [by_definition(model, prompt, 8, (stop,)) for prompt in prompts]
    assert generate.greedy(model, prompts, longest=8, stops=[stop], pad=0, token_budget=1000) == want


def test_settings_of_the_model_change_nothing():
    """Sampling, penalties and forced tokens of generation_config.json are for chats."""
    from transformers import GenerationConfig

    model, prompts = build("LlamaForCausalLM").eval(), prompts_of(LENGTHS)
    want = [by_definition(model, prompt, 6) for prompt in prompts]
    theirs = GenerationConfig(
        do_sample=True, temperature=3.0, repetition_penalty=2.0, forced_eos_token_id=9, max_length=9
    )
    model.generation_config = theirs
    state = torch.get_rng_state()
    assert generate.greedy(model, prompts, longest=6, stops=[], pad=0, token_budget=1000) == want
    assert model.generation_config is theirs and torch.equal(torch.get_rng_state(), state)


def test_a_model_whose_padding_is_wrong_is_noticed(monkeypatch, capsys):
    """It attends to padding on the left: the batch is generated again, prompts of one length together."""
    model, prompts = build("LlamaForCausalLM").eval(), prompts_of(LENGTHS)
    want = [by_definition(model, prompt, 6) for prompt in prompts]
    ours = model.generate
    monkeypatch.setattr(
        model, "generate", lambda attention_mask, **more: ours(attention_mask=torch.ones_like(attention_mask), **more)
    )
    assert generate.greedy(model, prompts, longest=6, stops=[], pad=9, token_budget=1000) == want
    assert "batches of one length with a cache" in capsys.readouterr().err


def test_a_prompt_that_fills_all_positions_gets_no_answer():
    model = build("GPT2LMHeadModel").eval()
    prompts = prompts_of((64, 60, 3))
    found = generate.greedy(model, prompts, longest=8, stops=[], pad=0, token_budget=1000, positions=64)
    assert [len(tokens) for tokens in found] == [0, 4, 8]
    assert found[1:] == [by_definition(model, prompts[1], 4), by_definition(model, prompts[2], 8)]


@pytest.mark.parametrize("name", DECODERS)
def test_option_scores_are_those_of_whole_rows(name):
    """Options that begin alike, differ in length, and share prompts of several lengths."""
    model = build(name).eval()
    ends = ([9], [9, 11], [12, 13, 14], [9, 11, 13])
    asked = [[(prompt + end, [-100] * len(prompt) + end) for end in ends] for prompt in prompts_of((9, 2, 17))]
    found = options.log_likelihoods(model, asked, token_budget=100)
    for question, scores in zip(asked, found, strict=True):
        for (ids, labels), (total, count) in zip(question, scores, strict=True):
            with torch.inference_mode():
                logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].double().log_softmax(-1)
            want = sum(float(logits[t - 1, labels[t]]) for t in range(1, len(ids)) if labels[t] != -100)
            assert count == sum(label != -100 for label in labels[1:])
            assert total == pytest.approx(want, abs=1e-4, rel=1e-4)
