"""Counter-based random bits (Philox4x32-10), the same from torch operations on any device and inside kernels.

Element i of a stream has output ``i mod 4`` of the block with counter ``(low and high word of i // 4, stream, 0)``
under the 64-bit key `seed`: it depends on nothing else, so neither on the device nor on how a tensor is cut.
Source: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"; `triton.language.philox`.
"""

import math

import torch
from torch import Tensor

from optim import backend
from optim.fused import counter

_LOW = 0xFFFFFFFF
KEYS = (0x9E3779B9, 0xBB67AE85)
FACTORS = (0xD2511F53, 0xCD9E8D57)
UNIFORM = 4.6566127342e-10  # of 31 bits; the largest float32 for which every product stays below 1


def philox(counters: tuple[Tensor, ...], seed: int) -> tuple[Tensor, ...]:
    """Four words of 32 random bits (as int64) for each counter: four int64 tensors of 32-bit words; 10 rounds."""
    c0, c1, c2, c3 = counters
    k0, k1 = seed & _LOW, (seed >> 32) & _LOW
    for _ in range(10):
        high_a, low_a = _product(FACTORS[0], c0)
        high_b, low_b = _product(FACTORS[1], c2)
        c0, c1, c2, c3 = high_b ^ c1 ^ k0, low_b, high_a ^ c3 ^ k1, low_a
        k0, k1 = (k0 + KEYS[0]) & _LOW, (k1 + KEYS[1]) & _LOW
    return c0, c1, c2, c3


def _product(factor: int, x: Tensor) -> tuple[Tensor, Tensor]:
    """High and low word of a 32 x 32 bit product; in halves, for int64 has no unsigned product of 64 bits."""
    low, high = factor * (x & 0xFFFF), factor * (x >> 16)
    total = (low >> 16) + high
    return total >> 16, ((total & 0xFFFF) << 16) | (low & 0xFFFF)


def random_words(
    n: int, *, seed: int, stream: int | Tensor = 0, start: int = 0, device: torch.device | str = "cpu"
) -> Tensor:
    """int64 [n]: 32 random bits for each of the elements start..start + n of a stream."""
    first = start // 4
    return _words(first, -(-(start + n) // 4), seed, stream, device).flatten()[start - 4 * first :][:n]


def _words(first: int, stop: int, seed: int, stream: int | Tensor, device: torch.device | str) -> Tensor:
    """int64 [stop - first, 4] of these blocks: `philox`, compiled where that is possible."""
    if counter.supports(stream, device):
        return counter.words(first, stop - first, stream, seed)
    block = torch.arange(first, stop, device=device)
    zero = torch.zeros_like(block)
    return torch.stack(philox((block & _LOW, block >> 32, zero + (stream & _LOW), zero), seed), 1)


def normals(
    n: int, *, seed: int, stream: int | Tensor = 0, start: int = 0, device: torch.device | str = "cpu"
) -> Tensor:
    """float32 [n] standard normal: Box-Muller of words 0 and 1, and of words 2 and 3, of each block."""
    first, stop = start // 4, -(-(start + n) // 4)
    if counter.supports(stream, device):
        u = counter.uniforms(first, stop - first, stream, seed)
    else:
        words = _words(first, stop, seed, stream, device)
        signed = torch.where(words >= 1 << 31, words ^ _LOW, words)  # |x| of 32 bits as an int32, minus 1 if negative
        u = signed.float() * UNIFORM
    u = u.reshape(-1, 2, 2)
    radius = (-2.0 * u[..., 0].clamp(min=1e-7).log()).sqrt()
    angle = 2 * math.pi * u[..., 1]
    return torch.stack([radius * angle.cos(), radius * angle.sin()], -1).flatten()[start - 4 * first :][:n]


def stochastic_round(x: Tensor, words: Tensor) -> Tensor:
    """x float32 -> bfloat16, up or down with probabilities that make the expectation x; words: 32 random bits an
    element, of which the lowest 16 count. What is not finite stays so.
    """
    carried = (x.contiguous().view(torch.int32) + (words & 0xFFFF).int().reshape(x.shape)) & -0x10000
    return torch.where(x.isfinite(), carried.view(torch.float32), x).to(torch.bfloat16)


if backend.triton is not None:
    import triton.language as tl

    @backend.jit
    def words_of(start, seed, stream, BLOCK: tl.constexpr):
        """uint32 [BLOCK]: the words of elements start..start + BLOCK; both are multiples of 4."""
        block = start // 4 + tl.arange(0, BLOCK // 4)
        low = (block & 0xFFFFFFFF).to(tl.uint32)
        high = (block >> 32).to(tl.uint32)
        w0, w1, w2, w3 = tl.philox(seed, low, high, low * 0 + stream.to(tl.uint32), low * 0)
        return tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3))

    @backend.jit
    def normals_of(start, seed, stream, BLOCK: tl.constexpr):
        """float32 [BLOCK]: the normals of elements start..start + BLOCK; both are multiples of 4."""
        block = start // 4 + tl.arange(0, BLOCK // 4)
        low = (block & 0xFFFFFFFF).to(tl.uint32)
        high = (block >> 32).to(tl.uint32)
        w0, w1, w2, w3 = tl.philox(seed, low, high, low * 0 + stream.to(tl.uint32), low * 0)
        z0, z1 = _box_muller(w0, w1)
        z2, z3 = _box_muller(w2, w3)
        return tl.interleave(tl.interleave(z0, z2), tl.interleave(z1, z3))

    @backend.jit
    def _box_muller(w0, w1):
        # a GPU's logarithm is approximate: near 1 it must not come out above 0
        radius = tl.sqrt(tl.maximum(-2.0 * tl.log(tl.maximum(tl.uint_to_uniform_float(w0), 1.0e-7)), 0.0))
        angle = 6.283185307179586 * tl.uint_to_uniform_float(w1)
        return radius * tl.cos(angle), radius * tl.sin(angle)

    @backend.jit
    def stochastic_bfloat16(x, words):
        """`stochastic_round` inside a kernel."""
        bits = x.to(tl.uint32, bitcast=True)
        carried = ((bits + (words & 0xFFFF)) & 0xFFFF0000).to(tl.float32, bitcast=True)
        finite = (bits & 0x7F800000) != 0x7F800000
        return tl.where(finite, carried, x).to(tl.bfloat16)
