"""Schedules beyond the golden values: ends, edges, refusals, and `LambdaLR`."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.optim.lr_scheduler import LambdaLR

from optim import SCHEDULES, SGD, schedule

steps = st.integers(0, 40)


@given(st.sampled_from(sorted(SCHEDULES)), steps, steps, st.integers(0, 90), st.floats(0, 1))
def test_factors_are_between_0_and_1_and_hold_at_the_end(name, total, warmup, step, ratio):
    options = {} if name == "constant" else {"min_ratio": ratio}
    factor = schedule(name, total_steps=total, warmup_steps=warmup, **options)
    assert 0 <= factor(step) <= 1
    if step >= total:
        assert factor(step) == pytest.approx(1.0 if name == "constant" else ratio, abs=1e-12)


@given(st.sampled_from(["linear", "cosine", "wsd"]), st.integers(1, 40), steps)
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
        (ValueError, "warmup_steps", lambda: schedule("linear", total_steps=1, warmup_steps=0.5)),
        (ValueError, "decay_steps", lambda: schedule("wsd", total_steps=1, decay_steps=-2)),
        (ValueError, "min_ratio", lambda: schedule("wsd", total_steps=1, min_ratio=1.5)),
        (ValueError, "did you mean 'linear'", lambda: schedule("wsd", total_steps=1, decay="liner")),
    ],
)
def test_refusals(error, part, call):
    with pytest.raises(error, match=part):
        call()
