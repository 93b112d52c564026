"""Shapes and dtypes are those that the signatures state, for the tensor functions of influence and of subsets."""

from importlib import import_module

import pytest
import torch

from tests.optim.test_shapes import annotated, checked, randn

ROWS, WANTED, GROUPS = randn(5, 3), randn(4, 3), torch.tensor([0, 0, 1, 1])
CALLS = {
    "datatools.less.influence": {
        "influence": (([ROWS], [WANTED], [1.0]), {}),
        "influence_paper": (([ROWS], [WANTED], [1.0], GROUPS), {}),
        "subtask_targets": ((WANTED.half(), torch.ones(4), GROUPS), {}),
    },
    "datatools.less.aggregate": {
        "aggregate": ((ROWS @ WANTED.T, GROUPS, "bids"), {"eligible": torch.ones(5, dtype=torch.bool)}),
    },
    "datatools.selection.subtasks": {
        "averaging": ((GROUPS, 4), {}),
        "subtask_means": ((ROWS @ WANTED.T, GROUPS), {}),
    },
    "datatools.selection.round_robin": {"round_robin_order": ((ROWS @ WANTED.T,), {})},
    "datatools.selection.bids": {"bids_order": ((ROWS @ WANTED.T, GROUPS), {})},
    "datatools.subsets.herding": {"herding": ((ROWS, 3), {"kept": torch.tensor([1])})},
    "datatools.subsets.matching_pursuit": {"matching_pursuit": ((ROWS, 3), {})},
    "datatools.subsets.facility_location": {"facility_location": ((ROWS @ ROWS.T, 3), {})},
}


@pytest.mark.parametrize(("module", "name"), [(module, name) for module, calls in CALLS.items() for name in calls])
def test_a_function_keeps_to_its_signature(module, name):
    args, kwargs = CALLS[module][name]
    checked(getattr(import_module(module), name), *args, **kwargs)


@pytest.mark.parametrize("module", CALLS)
def test_every_function_with_shapes_is_called(module):
    assert set(annotated(import_module(module))) == set(CALLS[module])
