"""Counter-based random bits (Philox4x32-10), equal in torch operations, compiled for the CPU, and inside kernels.

Element i of a stream is output ``i mod 4`` of the block with counter ``(low and high word of i // 4, stream, 0)`` under
the 64-bit key `seed`. It depends on nothing else, neither on the device nor on how a tensor is divided.

Source:
    Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"; `triton.language.philox`.
"""

import ctypes
import math
from functools import cache
from typing import Any

import torch
from jaxtyping import BFloat16, Float32, Int, Int64
from torch import Tensor

from optim import backend
from optim.cpu_jit import codes
from optim.cpu_jit.kinds import literal
from optim.cpu_jit.machine import compiled

_LOW = 0xFFFFFFFF
KEYS = (0x9E3779B9, 0xBB67AE85)
FACTORS = (0xD2511F53, 0xCD9E8D57)
UNIFORM = 4.6566127342e-10  # the largest float32 whose product with every number of 31 bits is below 1


def philox(counters: tuple[Tensor, ...], seed: int) -> tuple[Tensor, ...]:
    """Return four words of 32 random bits per counter after 10 rounds.

    Args:
        counters: Four int64 tensors of equal shapes, whose entries are 32-bit words.
        seed: The 64-bit key.

    Returns:
        Four int64 tensors of that shape.
    """
    c0, c1, c2, c3 = counters
    k0, k1 = seed & _LOW, (seed >> 32) & _LOW
    for _ in range(10):
        high_a, low_a = _product(FACTORS[0], c0)
        high_b, low_b = _product(FACTORS[1], c2)
        c0, c1, c2, c3 = high_b ^ c1 ^ k0, low_b, high_a ^ c3 ^ k1, low_a
        k0, k1 = (k0 + KEYS[0]) & _LOW, (k1 + KEYS[1]) & _LOW
    return c0, c1, c2, c3


def _product(factor: int, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the high and low word of a 32 x 32 bit product, in halves, because int64 cannot hold an unsigned one."""
    low, high = factor * (x & 0xFFFF), factor * (x >> 16)
    total = (low >> 16) + high
    return total >> 16, ((total & 0xFFFF) << 16) | (low & 0xFFFF)


def random_words(
    n: int, *, seed: int, stream: int | Tensor = 0, start: int = 0, device: torch.device | str = "cpu"
) -> Int64[Tensor, " n"]:
    """Return random bits for consecutive elements of a stream.

    Args:
        n: The number of elements.
        seed: The 64-bit key.
        stream: The number of the stream, below 2^32.
        start: The index of the first element.
        device: The device of the result.

    Returns:
        32 random bits per element, int64 [n].
    """
    first = start // 4
    return _words(first, -(-(start + n) // 4), seed, stream, device).flatten()[start - 4 * first :][:n]


def _words(first: int, stop: int, seed: int, stream: int | Tensor, device: torch.device | str) -> Tensor:
    """Return the words of blocks first..stop, int64 [stop - first, 4], by compiled code if possible."""
    if _is_compiled(stream, device):
        return _compiled_words(first, stop - first, stream, seed)
    block = torch.arange(first, stop, device=device)
    zero = torch.zeros_like(block)
    return torch.stack(philox((block & _LOW, block >> 32, zero + (stream & _LOW), zero), seed), 1)


def normals(
    n: int, *, seed: int, stream: int | Tensor = 0, start: int = 0, device: torch.device | str = "cpu"
) -> Float32[Tensor, " n"]:
    """Return standard normal numbers for consecutive elements of a stream.

    They are computed from each block by the Box-Muller transform of words 0 and 1, and of words 2 and 3.

    Args:
        n: The number of elements.
        seed: The 64-bit key.
        stream: The number of the stream, below 2^32.
        start: The index of the first element.
        device: The device of the result.

    Returns:
        Normal numbers, float32 [n].
    """
    first, stop = start // 4, -(-(start + n) // 4)
    if _is_compiled(stream, device):
        u = _compiled_uniforms(first, stop - first, stream, seed)
    else:
        words = _words(first, stop, seed, stream, device)
        signed = torch.where(words >= 1 << 31, words ^ _LOW, words)  # |x| of 32 bits as an int32, minus 1 if negative
        u = signed.float() * UNIFORM
    u = u.reshape(-1, 2, 2)
    radius = (-2.0 * u[..., 0].clamp(min=1e-7).log()).sqrt()
    angle = 2 * math.pi * u[..., 1]
    return torch.stack([radius * angle.cos(), radius * angle.sin()], -1).flatten()[start - 4 * first :][:n]


def stochastic_round(x: Float32[Tensor, "*shape"], words: Int[Tensor, "..."]) -> BFloat16[Tensor, "*shape"]:
    """Round up or down to bfloat16 at random, such that the expectation is x.

    Args:
        x: A float32 tensor of any shape.
        words: 32 random bits per element, of which the lowest 16 are used.

    Returns:
        A bfloat16 tensor of x's shape. Entries that are not finite do not change.
    """
    carried = (x.contiguous().view(torch.int32) + (words & 0xFFFF).int().reshape(x.shape)) & -0x10000
    return torch.where(x.isfinite(), carried.view(torch.float32), x).to(torch.bfloat16)


_LOOP = """
define void @NAME(ptr noalias %out, i64 %first, i64 %n, i32 %stream, i64 %seed) {
entry:
  %seed_high = lshr i64 %seed, 32
  %k0 = trunc i64 %seed to i32
  %k1 = trunc i64 %seed_high to i32
  %some = icmp sgt i64 %n, 0
  br i1 %some, label %each, label %done
each:
  %i = phi i64 [ 0, %entry ], [ %i1, %each ]
  %block = add i64 %first, %i
  %block_high = lshr i64 %block, 32
  %a0 = trunc i64 %block to i32
  %b0 = trunc i64 %block_high to i32
  %c0 = add i32 %stream, 0
  %d0 = add i32 0, 0
ROUNDS
  %at = mul i64 %i, 4
STORES
  %i1 = add nuw nsw i64 %i, 1
  %more = icmp slt i64 %i1, %n
  br i1 %more, label %each, label %done
done:
  ret void
}
"""

_ROUND = """
  %ka{r} = add i32 %k0, {key_a}
  %kb{r} = add i32 %k1, {key_b}
  %wa{r} = zext i32 %a{r} to i64
  %wc{r} = zext i32 %c{r} to i64
  %pa{r} = mul i64 %wa{r}, {factor_a}
  %pc{r} = mul i64 %wc{r}, {factor_c}
  %sa{r} = lshr i64 %pa{r}, 32
  %sc{r} = lshr i64 %pc{r}, 32
  %ha{r} = trunc i64 %sa{r} to i32
  %hc{r} = trunc i64 %sc{r} to i32
  %b{s} = trunc i64 %pc{r} to i32
  %d{s} = trunc i64 %pa{r} to i32
  %xa{r} = xor i32 %hc{r}, %b{r}
  %a{s} = xor i32 %xa{r}, %ka{r}
  %xc{r} = xor i32 %ha{r}, %d{r}
  %c{s} = xor i32 %xc{r}, %kb{r}
"""

_STORE = {
    "words": """
  %z{j} = zext i32 %{word}10 to i64
  %i{j}at = add i64 %at, {j}
  %p{j} = getelementptr inbounds i64, ptr %out, i64 %i{j}at
  store i64 %z{j}, ptr %p{j}
""",
    "uniforms": """
  %g{j} = ashr i32 %{word}10, 31
  %m{j} = xor i32 %{word}10, %g{j}
  %f{j} = sitofp i32 %m{j} to float
  %u{j} = fmul float %f{j}, UNIFORM
  %i{j}at = add i64 %at, {j}
  %p{j} = getelementptr inbounds float, ptr %out, i64 %i{j}at
  store float %u{j}, ptr %p{j}
""",
}


@cache
def _functions() -> tuple[dict[str, Any], object]:
    """Return words and uniforms, and the object that owns their code."""
    rounds = "".join(
        _ROUND.format(
            r=r,
            s=r + 1,
            key_a=r * KEYS[0] & 0xFFFFFFFF,
            key_b=r * KEYS[1] & 0xFFFFFFFF,
            factor_a=FACTORS[0],
            factor_c=FACTORS[1],
        )
        for r in range(10)
    )
    text = ""
    for name, store in _STORE.items():
        stores = "".join(store.format(j=j, word=word) for j, word in enumerate("abcd"))
        text += _LOOP.replace("NAME", name).replace("ROUNDS", rounds).replace("STORES", stores)
    integer, pointer = ctypes.c_int64, ctypes.c_void_p
    address, engine = compiled(text.replace("UNIFORM", literal(UNIFORM, "float")))
    kind = ctypes.CFUNCTYPE(None, pointer, integer, integer, ctypes.c_uint32, ctypes.c_uint64)
    return {name: kind(address(name)) for name in _STORE}, engine


def _is_compiled(stream: int | Tensor, device: torch.device | str) -> bool:
    """Return whether compiled code may run on this device and can read the number of the stream."""
    return (
        torch.device(device).type == "cpu"
        and backend.use_cpu_jit()
        and not torch.compiler.is_compiling()
        and (not isinstance(stream, Tensor) or codes.supports(stream))
    )


def _compiled_words(first: int, blocks: int, stream: int | Tensor, seed: int) -> Tensor:
    """Return the words of blocks from `first` on, int64 [blocks, 4]."""
    return _drawn("words", torch.int64, first, blocks, stream, seed)


def _compiled_uniforms(first: int, blocks: int, stream: int | Tensor, seed: int) -> Tensor:
    """Return each word as a number of 31 bits in [0, 1), float32 [blocks, 4]."""
    return _drawn("uniforms", torch.float32, first, blocks, stream, seed)


def _drawn(name: str, dtype: torch.dtype, first: int, blocks: int, stream: int | Tensor, seed: int) -> Tensor:
    out = torch.empty(blocks, 4, dtype=dtype, device="cpu")
    made, _ = _functions()
    made[name](out.data_ptr(), first, blocks, int(stream) & 0xFFFFFFFF, seed & 0xFFFFFFFFFFFFFFFF)
    return out


if backend.triton is not None:
    import triton.language as tl

    @backend.jit
    def words_of(start, seed, stream, BLOCK: tl.constexpr):
        """Return the words of elements start..start + BLOCK, uint32 [BLOCK]; start and BLOCK are multiples of 4."""
        block = start // 4 + tl.arange(0, BLOCK // 4)
        low = (block & 0xFFFFFFFF).to(tl.uint32)
        high = (block >> 32).to(tl.uint32)
        w0, w1, w2, w3 = tl.philox(seed, low, high, low * 0 + stream.to(tl.uint32), low * 0)
        return tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3))

    @backend.jit
    def normals_of(start, seed, stream, BLOCK: tl.constexpr):
        """Return the normals of elements start..start + BLOCK, float32 [BLOCK]; start and BLOCK are multiples of 4."""
        block = start // 4 + tl.arange(0, BLOCK // 4)
        low = (block & 0xFFFFFFFF).to(tl.uint32)
        high = (block >> 32).to(tl.uint32)
        w0, w1, w2, w3 = tl.philox(seed, low, high, low * 0 + stream.to(tl.uint32), low * 0)
        z0, z1 = _box_muller(w0, w1)
        z2, z3 = _box_muller(w2, w3)
        return tl.interleave(tl.interleave(z0, z2), tl.interleave(z1, z3))

    @backend.jit
    def _box_muller(w0, w1):
        # a GPU's logarithm is approximate, and that of numbers near 1 must not be positive
        radius = tl.sqrt(tl.maximum(-2.0 * tl.log(tl.maximum(tl.uint_to_uniform_float(w0), 1.0e-7)), 0.0))
        angle = 6.283185307179586 * tl.uint_to_uniform_float(w1)
        return radius * tl.cos(angle), radius * tl.sin(angle)

    @backend.jit
    def stochastic_bfloat16(x, words):
        """Round stochastically as `stochastic_round` does, inside a kernel."""
        bits = x.to(tl.uint32, bitcast=True)
        carried = ((bits + (words & 0xFFFF)) & 0xFFFF0000).to(tl.float32, bitcast=True)
        finite = (bits & 0x7F800000) != 0x7F800000
        return tl.where(finite, carried, x).to(tl.bfloat16)
