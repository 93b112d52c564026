"""State dicts of `torch.optim` that load here, ours that load there, and every rule's own over 16-bit parameters."""

import copy
import io

import pytest
import torch
from torch.nn import Parameter

from optim import OPTIMIZERS, SGD, AdamP, AdamW, Lion, Muon, NAdam, UpdateMap, create, to_torch_state
from tests.optim.harness import assert_close, assert_same, named, parameters, randn, set_grads

SHAPES = [(4, 3), (6, 2)]


def through_file(saved):
    buffer = io.BytesIO()
    torch.save(saved, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def muon(params, **settings):
    return Muon([(f"layers.{i}.weight", p) for i, p in enumerate(params)], 0.02, 0.1, ns_dtype="bfloat16", **settings)


PAIRS = {
    "adamw": (lambda p: AdamW(p, 0.01), lambda p: torch.optim.AdamW(p, 0.01)),
    "adamw fused": (lambda p: AdamW(p, 0.01), lambda p: torch.optim.AdamW(p, 0.01, fused=True)),
    "adamw foreach": (lambda p: AdamW(p, 0.01), lambda p: torch.optim.AdamW(p, 0.01, foreach=True)),
    "adamw named": (lambda p: AdamW(named(p), 0.01), lambda p: torch.optim.AdamW(named(p), 0.01)),
    "adamw amsgrad": (lambda p: AdamW(p, 0.01, amsgrad=True), lambda p: torch.optim.AdamW(p, 0.01, amsgrad=True)),
    "adam": (lambda p: AdamW(p, 0.01, weight_decay=0.0), lambda p: torch.optim.Adam(p, 0.01)),
    "sgd": (lambda p: SGD(p, 0.1), lambda p: torch.optim.SGD(p, 0.1)),
    "sgd decay": (lambda p: SGD(p, 0.1, weight_decay=0.1), lambda p: torch.optim.SGD(p, 0.1, weight_decay=0.1)),
    "sgd momentum": (lambda p: SGD(p, 0.1, 0.9, dampening=0.5), lambda p: torch.optim.SGD(p, 0.1, 0.9, dampening=0.5)),
    "sgd nesterov": (lambda p: SGD(p, 0.1, 0.9, nesterov=True), lambda p: torch.optim.SGD(p, 0.1, 0.9, nesterov=True)),
    "sgd l2": (
        lambda p: SGD(p, 0.1, 0.9, l2=0.1),
        lambda p: torch.optim.SGD(p, 0.1, 0.9, weight_decay=0.1),
    ),
    "nadam": (lambda p: NAdam(p, 0.01), lambda p: torch.optim.NAdam(p, 0.01)),
    "nadam l2": (lambda p: NAdam(p, 0.01, l2=0.1), lambda p: torch.optim.NAdam(p, 0.01, weight_decay=0.1)),
    "nadam decay": (
        lambda p: NAdam(p, 0.01, weight_decay=0.1),
        lambda p: torch.optim.NAdam(p, 0.01, weight_decay=0.1, decoupled_weight_decay=True),
    ),
    "muon": (lambda p: muon(p, convention="torch"), lambda p: torch.optim.Muon(p, 0.02)),
    "muon moonlight": (lambda p: muon(p), lambda p: torch.optim.Muon(p, 0.02, adjust_lr_fn="match_rms_adamw")),
    "muon plain": (
        lambda p: muon(p, nesterov=False, momentum=0.8),
        lambda p: torch.optim.Muon(p, 0.02, nesterov=False, momentum=0.8, adjust_lr_fn="match_rms_adamw"),
    ),
}


def factor(name):
    return 1e3 if name.startswith("muon") else 1  # products in bfloat16, in other orders


@pytest.mark.parametrize("name", sorted(PAIRS))
@pytest.mark.parametrize("direction", ["from torch", "to torch", "there and back"])
def test_a_run_goes_on_in_the_other_library(name, direction):
    ours, theirs = PAIRS[name]
    made = {"from torch": (theirs, ours), "to torch": (ours, theirs), "there and back": (ours, ours)}[direction]
    params, twins = parameters(SHAPES, torch.float32), parameters(SHAPES, torch.float32)
    whole, first = made[0](params), made[0](twins)
    for t in range(3):
        for some, optimizer in ((params, whole), (twins, first)):
            set_grads(some, t + 1)
            optimizer.step()
    if direction == "from torch":
        saved = through_file(first.state_dict())
    else:
        saved = to_torch_state(first if direction == "to torch" else through_file(first.state_dict()))
    before = copy.deepcopy(saved)
    second = made[1](twins)
    second.load_state_dict(saved)
    assert before["param_groups"] == saved["param_groups"] and before["state"].keys() == saved["state"].keys()
    for t in range(3, 6):
        for some, optimizer in ((params, whole), (twins, second)):
            set_grads(some, t + 1)
            optimizer.step()
    assert_close(params, twins, torch.float32, name, factor(name))
    if direction == "from torch":
        keys = dict(second.param_groups[0])
        assert set(keys) <= {"params", "param_names", "rule", "lr", "weight_decay"}


def test_learning_rates_and_what_schedulers_need_go_along():
    params = parameters(SHAPES)
    optimizer = AdamW([{"params": params[:1], "lr": 0.5, "betas": (0.8, 0.9)}, {"params": params[1:]}], 0.01)
    torch.optim.lr_scheduler.StepLR(optimizer, 1)
    set_grads(params, 1)
    optimizer.step()
    other = torch.optim.AdamW([{"params": params[:1]}, {"params": params[1:]}], 0.3)
    other.load_state_dict(to_torch_state(optimizer))
    first, second = other.param_groups
    assert (first["lr"], first["initial_lr"], first["betas"], first["weight_decay"]) == (0.5, 0.5, (0.8, 0.9), 0.01)
    assert (second["lr"], second["betas"]) == (0.01, (0.9, 0.999))
    assert not {"rule", "changed"} & set(first)


def test_muon_with_other_tensors_is_two_optimizers_in_torch():
    params = parameters([(4, 3), (5,), (3, 3)], torch.float32)
    names = ["layers.0.weight", "layers.0.bias", "layers.1.weight"]
    moonlight = Muon(list(zip(names, params, strict=True)), 0.02)
    with pytest.raises(ValueError, match="eps_before_correction = True"):
        to_torch_state(moonlight, rule="adamw")
    optimizer = Muon(list(zip(names, params, strict=True)), 0.02, adamw_eps_before_correction=False)
    set_grads(params, 1)
    optimizer.step()
    with pytest.raises(ValueError, match="adamw, muon.*rule='muon'"):
        to_torch_state(optimizer)
    with pytest.raises(ValueError, match="no param group runs 'sgd'"):
        to_torch_state(optimizer, rule="sgd")
    for rule, cls, some in (("muon", torch.optim.Muon, params[::2]), ("adamw", torch.optim.AdamW, params[1:2])):
        other = cls(some)
        other.load_state_dict(to_torch_state(optimizer, rule=rule))
        key, scale = ("momentum_buffer", 0.05) if rule == "muon" else ("exp_avg", 1)
        for p in some:
            torch.testing.assert_close(other.state[p][key], scale * optimizer.state[p][key])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: AdamW(p, eps_root=1e-8), "AdamW.*eps_root = 1e-08"),
        (lambda p: AdamW(p, bias_correction=False), "bias_correction = False"),
        (lambda p: AdamW(p, stochastic_rounding=True), "stochastic_rounding = True"),
        (lambda p: SGD(p, 0.1, 0.9, weight_decay=0.1), "decoupled"),
        (lambda p: NAdam(p, 0.1, weight_decay=0.1, l2=0.1), "not both"),
        (lambda p: Lion(p), "no counterpart of 'lion'"),
        (lambda p: create("adamw_8bit", named(p), lr=0.1), "no counterpart of 'adamw_8bit'"),
        (lambda p: muon(p, convention="dion", adamw_lr=0.1), "scale 'spectral_norm'"),
        (lambda p: muon(p, ns_coefficients="polar_express"), "polar_express"),
        (lambda p: muon(p, cautious_decay=True), "cautious_decay = True"),
    ],
)
def test_what_torch_does_not_have_is_refused_by_name(make, message):
    with pytest.raises(ValueError, match=f"to_torch_state: .*{message}"):
        to_torch_state(make(parameters(SHAPES)))


@pytest.mark.parametrize(("theirs", "ours", "message"), [
    (lambda p: torch.optim.AdamW(p, amsgrad=True), AdamW, "amsgrad is False here and True there"),
    (lambda p: torch.optim.Adam(p, amsgrad=True), lambda p: create("adamw_8bit", named(p), lr=0.1),
     "AdamW.*runs 'adamw_8bit'"),
    (torch.optim.AdamW, AdamP, "torch.optim's AdamW.*'adamp'"),
    (torch.optim.RAdam, AdamW, "betas.*'adamw'"),
    (torch.optim.Adamax, AdamW, "betas.*'adamw'"),
    (torch.optim.NAdam, AdamW, "NAdam.*'adamw'"),
    (torch.optim.AdamW, NAdam, "AdamW.*'nadam'"),
    (lambda p: torch.optim.Adam(p, weight_decay=0.1), AdamW, "to the gradient"),
    (lambda p: torch.optim.AdamW(p, maximize=True), AdamW, "maximize=True"),
    (lambda p: torch.optim.SGD(p, momentum=0.9, weight_decay=0.1), lambda p: SGD(p, momentum=0.9), "l2 is 0.0 here"),
    (lambda p: torch.optim.SGD(p, momentum=0.9), lambda p: SGD(p, momentum=0.8), "momentum is 0.8 here and 0.9 there"),
    (torch.optim.Muon, muon, "scale is 'match_rms_adamw' here and 'original' there"),
    (lambda p: torch.optim.Muon(p, adjust_lr_fn="match_rms_adamw", ns_coefficients=(3.0, -3.2, 1.2)), muon,
     "ns_coefficients"),
    (lambda p: torch.optim.Muon(p, adjust_lr_fn="match_rms_adamw", ns_steps=3), muon, "ns_steps is 5 here and 3 there"),
    (torch.optim.SGD, AdamW, "SGD.*'adamw'"),
])  # fmt: skip
def test_what_does_not_go_on_here_is_refused_by_name(theirs, ours, message):
    params = parameters(SHAPES)
    optimizer = theirs(params)
    set_grads(params, 1)
    optimizer.step()
    with pytest.raises(ValueError, match=message):
        ours(parameters(SHAPES)).load_state_dict(optimizer.state_dict())


@pytest.mark.parametrize("count", [3, 3.0, torch.tensor(3.0), torch.tensor(3), torch.tensor([3.0])], ids=str)
def test_step_counts_of_any_kind(count):
    """Old versions of torch saved plain numbers, capturable ones tensors of their own."""
    params, twins = parameters(SHAPES), parameters(SHAPES)
    optimizer, other = torch.optim.AdamW(params, 0.01), AdamW(twins, 0.01)
    for t in range(3):
        set_grads(params, t)
        optimizer.step()
    saved = optimizer.state_dict()
    for state in saved["state"].values():
        state["step"] = count
    other.load_state_dict(saved)
    state = other.state[twins[0]]
    assert state["step"].shape == () and state["step"].dtype == torch.float32 and float(state["step"]) == 3


def test_a_map_of_what_torch_wrote():
    """Directions of a saved run of torch's SGD, NAdam and Muon, as of its AdamW."""
    for name in ("sgd momentum", "nadam l2", "muon", "muon moonlight", "adamw"):
        ours, theirs = PAIRS[name]
        params = parameters(SHAPES, torch.float32)
        optimizer = theirs(params)
        for t in range(3):
            set_grads(params, t + 1)
            optimizer.step()
        at = dict(zip(("a", "b"), params, strict=True))
        grads = {n: randn(tuple(p.shape), i, torch.float32) for i, (n, p) in enumerate(at.items())}
        saved = UpdateMap.from_state_dict(optimizer.state_dict(), at)
        loaded = ours(params)
        loaded.load_state_dict(optimizer.state_dict())
        wanted = [
            loaded.param_groups[0]["rule"].update(g, loaded.state[p], p)[0]
            for g, p in zip(grads.values(), params, strict=True)
        ]
        assert_close(saved(grads).values(), wanted, torch.float32, name, 20 * factor(name))


HYPER = {
    "adam_mini": {"blocks": "tensor"},
    "galore": {"rank": 8},
    "fira": {"rank": 8},
    "apollo": {"rank": 8},
    "sgd": {"momentum": 0.9},
    "sgdp": {"momentum": 0.9},
    "scale": {"momentum": 0.9},
}


@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_a_loaded_state_goes_on_to_the_bit(name, dtype):
    """torch's own loading would round moments to the parameter's dtype, and step counts above 256 with them."""
    shapes = {
        "model.layers.0.mlp.up_proj.weight": (96, 64),
        "model.layers.0.mlp.down_proj.weight": (64, 96),
        "model.norm.weight": (64,),
    }

    def made(seed):
        params = [(n, Parameter(randn(shape, seed + i, dtype))) for i, (n, shape) in enumerate(shapes.items())]
        return params, create(name, params, lr=1e-2, weight_decay=0.1, **HYPER.get(name, {}))

    def go(params, optimizer, times):
        for t in times:
            set_grads([p for _, p in params], t + 1, 1e-3)
            optimizer.step()

    whole, half, again = made(0), made(0), made(5)
    go(*whole, range(6))
    go(*half, range(3))
    for _, p in half[0]:  # a long run
        half[1].state[p]["step"] += 1000
    saved = through_file(half[1].state_dict())
    again[1].load_state_dict(saved)
    for (_, p), (_, q) in zip(again[0], half[0], strict=True):
        assert float(again[1].state[p]["step"]) == 1003
        p.data.copy_(q.data)
        again[1].state[p]["step"] -= 1000
        assert {k: v.dtype for k, v in again[1].state[p].items()} == {k: v.dtype for k, v in half[1].state[q].items()}
    go(*again, range(3, 6))
    assert_same([p for _, p in whole[0]], [p for _, p in again[0]], name)
