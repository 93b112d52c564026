"""`UpdateMap` from states that others wrote: torch's AdamW, positional, named and FSDP-style keys, several groups."""

import copy

import pytest
import torch

from optim import AdamW, AdamWRule, SGDRule, UpdateMap, create
from tests.optim.harness import randn, set_grads


def trained(named: bool, cls=torch.optim.AdamW, dtype=torch.float32, **settings):
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.LayerNorm(4), torch.nn.Linear(4, 2)).to(dtype)
    pairs = list(model.named_parameters())
    decay = [(n, p) for n, p in pairs if p.ndim > 1]
    rest = [(n, p) for n, p in pairs if p.ndim <= 1]
    groups = [{"params": g if named else [p for _, p in g], "weight_decay": d} for g, d in ((decay, 0.1), (rest, 0.0))]
    optimizer = cls(groups, lr=0.01, betas=(0.8, 0.95), eps=1e-6, **settings)
    for t in range(3):
        set_grads([p for _, p in pairs], t + 1)
        optimizer.step()
    return dict(decay + rest), optimizer


def directions_by_hand(params, optimizer, grads):
    """What torch's AdamW would do, found by letting it step."""
    before = {n: p.detach().clone() for n, p in params.items()}
    for n, p in params.items():
        p.grad = grads[n]
    for group in optimizer.param_groups:
        group["lr"], group["weight_decay"] = 1.0, 0.0
    optimizer.step()
    return {n: before[n] - p.detach() for n, p in params.items()}


@pytest.mark.parametrize("form", ["named", "positional", "keys", "wrapped"])
def test_from_torch_adamw(form):
    params, optimizer = trained(named=form in ("named", "wrapped"))
    saved = copy.deepcopy(optimizer.state_dict())
    if form == "keys":  # FSDP's full state dict: parameter names as keys
        names = list(params)
        saved["state"] = {names[k]: v for k, v in saved["state"].items()}
        for group in saved["param_groups"]:
            group["params"] = [names[k] for k in group["params"]]
    if form == "wrapped":
        for group in saved["param_groups"]:
            group["param_names"] = ["module._orig_mod." + n for n in group["param_names"]]
    given = dict(sorted(params.items())) if form != "positional" else params  # names do not need the order
    update_map = UpdateMap.from_state_dict(saved, given)
    assert set(update_map.rules.values()) == {AdamWRule(betas=(0.8, 0.95), eps=1e-6)}
    grads = {n: randn(tuple(p.shape), i, torch.float32) for i, (n, p) in enumerate(params.items())}
    got = update_map(grads)
    for name, want in directions_by_hand(params, optimizer, grads).items():
        torch.testing.assert_close(got[name], want, rtol=1e-4, atol=1e-5)


def test_of_a_torch_optimizer():
    params, optimizer = trained(named=True)
    update_map = UpdateMap.of(optimizer)
    grads = {n: torch.ones_like(p) for n, p in params.items()}
    for name, want in directions_by_hand(params, optimizer, grads).items():
        torch.testing.assert_close(update_map(grads)[name], want, rtol=1e-4, atol=1e-5)


def test_other_rules_read_the_same_state():
    params, optimizer = trained(named=True, cls=AdamW)
    less = AdamWRule(eps=0.0, eps_root=1e-8, bias_correction=False)
    grads = {n: randn(tuple(p.shape), 1, torch.float32) for n, p in params.items()}
    for source in (
        UpdateMap.of(optimizer, rules=less),
        UpdateMap.from_state_dict(optimizer.state_dict(), params, rules=dict.fromkeys(params, less)),
    ):
        for name, p in params.items():
            state = optimizer.state[p]
            m = 0.9 * state["exp_avg"] + 0.1 * grads[name]
            v = 0.999 * state["exp_avg_sq"] + 0.001 * grads[name] ** 2
            torch.testing.assert_close(source(grads)[name], m / (v + 1e-8).sqrt())
    plain = UpdateMap.of(optimizer, rules=SGDRule())
    assert all(torch.equal(plain(grads)[n], grads[n]) for n in params)
    with pytest.raises(ValueError, match="momentum_buffer"):
        UpdateMap.of(optimizer, rules=SGDRule(momentum=0.9))


def test_parameters_without_a_step_have_a_fresh_state():
    p, q = torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(2))
    optimizer = AdamW([("p", p), ("q", q)])
    p.grad = torch.ones(3)
    optimizer.step()
    update_map = UpdateMap.of(optimizer)
    assert float(update_map.states["p"]["step"]) == 1 and float(update_map.states["q"]["step"]) == 0
    torch.testing.assert_close(update_map({"q": torch.tensor([2.0, -3.0])})["q"], torch.tensor([1.0, -1.0]))


def test_torch_moments_in_bfloat16_are_widened():
    params, optimizer = trained(named=True, dtype=torch.bfloat16)
    update_map = UpdateMap.from_state_dict(optimizer.state_dict(), params)
    assert {v.dtype for s in update_map.states.values() for v in s.values()} == {torch.float32}


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda saved, params: params.pop("0.bias"), "has 6 parameters, but 5"),
        (lambda saved, params: params.update({"x": params.pop("0.bias")}), "'0.bias', which was not given"),
        (lambda saved, params: saved["state"][0].pop("exp_avg"), "exp_avg"),
        (lambda saved, params: params.update({"0.weight": torch.zeros(4, 4)}), "'0.weight'.*shape"),
        (lambda saved, params: [g.pop("amsgrad") for g in saved["param_groups"]], "cannot determine"),
        (
            lambda saved, params: [g.update(decoupled_weight_decay=False) for g in saved["param_groups"]],
            "cannot determine",
        ),
        (lambda saved, params: [g.update(rule={"name": "adamv"}) for g in saved["param_groups"]], "did you mean"),
    ],
)
def test_refusals(spoil, message):
    params, optimizer = trained(named=True)
    saved = copy.deepcopy(optimizer.state_dict())
    spoil(saved, params)
    with pytest.raises(ValueError, match=message):
        UpdateMap.from_state_dict(saved, params)


@pytest.mark.parametrize("amsgrad", [False, True])
def test_our_adamw_goes_on_from_torchs(amsgrad):
    params, optimizer = trained(named=True, amsgrad=amsgrad)
    twin = {n: torch.nn.Parameter(p.detach().clone()) for n, p in params.items()}
    ours = create("adamw", twin.items(), lr=1.0, betas=(0.8, 0.95), eps=1e-6, amsgrad=amsgrad)
    with pytest.raises(ValueError, match="different number of parameter groups"):
        ours.load_state_dict(optimizer.state_dict())
    names = [g["param_names"] for g in optimizer.param_groups]
    groups = [{"params": [(n, twin[n]) for n in group]} for group in names]
    ours = AdamW(groups, betas=(0.8, 0.95), eps=1e-6, amsgrad=amsgrad)
    ours.load_state_dict(optimizer.state_dict())
    assert [g["weight_decay"] for g in ours.param_groups] == [0.1, 0.0] and ours.param_groups[0]["lr"] == 0.01
    assert not {"betas", "eps", "fused", "maximize"} & set(ours.param_groups[0])
    for t in range(10, 20):
        for own, opt in ((params, optimizer), (twin, ours)):
            set_grads(own.values(), t)
            opt.step()
    for name in params:
        torch.testing.assert_close(twin[name], params[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("settings", "message"), [({"betas": (0.9, 0.95)}, "betas"), ({"eps": 1e-8}, "eps"), ({"amsgrad": True}, "amsgrad")]
)
def test_torchs_settings_are_compared(settings, message):
    params, optimizer = trained(named=True)
    names = [g["param_names"] for g in optimizer.param_groups]
    here = {"betas": (0.8, 0.95), "eps": 1e-6} | settings
    ours = AdamW([{"params": [(n, params[n]) for n in group]} for group in names], **here)
    with pytest.raises(ValueError, match=message):
        ours.load_state_dict(optimizer.state_dict())
    maximised = copy.deepcopy(optimizer.state_dict())
    maximised["param_groups"][0]["maximize"] = True
    with pytest.raises(ValueError, match="maximize"):
        ours.load_state_dict(maximised)
