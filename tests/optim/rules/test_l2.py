"""`l2`: weight decay inside the gradient, as torch and the published code of ADOPT have it."""

import pytest
import torch
from torch.nn import Parameter

from optim import SGD, Adagrad, ADOPTRule, NAdam, RMSprop
from tests.optim.harness import parameters, set_grads

PAIRS = {
    "sgd": (SGD, torch.optim.SGD, {}),
    "sgd, momentum": (SGD, torch.optim.SGD, {"momentum": 0.9, "dampening": 0.2}),
    "sgd, nesterov": (SGD, torch.optim.SGD, {"momentum": 0.9, "nesterov": True}),
    "rmsprop": (RMSprop, torch.optim.RMSprop, {"momentum": 0.5, "centered": True, "eps": 1e-3}),
    "adagrad": (Adagrad, torch.optim.Adagrad, {"lr_decay": 0.1}),
    "nadam": (NAdam, torch.optim.NAdam, {}),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("path", ["auto", "torch"])
@pytest.mark.parametrize("name", PAIRS)
def test_it_is_the_weight_decay_of_torch(name, path, dtype, monkeypatch):
    monkeypatch.setenv("OPTIM_BACKEND", path)
    ours, theirs, settings = PAIRS[name]
    params, twins = parameters([(4, 3), (5,), ()], dtype), parameters([(4, 3), (5,), ()], dtype)
    one, other = ours(params, lr=0.05, l2=0.1, **settings), theirs(twins, lr=0.05, weight_decay=0.1, **settings)
    for t in range(6):
        for optimizer, of in ((one, params), (other, twins)):
            set_grads(of, t)
            optimizer.step()
    exact = dtype == torch.float64 and name != "nadam"  # torch has a product in float32
    torch.testing.assert_close(params, twins, rtol=1e-10 if exact else 1e-5, atol=1e-10 if exact else 1e-6)


def test_adopts_is_the_rule_with_the_gradient_of_the_penalty():
    p, grad = torch.randn(5), torch.randn(5)
    with_l2, plain = ADOPTRule(l2=0.1), ADOPTRule()
    states = [rule.init(Parameter(p)) for rule in (with_l2, plain)]
    for _ in range(3):
        a, states[0] = with_l2.update(grad, states[0], p)
        b, states[1] = plain.update(grad + 0.1 * p, states[1], p)
        torch.testing.assert_close(a, b)
    with pytest.raises(ValueError, match="l2 = -1"):
        ADOPTRule(l2=-1.0)
