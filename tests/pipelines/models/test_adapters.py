"""Adapters of every kind: read, taken off, merged and evaluated; their targets."""

import json
import re
import shutil

import pytest
import torch
from peft import LoraConfig as PeftLora
from peft import PeftModel, get_peft_model
from torch.nn import functional
from transformers import AutoModelForCausalLM

from datatools import DataError, UsageError
from pipelines.models import adapters
from pipelines.models import load as models
from pipelines.models.adapters import load_adapter, saved_parameters
from pipelines.models.base import unload
from pipelines.models.lora import add_lora, lora_parameters
from pipelines.settings.parts import LoraConfig, ModelConfig
from pipelines.settings.train import EvaluateConfig
from pipelines.training import evaluation
from tests.pipelines.models.adapted import IDS, KINDS, TARGETS, moved, rows_of, saved_adapter
from tests.zoo import build as zoo

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft")


@pytest.mark.parametrize("tied", ["tied", "untied"])
@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_is_read_taken_off_and_merged(bases, tmp_path, kind, tied):
    """The model is that of training, its parameters those that were trained, and the base comes back to the bit."""
    folder, wanted, trained = saved_adapter(bases / tied, tmp_path / "a", **KINDS[kind])
    model = models.load(ModelConfig(name=str(bases / tied))).model
    before = {name: p.clone() for name, p in model.named_parameters()}
    alone = model(input_ids=IDS).logits
    state = torch.get_rng_state()
    for _ in range(2):
        wrapped = load_adapter(model, folder)
        torch.testing.assert_close(wrapped(input_ids=IDS).logits, wanted, rtol=0, atol=1e-6)
        assert list(saved_parameters(wrapped)) == trained
        unload(wrapped)
        after = dict(model.named_parameters())
        assert list(after) == list(before) and all(torch.equal(after[name], before[name]) for name in before)
        assert torch.equal(model(input_ids=IDS).logits, alone)
        assert not any(p.requires_grad for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), state), "random numbers of the caller are left alone"
    merged = models.load(ModelConfig(name=str(bases / tied), adapter=folder)).model
    torch.testing.assert_close(merged(input_ids=IDS).logits, wanted, rtol=0, atol=1e-5)
    merged.save_pretrained(tmp_path / "merged")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(again(input_ids=IDS).logits, wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("method", ["IA3Config", "LoKrConfig", "LNTuningConfig"])
def test_adapters_of_other_methods_are_read_and_taken_off(bases, tmp_path, method):
    import peft

    options = {"target_modules": ["input_layernorm", "norm"] if method == "LNTuningConfig" else TARGETS}
    options |= {"feedforward_modules": []} if method == "IA3Config" else {}
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = AutoModelForCausalLM.from_pretrained(bases / "tied")
        wrapped = get_peft_model(model, getattr(peft, method)(task_type="CAUSAL_LM", **options))
        moved(wrapped).eval().save_pretrained(tmp_path / "a")
    base = models.load(ModelConfig(name=str(bases / "tied"))).model
    alone = base(input_ids=IDS).logits
    read = load_adapter(base, tmp_path / "a")
    torch.testing.assert_close(read(input_ids=IDS).logits, wrapped(input_ids=IDS).logits.detach())
    assert list(saved_parameters(read)) == [n for n, p in wrapped.named_parameters() if p.requires_grad]
    unload(read)
    assert torch.equal(base(input_ids=IDS).logits, alone)


@pytest.mark.parametrize("start", ["pissa_niter_4", "corda", "lora_ga", "loftq"])
@pytest.mark.parametrize("merge", [False, True])
def test_a_base_that_cannot_be_had_again_is_refused_by_name(bases, tmp_path, monkeypatch, start, merge):
    """Random, computed from data, or by a package that is missing: the base weights of training were not saved."""
    monkeypatch.setattr(adapters, "find_spec", lambda name: None)
    if start.startswith("pissa"):
        folder, _, _ = saved_adapter(bases / "tied", tmp_path / "a", init_lora_weights=start)
    else:
        folder, _, _ = saved_adapter(bases / "tied", tmp_path / "a")
        path = folder / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"init_lora_weights": start}))
    model = models.load(ModelConfig(name=str(bases / "tied"))).model
    before = {name: p.clone() for name, p in model.named_parameters()}
    with pytest.raises(DataError, match=f"initialisation '{start}'.*init_lora_weights"):
        if merge:
            models.load(ModelConfig(name=str(bases / "tied"), adapter=folder))
        load_adapter(model, folder)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_what_does_not_fit_says_why_and_leaves_the_base(bases, tmp_path):
    model = models.load(ModelConfig(name=str(bases / "untied"))).model
    names = list(dict(model.named_modules()))
    larger = AutoModelForCausalLM.from_pretrained(bases / "untied")
    larger.resize_token_embeddings(300)
    larger.save_pretrained(tmp_path / "larger")
    folder, _, _ = saved_adapter(tmp_path / "larger", tmp_path / "resized", target_modules=[*TARGETS, "embed_tokens"])
    with pytest.raises(DataError, match="vocabulary of 300 tokens and the model has 259"):
        load_adapter(model, folder)
    folder, _, _ = saved_adapter(bases / "untied", tmp_path / "prompt")
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"peft_type": "PREFIX_TUNING"}))
    with pytest.raises(DataError, match="PREFIX_TUNING adds tokens before a row"):
        load_adapter(model, folder)
    assert list(dict(model.named_modules())) == names


def test_a_small_adapter_on_bfloat16_weights_is_evaluated_and_not_rounded_away(bases, world, tmp_path, capsys):
    """Added to weights of 16 bits, a change below half their spacing is lost: said where it must be merged."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = AutoModelForCausalLM.from_pretrained(world.model)
        wrapped = get_peft_model(model, PeftLora(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "down_proj"]))
        for name, p in wrapped.named_parameters():
            if "lora_B" in name:
                p.data.normal_(std=1e-4)
        wrapped.save_pretrained(tmp_path / "a")
    narrow = ModelConfig(name=str(world.model), dtype="bfloat16", adapter=tmp_path / "a")
    plain = narrow.model_copy(update={"adapter": None})
    beside = models.load(narrow, merge=False).model
    assert len(lora_parameters(beside)) == 8
    with torch.no_grad():
        change = beside.base_model.model.model.layers[0].mlp.down_proj.get_delta_weight("default")
    assert 0 < float(change.abs().max()) < 1e-3
    assert "of its change" not in capsys.readouterr().err
    merged = models.load(narrow).model
    share = float(re.search(r"only (\d+)% of its change is kept", capsys.readouterr().err)[1]) / 100
    assert share < 0.9
    start = models.load(plain).model
    made, wanted = [], []
    for i in range(2):
        for part, name in (("self_attn", "q_proj"), ("mlp", "down_proj")):
            own, base, moved = (
                getattr(getattr(m.model.layers[i], part), name) for m in (beside.base_model.model, start, merged)
            )
            made.append((moved.weight.float() - base.weight.float()).flatten())
            wanted.append(own.get_delta_weight("default").detach().float().flatten())
    made, wanted = torch.cat(made), torch.cat(wanted)
    assert share == pytest.approx(float(made @ wanted / (wanted @ wanted)), abs=0.02)


def test_an_adapter_with_a_name_has_a_folder_of_its_own(bases, tmp_path):
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = AutoModelForCausalLM.from_pretrained(bases / "tied")
        options = PeftLora(task_type="CAUSAL_LM", r=4, target_modules=TARGETS)
        wrapped = get_peft_model(model, options, adapter_name="mine")
        moved(wrapped).eval().save_pretrained(tmp_path / "a")
    assert not (tmp_path / "a" / "adapter_config.json").exists()
    wanted = wrapped(input_ids=IDS).logits.detach()
    base = models.load(ModelConfig(name=str(bases / "tied"))).model
    read = load_adapter(base, tmp_path / "a")
    torch.testing.assert_close(read(input_ids=IDS).logits, wanted)
    assert list(saved_parameters(read)) == [n for n, p in wrapped.named_parameters() if p.requires_grad]
    shutil.copytree(tmp_path / "a" / "mine", tmp_path / "a" / "other")
    with pytest.raises(DataError, match="contains 2 adapters \\(mine, other\\)"):
        load_adapter(base, tmp_path / "a")


def test_weights_that_an_adapter_changed_and_no_file_holds_are_an_error(bases):
    """A model that was not read from files cannot be restored; a change that nobody may make is not passed on."""
    model = AutoModelForCausalLM.from_pretrained(bases / "tied").requires_grad_(False)
    wrapped = add_lora(model, LoraConfig(rank=2), seed=0)
    with torch.no_grad():
        model.model.norm.weight.add_(1)
    with pytest.raises(DataError, match=r"changed 1 weights.*model\.norm\.weight"):
        unload(wrapped)


# ------------------------------------------------------------------------------------------------- targets of adapters


def named(model):
    names = [name.split(".lora_A.")[0] for name in lora_parameters(model) if ".lora_A." in name]
    return {name.removeprefix("base_model.model.") for name in names}


def test_adapters_are_on_the_attention_of_any_model(bases):
    from transformers import GPT2Config, GPT2LMHeadModel, MambaConfig, MambaForCausalLM, Phi3Config, Phi3ForCausalLM

    def on(model, **settings):
        return named(add_lora(model.requires_grad_(False), LoraConfig(rank=2, **settings), seed=0))

    llama = on(AutoModelForCausalLM.from_pretrained(bases / "tied"))
    assert llama == {f"model.layers.{i}.self_attn.{k}_proj" for i in (0, 1) for k in "qkvo"}
    gpt2 = GPT2Config(vocab_size=50, n_embd=16, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0)
    assert on(GPT2LMHeadModel(gpt2)) == {"transformer.h.0.attn.c_attn", "transformer.h.0.attn.c_proj"}
    assert len(on(GPT2LMHeadModel(gpt2), targets="auto")) == 4
    small = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 1}
    ends = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    phi = Phi3Config(**small, **ends, intermediate_size=16, num_attention_heads=2, num_key_value_heads=2)
    assert on(Phi3ForCausalLM(phi)) == {"model.layers.0.self_attn.qkv_proj", "model.layers.0.self_attn.o_proj"}
    mamba = on(MambaForCausalLM(MambaConfig(**small, **ends, state_size=4)))
    inside = {f"backbone.layers.0.mixer.{name}_proj" for name in ("in", "x")}
    assert mamba == inside, "no attention: all but the head, dt_proj that is read and not called, and what peft refuses"
    with pytest.raises(DataError, match=r"q_proj: no layer of this model has this name.*'o_proj', 'qkv_proj'"):
        on(Phi3ForCausalLM(phi), targets=["q_proj", "o_proj"])


@pytest.mark.parametrize(
    "name", ["Llama4ForCausalLM", "PhimoeForCausalLM", "DeepseekV4ForCausalLM", "Gemma3nForCausalLM"]
)
def test_adapters_leave_out_what_only_looks_like_a_linear_layer(name):
    """Routers that return a choice, products in groups; and a list of layers named as the decoder's layers are."""
    model = zoo.build(name).requires_grad_(False)
    wrapped = add_lora(model, LoraConfig(rank=2, targets="auto"), seed=0)
    got = named(wrapped)
    assert got and not any(part in target for target in got for part in ("router.gate", "o_a_proj", "lm_head"))
    loss = wrapped(input_ids=IDS, use_cache=False).logits.logsumexp(-1).sum()
    assert all(g is None or g.isfinite().all() for g in torch.autograd.grad(
        loss, list(lora_parameters(wrapped).values()), allow_unused=True
    ))  # fmt: skip


def test_fresh_matrices_on_an_embedding_do_not_depend_on_what_ran_before(bases):
    def drawn(before):
        torch.manual_seed(before)
        model = add_lora(
            AutoModelForCausalLM.from_pretrained(bases / "tied"), LoraConfig(rank=2, targets=["embed_tokens"]), seed=3
        )
        return {name: p.clone() for name, p in lora_parameters(model).items()}

    with torch.random.fork_rng():
        first, second = drawn(1), drawn(2)
    assert all(torch.equal(first[name], second[name]) for name in first)


# ------------------------------------------------------------------------------------ what a checkpoint says it trained


@pytest.mark.parametrize("kind", ["pissa", "tokens", "whole head", "both as one"])
def test_an_adapter_of_any_kind_is_evaluated(world, tmp_path, kind):
    folder, _, _ = saved_adapter(world.model, tmp_path / "a", **KINDS[kind])
    model = {"name": str(world.model), "adapter": folder}
    got = evaluation.evaluate(EvaluateConfig(model=model, data={"paths": [str(world.test)]}))
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(world.model), folder).eval()
    rows, losses = rows_of(world, world.test), []
    for i in range(4):
        ids, labels = rows.item(i)
        logits = plain(input_ids=torch.tensor([ids])).logits[0, :-1].double()
        kept = torch.tensor(labels[1:]) != -100
        losses.append(functional.cross_entropy(logits[kept], torch.tensor(labels[1:])[kept], reduction="none"))
    assert got["loss"] == pytest.approx(float(torch.cat(losses).mean().detach()), abs=1e-6)
    with pytest.raises(UsageError, match=r"contains an adapter; give its base \(.*\) as --model"):
        models.load(ModelConfig(name=str(folder)))
