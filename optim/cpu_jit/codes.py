"""Compiled conversion of blocks of 8-bit codes to float32 numbers and back, for `optim.Quantized`."""

import ctypes
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from optim import backend
from optim.cpu_jit.machine import compiled

_TEXT = """
declare i64 @llvm.smin.i64(i64, i64)
declare i32 @llvm.umax.i32(i32, i32)
declare float @llvm.roundeven.f32(float)

define void @decode(ptr noalias %codes, ptr noalias %scales, ptr noalias %book, ptr noalias %out, i64 %n, i64 %size) {
entry:
  %some = icmp sgt i64 %n, 0
  br i1 %some, label %block, label %done
block:
  %b = phi i64 [ 0, %entry ], [ %b1, %next ]
  %lo = mul i64 %b, %size
  %end = add i64 %lo, %size
  %hi = call i64 @llvm.smin.i64(i64 %end, i64 %n)
  %sp = getelementptr inbounds float, ptr %scales, i64 %b
  %s = load float, ptr %sp
  br label %each
each:
  %j = phi i64 [ %lo, %block ], [ %j1, %each ]
  %cp = getelementptr inbounds i8, ptr %codes, i64 %j
  %c = load i8, ptr %cp
  %ci = zext i8 %c to i64
  %vp = getelementptr inbounds float, ptr %book, i64 %ci
  %v = load float, ptr %vp
  %x = fmul float %v, %s
  %xp = getelementptr inbounds float, ptr %out, i64 %j
  store float %x, ptr %xp
  %j1 = add nuw nsw i64 %j, 1
  %more = icmp slt i64 %j1, %hi
  br i1 %more, label %each, label %next
next:
  %b1 = add nuw nsw i64 %b, 1
  %rest = icmp slt i64 %hi, %n
  br i1 %rest, label %block, label %done
done:
  ret void
}
"""

_ENCODE = """
define void @NAME(ptr noalias %x, ptr noalias %codes, ptr noalias %scales, ptr noalias %first, ptr noalias %limits,
                  i64 %n, i64 %size) {
entry:
  %some = icmp sgt i64 %n, 0
  br i1 %some, label %block, label %done
block:
  %b = phi i64 [ 0, %entry ], [ %b1, %next ]
  %lo = mul i64 %b, %size
  %end = add i64 %lo, %size
  %hi = call i64 @llvm.smin.i64(i64 %end, i64 %n)
  br label %most
most:
  %k = phi i64 [ %lo, %block ], [ %k1, %most ]
  %m = phi i32 [ 0, %block ], [ %m1, %most ]
  %kp = getelementptr inbounds i32, ptr %x, i64 %k
  %kb = load i32, ptr %kp
  %size_bits = and i32 %kb, 2147483647
  %m1 = call i32 @llvm.umax.i32(i32 %m, i32 %size_bits)
  %k1 = add nuw nsw i64 %k, 1
  %kmore = icmp slt i64 %k1, %hi
  br i1 %kmore, label %most, label %scaled
scaled:
  %a = bitcast i32 %m1 to float
  %sp = getelementptr inbounds float, ptr %scales, i64 %b
  store float %a, ptr %sp
  %zero = icmp eq i32 %m1, 0
  %d = select i1 %zero, float 1.0, float %a
  br label %each
each:
  %j = phi i64 [ %lo, %scaled ], [ %j1, %each ]
  %xp = getelementptr inbounds float, ptr %x, i64 %j
  %xv = load float, ptr %xp
  %y = fdiv float %xv, %d
BODY
FLOOR
  %c8 = trunc i32 %c to i8
  %cp = getelementptr inbounds i8, ptr %codes, i64 %j
  store i8 %c8, ptr %cp
  %j1 = add nuw nsw i64 %j, 1
  %more = icmp slt i64 %j1, %hi
  br i1 %more, label %each, label %next
next:
  %b1 = add nuw nsw i64 %b, 1
  %rest = icmp slt i64 %hi, %n
  br i1 %rest, label %block, label %done
done:
  ret void
}
"""

_NEAREST = """
  %bits = bitcast float %y to i32
  %half = lshr i32 %bits, 16
  %hi64 = zext i32 %half to i64
  %fp = getelementptr inbounds i32, ptr %first, i64 %hi64
  %f = load i32, ptr %fp
  %f64 = zext i32 %f to i64
  %lp = getelementptr inbounds float, ptr %limits, i64 %f64
  %limit = load float, ptr %lp
  %above = fcmp ogt float %y, %limit
  %up = zext i1 %above to i32
  %found = add i32 %f, %up
"""

_ROUNDED = """
  %scaledy = fmul float %y, LEVELS
  %near = call float @llvm.roundeven.f32(float %scaledy)
  %found = fptosi float %near to i32
"""

_AT_LEAST_ONE = """
  %positive = fcmp ogt float %y, 0.0
  %least = zext i1 %positive to i32
  %c = call i32 @llvm.umax.i32(i32 %found, i32 %least)
"""

_SAME = """
  %c = add i32 %found, 0
"""

_BODIES = {
    "dynamic": _NEAREST,
    "linear": _ROUNDED.replace("LEVELS", "1.270000e+02"),
    "linear_unsigned": _ROUNDED.replace("LEVELS", "2.550000e+02"),
}


@cache
def _functions() -> tuple[dict[str, Any], object]:
    """Return decode, and encode_KIND with and without the floor, and the object that owns their code."""
    text = _TEXT
    names = []
    for kind, body in _BODIES.items():
        for floor, end in (("floor", _AT_LEAST_ONE), ("plain", _SAME)):
            names.append(f"encode_{kind}_{floor}")
            text += _ENCODE.replace("NAME", names[-1]).replace("BODY", body).replace("FLOOR", end)
    pointer, integer = ctypes.c_void_p, ctypes.c_int64
    address, engine = compiled(text)
    made = {"decode": ctypes.CFUNCTYPE(None, *[pointer] * 4, integer, integer)(address("decode"))}
    for name in names:
        made[name] = ctypes.CFUNCTYPE(None, *[pointer] * 5, integer, integer)(address(name))
    return made, engine


def supports(*tensors: Tensor) -> bool:
    """Return whether compiled code may run and can read these tensors by address.

    Args:
        *tensors: The tensors.

    Returns:
        True if all of them are plain, contiguous and on the CPU.
    """
    return (
        backend.use_cpu_jit()
        and not torch.compiler.is_compiling()
        and all(
            type(t) in (Tensor, Parameter)
            and t.is_cpu
            and t.is_contiguous()
            and not torch._C._functorch.is_functorch_wrapped_tensor(t)
            for t in tensors
        )
    )


def decode(codes: Tensor, scales: Tensor, book: Tensor, block_size: int) -> Tensor:
    """Return the numbers that codes stand for: book[code] times the scale of the block.

    Args:
        codes: Codes of one byte, of any shape.
        scales: The scales of the blocks, float32 [blocks].
        book: The number that each byte stands for, float32 [256].
        block_size: The number of consecutive entries that share a scale.

    Returns:
        Numbers of the shape of `codes`, float32.
    """
    out = torch.empty(codes.shape, dtype=torch.float32, device="cpu")
    made, _ = _functions()
    made["decode"](codes.data_ptr(), scales.data_ptr(), book.data_ptr(), out.data_ptr(), codes.numel(), block_size)
    return out


def encode(
    x: Tensor, codes: Tensor, scales: Tensor, first: Tensor, limits: Tensor, *, kind: str, floor: bool, block_size: int
) -> None:
    """Write the codes and scales of numbers.

    Args:
        x: The numbers, float32 [n].
        codes: Where codes are written, one byte [n].
        scales: Where scales are written, float32 [blocks].
        first: For the kind "dynamic", a code for each upper half of a float32, which is correct or too low by one,
            int32 [65536].
        limits: For the kind "dynamic", the number above which that code is too low, float32 [256].
        kind: "dynamic", "linear" or "linear_unsigned".
        floor: Whether positive numbers never have code 0.
        block_size: The number of consecutive entries that share a scale.
    """
    made, _ = _functions()
    made[f"encode_{kind}_{'floor' if floor else 'plain'}"](
        x.data_ptr(), codes.data_ptr(), scales.data_ptr(), first.data_ptr(), limits.data_ptr(), x.numel(), block_size
    )
