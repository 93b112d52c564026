"""The four cases in which SGD-SaI's published code fails or runs away."""

import pytest
import torch

from optim import Optimizer, SGDSaIRule, create
from tests.optim.golden import arrays, cases, golden, input_file, kind_of, set_recorded
from tests.optim.harness import randn
from tests.reference.sgd_sai import PublishedSGDSaI


@pytest.mark.golden
def test_the_transcribed_code_is_the_published_one(golden_dir):
    held = 0
    for case in cases(golden_dir):
        entry = case.entry
        if entry["optimizer"] != "SGDSaI" or entry["dtype"] != "float64" or kind_of(case) != "recorded_grads":
            continue
        inputs, want = arrays(input_file(case)), golden(case)
        named = {n: torch.nn.Parameter(torch.tensor(inputs[f"init/{n}"])) for n in entry["params"]}
        optimizer = PublishedSGDSaI(list(named.values()), **entry["hyper"])
        for t in range(entry["steps"]):
            set_recorded(inputs, t, list(named.items()))
            optimizer.step()
        for n, p in named.items():
            torch.testing.assert_close(p.detach(), want[n][-1], rtol=1e-10, atol=1e-12, msg=f"{case.id} {n}")
        held += 1
    if not held:
        pytest.skip(f"no case of SGD-SaI on recorded gradients in {golden_dir}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("grad", [torch.tensor(3.0), torch.tensor([-2.0]), torch.full((7, 5), 0.1)])
def test_entries_that_do_not_differ_have_gain_one(grad, dtype):
    rule, grad = SGDSaIRule(), grad.to(dtype)
    direction, state = rule.update(grad, rule.init(grad), grad)
    assert float(state["gain"]) == 1 and torch.equal(direction, grad)


def test_measured_at_the_first_gradient_that_is_not_zero():
    p = torch.nn.Parameter(torch.zeros(4, 3, dtype=torch.float64))
    optimizer = create("sgd_sai", [("p", p)], lr=0.1)
    grad = randn((4, 3), 1)
    for given in (torch.zeros(4, 3, dtype=torch.float64), grad):
        p.grad = given
        optimizer.step()
    gain = grad.norm() / (grad.std() + 1e-8)
    torch.testing.assert_close(optimizer.state[p]["gain"], gain)
    torch.testing.assert_close(p.detach(), -0.1 * gain * grad)
    p.grad = 100 * grad[[1, 0, 2, 3]] ** 3
    optimizer.step()
    torch.testing.assert_close(optimizer.state[p]["gain"], gain, msg="measured once")


def test_a_resumed_run_does_not_measure_again():
    p, q = (torch.nn.Parameter(torch.zeros(4, 3)) for _ in range(2))
    first, second = (Optimizer([("p", x)], SGDSaIRule(), lr=0.1) for x in (p, q))
    p.grad = randn((4, 3), 1, torch.float32)
    first.step()
    gain = first.state[p]["gain"].clone()
    second.load_state_dict(first.state_dict())
    q.grad = 1 + randn((4, 3), 2, torch.float32)
    second.step()
    assert torch.equal(second.state[q]["gain"], gain)
