"""Schedules beyond the golden values: ends, edges, refusals, and `LambdaLR`."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR

from optim import SCHEDULES, SGD, group_factors, schedule, schedule_options
from optim.curves import one_cycle_momentum

steps = st.integers(0, 40)


@given(st.sampled_from(sorted(SCHEDULES)), steps, steps, st.integers(0, 90), st.floats(0, 1))
def test_factors_are_between_0_and_1_and_hold_at_the_end(name, total, warmup, step, ratio):
    options = {"warmup_steps": warmup, "min_ratio": ratio}
    factor = schedule(name, total_steps=total, **{k: v for k, v in options.items() if k in schedule_options(name)})
    assert 0 <= factor(step) <= 1
    if step >= total:
        last = {"constant": 1.0, "one_cycle": 1 / 25e4}.get(name, ratio)
        assert factor(step) == pytest.approx(last, abs=1e-12)


@given(st.sampled_from(sorted(set(SCHEDULES) - {"constant", "one_cycle"})), st.integers(1, 40), steps)
def test_up_then_down(name, total, warmup):
    factor = schedule(name, total_steps=total, warmup_steps=warmup)
    values = [factor(t) for t in range(total + 5)]
    top = min(warmup, total)
    assert values[:top] == sorted(values[:top]) and values[top:] == sorted(values[top:], reverse=True)
    if warmup < total:
        assert values[top] == pytest.approx(1.0)


def test_wsd_phases():
    factor = schedule("wsd", total_steps=100, warmup_steps=10, min_ratio=0.1)
    assert [factor(t) for t in (0, 5, 10, 50, 80)] == pytest.approx([0.1, 0.55, 1, 1, 1])
    assert factor(95) == pytest.approx(0.1 + 0.9 * (1 - 0.75**0.5))
    squeezed = schedule("wsd", total_steps=10, warmup_steps=8, decay_steps=9, decay="linear")
    assert [squeezed(t) for t in (7, 8, 9, 10)] == pytest.approx([0.875, 1, 0.5, 0])


@given(st.integers(10, 60), st.floats(0, 1), st.booleans())
def test_one_cycle_is_torchs(total, share, three_phase):
    """At every step that torch's has; past them it raises, and with a rise of no step it divides by zero."""
    share = min(max(share, 1.5 / (total + 1)), 0.45 if three_phase else 0.9)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=1.0, momentum=0.9)
    theirs = OneCycleLR(optimizer, 1.0, total_steps=total + 1, pct_start=share, three_phase=three_phase)
    factor = schedule("one_cycle", total_steps=total, pct_start=share, three_phase=three_phase)
    for step in range(total + 1):
        group = optimizer.param_groups[0]
        assert factor(step) == pytest.approx(group["lr"], rel=1e-9)
        momentum = one_cycle_momentum(step, total_steps=total, pct_start=share, three_phase=three_phase)
        assert momentum == pytest.approx(group["momentum"], rel=1e-9)
        if step < total:
            optimizer.step()
            theirs.step()


@given(st.integers(0, 60), st.floats(0, 1), st.floats(0.01, 4), st.integers(0, 70))
def test_uba_is_rex_of_cosine(total, share, phi, step):
    """phi = 2 is cosine, smaller phi never lower, and d = 0 and power 1 are linear: the limits that theory gives."""
    uba = schedule("uba", total_steps=total, phi=phi)(step)
    cosine = schedule("cosine", total_steps=total)(step)
    assert uba == pytest.approx(cosine / (phi / 2 + (1 - phi / 2) * cosine), rel=1e-9)
    assert schedule("uba", total_steps=total, phi=2.0)(step) == pytest.approx(cosine, abs=1e-12)
    assert uba <= schedule("uba", total_steps=total, phi=phi / 2)(step) + 1e-12
    linear = schedule("linear", total_steps=total)(step)
    assert schedule("rex", total_steps=total, d=0.0)(step) == pytest.approx(linear, abs=1e-12)
    assert schedule("polynomial", total_steps=total, power=1.0)(step) == pytest.approx(linear, abs=1e-12)
    assert linear <= schedule("rex", total_steps=total, d=share * 0.9)(step) + 1e-12


def test_blocks_end_at_one_rate():
    """Peaks differ by their ratios, the last rate does not; other schedules scale every group alike."""
    ratios = (1.0, 4.0, 10.0)
    groups = [{"params": [torch.nn.Parameter(torch.ones(1))], "lr": 0.1 * r, "lr_ratio": r} for r in ratios]
    for name, last in (("blockwise_cosine", 0.05), ("blockwise_wsd", 0.1)):
        optimizer = SGD([dict(group) for group in groups])
        factors = group_factors(optimizer, name, total_steps=30, warmup_steps=3)
        rates = [[0.1 * r * f(t) for r, f in zip(ratios, factors, strict=True)] for t in (3, 30, 40)]
        assert rates[0] == pytest.approx([0.1, 0.4, 1.0]) and rates[1] == rates[2] == pytest.approx([0.1 * last] * 3)
        LambdaLR(optimizer, factors)
    alike = group_factors(SGD([dict(g) for g in groups]), "cosine", total_steps=30, min_ratio=0.1)
    assert [f(30) for f in alike] == pytest.approx([0.1] * 3)


def test_blockwise_wsd_glides():
    factor = schedule("blockwise_wsd", total_steps=90, warmup_steps=10, gamma=0.5, ratio=4.0)
    assert [factor(t) for t in (5, 10, 30, 45, 60, 75, 90)] == pytest.approx([0.25, 0.5, 0.5, 0.75, 1, 0.5125, 0.025])


def test_drives_groups_and_resumes():
    def make():
        groups = [{"params": [torch.nn.Parameter(torch.ones(1))], "lr": lr} for lr in (1.0, 0.1)]
        optimizer = SGD(groups)
        return optimizer, LambdaLR(optimizer, schedule("linear", total_steps=10, warmup_steps=2))

    optimizer, scheduler = make()
    seen = []
    for _ in range(6):
        seen.append([g["lr"] for g in optimizer.param_groups])
        optimizer.step()
        scheduler.step()
    assert seen == [[f, 0.1 * f] for f in (0, 0.5, 1, 7 / 8, 6 / 8, 5 / 8)]
    other, resumed = make()
    other.load_state_dict(optimizer.state_dict())
    resumed.load_state_dict(scheduler.state_dict())
    other.step()
    resumed.step()
    optimizer.step()
    scheduler.step()
    assert resumed.get_last_lr() == scheduler.get_last_lr() == [3 / 8, 0.1 * 3 / 8]


@pytest.mark.parametrize(
    ("error", "part", "call"),
    [
        (ValueError, "did you mean 'cosine'", lambda: schedule("cosin", total_steps=1)),
        (TypeError, "did you mean 'min_ratio'", lambda: schedule("linear", total_steps=1, min_rato=0.1)),
        (TypeError, "min_ratio", lambda: schedule("constant", total_steps=1, min_ratio=0.1)),
        (ValueError, "total_steps", lambda: schedule("linear", total_steps=-1)),
        (ValueError, "total_steps = None", lambda: schedule("linear", total_steps=None)),
        (ValueError, "warmup_steps", lambda: schedule("linear", total_steps=1, warmup_steps=0.5)),
        (ValueError, "warmup_steps = None", lambda: schedule("wsd", total_steps=1, warmup_steps=None)),
        (ValueError, "did you mean 'uba'", lambda: schedule("UBA", total_steps=1)),
        (ValueError, "decay_steps", lambda: schedule("wsd", total_steps=1, decay_steps=-2)),
        (ValueError, "min_ratio", lambda: schedule("wsd", total_steps=1, min_ratio=1.5)),
        (ValueError, "did you mean 'linear'", lambda: schedule("wsd", total_steps=1, decay="liner")),
        (ValueError, "did you mean 'cosine'", lambda: schedule("one_cycle", total_steps=1, anneal="cos")),
        (ValueError, "did you mean 'one_cycle'", lambda: schedule("onecycle", total_steps=1)),
        (TypeError, "warmup_steps", lambda: schedule("one_cycle", total_steps=9, warmup_steps=2)),
        (ValueError, "pct_start", lambda: schedule("one_cycle", total_steps=9, pct_start=30)),
        (ValueError, "div_factor", lambda: schedule("one_cycle", total_steps=9, div_factor=0.5)),
        (ValueError, "three_phase", lambda: schedule("one_cycle", total_steps=9, three_phase="no")),
        (ValueError, "phi", lambda: schedule("uba", total_steps=9, phi=0)),
        (ValueError, "phi", lambda: schedule("uba", total_steps=9, phi="1")),
        (ValueError, "d = 1", lambda: schedule("rex", total_steps=9, d=1)),
        (ValueError, "power", lambda: schedule("polynomial", total_steps=9, power=-1.0)),
        (ValueError, "ratio", lambda: schedule("blockwise_cosine", total_steps=9, ratio=0.0)),
        (ValueError, "gamma", lambda: schedule("blockwise_wsd", total_steps=9, gamma=float("nan"))),
    ],
)
def test_refusals(error, part, call):
    with pytest.raises(error, match=part):
        call()
