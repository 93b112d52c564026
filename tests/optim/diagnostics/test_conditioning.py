"""Condition numbers and the penalties on them."""

import math

import pytest
import torch

from optim.diagnostics import condition_numbers, condition_penalty, gate_penalty, transformed_l1
from optim.diagnostics.conditioning import gate_closed


@pytest.mark.golden
def test_against_golden(reference):
    stored = reference("condition")
    for shape in ("tall", "square", "wide"):
        weight = torch.tensor(stored[f"W/{shape}"])
        found = condition_numbers(weight)
        for key in ("cond2", "condF"):
            assert found[key] == pytest.approx(float(stored[f"{key}/{shape}"]), rel=1e-7)
        for key, penalty in (
            ("logdet_sq_code", lambda w: condition_penalty(w, form="code")),
            ("logdet_sq_small_side", condition_penalty),
            *((f"tl1_a{a}", lambda w, a=a: transformed_l1(w, a)) for a in (0.5, 1.0, 10.0)),
        ):
            w = weight.clone().requires_grad_()
            value = penalty(w)
            value.backward()
            assert value.item() == pytest.approx(float(stored[f"{key}/{shape}"]), rel=1e-7, abs=1e-9), key
            torch.testing.assert_close(w.grad, torch.tensor(stored[f"{key}_grad/{shape}"]), rtol=1e-7, atol=1e-9)


def test_the_condition_number_is_that_of_numpy_and_scale_free():
    made = torch.Generator().manual_seed(0)
    w = torch.randn(7, 4, generator=made, dtype=torch.float64)
    found = condition_numbers(w)
    assert found["cond2"] == pytest.approx(float(torch.linalg.cond(w)))
    assert found["condF"] == pytest.approx(float(w.norm() * torch.linalg.pinv(w).norm()))
    assert condition_numbers(1e-200 * w)["condF"] == pytest.approx(found["condF"])
    assert found["log10_cond2"] == pytest.approx(math.log10(found["cond2"]))
    assert condition_numbers(w.view(7, 2, 2))["cond2"] == pytest.approx(found["cond2"])


def test_singular_matrices_are_infinite():
    w = torch.outer(torch.arange(1.0, 5), torch.arange(1.0, 4))
    assert condition_numbers(w)["cond2"] == math.inf and condition_numbers(w)["condF"] == math.inf
    assert condition_numbers(torch.zeros(2, 2))["cond2"] == math.inf
    assert math.isnan(condition_numbers(torch.full((2, 2), math.nan))["cond2"])
    with pytest.raises(ValueError, match=r"shape \(3,\)"):
        condition_numbers(torch.ones(3))


def test_the_penalty_bounds_the_volume_alone():
    """Its own warning: eigenvalues 100 and 0.01 cost nothing, although the condition number is 100."""
    n = 2
    uneven = torch.diag(torch.tensor([100.0, 0.01], dtype=torch.float64).sqrt() * math.sqrt(n))
    assert condition_penalty(uneven).item() == pytest.approx(0, abs=1e-5)
    assert condition_numbers(uneven)["cond2"] == pytest.approx(100)
    assert condition_penalty(2 * uneven).item() > 1


def test_the_small_side_works_where_the_published_form_cannot():
    made = torch.Generator().manual_seed(0)
    wide = torch.randn(60, 400, generator=made, requires_grad=True)
    condition_penalty(wide).backward()
    assert wide.grad.isfinite().all() and float(wide.grad.abs().max()) > 0
    other = wide.detach().clone().requires_grad_()
    condition_penalty(other, form="code").backward()
    assert not other.grad.isfinite().all() or float(other.grad.abs().max()) == 0
    with pytest.raises(ValueError, match="form = 'both'"):
        condition_penalty(wide, form="both")


def test_transformed_l1_counts_or_sums_at_its_ends():
    x = torch.tensor([0.0, 0.5, -2.0, 3.0], dtype=torch.float64)
    assert transformed_l1(x, 1e-9).item() == pytest.approx(3, abs=1e-6)
    assert transformed_l1(x, 1e9).item() == pytest.approx(5.5, rel=1e-6)
    with pytest.raises(ValueError, match="a = 0"):
        transformed_l1(x, 0)


def test_gates():
    """Against the hard-concrete distribution itself: the share of samples that are stretched to at most zero."""
    made, log_alpha = torch.Generator().manual_seed(0), torch.tensor([-2.0, 0.0, 3.0])
    u = torch.rand(200_000, 3, generator=made)
    gate = torch.sigmoid((torch.logit(u) + log_alpha) / (2 / 3)) * 1.2 - 0.1
    torch.testing.assert_close(gate_closed(log_alpha), (gate <= 0).float().mean(0), atol=4e-3, rtol=0)
    w = torch.ones(3, 4, requires_grad=True)
    loss = gate_penalty(w, log_alpha, data_size=10, strength=2.0, precision=0.5, a=3.0)
    energy = (1 - gate_closed(log_alpha)) * (2.0 * 4 + 0.25 * 4)
    assert loss.item() == pytest.approx(2.0 / 10 * float((4 * energy / (3 + energy)).sum()))
    loss.backward()
    assert (w.grad > 0).all()
    with pytest.raises(ValueError, match="one gate per row"):
        gate_penalty(w, torch.zeros(2), data_size=10)
