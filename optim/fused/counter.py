"""Random words by counter, compiled: what `optim.kernels.philox` draws on a CPU."""

import ctypes
from functools import cache
from typing import Any

import torch
from torch import Tensor

from optim import backend
from optim.fused import codes
from optim.fused.arithmetic import literal
from optim.fused.machine import compiled

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
    """words and uniforms, and what owns their code."""
    from optim.kernels import philox  # which draws by this module

    rounds = "".join(
        _ROUND.format(
            r=r,
            s=r + 1,
            key_a=r * philox.KEYS[0] & 0xFFFFFFFF,
            key_b=r * philox.KEYS[1] & 0xFFFFFFFF,
            factor_a=philox.FACTORS[0],
            factor_c=philox.FACTORS[1],
        )
        for r in range(10)
    )
    text = ""
    for name, store in _STORE.items():
        stores = "".join(store.format(j=j, word=word) for j, word in enumerate("abcd"))
        text += _LOOP.replace("NAME", name).replace("ROUNDS", rounds).replace("STORES", stores)
    integer, pointer = ctypes.c_int64, ctypes.c_void_p
    address, engine = compiled(text.replace("UNIFORM", literal(philox.UNIFORM, "float")))
    kind = ctypes.CFUNCTYPE(None, pointer, integer, integer, ctypes.c_uint32, ctypes.c_uint64)
    return {name: kind(address(name)) for name in _STORE}, engine


def supports(stream: int | Tensor, device: torch.device | str) -> bool:
    """Whether a stream on the CPU has a number that may be read, and compiled code may run."""
    return (
        torch.device(device).type == "cpu"
        and backend.use_fused()
        and not torch.compiler.is_compiling()
        and (not isinstance(stream, Tensor) or codes.supports(stream))
    )


def words(first: int, blocks: int, stream: int | Tensor, seed: int) -> Tensor:
    """int64 [blocks, 4]: the words of blocks `first` and on."""
    return _drawn("words", torch.int64, first, blocks, stream, seed)


def uniforms(first: int, blocks: int, stream: int | Tensor, seed: int) -> Tensor:
    """float32 [blocks, 4]: each word as a number of 31 bits from 0 to below 1."""
    return _drawn("uniforms", torch.float32, first, blocks, stream, seed)


def _drawn(name: str, dtype: torch.dtype, first: int, blocks: int, stream: int | Tensor, seed: int) -> Tensor:
    out = torch.empty(blocks, 4, dtype=dtype, device="cpu")
    made, _ = _functions()
    made[name](out.data_ptr(), first, blocks, int(stream) & 0xFFFFFFFF, seed & 0xFFFFFFFFFFFFFFFF)
    return out
