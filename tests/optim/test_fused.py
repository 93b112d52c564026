"""`fuse_backward`: the steps of `Optimizer.step`, inside the backward pass, with one gradient at a time."""

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from optim import AdamWRule, FusedBackward, Optimizer, ProdigyRule, SGDRule, create, fuse_backward, set_rounding
from optim.distributed import OwnerComputes
from tests.optim.harness import assert_same, randn

X = randn((5, 8), 1, torch.float32)


def model(width: int = 8, depth: int = 3) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*[layer for _ in range(depth) for layer in (nn.Linear(width, width), nn.Tanh())])


def loss(net: nn.Module, x: Tensor = X) -> Tensor:
    found: Tensor = net(x).square().mean()
    return found


@pytest.mark.parametrize("name", ["adamw", "muon", "soap", "shampoo", "kron", "lion", "adamw_8bit", "adafactor"])
def test_the_steps_are_those_after_the_backward_pass(name: str) -> None:
    """To the bit, with a scheduler, over what an elementwise rule, matrices and decompositions need."""
    ends = []
    for fused in (False, True):
        net = model()
        hyper = {"ns_dtype": "float32"} if name == "muon" else {}
        optimizer = create(name, net, lr=0.01, weight_decay=0.1, **hyper)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        if fused:
            fuse_backward(net, optimizer)
        for _ in range(11):
            loss(net).backward()
            assert fused == all(p.grad is None for p in net.parameters())
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
        ends.append([*net.parameters()])
    if name == "muon":  # in stacks, products of matrices round in another order
        torch.testing.assert_close(ends[0], ends[1], rtol=1e-4, atol=1e-5)
    else:
        assert_same(*ends)


def test_no_two_gradients_exist_at_a_time() -> None:
    """Bytes of gradients in the backward pass: those of one layer instead of those of the model."""
    width, depth = 64, 8
    peaks = []
    for fused in (False, True):
        net = model(width, depth)
        handle = fuse_backward(net, SGDRule(), lr=0.01) if fused else None
        seen = []

        def measure(_: nn.Module, __: object, net: nn.Module = net, seen: list[int] = seen) -> None:
            seen.append(sum(p.grad.numel() for p in net.parameters() if p.grad is not None))

        for layer in net:
            layer.register_full_backward_pre_hook(measure)
        loss(net, randn((4, width), 2, torch.float32).requires_grad_()).backward()
        left = sum(p.grad.numel() for p in net.parameters() if p.grad is not None)
        peaks.append(max(*seen, left))
        assert (handle is not None) == (left == 0)
    assert peaks == [depth * (width * width + width), 0]


def test_tied_weights_are_stepped_once_and_frozen_ones_later() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.frozen = nn.Embedding(6, 4), nn.Linear(4, 4)
            self.frozen.requires_grad_(False)

        def forward(self, ids: Tensor) -> Tensor:
            return self.frozen(self.table(ids)) @ self.table.weight.T

    net = Tied()
    optimizer = Optimizer(net.named_parameters(), AdamWRule(), lr=0.01)
    with fuse_backward(net, optimizer) as fused:
        assert isinstance(fused, FusedBackward) and fused.optimizer is optimizer
        net(torch.arange(6)).square().sum().backward()
        assert float(optimizer.state[net.table.weight]["step"]) == 1 and net.table.weight.grad is None
        net.frozen.requires_grad_(True)
        net(torch.arange(6)).square().sum().backward()
        optimizer.step()
        assert float(optimizer.state[net.table.weight]["step"]) == 2
        assert float(optimizer.state[net.frozen.weight]["step"]) == 1
    net(torch.arange(6)).square().sum().backward()
    assert net.table.weight.grad is not None, "the hooks are gone"


class Checkpointed(nn.Module):
    def __init__(self, layers: int, reentrant: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.reentrant = nn.Linear(8, 8), reentrant
        self.layers = nn.ModuleList([nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(layers)])

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for i in range(2):
            x = checkpoint(self.layers[i % len(self.layers)], x, use_reentrant=self.reentrant)
        return x


@pytest.mark.parametrize("layers", [2, 1])
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_layers_are_stepped_once_or_refused(layers: int, reentrant: bool) -> None:
    """Reentrant checkpointing is a backward pass per segment; a layer in two segments would be stepped twice."""
    ends = []
    for fused in (False, True):
        net = Checkpointed(layers, reentrant)
        optimizer = create("adamw", net, lr=0.01)
        if fused:
            fuse_backward(net, optimizer)
        if fused and reentrant and layers == 1:
            with pytest.raises(RuntimeError, match=r"'layers\.0\.0\.\w+' arrives in parts.*use_reentrant=False"):
                loss(net).backward()
            continue
        for _ in range(3):
            loss(net).backward()
            optimizer.step()
            optimizer.zero_grad()
        ends.append([*net.parameters()])
    if len(ends) == 2:
        assert_same(*ends)


def test_changed_settings_rounding_and_groups() -> None:
    ends = []
    for fused in (False, True):
        net = model().bfloat16()
        optimizer = create("adamw", net, lr=0.01)
        set_rounding(optimizer, "stochastic")
        if fused:
            fuse_backward(net, optimizer)
        for t in range(4):
            optimizer.param_groups[0]["betas"] = (0.5 + 0.1 * t, 0.99)
            loss(net, X.bfloat16()).backward()
            optimizer.step()
            optimizer.zero_grad()
        ends.append([*net.parameters()])
    assert all(a.equal(b) for a, b in zip(*ends, strict=True)), "the random bits of a pass are those of a step"


def test_refusals() -> None:
    net = model()
    with pytest.raises(ValueError, match="prodigy the step of one parameter depends on"):
        fuse_backward(net, ProdigyRule(), lr=1.0)
    with pytest.raises(TypeError, match="pass lr="):
        fuse_backward(net, AdamWRule())
    with pytest.raises(TypeError, match="lr belong"):
        fuse_backward(net, create("adamw", net, lr=0.1), lr=0.1)
    with pytest.raises(TypeError, match="rule is type|a class"):
        fuse_backward(net, AdamWRule, lr=0.1)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="OwnerComputes exchanges"):
        fuse_backward(net, OwnerComputes(create("muon", net, lr=0.1)))
    with pytest.raises(ValueError, match="no parameter of this model"):
        fuse_backward(net, create("adamw", model(), lr=0.1))
    with pytest.warns(RuntimeWarning, match=r"'0.weight': its gradient is not finite"):
        with fuse_backward(net, create("lamb", net, lr=0.1)):
            (net[0].weight * torch.inf).sum().backward()
