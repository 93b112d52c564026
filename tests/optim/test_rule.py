"""A rule of somebody's own, which is in no table, under `Optimizer` and `UpdateMap`: the default paths."""

import copy
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

from optim import AdamW, AdamWRule, Optimizer, Quantized, UpdateMap, UpdateRule, cpu_jit, create, rule_from
from optim.moments import zero_moment, zero_step


@dataclass(frozen=True, kw_only=True)
class Optimistic(UpdateRule):
    """u = 2 g - previous g; decay pulls positive entries only; may wrap another rule, for describing itself."""

    name: ClassVar[str] = "optimistic"
    inner: UpdateRule | None = None

    def init(self, param):
        return {"step": zero_step(), "previous": zero_moment(param)}

    def update(self, grad, state, param):
        return 2 * grad - state["previous"], {"step": state["step"] + 1, "previous": grad}  # aliases the gradient

    def decay(self, direction, state, param):
        assert float(state["step"]) > 0, "the state after the update"
        return param.clamp(min=0)


def test_default_step_writes_update_back():
    p = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
    optimizer = Optimizer([("p", p)], Optimistic(), lr=0.1, weight_decay=0.5)
    p.grad = torch.tensor([1.0, 1.0])
    optimizer.step()
    torch.testing.assert_close(p.detach(), torch.tensor([1 - 0.1 * 2.5, -2 - 0.1 * 2.0]))
    buffer = optimizer.state[p]["previous"]
    optimizer.zero_grad(set_to_none=False)
    assert torch.equal(buffer, torch.ones(2)), "the state must not share memory with the gradient"
    p.grad = torch.tensor([1.0, 0.0])
    torch.testing.assert_close(UpdateMap.of(optimizer)({"p": p.grad})["p"], torch.tensor([1.0, -1.0]))
    optimizer.step()
    assert optimizer.state[p]["previous"] is buffer, "buffers keep their place"


def test_saves_and_loads_without_a_table():
    def make(rule):
        p = torch.nn.Parameter(torch.ones(2))
        p.grad = torch.ones(2)
        return Optimizer([p], rule, lr=0.1)

    optimizer = make(Optimistic(inner=AdamWRule()))
    optimizer.step()
    saved = optimizer.state_dict()
    assert saved["param_groups"][0]["rule"]["inner"]["name"] == "adamw"
    make(Optimistic(inner=AdamWRule())).load_state_dict(saved)
    with pytest.raises(ValueError, match="in inner, eps is"):
        make(Optimistic(inner=AdamWRule(eps=1e-6))).load_state_dict(saved)
    with pytest.raises(ValueError, match="inner is None here"):
        make(Optimistic()).load_state_dict(saved)
    with pytest.raises(ValueError, match="no rule is called 'optimistic'"):
        rule_from(saved["param_groups"][0]["rule"])
    with pytest.raises(TypeError, match="no setting 'beta'; did you mean 'betas'"):
        rule_from({"name": "adamw", "beta": 1})


def test_one_optimizer_steps_several_rules():
    p, q = torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(2))
    optimizer = Optimizer([{"params": [p]}, {"params": [q], "rule": AdamWRule(), "lr": 0.01}], Optimistic(), lr=0.1)
    for x in (p, q):
        x.grad = torch.ones(2)
    optimizer.step()
    torch.testing.assert_close(p.detach(), torch.full((2,), 0.8))
    torch.testing.assert_close(q.detach(), torch.full((2,), 0.99))
    assert set(optimizer.state[p]) == {"step", "previous"} and "exp_avg" in optimizer.state[q]


@pytest.mark.parametrize("saved", ["plain", "wrapped", "unnamed", "torch"])
@pytest.mark.parametrize("named", [True, False])
def test_names_stay_those_of_this_optimizer_when_a_state_is_loaded(saved, named):
    """Not those of the wrappers that it was saved with; messages, maps and the next checkpoint speak of them."""
    names = {"plain": ["w", "b"], "wrapped": ["module._orig_mod.w", "module._orig_mod.b"]}.get(saved)

    def groups(names):
        params = [torch.nn.Parameter(torch.ones(2, dtype=torch.float64)) for _ in "wb"]
        for p in params:
            p.grad = torch.ones_like(p)
        return [{"params": [entry]} for entry in (zip(names, params, strict=True) if names else params)]

    kind = torch.optim.AdamW if saved == "torch" else AdamW
    there, here = kind(groups(names), lr=0.1), AdamW(groups(["w", "b"] if named else None), lr=0.1)
    there.step()
    kept = copy.deepcopy(there.state_dict())
    here.load_state_dict(there.state_dict())
    assert there.state_dict().keys() == kept.keys() and [g.get("param_names") for g in kept["param_groups"]] == [
        g.get("param_names") for g in there.state_dict()["param_groups"]
    ]
    own = [["w"], ["b"]] if named else [[n] for n in names] if names else [None, None]  # torch's way: better than none
    assert [g.get("param_names") for g in here.param_groups] == own
    assert [g.get("param_names") for g in here.state_dict()["param_groups"]] == own
    if named:
        grads = {"w": torch.ones(2, dtype=torch.float64), "b": torch.ones(2, dtype=torch.float64)}
        assert set(UpdateMap.of(here)(grads)) == {"w", "b"}
        here.param_groups[1]["params"][0].grad = torch.ones(2, dtype=torch.float64).to_sparse()
        with pytest.raises(TypeError, match="parameter 'b' has a sparse gradient"):
            here.step()


@dataclass(frozen=True, kw_only=True)
class Counting(UpdateRule):
    """Elementwise or not, its `share` writes down whom it was called with."""

    name: ClassVar[str] = "counting"
    elementwise: ClassVar[bool] = False

    def init(self, param):
        return {"step": zero_step(), "told": zero_step(), "stepping": zero_step(), "ever": zero_step()}

    def update(self, grad, state, param):
        return grad, {**state, "step": state["step"] + 1}

    def share(self, grads, states, group):
        assert len(grads) == len(states)
        for grad, state in zip(grads, states, strict=True):
            assert grad.isfinite().all()
            state["told"] += 1
            state["stepping"].fill_(len(states))
            state["ever"].fill_(len(group))


@dataclass(frozen=True, kw_only=True)
class Elementwise(Counting):
    name: ClassVar[str] = "elementwise"
    elementwise: ClassVar[bool] = True

    def share(self, grads, states, group):
        super().share([torch.zeros(1) for _ in grads], states, group)


@pytest.mark.parametrize("rule", [Counting(), Elementwise()], ids=lambda r: r.name)
def test_share_is_told_of_those_that_step_and_of_all_that_ever_did(rule):
    """Missing gradients, not-finite ones, a step of nobody, a second group: who is about to step, and who ever was."""
    a, b, c, other = (torch.nn.Parameter(torch.ones(2)) for _ in range(4))
    optimizer = Optimizer([{"params": [("a", a), ("b", b), ("c", c)]}, {"params": [("other", other)]}], rule, lr=0.1)

    def step(*present, broken=None):
        for p in (a, b, c, other):
            p.grad = torch.ones(2) if any(p is q for q in present) else None
        if broken is not None:
            broken.grad = torch.full((2,), torch.nan)
        optimizer.step()

    def seen(p):
        state = optimizer.state[p]
        return tuple(int(state[key]) for key in ("step", "told", "stepping", "ever"))

    step(a)
    assert seen(a) == (1, 1, 1, 1) and not optimizer.state.get(b) and not optimizer.state.get(other)
    step(b, other)  # the group has two that ever stepped, of which one steps now
    assert seen(a) == (1, 1, 1, 1) and seen(b) == (1, 1, 1, 2) and seen(other) == (1, 1, 1, 1)
    step()
    assert seen(a) == (1, 1, 1, 1) and seen(b) == (1, 1, 1, 2)
    if rule.elementwise:
        step(a, broken=c)
        assert seen(a) == (2, 2, 2, 3) and seen(c) == (1, 1, 2, 3)
    else:
        with pytest.warns(RuntimeWarning, match="parameter 'c': its gradient is not finite; counting left it"):
            step(a, broken=c)
        assert seen(a) == (2, 2, 1, 2) and not optimizer.state.get(c)


@pytest.mark.parametrize("inner", [AdamWRule(), Counting()], ids=lambda r: r.name)
def test_a_quantised_rule_shares_what_its_inner_rule_shares(inner):
    rule = Quantized(inner=inner)
    assert rule.shares is inner.shares and rule.coupled is inner.coupled


def test_8_bit_moments_look_at_each_gradient_for_finiteness_once(monkeypatch):
    looked = []
    real = cpu_jit.all_finite
    monkeypatch.setattr(cpu_jit, "all_finite", lambda grads: looked.append(len(grads)) or real(grads))
    param = torch.nn.Parameter(torch.ones(128, 64))
    optimizer = create("muon_8bit", [("weight", param)], lr=0.1)
    param.grad = torch.full_like(param, torch.nan)
    with pytest.warns(RuntimeWarning, match="parameter 'weight': its gradient is not finite; muon_8bit left it"):
        optimizer.step()
    assert not looked and (param == 1).all()


def test_added_group_gets_the_default_rule():
    optimizer = Optimizer([torch.nn.Parameter(torch.ones(2))], AdamWRule(eps=1e-3), lr=0.1, weight_decay=0.2)
    optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(2))], "betas": [0.5, 0.6]})
    group = optimizer.param_groups[1]
    assert group["rule"] == AdamWRule(eps=1e-3, betas=(0.5, 0.6)) and group["weight_decay"] == 0.2


def test_parameters_may_come_from_a_generator():
    """Which is read once, also where a group is divided into several."""
    from optim import create

    def named():
        yield "layers.0.weight", torch.nn.Parameter(torch.ones(4, 3))
        yield "layers.0.bias", torch.nn.Parameter(torch.ones(4))

    for name in ("adamw", "muon"):
        optimizer = create(name, [{"params": named()}], lr=0.1)
        optimizer.add_param_group({"params": (("layers.1" + key[8:], p) for key, p in named())})
        names = sorted(key for group in optimizer.param_groups for key in group["param_names"])
        assert names == ["layers.0.bias", "layers.0.weight", "layers.1.bias", "layers.1.weight"]


def test_the_warning_of_a_gradient_that_is_not_finite_points_at_the_step():
    from optim import create

    optimizer = create("muon", [("layers.0.weight", torch.nn.Parameter(torch.ones(4, 3)))], lr=0.1)
    optimizer.param_groups[0]["params"][0].grad = torch.full((4, 3), torch.nan)
    with pytest.warns(RuntimeWarning, match="not finite") as said:
        optimizer.step()
    assert [warning.filename for warning in said] == [__file__]
