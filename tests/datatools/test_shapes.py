"""Every tensor of a signature of datatools has a shape and a dtype; calls of the main functions keep to them."""

import ast
from importlib import import_module

import pytest
import torch

from tests.conftest import REPOSITORY
from tests.shapes import annotated, checked, randn

FILES = sorted((REPOSITORY / "datatools").rglob("*.py"))
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
    "datatools.selection.coverage": {"coverage_order": ((ROWS @ WANTED.T,), {})},
    "datatools.selection.bids": {"bids_order": ((ROWS @ WANTED.T, GROUPS), {})},
    "datatools.subsets.herding": {"herding": ((ROWS, 3), {"kept": torch.tensor([1])})},
    "datatools.subsets.matching_pursuit": {"matching_pursuit": ((ROWS, 3), {})},
    "datatools.subsets.facility_location": {
        "facility_location": ((ROWS @ ROWS.T, 3), {}),
        "distances": ((ROWS,), {}),
    },
}


def without_shape(hint):
    """Whether an annotation has a tensor of its own (not one in a mapping or a list) without a shape."""
    if isinstance(hint, ast.BinOp):
        return without_shape(hint.left) or without_shape(hint.right)
    if isinstance(hint, ast.Subscript) and ast.unparse(hint.value) in ("tuple", "Iterator"):
        return any(map(without_shape, hint.slice.elts if isinstance(hint.slice, ast.Tuple) else [hint.slice]))
    return isinstance(hint, ast.Name) and hint.id == "Tensor"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_every_tensor_has_a_shape(path):
    bare = []
    tree = ast.parse(path.read_text(encoding="utf-8"))
    kinds = [node for node in tree.body if isinstance(node, ast.ClassDef) and not node.name.startswith("_")]
    for node in [*tree.body, *(node for kind in kinds for node in kind.body)]:
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
            of = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            bare += [f"{node.name}: {a.arg}" for a in of if a.annotation and without_shape(a.annotation)]
            bare += [node.name] * bool(node.returns and without_shape(node.returns))
        if isinstance(node, ast.AnnAssign) and without_shape(node.annotation):
            bare.append(ast.unparse(node.target))
    assert not bare


@pytest.mark.parametrize(("module", "name"), [(module, name) for module, calls in CALLS.items() for name in calls])
def test_a_function_keeps_to_its_signature(module, name):
    args, kwargs = CALLS[module][name]
    checked(getattr(import_module(module), name), *args, **kwargs)


@pytest.mark.parametrize("module", CALLS)
def test_every_function_with_shapes_is_called(module):
    assert set(annotated(import_module(module))) == set(CALLS[module])
