"""`optim.hf.resolve` in `transformers.Trainer`: plain, accumulated, bfloat16, compiled, resumed, DDP, FSDP2."""

import hashlib
import json
import shutil
import socket

import pytest
import torch

from optim import OPTIMIZERS, Optimizer, UpdateMap, create, hf, schedule, without_decay
from tests.optim.distributed import processes
from tests.processes import spawn
from tests.tiny import save_tiny_model

NAMES = sorted(OPTIMIZERS)
pytestmark = pytest.mark.filterwarnings("ignore:.*does not refresh the curvature:UserWarning")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("hf") / "model", hidden=16)


@pytest.fixture(scope="module")
def runs():
    """The module of the runs, which imports transformers: not at collection."""
    return pytest.importorskip("tests.optim.hf_training")


def digests(folder):
    """Of everything that a resumed run must not change."""
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.iterdir()
        if path.suffix in (".safetensors", ".pt", ".pth")
    }


def params(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


# ------------------------------------------------------------------------------------------------------ one process


@pytest.mark.parametrize("name", NAMES)
def test_trains_and_resumes_to_the_bit(runs, folder, tmp_path, name):
    """Every optimizer; its checkpoint, read by the Trainer with weights_only, continues as if nothing had stopped."""
    done = runs.trainer(runs.load(folder), tmp_path / "run", name)
    before = params(done.model)
    done.train()
    assert isinstance(done.optimizer.optimizer, OPTIMIZERS[name])
    losses = [entry["loss"] for entry in done.state.log_history if "loss" in entry]
    assert len(losses) == 4 and all(0 < loss < 20 for loss in losses)
    assert all(not torch.equal(before[n], p) for n, p in done.model.named_parameters()), "every tensor has moved"
    whole = digests(tmp_path / "run" / "checkpoint-4")
    shutil.rmtree(tmp_path / "run" / "checkpoint-4")
    runs.trainer(runs.load(folder), tmp_path / "run", name).train(
        resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2")
    )
    assert digests(tmp_path / "run" / "checkpoint-4") == whole


@pytest.mark.parametrize("name", NAMES)
def test_is_what_create_makes(runs, folder, tmp_path, name):
    """The same rules and rates by name; weight decay where Trainer's own optimizers have it; selection can read it."""
    made = runs.trainer(runs.load(folder), tmp_path, name)
    ours = made.create_optimizer()
    named = list(made.model.named_parameters())
    plain = create(name, named, lr=1e-2, weight_decay=0.1)
    at = {n: g for g in ours.param_groups for n in g["param_names"]}
    assert sorted(at) == sorted(n for n, _ in named)
    decayed = set(made.get_decay_parameter_names(made.model))
    for group in plain.param_groups:
        for n in group["param_names"]:
            assert (at[n]["rule"], at[n]["lr"]) == (group["rule"], group["lr"])
            assert at[n]["weight_decay"] == (group["weight_decay"] if n in decayed else 0.0)
    assert set(UpdateMap.of(ours).params) == set(at)


def test_a_plain_loop_gives_the_same_bits(runs, folder, tmp_path):
    """What Trainer adds is none of the optimizer's business: its four steps are those of a loop over its batches."""
    done = runs.trainer(runs.load(folder), tmp_path, "lion", max_grad_norm=0.0, lr_scheduler_type="constant")
    torch.manual_seed(done.args.seed)  # as `train` does before it shuffles
    batches = list(done.get_train_dataloader())[:4]
    done.train()
    model = runs.load(folder)
    spared = without_decay([n for n, _ in model.named_parameters()], model)
    groups = [
        {"params": [(n, p) for n, p in model.named_parameters() if (n in spared) == which], "weight_decay": decay}
        for which, decay in ((False, 0.1), (True, 0.0))
    ]
    optimizer = Optimizer(groups, create("lion", [("x", torch.ones(1))], lr=1.0).param_groups[0]["rule"], lr=1e-2)
    model.train()
    for batch in batches:
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    want = params(model)
    for name, p in done.model.named_parameters():
        torch.testing.assert_close(p.detach(), want[name], rtol=0, atol=1e-6, msg=name)


def test_gradient_accumulation(runs, folder, tmp_path):
    """Four micro-batches of one row are one batch of four."""
    one = runs.trainer(runs.load(folder), tmp_path / "one", "adamw")
    four = runs.trainer(
        runs.load(folder), tmp_path / "four", "adamw", per_device_train_batch_size=1, gradient_accumulation_steps=4
    )
    one.train()
    four.train()
    step = next(iter(four.optimizer.state.values()))["step"]
    assert float(step) == 4
    for (name, a), b in zip(one.model.named_parameters(), four.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4, msg=name)


@pytest.mark.parametrize("name", ["adamw", "muon", "adam_mini"])
def test_bfloat16_parameters(runs, folder, tmp_path, name):
    """Moments are float32 and stay so through a checkpoint, from which the run continues to the bit."""
    done = runs.trainer(runs.load(folder, torch.bfloat16), tmp_path, name)
    done.train()
    whole = digests(tmp_path / "checkpoint-4")
    again = runs.trainer(runs.load(folder, torch.bfloat16), tmp_path, name)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert digests(tmp_path / "checkpoint-4") == whole
    assert {p.dtype for p in again.model.parameters()} == {torch.bfloat16}
    assert {v.dtype for s in again.optimizer.state.values() for v in s.values()} == {torch.float32}


@pytest.mark.slow
def test_compiled_model(runs, folder, tmp_path):
    """`torch_compile=True` wraps the model; names lose the prefix, and the numbers are those of the plain run."""
    plain = runs.trainer(runs.load(folder), tmp_path / "plain", "adamw")
    compiled = runs.trainer(runs.load(folder), tmp_path / "compiled", "adamw", torch_compile=True)
    plain.train()
    compiled.train()
    assert type(compiled.model_wrapped).__name__ == "OptimizedModule"
    for (name, a), b in zip(plain.model.named_parameters(), compiled.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3, msg=name)


@pytest.fixture(scope="module")
def compiled(runs, folder):
    """A model whose graph is captured once, with the names that torch.compile gives; and how it starts."""
    model = runs.load(folder)
    start = {name: p.clone() for name, p in model.state_dict().items()}
    return model, torch.compile(model, backend="eager"), start


@pytest.mark.parametrize("name", NAMES)
def test_compiled_model_and_accumulation(runs, compiled, monkeypatch, name):
    """Every optimizer: a compiled model with two micro-batches is the plain one with one batch."""
    monkeypatch.setenv("OPTIM_BACKEND", "torch")  # it is not compiled steps that are tested
    model, wrapped, start = compiled
    model.load_state_dict(start)
    plain = runs.stepped(model, name)
    want = params(model)
    model.load_state_dict(start)
    ours = runs.stepped(wrapped, name, parts=2)
    off = [(p.detach() - want[n]).abs() > 1e-4 for n, p in model.named_parameters()]
    share = 0.1 if name == "muon_8bit" else 0.01  # a code of a small matrix moves all of its direction
    assert torch.cat([x.flatten() for x in off]).double().mean() < share, "but for signs and codes at rounding level"
    settings = [[(g["rule"], g["lr"], g["weight_decay"]) for g in o.param_groups] for o in (plain, ours)]
    assert settings[0] == settings[1], "the wrapper's prefix hides no name"


VISIBLE = {"lars": {"trust_coeff": 1.0}, "prodigy": {"d0": 1.0}}
"""Settings for steps in proportion to the learning rate, where the defaults make them a thousandth of that or less."""


@pytest.mark.parametrize("name", NAMES)
def test_bfloat16_steps(runs, folder, monkeypatch, name):
    """Every optimizer: parameters stay bfloat16 and move; no running average is bfloat16."""
    monkeypatch.setenv("OPTIM_BACKEND", "torch")
    model = runs.load(folder, torch.bfloat16)
    before = params(model)
    optimizer = runs.stepped(model, name, parts=2, **VISIBLE.get(name, {}))
    moved = [not torch.equal(p, before[n]) for n, p in model.named_parameters()]
    assert sum(moved) > len(moved) / 2, "some steps are less than a unit in the last place of bfloat16"
    assert all(p.dtype == torch.bfloat16 and p.isfinite().all() for p in model.parameters())
    assert torch.bfloat16 not in {v.dtype for s in optimizer.state.values() for v in s.values()}


def test_schedule_by_name(runs, folder, tmp_path):
    """Rates are the schedule's at 1..T of T + 1, with the warm-up of the arguments; a resumed run has the same."""

    def made():
        trainer = runs.trainer(runs.load(folder), tmp_path, "adamw", warmup_steps=2)
        hf.use_schedule(trainer, "wsd", decay_steps=2, decay="linear")
        return trainer

    done = made()
    done.train()
    rates = [entry["learning_rate"] for entry in done.state.log_history if "learning_rate" in entry]
    factor = schedule("wsd", total_steps=5, warmup_steps=2, decay_steps=2, decay="linear")
    assert rates == pytest.approx([1e-2 * factor(k + 1) for k in range(4)])
    assert len(set(rates)) > 1
    whole = digests(tmp_path / "checkpoint-4")
    made().train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert digests(tmp_path / "checkpoint-4") == whole


def test_schedules_are_refused_at_once(runs, folder, tmp_path):
    made = runs.trainer(runs.load(folder), tmp_path, "adamw")
    with pytest.raises(ValueError, match="did you mean 'cosine'"):
        hf.use_schedule(made, "cosin")
    with pytest.raises(TypeError, match="no option 'decay_step'"):
        hf.use_schedule(made, "wsd", decay_step=3)
    made.create_optimizer_and_scheduler(4)
    with pytest.raises(RuntimeError, match="before train"):
        hf.use_schedule(made, "wsd")


def test_block_ratios_and_all_decay(runs, folder, tmp_path):
    hyper = {"block_ratios": "paper", "decay_all": True, "lr": 2e-3, "betas": (0.9, 0.95)}
    ours = runs.trainer(runs.load(folder), tmp_path, "adamw", hyper=hyper).create_optimizer()
    assert {g["block"]: g["lr"] for g in ours.param_groups} == pytest.approx(
        {"embedding": 2e-2, "qk": 1.6e-2, "vo": 8e-3, "ffn": 1.2e-2, "norm": 2e-3}
    )
    assert {g["weight_decay"] for g in ours.param_groups} == {0.1}
    assert {g["rule"].betas for g in ours.param_groups} == {(0.9, 0.95)}


def test_frozen_parameters_are_left_out(runs, folder, tmp_path):
    model = runs.load(folder)
    model.model.embed_tokens.weight.requires_grad_(False)
    done = runs.trainer(model, tmp_path, "adamw")
    before = model.model.embed_tokens.weight.detach().clone()
    done.train()
    assert torch.equal(model.model.embed_tokens.weight, before)
    names = {n for g in done.optimizer.param_groups for n in g["param_names"]}
    assert names == {n for n, _ in model.named_parameters()} - {"model.embed_tokens.weight"}


# ------------------------------------------------------------------------------------------------------- arguments


class Arguments:
    """What `resolve` reads of a TrainingArguments."""

    learning_rate, weight_decay, adam_beta1, adam_beta2, adam_epsilon, optim_args = 3e-4, 0.1, 0.9, 0.999, 1e-8, None

    def __init__(self, **changes):
        vars(self).update(changes)


def test_what_is_taken_from_the_arguments():
    assert hf.resolve("lion", Arguments())[1] == {"lr": 3e-4, "weight_decay": 0.1}, "Lion keeps betas of its own"
    assert hf.resolve("adamw", Arguments(adam_beta2=0.95, adam_epsilon=1e-6), weight_decay=0.0)[1] == {
        "lr": 3e-4, "weight_decay": 0.0, "betas": (0.9, 0.95), "eps": 1e-6
    }  # fmt: skip
    assert hf.resolve("sgd", lr=0.1, momentum=0.9)[1] == {"lr": 0.1, "momentum": 0.9}
    with pytest.warns(UserWarning, match=r"sgd does not use adam_beta1 and adam_beta2 \(\(0.9, 0.95\)\)"):
        hf.resolve("sgd", Arguments(adam_beta2=0.95))
    with pytest.warns(UserWarning, match="does not refresh the curvature that sophia_g reads"):
        hf.resolve("sophia_g", Arguments())
    with pytest.warns(UserWarning, match="optim_args='a=b' is not used"):
        hf.resolve("sgd", Arguments(optim_args="a=b"))


@pytest.mark.parametrize(
    ("error", "part", "call"),
    [
        (ValueError, "did you mean 'adamw'", lambda: hf.resolve("adamww", lr=0.1)),
        (TypeError, "no learning rate", lambda: hf.resolve("adamw")),
        (TypeError, "no setting 'beta'; did you mean 'betas'", lambda: hf.resolve("adamw", lr=0.1, beta=0.9)),
        (ValueError, "betas", lambda: hf.resolve("adamw", lr=0.1, betas=(0.9, 1.5))),
        (ValueError, "'papers'", lambda: hf.resolve("adamw", lr=0.1, block_ratios="papers")),
    ],
)
def test_refusals_come_before_training(error, part, call):
    with pytest.raises(error, match=part):
        call()


def test_transformers_is_not_imported():
    code = "import sys; from optim import hf; hf.resolve('adamw', lr=1.0); print('transformers' in sys.modules)"
    process = spawn(code)
    assert process.communicate(timeout=120)[0].strip() == "False"


# ------------------------------------------------------------------------------------------------ several processes


def together(folder, out, kind, names):
    """Two processes, gloo."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    code = "import sys; from tests.optim.hf_training import main; main(*sys.argv[1:])"
    processes = [
        spawn(code, folder, out, kind, ",".join(names), RANK=str(i), LOCAL_RANK=str(i), **shared) for i in range(2)
    ]
    try:
        for process in processes:
            _, errors = process.communicate(timeout=300)
            assert process.returncode == 0, errors[-4000:]
    finally:
        for process in processes:
            process.kill()


@pytest.mark.slow
@pytest.mark.distributed
def test_two_processes_are_one_for_every_optimizer(runs, folder, tmp_path, monkeypatch):
    """DDP and FSDP2 on half of the rows each, against one process with all; or a refusal that speaks of shards."""
    monkeypatch.setenv("OPTIM_BACKEND", "torch")
    found = processes.run(runs.families, 2, tmp_path, str(folder), NAMES)
    stepped = 0
    for (name, kind), mine in found[0].items():
        if isinstance(mine, str):
            assert kind == "fsdp2" and "shard" in mine and "parameter" in mine, (name, mine)
            continue
        alone = runs.load(folder, torch.float64)
        runs.stepped(alone, name)
        for n, p in alone.named_parameters():
            assert torch.equal(mine[n], found[1][name, kind][n]), (name, kind, n)
            torch.testing.assert_close(
                mine[n], p.detach(), rtol=1e-5, atol=1e-5, msg=lambda m, at=(name, kind, n): f"{at}\n{m}"
            )
        stepped += 1
    refused = sorted(name for (name, _), mine in found[0].items() if isinstance(mine, str))
    assert stepped == 2 * len(NAMES) - len(refused), refused


MANY = ("adamw", "muon", "adam_mini", "adamp")


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_two_processes_are_one(runs, folder, tmp_path, kind):
    """Two processes with two rows each are one with four, also for rules that look at whole matrices; and FSDP2
    continues from its sharded checkpoint to the bit.
    """
    together(folder, tmp_path, kind, MANY)
    for name in MANY:
        single = runs.trainer(runs.load(folder), tmp_path / f"single-{name}", name, hyper=runs.EXACT.get(name))
        single.train()
        ranks = [torch.load(tmp_path / f"{kind}-{name}-whole-{r}.pt", weights_only=True) for r in range(2)]
        for n, p in single.model.named_parameters():
            assert torch.equal(ranks[0][n], ranks[1][n]), (name, n)
            torch.testing.assert_close(
                ranks[0][n], p.detach(), rtol=1e-4, atol=2e-4, msg=lambda m, at=(name, n): f"{at}\n{m}"
            )
        if kind == "fsdp2":
            resumed = torch.load(tmp_path / f"{kind}-{name}-resumed-0.pt", weights_only=True)
            assert all(torch.equal(resumed[n], ranks[0][n]) for n in resumed), name
            seen = json.loads((tmp_path / f"{kind}-{name}-whole-0.json").read_text())
            assert "DTensor" in seen["types"], "the state is sharded like its parameter"


@pytest.mark.parametrize(
    "name, hyper",
    [
        ("adam_mini", {"blocks": 64}),
        ("adamw", {"block_ratios": {"qk": 8.0, "vo": 4.0}}),  # adapters on the attention alone
        ("muon", {"block_ratios": "paper"}),
    ],
)
def test_settings_that_suit_some_model_are_not_refused_before_there_is_one(name: str, hyper: dict[str, object]) -> None:
    hf.resolve(name, lr=1e-3, **hyper)


def test_ratios_of_blocks_that_do_not_exist_are_refused_at_once() -> None:
    with pytest.raises(ValueError, match="no ratio; known: qq"):
        hf.resolve("adamw", lr=1e-3, block_ratios={"qq": 8.0})
