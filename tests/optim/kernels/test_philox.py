"""Random bits by counter: published answers, statistics, and the same bits inside kernels."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from optim import backend
from optim.kernels import philox

ANSWERS = [  # Random123 1.09, kat_vectors, philox4x32 10
    ((0, 0, 0, 0), 0, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (1 << 64) - 1, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        0x299F31D0A4093822,
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "seed", "words"), ANSWERS)
def test_published_answers(counter, seed, words):
    assert tuple(int(w) for w in philox.philox(tuple(torch.tensor([c]) for c in counter), seed)) == words


@given(st.integers(0, 40), st.integers(0, 40), st.sampled_from([0, 1 << 34, (1 << 40) + 3]), st.integers(0, 2**63 - 1))
def test_elements_do_not_depend_on_where_the_drawing_starts(skip, n, start, seed):
    whole = philox.random_words(skip + n, seed=seed, stream=5, start=start)
    assert torch.equal(whole[skip:], philox.random_words(n, seed=seed, stream=5, start=start + skip))
    normals = philox.normals(skip + n, seed=seed, start=start)
    assert torch.equal(normals[skip:], philox.normals(n, seed=seed, start=start + skip))


@pytest.mark.skipif(not backend.use_cpu_jit(), reason="llvmlite is not installed, or OPTIM_BACKEND=torch")
@pytest.mark.parametrize(("seed", "stream", "start", "n"), [
    (0, 0, 0, 0), (3, torch.tensor(5), 7, 1001), ((1 << 63) - 1, (1 << 32) - 1, (1 << 40) + 3, 77),
    (1 << 32, 9, 4 << 32, 33),
])  # fmt: skip
def test_compiled_words_and_normals_are_those_of_the_definition(seed, stream, start, n, monkeypatch):
    draws = {}
    for chosen in ("auto", "torch"):
        monkeypatch.setenv("OPTIM_BACKEND", chosen)
        draws[chosen] = [
            draw(n, seed=seed, stream=stream, start=start) for draw in (philox.random_words, philox.normals)
        ]
    for compiled, defined in zip(draws["auto"], draws["torch"], strict=True):
        assert compiled.dtype == defined.dtype and torch.equal(compiled, defined)


def test_streams_seeds_and_blocks_beyond_32_bits_differ():
    draws = [
        philox.random_words(8, seed=s, stream=t, start=a)
        for s, t, a in [(0, 0, 0), (1, 0, 0), (1 << 32, 0, 0), (0, 1, 0), (0, 0, 8), (0, 0, 4 << 32)]
    ]
    assert len({tuple(d.tolist()) for d in draws}) == len(draws)


def test_normals_are_normal():
    """200,000 draws: mean, variance, fourth moment and neighbours' products within 5 standard errors."""
    z = philox.normals(200_000, seed=3).double()
    n = len(z)
    assert abs(z.mean()) < 5 / n**0.5
    assert abs(z.square().mean() - 1) < 5 * (2 / n) ** 0.5
    assert abs(z.pow(4).mean() - 3) < 5 * (96 / n) ** 0.5
    assert abs((z[1:] * z[:-1]).mean()) < 5 / n**0.5
    assert z.isfinite().all()


def test_stochastic_rounding_is_right_on_average():
    """Each of 20,000 copies goes to one of the two neighbours; the mean is the number, within 5 standard errors."""
    for x in (1.001, -3.1415, 1e-30, 2.0**-130):
        exact = torch.full((20_000,), x)
        got = philox.stochastic_round(exact, philox.random_words(20_000, seed=1)).double()
        low, high = got.min(), got.max()
        assert len(got.unique()) <= 2 and low <= exact[0].double() <= high
        assert abs(got.mean() - exact[0].double()) <= 5 * (high - low) / 2 / 20_000**0.5


def test_stochastic_rounding_leaves_what_bfloat16_holds_and_what_is_not_finite():
    words = philox.random_words(7, seed=0)
    x = torch.tensor([0.0, -0.0, 1.5, -(2.0**100), torch.inf, -torch.inf, torch.nan])
    got = philox.stochastic_round(x, words)
    torch.testing.assert_close(got.float(), x, rtol=0, atol=0, equal_nan=True)
