"""The AdamW kernel against `UpdateRule.step`, whole optimizers and single rows."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from optim import AdamW
from optim.kernels import adamw
from tests.kernels import assert_rounded, counted, odd_sizes, poisoned

SHAPES = [(3,), (1025,), (33, 65), (0,), (), (2, 3, 2)]
SETTINGS = [
    {},
    {"weight_decay": 0.0, "betas": (0.0, 0.9)},
    {"eps_before_correction": True},
    {"bias_correction": False, "eps": 0.0, "eps_root": 1e-8},
]


def trained(device, backend, dtype, kwargs, *, shapes=SHAPES, steps=3):
    """Parameters and states after some steps of AdamW, with a fixed gradient stream."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OPTIM_BACKEND", backend)
        generator = torch.Generator().manual_seed(0)

        def draw(shape):
            return torch.randn(shape, generator=generator).to(device, dtype)

        params = [torch.nn.Parameter(draw(shape)) for shape in shapes]
        optimizer = AdamW(params, **{"lr": 0.01, "weight_decay": 0.1} | kwargs)
        for _ in range(steps):
            for p in params:
                p.grad = draw(p.shape)
            optimizer.step()
    return [p.detach() for p in params], [optimizer.state[p] for p in params]


@pytest.mark.parametrize("kwargs", SETTINGS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_steps_equal_the_definition(kernel_device, kwargs, dtype):
    by_kernel = "triton" if kernel_device.type == "cpu" else "auto"
    with counted() as launches:
        got, got_states = trained(kernel_device, by_kernel, dtype, kwargs, steps=1)
    assert launches == ["_adamw_kernel"], "one launch for the whole group"
    want, want_states = trained(kernel_device, "torch", dtype, kwargs, steps=1)
    for a, b, state, expected in zip(got, want, got_states, want_states, strict=True):
        assert_rounded(a, b, rtol=2e-6, atol=1e-7)
        assert state["step"] == expected["step"] == 1
        for key in ("exp_avg", "exp_avg_sq"):
            torch.testing.assert_close(state[key], expected[key], rtol=2e-6, atol=1e-9)


def test_three_steps_equal_the_definition(kernel_device):
    by_kernel = "triton" if kernel_device.type == "cpu" else "auto"
    got, _ = trained(kernel_device, by_kernel, torch.float32, {})
    want, _ = trained(kernel_device, "torch", torch.float32, {})
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_stochastic_rounding_equals_the_definition(kernel_device):
    """The same bits, so the same parameters but where float32 arithmetic moved a number across the draw."""
    by_kernel = "triton" if kernel_device.type == "cpu" else "auto"
    kwargs = {"stochastic_rounding": True}
    got, _ = trained(kernel_device, by_kernel, torch.bfloat16, kwargs)
    want, _ = trained(kernel_device, "torch", torch.bfloat16, kwargs)
    differing = sum(int((a != b).sum()) for a, b in zip(got, want, strict=True))
    assert differing <= 0.002 * sum(a.numel() for a in got)
    nearest, _ = trained(kernel_device, "torch", torch.bfloat16, {})
    assert sum(int((a != b).sum()) for a, b in zip(nearest, want, strict=True)) > 1000, "it does something"


def test_stochastic_rounding_does_not_lose_small_steps(monkeypatch):
    """Steps of 2^-10 at 1: rounded to nearest nothing ever moves; at random the mean follows."""
    monkeypatch.setenv("OPTIM_BACKEND", "torch")
    ends = {}
    for rounding in (False, True):
        p = torch.nn.Parameter(torch.full((4096,), 1.0, dtype=torch.bfloat16))
        optimizer = AdamW([p], lr=2.0**-10, weight_decay=0.0, stochastic_rounding=rounding)
        for _ in range(16):
            p.grad = torch.ones_like(p)
            optimizer.step()
        ends[rounding] = p.detach().double().mean().item()
    assert ends[False] == 1.0
    assert abs(ends[True] - (1 - 16 * 2.0**-10)) < 5e-4


def test_resuming_rounds_alike(monkeypatch):
    monkeypatch.setenv("OPTIM_BACKEND", "torch")

    def step(p, optimizer):
        p.grad = torch.ones_like(p) * 1e-3
        optimizer.step()

    p = torch.nn.Parameter(torch.linspace(-2, 2, 999).bfloat16())
    optimizer = AdamW([p], stochastic_rounding=True)
    step(p, optimizer)
    q = torch.nn.Parameter(p.detach().clone())
    resumed = AdamW([q], stochastic_rounding=True)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    step(p, optimizer)
    step(q, resumed)
    assert torch.equal(p, q)


@odd_sizes
@given(
    st.integers(1, 2100), st.sampled_from([0, 1, 3]), st.sampled_from([torch.float32, torch.bfloat16]), st.booleans()
)
def test_any_length_and_alignment_amid_nan(kernel_device, n, shift, dtype, rounding):
    """Nothing outside of the tensors is read into them or written."""
    generator = torch.Generator().manual_seed(n)
    drawn = [torch.randn(n, generator=generator) for _ in range(4)]
    values = [drawn[0].to(dtype), drawn[1].to(dtype), drawn[2], drawn[3].square()]
    placed = [poisoned(x, kernel_device, shift) for x in values]
    row = tuple(x for x, _ in placed)
    scalars = adamw.Scalars(2.0, 1.5, 7)
    adamw.adamw_step(
        [row], [scalars], lr=0.1, weight_decay=0.01, betas=(0.9, 0.99), eps=1e-8, stochastic_rounding=rounding
    )
    p, g, m, v = (x.double() for x in values)
    m, v = 0.9 * m + 0.1 * g, 0.99 * v + 0.01 * g * g
    p = p - 0.1 * (2.0 * m / ((1.5 * v).sqrt() + 1e-8) + 0.01 * p)
    torch.testing.assert_close(row[2].cpu().double(), m, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(row[3].cpu().double(), v, rtol=1e-5, atol=1e-6)
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2**-7, "atol": 1e-5}
    torch.testing.assert_close(row[0].cpu().double(), p, **tolerance)
    assert torch.equal(row[1].cpu(), values[1]), "the gradient is only read"
    for _, check in placed:
        check()
