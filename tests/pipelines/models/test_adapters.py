"""Adapters and checkpoints of every kind that trainers save: the model of training, what was trained, its base."""

import copy
import json
import re
import shutil

import pytest
import torch
from peft import LoraConfig as PeftLora
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

from datatools import DataError, GradientFeatures, UsageError
from pipelines.models import load as models
from pipelines.models import saved_states
from pipelines.models.adapters import load_adapter, saved_parameters
from pipelines.models.base import unload
from pipelines.models.lora import add_lora, lora_parameters
from pipelines.select import run as select
from pipelines.settings.parts import LoraConfig, ModelConfig, TrainingConfig
from pipelines.settings.select import FeaturesConfig, ProjectorConfig
from pipelines.settings.train import EvaluateConfig, TrainConfig
from pipelines.training import checkpoints, evaluation, train
from tests.pipelines.conftest import make_world
from tests.tiny import TEMPLATE, save_tiny_model
from tests.zoo import build as zoo

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft")
IDS = torch.arange(3, 20)[None]
TARGETS = ["q_proj", "v_proj"]


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Two folders: `tied`, with one weight for embedding and head, and `untied`; both with biases in attention."""
    home = tmp_path_factory.mktemp("bases")
    save_tiny_model(home / "plain")
    model = AutoModelForCausalLM.from_pretrained(home / "plain")
    config = copy.deepcopy(model.config)
    config.attention_bias = True
    for name, tied in (("tied", True), ("untied", False)):
        config.tie_word_embeddings = tied
        with torch.random.fork_rng():
            torch.manual_seed(0)
            type(model)(config).save_pretrained(home / name)
        AutoTokenizer.from_pretrained(home / "plain").save_pretrained(home / name)
    return home


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


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
def test_a_base_that_cannot_be_had_again_is_refused_by_name(bases, tmp_path, start, merge):
    """Random, or computed from data: what the base weights were in training was not saved."""
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


def rows_of(world, path):
    from pipelines.rows.prepare import prepare
    from pipelines.settings.parts import DataConfig

    config = ModelConfig(name=str(world.model))
    tokenizer = models.load(config, tokenizer_only=True).tokenizer
    return prepare(DataConfig(paths=[str(path)]), config, tokenizer, cache=world.folder / "cache", label="rows")


def user_run(world, folder, model, steps=4, **arguments):
    """A Trainer run of the user's over rows of the pool: the model at its end, and its last checkpoint."""
    rows = rows_of(world, world.pool)
    items = [rows.item(i) for i in range(4)]
    data = [{"input_ids": torch.tensor(ids), "labels": torch.tensor(labels)} for ids, labels in items]
    settings = {"learning_rate": 1e-2, "lr_scheduler_type": "linear", "logging_steps": 1, "save_steps": steps}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        Trainer(
            model,
            TrainingArguments(
                output_dir=str(folder), per_device_train_batch_size=1, max_steps=steps, report_to="none", use_cpu=True,
                disable_tqdm=True, **settings | arguments,
            ),
            train_dataset=data,
        ).train()  # fmt: skip
    return model.eval(), folder / f"checkpoint-{steps}"


def norms_by_autograd(world, model, names):
    """Norm of the target rows' gradients over the parameters `names`, one row at a time, in float64."""
    model = model.double().requires_grad_(True)
    rows, found = rows_of(world, world.target), []
    for i in range(3):
        ids, labels = rows.item(i)
        model.zero_grad()
        logits = model(input_ids=torch.tensor([ids])).logits[0, :-1]
        functional.cross_entropy(logits, torch.tensor(labels[1:]), ignore_index=-100).backward()
        found.append(float(sum(p.grad.square().sum() for n, p in model.named_parameters() if n in names) ** 0.5))
    return found


def norms_by_selection(world, out, stop, method="loop"):
    config = world.select(
        out, checkpoints=[stop], projector=ProjectorConfig(name="identity", dim=100_000),
        features=FeaturesConfig(method=method, dtype="float32"),
    )  # fmt: skip
    select.run(config)
    rows = rows_of(world, world.target)
    held = GradientFeatures.open(out / "features" / f"target-{stop.name[11:]}").rows()
    norm = dict(zip(held.keys, held.norms.tolist(), strict=True))
    return [norm[rows.keys[i]] for i in range(3)]


@pytest.mark.parametrize("kind", ["pissa", "dora", "whole head", "whole embedding", "whole norms", "both", "tokens"])
def test_gradients_at_a_user_s_adapter_are_those_of_the_model_of_training(world, tmp_path, kind):
    """Twice put on and taken off (the estimate of costs does it first), at the trained model's own gradients."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        options = {"target_modules": TARGETS} | KINDS[kind]
        model = get_peft_model(
            AutoModelForCausalLM.from_pretrained(world.model), PeftLora(task_type="CAUSAL_LM", r=4, **options)
        )
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    model, stop = user_run(world, tmp_path / "run", model)
    wanted = norms_by_autograd(world, model, trained)
    assert norms_by_selection(world, tmp_path / "out", stop) == pytest.approx(wanted, rel=1e-4)


def frozen_but(model, part):
    for name, p in model.named_parameters():
        p.requires_grad_(part(name))
    return model


PARTS = {
    "last layer": lambda name: "layers.1." in name,
    "first layer": lambda name: "layers.0." in name,
    "attention": lambda name: "self_attn" in name,
    "norms": lambda name: "norm" in name,
    "all but the embedding": lambda name: "embed" not in name,
}


@pytest.mark.parametrize("part", PARTS)
def test_gradients_at_a_partly_frozen_model_are_of_what_was_trained(world, tmp_path, part):
    """The state has no names, and several layers have its shapes: what moved from the base tells."""
    model = frozen_but(AutoModelForCausalLM.from_pretrained(world.model), PARTS[part])
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    model, stop = user_run(world, tmp_path / "run", model)
    wanted = norms_by_autograd(world, model, trained)
    assert norms_by_selection(world, tmp_path / "out", stop) == pytest.approx(wanted, rel=1e-4)
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["model"]["seen_share"] == 1.0


def test_a_state_that_may_be_of_several_parameters_is_refused(world, tmp_path):
    """The checkpoint's own weights given as the model: nothing moved, and two layers have the shapes."""
    model = frozen_but(AutoModelForCausalLM.from_pretrained(world.model), PARTS["last layer"])
    model, stop = user_run(world, tmp_path / "run", model)
    at = checkpoints.find([stop])[0]
    same = models.load(ModelConfig(name=str(world.model)), weights=stop).model
    with pytest.raises(DataError, match="9 parameters without names, of 20 .*several choices.*--model must be"):
        checkpoints.updates(at, checkpoints.trainable(same), module=same, base=same)
    other = models.load(ModelConfig(name=str(world.model))).model
    moved(other.requires_grad_(True))
    with pytest.raises(DataError, match="no choice of the model's has their shapes and the 20 weights that differ"):
        checkpoints.updates(at, checkpoints.trainable(same), module=same, base=other)


def test_weights_that_a_run_trained_and_did_not_save_are_missed(world, tmp_path):
    """peft saves adapters; a norm that was set to train beside them is in the optimizer's state alone."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        base = AutoModelForCausalLM.from_pretrained(world.model)
        model = get_peft_model(base, PeftLora(task_type="CAUSAL_LM", r=4, target_modules=TARGETS))
    model.base_model.model.model.norm.weight.requires_grad_(True)
    _, stop = user_run(world, tmp_path / "run", model)
    with pytest.raises(DataError, match=r"contains 9 parameters, but the adapter's file 8: .*modules_to_save"):
        select.run(world.select(tmp_path / "out", checkpoints=[stop]))


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


# ---------------------------------------------------------------------------------------- layouts of other trainers


@pytest.fixture(scope="module")
def plain_run(world, tmp_path_factory):
    """(a checkpoint of all weights, the map that its own optimizer.pt gives)."""
    _model, stop = user_run(world, tmp_path_factory.mktemp("run"), AutoModelForCausalLM.from_pretrained(world.model))
    module = models.load(ModelConfig(name=str(world.model)), weights=stop).model
    found = checkpoints.updates(checkpoints.find([stop])[0], checkpoints.trainable(module), module=module)
    return stop, found, module


def by_name(found):
    """The optimizer's state dict with names as keys, as FSDP saves it."""
    group = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0, "amsgrad": False}
    state = {name: dict(entries) for name, entries in found.states.items()}
    return {"state": state, "param_groups": [{**group, "params": [*state]}]}


def sharded(value, folder):
    """Written as FSDP writes shards: torch.distributed.checkpoint in one process."""
    import torch.distributed.checkpoint as dcp

    dcp.save(value, storage_writer=dcp.FileSystemWriter(folder), no_dist=True)


def copied(stop, folder, *without):
    shutil.copytree(stop, folder, ignore=shutil.ignore_patterns(*without))
    return folder


def assert_same(at, module, wanted):
    read = checkpoints.updates(checkpoints.find([at])[0], checkpoints.trainable(module), module=module, base=module)
    assert set(read.states) == set(wanted.states)
    for name, state in wanted.states.items():
        for key, value in state.items():
            assert torch.equal(read.states[name][key], value), (name, key)
    assert read.rules == wanted.rules


@pytest.mark.filterwarnings("ignore:.*torch.distributed.*:UserWarning")
@pytest.mark.parametrize("layout", ["full", "shards"])
def test_states_and_weights_that_fsdp_saves_are_read(plain_run, world, tmp_path, layout):
    stop, wanted, module = plain_run
    if layout == "full":
        at = copied(stop, tmp_path / "checkpoint-4", "optimizer.pt")
        torch.save(by_name(wanted), at / "optimizer.bin")
    else:
        at = copied(stop, tmp_path / "checkpoint-4", "optimizer.pt", "model.safetensors", "config.json")
        sharded({"optimizer": by_name(wanted)}, at / "optimizer_0")
        sharded({"model": module.state_dict()}, at / "pytorch_model_fsdp_0")
        assert set(checkpoints.find([at])[0].digests()) >= {"optimizer_0/.metadata", "pytorch_model_fsdp_0/.metadata"}
    assert_same(at, module, wanted)
    read = models.load(ModelConfig(name=str(world.model)), weights=at).model
    assert all(torch.equal(p, q) for p, q in zip(read.parameters(), module.parameters(), strict=True))


@pytest.mark.filterwarnings("ignore:.*torch.distributed.*:UserWarning")
def test_adapters_in_shards_are_read_with_their_configuration(bases, tmp_path):
    """Trainer leaves no adapter_config.json beside the shards; with that of the run's last adapter they are one."""
    folder, wanted, trained = saved_adapter(bases / "tied", tmp_path / "a", modules_to_save=["lm_head"])
    config, weights = folder / "adapter_config.json", load_file(folder / "adapter_model.safetensors")
    at = tmp_path / "checkpoint-4"
    sharded({"model": weights}, at / "pytorch_model_fsdp_0")
    base = ModelConfig(name=str(bases / "tied"))
    with pytest.raises(DataError, match=r"adapters without their adapter_config\.json; copy it .*checkpoint-4"):
        models.load(base, weights=at)
    shutil.copy(config, at)
    read = load_adapter(models.load(base).model, at)
    torch.testing.assert_close(read(input_ids=IDS).logits, wanted)
    assert list(saved_parameters(read)) == trained


@pytest.mark.filterwarnings("ignore:.*torch.distributed.*:UserWarning")
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_the_index_of_shards_is_read_in_every_form_of_pickles(tmp_path, protocol):
    import pickle

    values = {"a": {"b": torch.arange(6.0).reshape(2, 3), "c": torch.tensor(3, dtype=torch.int64)}, "d": [1.5, "text"]}
    sharded(values, tmp_path / "x")
    path = tmp_path / "x" / ".metadata"
    path.write_bytes(pickle.dumps(pickle.loads(path.read_bytes()), protocol=protocol))
    read = saved_states._nested(tmp_path / "x")
    assert torch.equal(read["a"]["b"], values["a"]["b"]) and torch.equal(read["a"]["c"], values["a"]["c"])
    assert saved_states._listed(read["d"]) == [1.5, "text"]


def test_the_index_of_shards_runs_no_code(plain_run, tmp_path):
    import pickle

    class Harm:
        def __reduce__(self):
            return (open, (str(tmp_path / "harm"), "w"))

    at = copied(plain_run[0], tmp_path / "checkpoint-4", "optimizer.pt")
    (at / "optimizer_0").mkdir()
    (at / "optimizer_0" / ".metadata").write_bytes(pickle.dumps(Harm()))
    with pytest.raises(DataError, match="its index asks for .*open, which is not part of one"):
        saved_states.read(saved_states.find(at))
    torch.save(Harm(), at / "optimizer.pt")
    with pytest.raises(DataError, match="not readable as plain tensors"):
        saved_states.read(saved_states.find(at))
    assert not (tmp_path / "harm").exists()


@pytest.mark.filterwarnings("ignore:.*torch.distributed.*:UserWarning")
def test_shards_that_are_missing_or_of_another_model_are_refused(plain_run, world, tmp_path):
    stop, wanted, module = plain_run
    at = copied(stop, tmp_path / "checkpoint-4", "optimizer.pt", "model.safetensors")
    sharded({"optimizer": by_name(wanted)}, at / "optimizer_0")
    sharded({"model": {"another.weight": torch.zeros(3)}}, at / "pytorch_model_fsdp_0")
    with pytest.raises(DataError, match=r"weights of another model: 'another\.weight'"):
        models.load(ModelConfig(name=str(world.model)), weights=at)
    next((at / "optimizer_0").glob("*.distcp")).unlink()
    with pytest.raises(DataError, match="a shard cannot be read"):
        checkpoints.updates(checkpoints.find([at])[0], checkpoints.trainable(module), module=module)


def test_8_bit_states_of_bitsandbytes_are_decoded(plain_run, tmp_path):
    """Codes and one scale for 256 of them, small tensors in float32; nested, as newer versions write it."""
    stop, wanted, module = plain_run
    at = copied(stop, tmp_path / "checkpoint-4", "optimizer.pt")
    state, expected = {}, {}
    books = torch.linspace(-1, 1, 256), torch.linspace(0, 1, 256)
    for i, (name, held) in enumerate(wanted.states.items()):
        entries, values = {"step": 4}, {"step": held["step"]}
        for which, key, book in (("1", "exp_avg", books[0]), ("2", "exp_avg_sq", books[1])):
            moment = held[key]
            if moment.numel() < 1024:
                entries[f"state{which}"], values[key] = moment, moment
                continue
            blocks = functional.pad(moment.flatten(), (0, -moment.numel() % 256)).reshape(-1, 256)
            scales = blocks.abs().amax(1).clamp_min(1e-12)
            codes = ((blocks / scales[:, None])[..., None] - book).abs().argmin(-1).to(torch.uint8)
            entries |= {f"state{which}": codes.flatten()[: moment.numel()].reshape(moment.shape)}
            entries |= {f"qmap{which}": book, f"absmax{which}": scales}
            decoded = (book[codes.long()] * scales[:, None]).flatten()[: moment.numel()].reshape(moment.shape)
            values[key] = decoded
            assert float((decoded - moment).abs().max()) < 0.01 * float(moment.abs().max())
        expected[name] = values
        state[i] = entries if i % 2 else {"__bnb_optimizer_quant_state__": entries}
    groups = torch.load(stop / "optimizer.pt", weights_only=True)["param_groups"]
    order = [*range(len(state))]
    spared = [i for i, name in enumerate(wanted.states) if "norm" in name]
    for group, keys in zip(groups, ([i for i in order if i not in spared], spared), strict=True):
        group["params"] = keys
        for key in set(group) - {"params", "lr", "betas", "eps", "weight_decay"}:
            del group[key]
    torch.save({"state": state, "param_groups": groups}, at / "optimizer.pt")
    read = checkpoints.updates(checkpoints.find([at])[0], checkpoints.trainable(module), module=module)
    for name, values in expected.items():
        for key, value in values.items():
            torch.testing.assert_close(read.states[name][key], value)
    torch.save({"state": {0: {"state1": state[1]["state1"], "step": 4}}, "param_groups": groups}, at / "optimizer.pt")
    with pytest.raises(DataError, match=r"with one moment \(Lion, RMSprop or SGD\)"):
        saved_states.read(at / "optimizer.pt")


def test_deepspeed_s_universal_layout_is_read_and_its_shards_named(plain_run, world, tmp_path):
    stop, wanted, module = plain_run
    at = copied(stop, tmp_path / "checkpoint-4", "optimizer.pt", "model.safetensors")
    (at / "global_step4").mkdir()
    with pytest.raises(DataError, match=r"ZeRO shards.*ds_to_universal --input_folder \S+global_step4 --output_folder"):
        checkpoints.find([at])
    home = at / "global_step4_universal" / "zero"
    every = dict(module.named_parameters())
    for name, state in wanted.states.items():
        (home / name).mkdir(parents=True)
        for key in ("exp_avg", "exp_avg_sq"):
            torch.save({"param": state[key], "cat_dim": 0}, home / name / f"{key}.pt")
        torch.save({"param": every[name].detach()}, home / name / "fp32.pt")
        torch.save(state["step"], home / name / "step.pt")
    scaler = type("LossScaler", (), {"__module__": "deepspeed.runtime.fp16.loss_scaler", "__qualname__": "LossScaler"})
    torch.save({"param_groups": [{"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8}]}, home / "optimizer_state.pt")
    assert_same(at, module, wanted)
    read = models.load(ModelConfig(name=str(world.model)), weights=at).model
    assert all(torch.equal(p, q) for p, q in zip(read.parameters(), module.parameters(), strict=True))
    with pytest.MonkeyPatch.context() as patched:  # a class that is there when it is saved, and not when it is read
        import sys
        from types import ModuleType

        parts = scaler.__module__.split(".")
        for k in range(len(parts)):
            patched.setitem(sys.modules, ".".join(parts[: k + 1]), ModuleType(".".join(parts[: k + 1])))
        sys.modules[scaler.__module__].LossScaler = scaler
        groups = [{"betas": (0.9, 0.999), "eps": 1e-8}]
        torch.save({"loss_scaler": scaler(), "param_groups": groups}, home / "optimizer_state.pt")
    assert_same(at, module, wanted)


def test_states_of_other_optimizers_are_named(plain_run, tmp_path):
    at = copied(plain_run[0], tmp_path / "checkpoint-4", "optimizer.pt")
    rows = {"exp_avg_sq_row": torch.zeros(3), "exp_avg_sq_col": torch.zeros(4)}
    torch.save({"state": {0: rows}, "param_groups": [{"params": [0]}]}, at / "optimizer.pt")
    with pytest.raises(DataError, match="Adafactor's state.*optim.hf.resolve"):
        saved_states.read(at / "optimizer.pt")
    (at / "optimizer.pt").unlink()
    (at / "optimizer_0_rank0.bin").write_bytes(b"")
    with pytest.raises(DataError, match="one file per process.*SHARDED_STATE_DICT"):
        checkpoints.find([at])


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
