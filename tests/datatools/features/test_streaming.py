"""Features of large matrices, made from inputs and output gradients in parts: the same rows, in less memory."""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from datatools import PROJECTORS, batch_rows
from datatools.features import extract as extract_module
from optim import SGDRule, UpdateMap, create


class Tied(nn.Module):
    """Embedding and head in one matrix, a linear layer in another, Conv1D's orientation in a third, and a norm."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(50, 12, padding_idx=3)
        self.up, self.norm = nn.Linear(12, 40), nn.LayerNorm(40)
        self.down = nn.Parameter(torch.randn(40, 12))

    def forward(self, ids):
        return (self.norm(torch.tanh(self.up(self.embed(ids)))) @ self.down) @ self.embed.weight.T


def loss(module, batch):
    return nn.functional.cross_entropy(module(batch["ids"]).mT, batch["ids"], reduction="none").mean(1)


@pytest.fixture(scope="module")
def setting():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = Tied().eval()
    batch = {"ids": torch.randint(50, (5, 4), generator=torch.Generator().manual_seed(0))}
    optimizer = create("adamw", list(module.named_parameters()), lr=1e-3)
    loss(module, batch).mean().backward()
    optimizer.step()
    return module, batch, optimizer


@pytest.mark.parametrize("name", PROJECTORS)
@pytest.mark.parametrize("rule", ["adamw", "plain", "muon"])
def test_parts_give_the_features_of_the_whole(setting, name, rule, monkeypatch):
    module, batch, optimizer = setting
    if rule == "muon":  # not elementwise: the update of a row of a matrix depends on all others
        optimizer = create("muon", [(n, p) for n, p in module.named_parameters() if p.ndim == 2], lr=1e-3)
    updates = UpdateMap.of(optimizer, rules=SGDRule() if rule == "plain" else None)
    projector = PROJECTORS[name].of({n: p.shape for n, p in updates.params.items()}, dim=64, seed=0)
    monkeypatch.setattr(type(projector), "takes_factors", False)
    want = batch_rows(module, loss, batch, updates, projector)
    monkeypatch.undo()
    monkeypatch.setattr(extract_module, "_WHOLE_BYTES", 1)
    monkeypatch.setattr(extract_module, "_PART_BYTES", 2000)  # a few rows at a time
    got = batch_rows(module, loss, batch, updates, projector)
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4 * float(other.abs().max()))


class Largest(TorchDispatchMode):
    """The largest tensor that an operation returns."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, torch.Tensor) and not tensor._is_view():
                self.numel = max(self.numel, tensor.untyped_storage().nbytes() // 4)
        return result


@pytest.mark.parametrize("name, rule", [("sjlt", "adamw"), ("sjlt", "plain"), ("factored", "plain")])
def test_no_tensor_is_as_large_as_the_gradients_of_all_rows(name, rule, monkeypatch):
    monkeypatch.setattr(extract_module, "_WHOLE_BYTES", 1 << 20)
    monkeypatch.setattr(extract_module, "_PART_BYTES", 1 << 18)
    module, rows = nn.Linear(300, 400, bias=False).eval(), 24
    optimizer = create("adamw", list(module.named_parameters()), lr=1e-3)
    updates = UpdateMap.of(optimizer, rules=SGDRule() if rule == "plain" else None)
    projector = PROJECTORS[name].of({"weight": module.weight.shape}, dim=128, seed=0)
    batch = {"x": torch.randn(rows, 3, 300)}

    def squares(module, batch):
        return module(batch["x"]).square().flatten(1).mean(1)

    with Largest() as largest:
        batch_rows(module, squares, batch, updates, projector)
    assert largest.numel <= 2 * module.weight.numel() < rows * module.weight.numel()


def test_factors_are_projected_as_their_product_is():
    """The circular convolution of two sketches is the sketch of the outer product, by the definition of the map."""
    projector = PROJECTORS["factored"](dim=50, seed=1)
    (h, s), (h2, s2) = projector._sides("w", torch.Size((7, 9)), torch.device("cpu"))
    grad = torch.randn(2, 7, 9)
    want = torch.zeros(2, 50)
    for o in range(7):
        for i in range(9):
            want[:, (h[o] + h2[i]) % 50] += s[o] * s2[i] * grad[:, o, i]
    torch.testing.assert_close(projector.block("w", grad), want)


def test_inner_products_of_the_factored_projector_are_unbiased():
    """Over seeds, the mean is within 4 standard errors of the product, and the variance is near |x|^2 |y|^2 / dim."""
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, 1, 30, 30, generator=generator)
    products = []
    for seed in range(400):
        p = PROJECTORS["factored"](dim=128, seed=seed)
        products.append(float((p.block("w", x) * p.block("w", y)).sum()))
    got, exact = torch.tensor(products, dtype=torch.float64), float((x * y).sum())
    variance = (float(x.square().sum() * y.square().sum()) + exact**2) / 128
    assert abs(got.mean() - exact) < 4 * (float(got.var()) / len(got)) ** 0.5
    assert 0.5 < got.var() / variance < 1.5
