"""`Cautious` and `Grams` around every elementwise rule: directions, states, steps, refusals."""

import pytest
import torch
from torch.nn import Parameter

from optim import (
    RULES,
    AdamRule,
    AdamWRule,
    Cautious,
    Grams,
    LionRule,
    MuonRule,
    Optimizer,
    Quantized,
    ScheduleFreeSGDRule,
    UpdateMap,
    cpu_jit,
    create,
    rule_from,
)
from tests.optim.harness import randn, train
from tests.optim.specs import SPECS

INNER = [rule for name in sorted(RULES) if (rule := SPECS[name].rule()).elementwise and not rule.reads]
INNER = [rule for rule in INNER if rule.step_is_update]


@pytest.mark.parametrize("inner", INNER, ids=lambda rule: rule.name)
def test_directions_are_those_of_the_rule_inside(inner):
    grads = [randn((4, 3), t) for t in range(3)]
    param = randn((4, 3), 9)
    state = inner.init(param)
    for grad in grads:
        direction, new = inner.update(grad, state, param)
        masked, same = Cautious(inner=inner).update(grad, state, param)
        signed, _ = Grams(inner=inner).update(grad, state, param)
        agrees = direction * grad > 0
        assert torch.equal(signed, direction.abs() * grad.sign())
        torch.testing.assert_close(masked, direction * agrees / max(float(agrees.double().mean()), 1e-3))
        assert all(torch.equal(same[key], new[key]) for key in new)
        state = new


@pytest.mark.parametrize("kind", [Cautious, Grams])
def test_steps_maps_and_descriptions(kind):
    rule = kind(inner=LionRule(betas=(0.8, 0.9)))
    assert rule_from(rule.describe()) == rule and rule.with_settings(betas=(0.5, 0.5)).inner.betas == (0.5, 0.5)
    assert cpu_jit.supports(rule, torch.empty(64, 64)) == ""
    p = Parameter(randn((4, 3), 1, torch.float32))
    optimizer = Optimizer([("p", p)], rule, lr=0.1)
    train(optimizer, [p], range(2))
    grads = randn((5, 4, 3), 7, torch.float32)
    each = UpdateMap.of(optimizer).per_sample({"p": grads})["p"]
    for grad, direction in zip(grads, each, strict=True):
        torch.testing.assert_close(direction, rule.update(grad, optimizer.state[p], p.detach())[0])


def test_no_agreement_is_no_step():
    """The least mean bounds the factor, and 0 over it is 0; a small tensor and an empty one too."""
    rule = Cautious(inner=LionRule())
    state = {"step": torch.zeros(()), "exp_avg": torch.full((3,), 10.0)}
    assert torch.equal(rule.update(-torch.ones(3), state, torch.ones(3))[0], torch.zeros(3))
    assert rule.update(torch.zeros(0), rule.init(torch.zeros(0)), torch.zeros(0))[0].shape == (0,)


@pytest.mark.parametrize("kind", [Cautious, Grams])
@pytest.mark.parametrize(
    ("inner", "part"),
    [
        (MuonRule(), "elementwise"),
        (Quantized(inner=LionRule()), "elementwise"),
        (AdamRule(), "weight decay or averages"),
        (ScheduleFreeSGDRule(), "weight decay or averages"),
        (AdamWRule(stochastic_rounding=True), "set_rounding"),
        ("adamw", "elementwise"),
    ],
    ids=str,
)
def test_refused_by_name(kind, inner, part):
    with pytest.raises(ValueError, match=f"{kind.__name__}: inner.*{part}"):
        kind(inner=inner)


@pytest.mark.parametrize("kind", [Cautious, Grams])
def test_made_by_name(kind):
    """`create(..., wrapper=...)` puts the rule of every group inside, with its settings, and keeps rates and decay."""
    model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.LayerNorm(3))
    made = create(
        "adamw", model, lr=0.1, weight_decay=0.2, decay_all=False, betas=(0.8, 0.9), assign={"1.": {"lr": 0.3}},
        wrapper=kind.name,
    )  # fmt: skip
    assert {group["rule"] for group in made.param_groups} == {kind(inner=AdamWRule(betas=(0.8, 0.9)))}
    assert {(group["lr"], group["weight_decay"]) for group in made.param_groups} == {(0.1, 0.2), (0.1, 0.0), (0.3, 0.0)}
    with pytest.raises(ValueError, match="inner = MuonRule.*must be an elementwise rule"):
        create("muon", model, lr=0.1, wrapper=kind.name)
    with pytest.raises(ValueError, match=f"no wrapper is called '{kind.name}s'; did you mean '{kind.name}'"):
        create("adamw", model, lr=0.1, wrapper=f"{kind.name}s")
