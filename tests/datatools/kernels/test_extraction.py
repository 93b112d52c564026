"""The kernel where it is met: in extraction, beside the same without it."""

import pytest
import torch
from torch import nn

from datatools.features.extract import batch_rows
from datatools.projectors import SJLT
from optim import AdamW, UpdateMap
from tests.kernels import counted

WEIGHTS = ("0.weight", "2.weight")


def model_and_batch(device):
    generator = torch.Generator().manual_seed(0)
    module = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).eval()
    for p in module.parameters():
        p.data.copy_(torch.randn(p.shape, generator=generator) * 0.5)
    batch = {"x": torch.randn(4, 6, 5, generator=generator), "y": torch.randn(4, 6, 3, generator=generator)}
    return module.to(device), {key: value.to(device) for key, value in batch.items()}


def mse(module, batch):
    return (module(batch["x"]) - batch["y"]).square().flatten(1).mean(1)


@pytest.mark.parametrize("method", ["hooks", "loop", "vmap"])
def test_features_are_made_by_the_fused_kernel(kernel_device, method, monkeypatch):
    """One launch for each parameter, whichever way gradients are made; the same rows as by torch operations."""
    module, batch = model_and_batch(kernel_device)
    params = {name: p for name, p in module.named_parameters() if name in WEIGHTS}
    optimizer = AdamW(params.items(), lr=1e-3)
    mse(module, batch).mean().backward()
    optimizer.step()
    updates, projector = UpdateMap.of(optimizer), SJLT(dim=32, seed=1)
    with counted() as launches:
        features, _, _ = batch_rows(module, mse, batch, updates, projector, method=method)
    assert launches == ["_sjlt_kernel"] * len(WEIGHTS)
    monkeypatch.setenv("OPTIM_BACKEND", "torch")
    with counted() as launches:
        want, _, _ = batch_rows(module, mse, batch, updates, projector, method=method)
    assert launches == []
    torch.testing.assert_close(features, want, rtol=1e-4, atol=1e-4 * want.abs().max().item())
