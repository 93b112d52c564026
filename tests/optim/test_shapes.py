"""Shapes and dtypes are those that the signatures state, for every public tensor function and every rule."""

import typing
from importlib import import_module
from typing import Any

import pytest
import torch

from optim import OPTIMIZERS, RULES, linalg, radial
from optim.diagnostics import components, conditioning, smoothness
from optim.kernels import philox, unit_rms
from optim.rules.wrappers import codebooks
from optim.zeroth_order import noise
from tests.optim.specs import SPECS
from tests.shapes import annotated, checked, is_shape, randn

hutchinson, spectrum = (import_module(f"optim.{name}") for name in ("curvature.hutchinson", "diagnostics.spectrum"))
"""Modules whose package has a function of their name."""

CALLS: dict[Any, dict[str, tuple[tuple[Any, ...], dict[str, Any]]]] = {
    linalg: {
        "newton_schulz": ((randn(2, 3, 4, 6),), {}),
        "polar": ((randn(2, 4, 3),), {}),
        "whiten": ((randn(4, 3),), {"steps": 4, "beta": 0.5}),
        "unit_rms": ((randn(2, 3, 4),), {"dim": (0, 1), "eps": 1e-8}),
        "row_normalised": ((randn(2, 3),), {}),
        "column_normalised": ((randn(5, 2, 3),), {}),
        "spectrally_normalised": ((randn(2, 3),), {}),
        "multi_normalised": ((randn(2, 3),), {"norms": ("row", "sign"), "rounds": 2}),
    },
    radial: {
        "remove_radial": ((randn(3, 2, 2), randn(3, 2, 2), randn(3, 2, 2)), {"delta": 0.1, "eps": 1e-8}),
    },
    philox: {
        "random_words": ((7,), {"seed": 1}),
        "normals": ((7,), {"seed": 1}),
        "stochastic_round": ((randn(3, 2), torch.arange(6)), {}),
    },
    codebooks: {
        "take": ((randn(5), torch.tensor([[0, 4]])), {}),
        "packed": ((torch.tensor([1, 2, 15], dtype=torch.uint8),), {}),
        "unpacked": ((torch.tensor([33, 15], dtype=torch.uint8), 3), {}),
    },
    conditioning: {
        "condition_numbers": ((randn(3, 2, 2),), {}),
        "condition_penalty": ((randn(3, 4),), {}),
        "transformed_l1": ((randn(3, 4),), {}),
        "gate_closed": ((randn(3),), {}),
        "gate_penalty": ((randn(3, 4), randn(3)), {"data_size": 10}),
    },
    spectrum: {"spectrum": ((randn(3, 2, 2),), {})},
    components: {"tail_learning": ((torch.tensor([0.6, 0.4]), torch.eye(3)[:, :2], torch.eye(3)[:, :2]), {})},
    smoothness: {"row_scales": ((randn(5, 3),), {}), "cauchy": ((randn(3, 2), 0), {})},
    hutchinson: {"draw": ((randn(3, 2), "normal", 0), {})},
    noise: {"add_normal_": ((randn(3, 2), 1.0, 0), {})},
}
KERNELS = {unit_rms: {"unit_rms"}}
"""Compared with its definition by the tests of kernels, which run where Triton does."""


@pytest.mark.parametrize(("module", "name"), [(module, name) for module, calls in CALLS.items() for name in calls])
def test_a_function_keeps_to_its_signature(module, name):
    args, kwargs = CALLS[module][name]
    checked(getattr(module, name), *args, **kwargs)


@pytest.mark.parametrize("module", [*CALLS, *KERNELS], ids=lambda module: module.__name__)
def test_every_function_with_shapes_is_called(module):
    assert set(annotated(module)) == set(CALLS.get(module, {})) | KERNELS.get(module, set())


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_rule_keeps_to_its_signature(name, dtype):
    spec = SPECS[name]
    rule, (shape, *_) = spec.rule(), spec.shapes
    param, grad = randn(*shape).to(dtype), randn(*shape).to(dtype)
    state = checked(rule.init, param)
    direction, new = checked(rule.update, grad, state, param)
    checked(rule.decay, direction, new, param)


def test_codebooks_keep_to_their_signature():
    y = randn(3, 4).clamp(-1, 1)
    for (_, signed), book in codebooks.BOOKS.items():
        checked(book.encode, y if signed else y.abs())
        checked(book.encode_stochastic, y.abs(), torch.rand(3, 4, generator=torch.Generator().manual_seed(0)))


@pytest.mark.parametrize(
    ("module", "name", "args", "kwargs"),
    [
        (linalg, "polar", (randn(4),), {}),
        (linalg, "polar", (torch.ones(2, 2, dtype=torch.int64),), {}),
        (radial, "remove_radial", (randn(3, 2), randn(2, 3), randn(3, 2)), {"delta": 0.1, "eps": 1e-8}),
    ],
)
def test_other_shapes_and_dtypes_are_seen(module, name, args, kwargs):
    with pytest.raises(AssertionError, match=name):
        checked(getattr(module, name), *args, **kwargs)


def test_every_rule_states_shapes():
    hints = [typing.get_type_hints(rule.update)["grad"] for rule in RULES.values()]
    assert all(map(is_shape, hints)) and len(hints) == len(OPTIMIZERS)
