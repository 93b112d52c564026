"""What a loss may do with a module, and what must stay as it was afterwards."""

import pytest
import torch
from torch import nn

from datatools import per_sample_grads
from datatools.gradients.layers import adapters
from datatools.gradients.lora import watch_adapter


def agrees(loss, module, batch):
    """The gradients of both methods are equal."""
    names = [name for name, _ in module.named_parameters()]
    fast, slow = (per_sample_grads(loss, module, batch, names, method=method) for method in ("hooks", "loop"))
    for name in names:
        torch.testing.assert_close(fast[name], slow[name], rtol=1e-4, atol=1e-6)


class Own(torch.autograd.Function):
    """A product that no torch function mode sees."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x)
        return x @ weight.T

    @staticmethod
    def backward(ctx, g):
        return None, g.flatten(0, -2).T @ ctx.saved_tensors[0].flatten(0, -2)


def test_what_is_known_about_one_loss_is_not_believed_of_another():
    module = nn.Linear(3, 2, bias=False).eval()
    batch = {"x": torch.randn(2, 4, 3)}
    agrees(lambda module, batch: module(batch["x"]).square().sum((1, 2)), module, batch)
    agrees(lambda module, batch: module(batch["x"].transpose(0, 1)).square().sum((0, 2)), module, batch)
    with pytest.warns(UserWarning, match="use method 'loop'"):
        agrees(lambda module, batch: Own.apply(batch["x"], module.weight).square().sum((1, 2)), module, batch)


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3))

    def forward(self, x):
        return (self.weight * x).float().sum(-1)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("x", [torch.arange(12).view(4, 3), torch.randn(4, 3).bfloat16()], ids=["int64", "bfloat16"])
def test_factors_of_another_dtype_do_not_round_gradients(x):
    batch = {"x": x, "rate": torch.tensor([0.3, 0.2, 0.7, 1.0])}  # only the last gradient is an integer
    agrees(lambda module, batch: module(batch["x"]) * batch["rate"], Scaled().eval(), batch)


def test_tensors_outside_of_the_module_get_no_gradient():
    head, x = nn.Linear(2, 1), torch.randn(4, 3, requires_grad=True)
    agrees(lambda module, batch: head(module(batch["x"].tanh())).sum(1), nn.Linear(3, 2).eval(), {"x": x})
    assert head.weight.grad is None and x.grad is None


def test_a_wrapped_forward_of_an_adapter_stays_and_runs():
    peft = pytest.importorskip("peft")
    inner = nn.Sequential(nn.Linear(3, 3))
    module = peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["0"], r=2), inner).eval()
    layer, calls = module[0], []
    plain = layer.forward

    def wrapped(*args):
        calls.append(1)
        return plain(*args)

    layer.forward = wrapped
    (one,) = adapters(module)
    with watch_adapter(one, [], lambda uses, y, in_place: y):
        module(torch.ones(2, 3))
    assert layer.forward is wrapped and calls
