"""AdaBelief beyond the battery: weight decay that the learning rate does not scale."""

import pytest
import torch

from optim import AdaBeliefRule, Optimizer, UpdateMap, create
from tests.optim.harness import randn
from tests.reference import adabelief


@pytest.mark.parametrize("backend", ["auto", "torch"])
@pytest.mark.parametrize("settings", [{}, {"rectify": False, "eps": 1e-8}])
def test_fixed_decay_is_not_scaled_by_the_learning_rate(monkeypatch, backend, settings):
    monkeypatch.setenv("OPTIM_BACKEND", backend)
    start, grads = randn((4, 3), 1), [randn((4, 3), t) for t in range(2, 12)]
    p = torch.nn.Parameter(start.clone())
    optimizer = create("adabelief", [("p", p)], lr=0.02, weight_decay=0.03, fixed_decay=True, **settings)
    want = adabelief.run(
        start.numpy(), [g.numpy() for g in grads], lr=0.02, weight_decay=0.03, fixed_decay=True, **settings
    )
    for g, expected in zip(grads, want, strict=True):
        p.grad = g
        optimizer.step()
        torch.testing.assert_close(p.detach(), torch.as_tensor(expected), rtol=1e-10, atol=1e-12)
    optimizer.param_groups[0]["lr"], before = 0.0, p.detach().clone()
    optimizer.step()
    torch.testing.assert_close(p.detach(), before * 0.97)


def test_fixed_decay_is_no_part_of_a_direction():
    p = torch.nn.Parameter(randn((4, 3), 1))
    directions = [
        UpdateMap.of(Optimizer([("p", p)], AdaBeliefRule(fixed_decay=fixed), lr=0.1, weight_decay=0.5))(
            {"p": randn((4, 3), 2)}
        )["p"]
        for fixed in (False, True)
    ]
    assert torch.equal(*directions)
