"""What a checkpoint says was trained, and the layouts that other trainers save."""

import json
import shutil

import pytest
import torch
from peft import LoraConfig as PeftLora
from peft import get_peft_model
from safetensors.torch import load_file
from torch.nn import functional
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from datatools import DataError, GradientFeatures
from pipelines.models import load as models
from pipelines.models import saved_states
from pipelines.models.adapters import load_adapter, saved_parameters
from pipelines.select import run as select
from pipelines.settings.parts import ModelConfig
from pipelines.settings.select import FeaturesConfig, ProjectorConfig
from pipelines.training import checkpoints
from tests.pipelines.models.adapted import IDS, KINDS, TARGETS, moved, rows_of, saved_adapter

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft")

# ------------------------------------------------------------------------------------ what a checkpoint says it trained


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
