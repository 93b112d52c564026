"""SJLT with its hashes made in registers, of gradients and of AdamW's directions, against the projector's own path."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from datatools.kernels import sjlt
from datatools.projectors import SJLT, Rademacher
from datatools.projectors.base import key
from optim import AdamWRule, SGDRule, UpdateMap
from tests.kernels import counted, odd_sizes, poisoned

RULES = [
    AdamWRule(),
    AdamWRule(betas=(0.0, 0.999)),
    AdamWRule(eps=0.0, eps_root=1e-8, bias_correction=False),
    AdamWRule(eps_before_correction=True),
]


def updates_of(rule, shape, device, seed=0):
    generator = torch.Generator().manual_seed(seed)
    param = torch.zeros(shape, device=device)
    state = rule.init(param)
    for value in state.values():
        if value.ndim or value.device.type != "cpu":
            value.copy_(torch.rand(shape, generator=generator) * 1e-2)
    if "step" in state:
        state["step"].fill_(4)
    return UpdateMap({"w": rule}, {"w": state}, {"w": param})


def reference(monkeypatch, projector, updates, grad):
    """`out` by torch operations, in float64 where they allow it."""
    with monkeypatch.context() as patch:
        patch.setenv("OPTIM_BACKEND", "torch")
        out = torch.zeros(len(grad), projector.dim, device=grad.device)
        projector.accumulate(out, "w", updates.per_sample({"w": grad})["w"])
    return out


@odd_sizes
@given(
    st.integers(1, 3),
    st.integers(1, 1300),
    st.sampled_from([1, 3, 64, 1000]),
    st.sampled_from([0, 1]),
    st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_any_length_and_dimension_amid_nan(kernel_device, rows, n, dim, shift, dtype):
    generator = torch.Generator().manual_seed(n)
    grad = torch.randn(rows, n, generator=generator).to(dtype)
    out = torch.randn(rows, dim, generator=generator)
    placed, check_grad = poisoned(grad, kernel_device, shift)
    features, check_out = poisoned(out, kernel_device, shift)
    projector = SJLT(dim=dim, seed=3)
    with counted() as launches:
        projector.accumulate(features, "w", placed)
    assert launches == ["_sjlt_kernel"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OPTIM_BACKEND", "torch")
        projector.accumulate(out, "w", grad)
    torch.testing.assert_close(features.cpu(), out, rtol=1e-5, atol=1e-4)
    check_grad()
    check_out()


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_projected_updates_of_adamw_are_one_kernel(kernel_device, rule, monkeypatch):
    updates = updates_of(rule, (7, 100), kernel_device)
    grad = torch.randn(3, 7, 100, generator=torch.Generator().manual_seed(1)).to(kernel_device) * 0.1
    for projector in (SJLT(dim=64, seed=3), SJLT(dim=100, seed=3)):
        out = torch.zeros(3, projector.dim, device=kernel_device)
        with counted() as launches:
            projector.accumulate_updates(out, updates, "w", grad)
        assert launches == ["_sjlt_kernel"]
        want = reference(monkeypatch, projector, updates, grad)
        torch.testing.assert_close(out, want, rtol=1e-4, atol=1e-4 * want.abs().max().item())


def test_amid_nan_the_directions_stay_clean(kernel_device, monkeypatch):
    rule = AdamWRule()
    n, generator = 777, torch.Generator().manual_seed(0)
    grad, m, v = torch.randn(2, n, generator=generator), torch.randn(n, generator=generator), torch.ones(n)
    placed = [poisoned(x, kernel_device, 1) for x in (grad, m, v)]
    now = rule.scalars(5)
    adam = sjlt.Adam(placed[1][0], placed[2][0], rule.betas, now.scale, now.shrink, rule.eps, rule.eps_root)
    out, check = poisoned(torch.zeros(2, 16), kernel_device)
    sjlt.add_sjlt(out, placed[0][0], key(0, "w", torch.Size([n])), adam)
    updates = UpdateMap(
        {"w": rule}, {"w": {"step": torch.tensor(4.0), "exp_avg": m, "exp_avg_sq": v}}, {"w": torch.zeros(n)}
    )
    torch.testing.assert_close(out.cpu(), reference(monkeypatch, SJLT(dim=16), updates, grad), rtol=1e-4, atol=1e-4)
    for guard in (check, *(c for _, c in placed)):
        guard()


def test_a_row_that_is_not_finite_spoils_no_other(kernel_device):
    updates = updates_of(AdamWRule(), (50,), kernel_device)
    grad = torch.ones(3, 50, device=kernel_device)
    grad[1, 7] = torch.nan
    out = torch.zeros(3, 8, device=kernel_device)
    SJLT(dim=8).accumulate_updates(out, updates, "w", grad)
    assert out.isfinite().all(1).tolist() == [True, False, True]


def test_what_the_kernel_does_not_do_is_left_to_torch(kernel_device):
    """Other rules and projectors, float64, gradients that are not contiguous, deterministic algorithms."""
    shape, generator = (6, 5), torch.Generator().manual_seed(0)
    grad = torch.randn(2, *shape, generator=generator).to(kernel_device)
    cases = [
        (AdamWRule(amsgrad=True), SJLT(dim=8), grad, ["_sjlt_kernel"]),  # of the update, made by torch
        (SGDRule(), SJLT(dim=8), grad, ["_sjlt_kernel"]),
        (AdamWRule(), Rademacher(dim=8), grad, []),
        (AdamWRule(), SJLT(dim=8), grad.double(), ["_sjlt_kernel"]),  # the update is float32 again
    ]
    for rule, projector, given_grad, expected in cases:
        with counted() as launches:
            out = torch.zeros(2, 8, device=kernel_device)
            projector.accumulate_updates(out, updates_of(rule, shape, kernel_device), "w", given_grad)
        assert launches == expected, (rule, projector)
    with counted() as launches:
        out = torch.zeros(2, 8, device=kernel_device)
        SJLT(dim=8).accumulate(out, "w", grad.mT)
        SJLT(dim=8).accumulate(torch.zeros(8, 2, device=kernel_device).T, "w", grad)
        torch.use_deterministic_algorithms(True)
        try:
            SJLT(dim=8).accumulate(out, "w", grad)
        finally:
            torch.use_deterministic_algorithms(False)
    assert launches == []


def test_no_rows_and_no_coordinates(kernel_device):
    for grad in (torch.zeros(0, 5), torch.zeros(2, 0)):
        out = torch.zeros(len(grad), 8, device=kernel_device)
        SJLT(dim=8).accumulate(out, "w", grad.to(kernel_device))
        assert not out.any()
