"""A rule of somebody's own, which is in no table, under `Optimizer` and `UpdateMap`: the default paths."""

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

from optim import AdamWRule, Optimizer, UpdateMap, UpdateRule, rule_from
from optim.rule import zero_moment, zero_step


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


def test_added_group_gets_the_default_rule():
    optimizer = Optimizer([torch.nn.Parameter(torch.ones(2))], AdamWRule(eps=1e-3), lr=0.1, weight_decay=0.2)
    optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(2))], "betas": [0.5, 0.6]})
    group = optimizer.param_groups[1]
    assert group["rule"] == AdamWRule(eps=1e-3, betas=(0.5, 0.6)) and group["weight_decay"] == 0.2
