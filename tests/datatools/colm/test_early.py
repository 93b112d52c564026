"""Early features against the gradients of a model that really ends after its first layers."""

import copy

import pytest
import torch
from torch import nn

from datatools import CoLM, DataError
from datatools.colm import early
from datatools.colm.early import early_gradients
from datatools.colm.last_layer import LastLayer
from datatools.colm.replay import evaluating
from pipelines.models.losses import row_losses
from tests.datatools.colm.test_last_layer import build


class Map(nn.Module):
    """A decoder layer, and after it a linear map that is the identity."""

    def __init__(self, layer, width):
        super().__init__()
        self.layer, self.map = layer, nn.Parameter(torch.eye(width))

    def forward(self, *args, **kwargs):
        found = self.layer(*args, **kwargs)
        return found @ self.map.T if isinstance(found, torch.Tensor) else (found[0] @ self.map.T, *found[1:])


def batch(rows=4):
    ids = torch.randint(3, 90, (rows, 9), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    for i in range(rows):
        labels[i, : 2 + i] = -100
    return {"input_ids": ids, "labels": labels}


@pytest.mark.parametrize("name", ["llama", "gpt2", "neox", "bloom", "qwen3"])
def test_features_are_gradients_of_the_shorter_model(name):
    model = build(name).eval()
    short = copy.deepcopy(model)
    blocks = next(part for part in short.modules() if isinstance(part, nn.ModuleList))
    del blocks[1:]  # a quarter of three layers is one
    blocks[0] = Map(blocks[0], 32)
    given = batch()
    losses = row_losses(short, given)
    want = torch.stack([torch.autograd.grad(loss, blocks[0].map, retain_graph=True)[0] for loss in losses])
    generator = torch.Generator().manual_seed(early._SEED)
    a, b = (torch.randn(32, 32, generator=generator) / 32**0.5 for _ in range(2))
    before = row_losses(model, given)
    with evaluating(model):
        found = early_gradients(model, row_losses, given, LastLayer.of(model))
    torch.testing.assert_close(found, (a.T @ want @ b).flatten(1), rtol=1e-4, atol=1e-5)
    assert torch.equal(row_losses(model, given), before), "the model is whole again"
    assert not any("forward" in vars(part) or part._forward_hooks for part in model.modules())


def test_early_features_choose_without_the_later_layers():
    model = build("llama")
    ran = []
    layers = model.model.layers
    for i, layer in enumerate(layers):
        layer.self_attn.register_forward_hook(lambda *_, i=i: ran.append(i))
    colm = CoLM(model, row_losses, keep=3, features="early")
    del ran[:]
    colm(batch(6), ["a"] * 6, step=0)
    assert set(ran) == {0}
    with evaluating(model), pytest.raises(DataError, match="pass on no hidden states"):
        early_gradients(model, lambda _, given: given["labels"].float().mean(1), batch(), LastLayer.of(model))
