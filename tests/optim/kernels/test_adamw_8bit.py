"""8-bit AdamW in one pass against the wrapper's own step: codes, scales, parameters."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from optim import AdamW8bit
from optim.kernels import adamw, adamw_8bit
from optim.rules.wrappers.codebooks import BOOKS
from tests.kernels import assert_rounded, counted, odd_sizes, poisoned

BOOKS = (BOOKS["dynamic", True].values, BOOKS["dynamic", False].values)


def trained(device, backend, dtype, steps, **kwargs):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OPTIM_BACKEND", backend)
        generator = torch.Generator().manual_seed(0)

        def draw(shape):
            return torch.randn(shape, generator=generator).to(device, dtype)

        params = [torch.nn.Parameter(draw(shape)) for shape in ((700,), (33, 65), (3,))]
        optimizer = AdamW8bit(params, **{"lr": 0.01, "weight_decay": 0.1, "min_size": 16} | kwargs)
        for _ in range(steps):
            for p in params:
                p.grad = draw(p.shape)
            optimizer.step()
    return [p.detach() for p in params], [optimizer.state[p] for p in params]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("block_size", [16, 256, 4096])
def test_steps_equal_the_wrapper(kernel_device, dtype, block_size):
    by_kernel = "triton" if kernel_device.type == "cpu" else "auto"
    steps = 3 if dtype == torch.float32 else 1
    with counted() as launches:
        got, got_states = trained(kernel_device, by_kernel, dtype, steps, block_size=block_size)
    assert launches == ["_adamw_8bit_kernel", "_adamw_kernel"] * steps, "the small tensor keeps its moments in full"
    want, want_states = trained(kernel_device, "torch", dtype, steps, block_size=block_size)
    for a, b, state, expected in zip(got, want, got_states, want_states, strict=True):
        assert_rounded(a, b, rtol=1e-5, atol=1e-6)
        assert state.keys() == expected.keys() and state["step"] == steps
        for key in state:
            if state[key].dtype == torch.uint8:  # a number on the edge between two codes may go either way
                apart = (state[key].int() - expected[key].int()).abs()
                assert apart.max() <= 1 and (apart > 0).float().mean() <= 0.002
            else:
                torch.testing.assert_close(state[key], expected[key], rtol=1e-5, atol=1e-9)


def test_bfloat16_parameters_are_rounded_with_the_same_bits(kernel_device):
    by_kernel = "triton" if kernel_device.type == "cpu" else "auto"
    got, _ = trained(kernel_device, by_kernel, torch.bfloat16, 2, stochastic_rounding=True)
    want, _ = trained(kernel_device, "torch", torch.bfloat16, 2, stochastic_rounding=True)
    assert sum(int((a != b).sum()) for a, b in zip(got, want, strict=True)) <= 6


def test_what_the_kernel_does_not_do_is_left_to_the_wrapper(kernel_device):
    by_kernel = "triton" if kernel_device.type == "cpu" else "auto"
    for kwargs in ({"amsgrad": True}, {"code": "linear"}, {"stochastic": True}, {"block_size": 100}):
        with counted() as launches:
            trained(kernel_device, by_kernel, torch.float32, 1, **kwargs)
        assert "_adamw_8bit_kernel" not in launches, kwargs


@pytest.mark.parametrize("signed", [True, False])
def test_codes_at_every_limit_are_the_books(kernel_device, signed):
    """On both sides of each of the 255 limits, on them, and at values: the entry that a search of the book finds."""
    book = BOOKS[0 if signed else 1]
    limits = (book[:-1] + book[1:]) / 2
    up, down = torch.tensor(torch.inf), torch.tensor(-torch.inf)
    y = torch.cat([limits, limits.nextafter(up), limits.nextafter(down), book, torch.tensor([1e-9, 3e-8, 1e-30])])
    y = y[y.abs() < 1]
    if not signed:
        y = y[y >= 0]
    step = -(-len(y) // 255)
    rows = torch.cat([torch.ones(step, 1), torch.nn.functional.pad(y, (0, step * 255 - len(y))).view(step, 255)], 1)
    g = rows.flatten()  # blocks of 256, each with a 1 in it: the scale is 1
    n = len(g)
    g = g if signed else g.sqrt()  # v = g^2: what is then searched for is the square's own rounding
    state = [torch.zeros(n, dtype=torch.uint8), torch.zeros(step), torch.zeros(n, dtype=torch.uint8), torch.zeros(step)]
    row = tuple(x.to(kernel_device) for x in (torch.zeros(n), g, *state))
    adamw_8bit.adamw_8bit_step(
        [row],
        [adamw.Scalars(1.0, 1.0, 1)],
        books=BOOKS,
        block_size=256,
        lr=0.0,
        weight_decay=0.0,
        betas=(0.0, 0.0),
        eps=1.0,
        floor=False,
    )
    codes = row[2 if signed else 4].cpu().long()
    want = torch.bucketize(g if signed else g * g, limits)
    assert torch.equal(codes, want)


@odd_sizes
@given(st.integers(1, 700), st.sampled_from([0, 1, 5]), st.sampled_from([16, 64, 256]))
def test_any_length_and_alignment_amid_poison(kernel_device, n, shift, block_size):
    """The last block is shorter; scales are of what is inside, codes the nearest; a spike stays in its block."""
    generator = torch.Generator().manual_seed(n)
    p, g = torch.randn(n, generator=generator), torch.randn(n, generator=generator)
    g[n // 2] = 1e4
    blocks = -(-n // block_size)
    codes = [torch.randint(0, 256, (n,), generator=generator, dtype=torch.uint8) for _ in range(2)]
    scales = [torch.rand(blocks, generator=generator) for _ in range(2)]
    values = [p, g, codes[0], scales[0], codes[1], scales[1]]
    placed = [poisoned(x, kernel_device, shift) for x in values]
    row = tuple(x for x, _ in placed)
    adamw_8bit.adamw_8bit_step(
        [row],
        [adamw.Scalars(2.0, 1.5, 1)],
        books=BOOKS,
        block_size=block_size,
        lr=0.1,
        weight_decay=0.01,
        betas=(0.9, 0.99),
        eps=1e-8,
    )
    p, g = p.double(), g.double()
    m, v = (
        book.double()[code.int()] * scale.double().repeat_interleave(block_size)[:n]
        for book, code, scale in zip(BOOKS, codes, scales, strict=True)
    )
    m, v = 0.9 * m + 0.1 * g, 0.99 * v + 0.01 * g * g
    p = p - 0.1 * (2.0 * m / ((1.5 * v).sqrt() + 1e-8) + 0.01 * p)
    torch.testing.assert_close(row[0].cpu().double(), p, rtol=1e-4, atol=1e-5)
    for x, book, code, scale in ((m, BOOKS[0], row[2], row[3]), (v, BOOKS[1], row[4], row[5])):
        largest = torch.stack([part.abs().max() for part in x.split(block_size)])
        torch.testing.assert_close(scale.cpu().double(), largest, rtol=1e-5, atol=1e-12)
        y = x / largest.repeat_interleave(block_size)[:n]
        chosen = (book.double()[code.cpu().int()] - y).abs()
        nearest = (book.double()[None, :] - y[:, None]).abs().amin(1)
        positive_without_zero = (book[0] == 0) & (code.cpu() == 1)
        assert ((chosen <= nearest + 1e-6) | positive_without_zero).all()
    assert not ((v > 0) & (row[4].cpu() == 0)).any(), "a positive second moment is never decoded to zero"
    for _, check in placed:
        check()
