"""Settings of a rule as keys of its param group: written by hand or by a scheduler, they hold from the next step on."""

import copy
import io
import math
import pickle

import numpy as np
import pytest
import torch
from torch.nn import Parameter
from torch.optim.lr_scheduler import CyclicLR, OneCycleLR

from optim import (
    OPTIMIZERS,
    RULES,
    SGD,
    AdamW,
    AdamW8bit,
    AdamWRule,
    Muon,
    NAdam,
    Optimizer,
    SGDRule,
    UpdateMap,
    UpdateRule,
    create,
    divide_groups,
    group_table,
)
from optim.cpu_jit import cache, kernel
from tests.optim.harness import assert_close, assert_same, named, parameters, set_grads, states
from tests.optim.specs import SPECS

SHAPES = [(4, 3), (5,), (2, 3)]


def pair(ours, theirs, dtype=torch.float64, shapes=SHAPES):
    a, b = parameters(shapes, dtype), parameters(shapes, dtype)
    return (a, ours(a)), (b, theirs(b))


def step(*runs, seed):
    for params, optimizer in runs:
        set_grads(params, seed)
        optimizer.step()


@pytest.mark.parametrize("backend", ["auto", "torch"])
@pytest.mark.parametrize(
    ("ours", "theirs", "key", "value"),
    [
        (lambda p: AdamW(p, 0.01), lambda p: torch.optim.AdamW(p, 0.01), "betas", lambda t: (0.8 + 0.02 * t, 0.99)),
        (lambda p: AdamW(p, 0.01), lambda p: torch.optim.AdamW(p, 0.01), "eps", lambda t: 10.0 ** (t - 8)),
        (lambda p: SGD(p, 0.01, 0.9), lambda p: torch.optim.SGD(p, 0.01, 0.9), "momentum", lambda t: 0.5 + 0.05 * t),
        (lambda p: SGD(p, 0.01, 0.9), lambda p: torch.optim.SGD(p, 0.01, 0.9), "nesterov", lambda t: t > 3),
        (lambda p: SGD(p, 0.01), lambda p: torch.optim.SGD(p, 0.01), "momentum", lambda t: 0.1 * t),
        (lambda p: NAdam(p, 0.01), lambda p: torch.optim.NAdam(p, 0.01), "momentum_decay", lambda t: 4e-3 * (t + 1)),
    ],
    ids=["adamw betas", "adamw eps", "sgd momentum", "sgd nesterov", "sgd momentum from 0", "nadam momentum_decay"],
)
def test_writing_a_setting_is_what_it_is_in_torch(monkeypatch, backend, ours, theirs, key, value):
    monkeypatch.setenv("OPTIM_BACKEND", backend)
    dtype = torch.float32 if key == "momentum_decay" else torch.float64  # torch keeps NAdam's product in float32
    runs = pair(ours, theirs, dtype)
    for t in range(7):
        for _, optimizer in runs:
            for group in optimizer.param_groups:
                group[key] = value(t)
        step(*runs, seed=t + 1)
    assert_close(runs[0][0], runs[1][0], dtype)


@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_momentum_warm_up_of_muon_is_a_rule_a_step(monkeypatch, backend):
    """The usual warm-up, 0.85 to 0.95; judged by optimizers that were built with each momentum and given the state."""
    monkeypatch.setenv("OPTIM_BACKEND", backend)
    shapes = [(6, 4), (4, 6)]
    params, twins = parameters(shapes, torch.float32), parameters(shapes, torch.float32)
    optimizer = Muon([(f"layers.{i}.w", p) for i, p in enumerate(params)], 0.02)
    state = None
    for t in range(5):
        momentum = 0.85 + 0.02 * t
        for group in optimizer.param_groups:
            group["momentum"] = momentum
        other = Muon([(f"layers.{i}.w", p) for i, p in enumerate(twins)], 0.02, momentum=momentum)
        if state is not None:
            other.state.update(state)
        step((params, optimizer), (twins, other), seed=t + 1)
        state = other.state
        assert_same(params, twins)
        assert optimizer.param_groups[0]["momentum"] == momentum == optimizer.param_groups[0]["rule"].momentum


@pytest.mark.parametrize("name", sorted(SPECS))
def test_every_number_of_every_rule_takes_effect(monkeypatch, name):
    """Compiled or not, a step after a change is the step of a rule that was built with the new value."""
    spec = SPECS[name]
    rule = spec.rule(spec.default)
    numbers = {k for k in rule.settings() if isinstance(rule.setting(k), float) and 0 < rule.setting(k) < 1}
    numbers -= set(rule.state_settings())  # these are refused, see below
    for key in sorted(numbers | ({"betas"} & rule.settings())):
        old = rule.setting(key)
        new = tuple(0.97 * b for b in old) if key == "betas" else 0.97 * old
        try:
            want = rule.with_settings(**{key: new})
        except ValueError:
            continue
        moved = []
        for backend, change in (("auto", True), ("auto", False), ("torch", False)):
            monkeypatch.setenv("OPTIM_BACKEND", backend)
            params = parameters(spec.shapes, torch.float32)
            optimizer = Optimizer(params, rule, lr=0.01)
            set_grads(params, 1)
            optimizer.step()
            if change:
                optimizer.param_groups[0][key] = new
            else:
                optimizer.param_groups[0]["rule"] = want
            set_grads(params, 2)
            optimizer.step()
            moved.append([p.detach().clone() for p in params])
        assert_same(moved[0], moved[1], f"{name}, {key}")
        assert_close(moved[0], moved[2], torch.float32, f"{name}, {key}", factor=20)


def test_a_change_is_not_compiled_again(monkeypatch):
    """LLVM runs once for all values of a number; 100 ms a step otherwise."""
    made = []
    machine_code = kernel._machine_code
    monkeypatch.setattr(kernel, "_machine_code", lambda text: made.append(text) or machine_code(text))
    cache.kernel_of.cache_clear()
    for rule, key in ((AdamWRule(eps=1.25e-7), "betas"), (SGDRule(momentum=0.7, dampening=0.3), "momentum")):
        params = parameters(SHAPES, torch.float32)
        optimizer = Optimizer(params, rule, lr=0.1, weight_decay=0.01)
        counts = []
        for t in range(5):
            value = 0.81 + 0.01 * t
            optimizer.param_groups[0][key] = (value, 0.99 + 1e-3 * t) if key == "betas" else value
            set_grads(params, t)
            optimizer.step()
            counts.append(len(made))
        assert len(set(counts)) == 1, counts


def test_compiled_by_torch():
    """`torch.compile` of the step sees the new value, and stops compiling after the first changes."""
    runs = pair(lambda p: SGD(p, 0.01, 0.9), lambda p: SGD(p, 0.01, 0.9))
    compiles = []

    def backend(graph, inputs):
        compiles.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(runs[0][1].step, backend=backend)
    counts = []
    for t in range(6):
        for _, optimizer in runs:
            optimizer.param_groups[0]["momentum"] = 0.6 + 0.03 * t
        for params, _ in runs:
            set_grads(params, t + 1)
        compiled()
        runs[1][1].step()
        counts.append(len(compiles))
    torch._dynamo.reset()
    assert_close(runs[0][0], runs[1][0], torch.float64)
    assert counts[-1] == counts[2], counts


def scheduled(optimizer, kind):
    if kind is OneCycleLR:
        return OneCycleLR(optimizer, max_lr=0.05, total_steps=10, base_momentum=0.8, max_momentum=0.9)
    return CyclicLR(optimizer, 0.01, 0.05, step_size_up=3, base_momentum=0.7, max_momentum=0.9)


@pytest.mark.parametrize("kind", [OneCycleLR, CyclicLR])
@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (lambda p: AdamW(p, 0.01), lambda p: torch.optim.AdamW(p, 0.01)),
        (lambda p: SGD(p, 0.01, 0.9), lambda p: torch.optim.SGD(p, 0.01, 0.9)),
        (lambda p: SGD(p, 0.01), lambda p: torch.optim.SGD(p, 0.01)),
    ],
    ids=["adamw", "sgd", "sgd without"],
)
def test_schedulers_cycle_momentum_as_in_torch(kind, ours, theirs):
    runs = pair(ours, theirs)
    schedulers = [scheduled(optimizer, kind) for _, optimizer in runs]
    for t in range(8):
        step(*runs, seed=t + 1)
        for scheduler in schedulers:
            scheduler.step()
    assert_close(runs[0][0], runs[1][0], torch.float64)
    (a,), (b,) = (optimizer.param_groups for _, optimizer in runs)
    key = "betas" if "betas" in b else "momentum"
    assert a[key] == pytest.approx(b[key]) and a["lr"] == pytest.approx(b["lr"])


def test_a_scheduler_cycles_both_kinds_of_groups_of_muon():
    """It writes `momentum` to all groups of an optimizer that has one: in AdamW's this is the first beta."""
    params = parameters([(4, 3), (5,)])
    optimizer = Muon([("layers.0.w", params[0]), ("layers.0.bias", params[1])], 0.01)
    scheduler = scheduled(optimizer, OneCycleLR)
    for t in range(3):
        set_grads(params, t)
        optimizer.step()
        scheduler.step()
    matrices, rest = optimizer.param_groups
    momentum = matrices["momentum"]
    assert 0.8 <= momentum < 0.9 and rest["betas"] == (momentum, 0.95) and rest["rule"].betas == rest["betas"]


def test_what_cannot_take_effect_is_refused_by_name():
    params = parameters([(4, 3), (5,)])
    optimizer = Muon([("layers.0.w", params[0]), ("layers.0.bias", params[1])], 0.01)
    matrices, rest = optimizer.param_groups
    for group, key, value, message in (
        (matrices, "betas", (0.9, 0.99), "'muon' has no setting 'betas'"),
        (matrices, "eps", 1e-6, "'muon' has no setting 'eps'.*ns_eps"),
        (rest, "nesterov", True, "'adamw' has no setting 'nesterov'"),
        (rest, "rho", 0.1, "'adamw' has no setting 'rho'"),
        (rest, "betas2", 0.9, "did you mean 'betas'"),
        (matrices, "momentun", 0.9, "did you mean 'momentum'"),
        (matrices, "momentum", 1.5, "momentum = 1.5"),
        (rest, "betas", (0.9,), "betas"),
        (rest, "maximize", True, "minimise the negated loss"),
        (rest, "fused", True, "fast path"),
    ):
        before = group["rule"]
        with pytest.raises(ValueError, match=message):
            group[key] = value
        assert group["rule"] is before and key not in dict(group)
    rest["momentum"] = 0.8  # may be a scheduler's, which shows when it has written the rest
    moved = [p.detach().clone() for p in params]
    set_grads(params, 1)
    with pytest.raises(ValueError, match="'adamw' has no 'momentum'"):
        optimizer.step()
    assert_same(params, moved)
    optimizer.step()  # the key is gone, and all is as before
    for key in ("momentum", "rho"):
        with pytest.raises(ValueError, match=f"'adamw' has no (setting )?'{key}'"):
            AdamW([{"params": parameters([(3,)]), key: 0.9}])


def test_other_keys_are_the_users_own():
    (group,) = AdamW([{"params": parameters([(3,)]), "layer": 3}]).param_groups
    group["initial_lr"], group["depth"], group["foreach"] = 0.1, 2, None
    assert (group["layer"], group["initial_lr"], group["depth"]) == (3, 0.1, 2) and group["betas"] == (0.9, 0.999)
    assert "eps" in group and group.get("eps") == 1e-8 and group.get("momentum", "none") == "none"
    assert "momentum" not in group and "eps" not in list(group)
    with pytest.raises(KeyError):
        group["momentum"]
    group["betas"] = [torch.tensor(0.5, dtype=torch.float64), 0.75]
    assert group["rule"].betas == (0.5, 0.75)
    group.update(eps=1e-3, betas=(0.1, 0.2))
    group |= {"amsgrad": True}
    assert group["rule"] == AdamWRule(betas=(0.1, 0.2), eps=1e-3, amsgrad=True)


def test_plain_dicts_among_the_groups_are_read_too():
    """Wrappers replace groups by dicts of their own."""
    runs = pair(lambda p: SGD(p, 0.01, 0.9), lambda p: torch.optim.SGD(p, 0.01, 0.5))
    optimizer = runs[0][1]
    optimizer.param_groups = [dict(group) | {"momentum": 0.5} for group in optimizer.param_groups]
    step(*runs, seed=1)
    step(*runs, seed=2)
    assert_close(runs[0][0], runs[1][0], torch.float64)


def test_settings_inside_a_wrapper_take_effect():
    params = parameters([(96, 64)], torch.float32)
    optimizer = AdamW8bit(params, 0.01)
    optimizer.param_groups[0]["betas"] = (0.5, 0.6)
    optimizer.param_groups[0]["stochastic"] = True
    assert optimizer.param_groups[0]["rule"].inner == AdamWRule(betas=(0.5, 0.6))
    set_grads(params, 1)
    optimizer.step()
    for key, value in (("block_size", 128), ("code", "linear"), ("min_size", 10**6), ("amsgrad", None)):
        with pytest.raises(ValueError, match=key):
            optimizer.param_groups[0][key] = value
            optimizer.step()
        optimizer.step()


def test_amsgrad_may_be_switched_on():
    """Its entry of the state begins with the second moment of the first step that has it."""
    params = parameters(SHAPES)
    optimizer = AdamW(params, 0.01)
    for t in range(4):
        optimizer.param_groups[0]["amsgrad"] = t in (1, 2)
        set_grads(params, t + 1)
        optimizer.step()
        assert ("max_exp_avg_sq" in optimizer.state[params[0]]) == (t in (1, 2))


def through_file(saved):
    buffer = io.BytesIO()
    torch.save(saved, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


@pytest.mark.parametrize("how", ["state dict", "deepcopy", "pickle"])
def test_written_settings_survive(how):
    """A run that is saved in the middle of a warm-up goes on to the bit; what was not written is still compared."""
    params = parameters([(6, 4), (4, 6), (5,)], torch.float32)
    names = ["layers.0.w", "layers.1.w", "layers.1.bias"]

    def made(tensors):
        return Muon(list(zip(names, tensors, strict=True)), 0.02, adamw_betas=(0.9, 0.99))

    optimizer = made(params)
    for t in range(3):
        optimizer.param_groups[0]["momentum"] = 0.85 + 0.01 * t
        set_grads(params, t + 1)
        optimizer.step()
    if how == "state dict":
        saved = through_file(optimizer.state_dict())
        twins = [Parameter(p.detach().clone()) for p in params]
        other = made(twins)
        other.load_state_dict(saved)
        with pytest.raises(ValueError, match="nesterov is False here and True there"):
            Muon(list(zip(names, twins, strict=True)), 0.02, nesterov=False).load_state_dict(saved)
        with pytest.raises(ValueError, match="betas is"):
            Muon(list(zip(names, twins, strict=True)), 0.02, adamw_betas=(0.8, 0.99)).load_state_dict(saved)
    else:
        twins, other = (
            copy.deepcopy((params, optimizer)) if how == "deepcopy" else pickle.loads(pickle.dumps((params, optimizer)))
        )
    assert other.param_groups[0]["momentum"] == 0.87 and other.param_groups[1]["betas"] == (0.9, 0.99)
    step((params, optimizer), (twins, other), seed=9)
    assert_same([*params, *states(optimizer)], [*twins, *states(other)])
    assert optimizer.state_dict()["param_groups"] == other.state_dict()["param_groups"]


def test_resuming_under_a_scheduler():
    """The scheduler has already written to the groups of the new optimizer when the state is loaded."""

    def made():
        params = parameters(SHAPES)
        optimizer = AdamW(params, 0.01)
        return params, optimizer, scheduled(optimizer, OneCycleLR)

    def go(params, optimizer, scheduler, times):
        for t in times:
            step((params, optimizer), seed=t + 1)
            scheduler.step()

    whole, half, again = made(), made(), made()
    go(*whole, range(6))
    go(*half, range(3))
    again[1].load_state_dict(through_file(half[1].state_dict()))
    again[2].load_state_dict(half[2].state_dict())
    for p, q in zip(again[0], half[0], strict=True):
        p.data.copy_(q.data)
    go(*again, range(3, 6))
    assert_same(whole[0], again[0])


def test_the_map_follows_what_was_written():
    params = parameters(SHAPES)
    optimizer = AdamW(named(params), 0.01)
    step((params, optimizer), seed=1)
    optimizer.param_groups[0]["betas"] = (0.5, 0.6)
    of, saved = UpdateMap.of(optimizer), UpdateMap.from_state_dict(optimizer.state_dict(), dict(named(params)))
    assert {rule.betas for rule in (*of.rules.values(), *saved.rules.values())} == {(0.5, 0.6)}
    assert "betas (0.5, 0.6)" in group_table(optimizer)


def test_divided_groups_have_settings_too():
    params = parameters([(4, 3), (5,)])
    optimizer = AdamW(named(params), 0.01)
    divide_groups(
        optimizer,
        lambda group: [
            group | {"params": group["params"][:1], "betas": (0.5, 0.6)},
            group | {"params": group["params"][1:]},
        ],
    )
    assert [group["betas"] for group in optimizer.param_groups] == [(0.5, 0.6), (0.9, 0.999)]
    assert optimizer.param_groups[0]["rule"].betas == (0.5, 0.6)


@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
def test_every_setting_reads_as_a_key(name):
    rule = RULES[name]()
    optimizer = Optimizer(parameters([(5040,)]), SGDRule(), lr=0.1)
    optimizer.param_groups[0]["rule"] = rule
    for key in rule.settings():
        assert key in optimizer.param_groups[0] and key in type(optimizer.param_groups[0])({"rule": rule})
        value = optimizer.param_groups[0][key]
        optimizer.param_groups[0][key] = value
        assert isinstance(value, UpdateRule) or optimizer.param_groups[0]["rule"] == rule


@pytest.mark.parametrize("key", ["lr", "weight_decay"])
@pytest.mark.parametrize("value", [None, "0.9", math.nan, math.inf, -1.0, True, 1j, [0.1], torch.ones(2)])
def test_a_rate_that_is_no_number_is_refused_where_it_is_written(key, value):
    """In any rule: such a rate is followed by weights that are not finite, or by training that goes uphill."""
    optimizer = AdamW(parameters([(3, 2)]), lr=0.1, weight_decay=0.0)
    with pytest.raises(ValueError, match=f"{key} .* one number|{key} = .* finite number of at least 0"):
        optimizer.param_groups[0][key] = value
    with pytest.raises(ValueError, match=key):
        optimizer.param_groups[0].update({key: value})
    assert optimizer.param_groups[0][key] == (0.1 if key == "lr" else 0.0)


@pytest.mark.parametrize("value", [0.5, np.float32(0.5), np.float64(0.5), np.array(0.5)])
def test_numbers_of_numpy_are_rates(value):
    optimizer = AdamW(parameters([(3, 2)]), lr=np.float32(0.25), weight_decay=np.float32(0.25))
    optimizer.param_groups[0]["lr"] = optimizer.param_groups[0]["weight_decay"] = value
    assert all(isinstance(optimizer.param_groups[0][key], float) for key in ("lr", "weight_decay"))


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [("adagrad", "initial_accumulator_value", 0.5), ("kron", "precond_init_scale", 2.0), ("dion", "seed", 1),
     ("prodigy", "d0", 1e-5), ("sgd_sai", "eps", 0.1)],
)  # fmt: skip
def test_what_only_the_start_reads_is_refused_afterwards(name, key, value):
    p = Parameter(torch.ones(4, 3))
    optimizer = create(name, [("layers.0.q.weight", p)], lr=0.1)
    optimizer.param_groups[0][key] = value  # before the first step it takes effect
    p.grad = torch.ones_like(p)
    optimizer.step()
    optimizer.param_groups[0][key] = optimizer.param_groups[0]["rule"].setting(key) + 1
    with pytest.raises(ValueError, match=rf"start or are stored cannot be changed after the first step \({key}"):
        optimizer.step()
