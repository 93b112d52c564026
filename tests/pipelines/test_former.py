"""Scripts that import modules by the names that they had before they moved into rooms."""

from importlib import import_module

import pytest

NAMES = {
    "pipelines.config": (
        "SelectConfig",
        "ModelConfig",
        "TrainConfig",
        "EvaluateConfig",
        "CoresetConfig",
        "OrderConfig",
    ),
    "pipelines.data": ("Row",),
    "pipelines.encode": ("Encoder",),
    "pipelines.chat": ("RowError",),
    "pipelines.coresets": ("CoresetMixin", "CoresetConfig"),
    "pipelines.evaluation": ("evaluate",),
    "pipelines.train": ("run",),
    "pipelines.audit": ("run",),
    "pipelines.select": ("run",),
    "pipelines.order": ("run",),
    "pipelines.diagnose": ("run",),
    "pipelines.models": ("load", "collate", "row_losses"),
}


@pytest.mark.parametrize("module", NAMES)
def test_former_names_are_found_and_can_be_called(module):
    found = import_module(module)
    assert all(callable(getattr(found, name)) for name in NAMES[module])
    with pytest.raises(AttributeError, match=module):
        found.no_such_name  # noqa: B018
