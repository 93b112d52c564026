"""The zoo holds every causal language model class, small and the same each time."""

import pytest
import torch

from tests.zoo import build


def test_every_class_is_in_the_zoo_or_named_with_its_reason():
    classes = build.all_names()
    assert set(build.UNBUILDABLE) <= set(classes) and set(build.OVERRIDES) <= set(build.names())
    assert len(build.names()) >= 0.95 * len(classes)


@pytest.mark.parametrize("name", build.names()[::24])
def test_a_model_is_small_and_the_same_for_the_same_seed(name):
    model, again = build.build(name), build.build(name)
    assert sum(p.numel() for p in model.parameters()) < 1_000_000
    assert not model.training
    for parameter, other in zip(model.parameters(), again.parameters(), strict=True):
        assert parameter.dtype == torch.float32
        torch.testing.assert_close(parameter, other, rtol=0, atol=0)
        assert parameter.abs().max() > 0
