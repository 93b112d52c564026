"""p += scale z with z drawn in the kernel, against the stream in torch operations; and as zeroth order uses it."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from optim import AdamW
from optim.kernels import perturb, philox
from optim.zeroth_order import ZerothOrder, noise
from tests.kernels import assert_rounded, counted, odd_sizes, poisoned

SEED = (1 << 62) + 12345


@odd_sizes
@given(
    st.integers(1, 2100),
    st.sampled_from([0, 1, 2, 4099, (1 << 34) + 3]),
    st.sampled_from([0, 1]),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_any_length_start_and_alignment_amid_nan(kernel_device, n, start, shift, dtype):
    p = torch.linspace(-2, 2, n).to(dtype)
    target, check = poisoned(p, kernel_device, shift)
    perturb.add_normals_(target, 0.5, SEED, start=start)
    want = p.float() + 0.5 * philox.normals(n, seed=SEED, start=start)
    exact = kernel_device.type == "cpu"  # a GPU's logarithm and cosine are approximate
    assert_rounded(target.cpu(), want, rtol=1e-5, atol=2e-6 if exact else 1e-4)
    check()


def test_shards_see_what_the_whole_sees(kernel_device):
    whole = torch.zeros(3000, device=kernel_device)
    perturb.add_normals_(whole, 1.0, SEED)
    parts = [torch.zeros(n, device=kernel_device) for n in (1001, 7, 1992)]
    for part, start in zip(parts, (0, 1001, 1008), strict=True):
        perturb.add_normals_(part, 1.0, SEED, start=start)
    assert torch.equal(torch.cat(parts), whole)


def test_zeroth_order_draws_the_same_numbers_in_both_of_its_ways(kernel_device, monkeypatch):
    """What is added in place (MeZO's perturbation) is what its update regenerates by pieces."""
    monkeypatch.setattr(noise, "PIECE", 2048)
    target = torch.zeros(noise.PIECE + 100, device=kernel_device)
    with counted() as launches:
        noise.add_normal_(target, 1.0, SEED, start=50, total=1 << 20)
    assert launches == ["_perturb_kernel"], "in place, without a buffer"
    with counted() as launches:
        drawn = torch.cat(
            [
                x.clone()
                for _, x in noise.pieces("normal", SEED, 1 << 20, start=50, count=len(target), device=kernel_device)
            ]
        )
    assert set(launches) == {"_perturb_kernel"}
    torch.testing.assert_close(target, drawn, rtol=0, atol=0)


def test_a_zeroth_order_step_moves_weights_by_the_kernel(kernel_device):
    """MeZO on a quadratic: three perturbations in place, an update along the very direction that was tried."""
    p = torch.nn.Parameter(torch.linspace(-1, 1, 50, device=kernel_device))
    source, optimizer = ZerothOrder([("w", p)], eps=1e-3, seed=3), AdamW([p], lr=0.05, weight_decay=0.0)

    def loss():
        return p.detach().square().sum()

    first, start = float(loss()), p.detach().clone()
    with counted() as launches:
        source.step(optimizer, loss)
    assert launches.count("_perturb_kernel") == 4 and launches[-1] == "_adamw_kernel"
    moved = p.detach() - start  # Adam's first step is the sign of the estimate
    torch.testing.assert_close(moved.abs(), torch.full_like(moved, 0.05), rtol=1e-2, atol=0)
    for _ in range(60):
        source.step(optimizer, loss)
    assert float(loss()) < 0.5 * first


def test_perturb_and_restore_leave_rounding_only(kernel_device):
    """+1, -2, +1 times the same z, the three moves of a two-sided estimate."""
    start = torch.linspace(-1, 1, 1000, device=kernel_device)
    p = start.clone()
    for c in (1, -2, 1):
        perturb.add_normals_(p, c * 1e-3, 7)
    torch.testing.assert_close(p, start, rtol=0, atol=1e-6)


def test_on_the_cpu_zeroth_order_keeps_torchs_generator(monkeypatch):
    monkeypatch.delenv("OPTIM_BACKEND", raising=False)
    with counted() as launches:
        noise.add_normal_(torch.zeros(10), 1.0, 3)
    assert launches == []


def test_what_is_not_contiguous_is_left_alone(kernel_device):
    if kernel_device.type == "cuda":
        pytest.skip("the rest of the path is torch's own")
    target = torch.zeros(20, 3).T
    with counted() as launches:
        noise.add_normal_(target, 1.0, 3)
    assert "_perturb_kernel" in launches, "its pieces are drawn by the kernel"
    assert len(target.unique()) == 60
