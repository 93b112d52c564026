"""Steps of bfloat16 parameters: what arrives, what is measured, and that resumed runs go on to the bit."""

import copy

import pytest
import torch

import optim
from optim import OPTIMIZERS, Arrived, create, set_rounding
from optim.curvature import CurvatureRule

NAMES = {"model.layers.0.mlp.up_proj.weight": (24, 16), "model.layers.0.input_layernorm.weight": (48,)}


def parameters(dtype, seed=0):
    g = torch.Generator().manual_seed(seed)
    values = {name: torch.randn(shape, generator=g) * 0.02 for name, shape in NAMES.items()}
    return {name: torch.nn.Parameter((value + ("norm" in name)).bfloat16().to(dtype)) for name, value in values.items()}


def stepped(optimizer, params, steps, start=0):
    for t in range(start, start + steps):
        g = torch.Generator().manual_seed(100 + t)
        for p in params.values():
            p.grad = (torch.randn(p.shape, generator=g) * 0.01).bfloat16().to(p.dtype)
        optimizer.step()


def built(name, params, how, lr):
    # Adafactor's own bound of its second moment is the resolution of the parameters' dtype, which is float32 here
    hyper = {"eps": (1e-30, 1e-3)} if name == "adafactor" else {}
    optimizer = create(name, params.items(), lr=lr, **hyper)
    if how is not None:
        set_rounding(optimizer, how)
    return optimizer


FIRST_ORDER = [name for name in OPTIMIZERS if not issubclass(type(optim.RULES[name]()), CurvatureRule)]


@pytest.mark.parametrize("name", FIRST_ORDER)
def test_small_updates_arrive_under_every_rule(name):
    """Steps of 1e-5 where neighbours are 8e-5 to 4e-3 apart, against the same steps in float32."""
    start, exact, rough = (parameters(dtype) for dtype in (torch.float32, torch.float32, torch.bfloat16))
    steps, lr = 64, 1e-5
    stepped(built(name, exact, None, lr), exact, steps)
    stepped(built(name, rough, "stochastic", lr), rough, steps)
    for part, p in exact.items():
        move, got = (q.detach() - start[part].detach() for q in (p, rough[part].float()))
        length = float(move.norm())
        if not length:
            continue
        # a step d between neighbours at a distance s has the variance d (s - d) <= d s
        apart = 2.0 ** (torch.frexp(start[part].detach().abs()).exponent - 8).float()
        noise = float((apart * move.abs() * move.square()).sum()) ** 0.5 / length + 1e-8
        assert abs(float((move * got).sum()) / length - length) < 5 * noise, part


@pytest.mark.parametrize("name", ["lion", "sgd", "muon", "adamw", "adamw_8bit", "lion_8bit", "galore"])
def test_a_resumed_run_draws_the_same(name):
    whole, first = parameters(torch.bfloat16), parameters(torch.bfloat16)
    stepped(built(name, whole, "stochastic", 1e-4), whole, 6)
    optimizer = built(name, first, "stochastic", 1e-4)
    stepped(optimizer, first, 3)
    saved = copy.deepcopy(optimizer.state_dict())
    second = {part: torch.nn.Parameter(p.detach().clone()) for part, p in first.items()}
    resumed = built(name, second, "stochastic", 1e-4)
    resumed.load_state_dict(saved)
    stepped(resumed, second, 3, start=3)
    assert all(torch.equal(whole[part], second[part]) for part in NAMES)
    other = parameters(torch.bfloat16)
    stepped(built(name, other, None, 1e-4), other, 6)
    assert not all(torch.equal(whole[part], other[part]) for part in NAMES)


@pytest.mark.parametrize("name", FIRST_ORDER)
def test_to_the_nearest_is_what_the_rule_itself_does(name):
    """Through float32 and back: the last bit may differ where a rule rounds in between."""
    plain, wide = parameters(torch.bfloat16), parameters(torch.bfloat16)
    stepped(built(name, plain, None, 1e-3), plain, 3)
    stepped(built(name, wide, "nearest", 1e-3), wide, 3)
    for part in NAMES:
        torch.testing.assert_close(plain[part], wide[part], rtol=2**-7, atol=1e-6)


def test_float32_parameters_are_not_touched():
    plain, marked = parameters(torch.float32), parameters(torch.float32)
    stepped(built("lion", plain, None, 1e-4), plain, 3)
    stepped(built("lion", marked, "stochastic", 1e-4), marked, 3)
    assert all(torch.equal(plain[part], marked[part]) for part in NAMES)


def test_what_arrived_is_measured():
    params = parameters(torch.bfloat16)
    before = {part: p.detach().clone() for part, p in params.items()}
    optimizer = built("sgd", params, "nearest", 1e-2)
    optimizer.arrived = Arrived()
    stepped(optimizer, params, 1)
    made = intended = 0.0
    for part, p in params.items():
        wanted = -1e-2 * p.grad.float()
        made += float((wanted * (p.detach().float() - before[part].float())).sum())
        intended += float(wanted.square().sum())
        if p.ndim == 1:
            assert optimizer.arrived.small == pytest.approx(
                float((wanted * (p.detach().float() - before[part].float())).sum() / wanted.square().sum()), abs=1e-6
            )
    assert optimizer.arrived.share == pytest.approx(made / intended, rel=1e-4)
    assert optimizer.arrived.share < 0.95


def test_parts_of_a_group_do_not_show(monkeypatch):
    """A part holds 256 MiB of float32 at most; random bits belong to elements, not to parts or pieces."""
    one, many = parameters(torch.bfloat16), parameters(torch.bfloat16)
    stepped(built("lion", one, "stochastic", 1e-4), one, 3)
    monkeypatch.setattr(optim.rounding, "WIDE", 1)
    monkeypatch.setattr(optim.rounding, "PIECE", 20)
    stepped(built("lion", many, "stochastic", 1e-4), many, 3)
    assert all(torch.equal(one[part], many[part]) for part in NAMES)
