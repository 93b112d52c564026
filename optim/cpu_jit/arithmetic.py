"""Operations on numbers as LLVM assembly: IEEE arithmetic in the dtype that torch would use."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeAlias

import torch

from optim.cpu_jit.arctangent import atan2
from optim.cpu_jit.kinds import FILLS, TYPES, VIEWS, Kinds, literal
from optim.cpu_jit.trace import Node, Number, Unsupported

_COMPARISONS = {"gt": "ogt", "ge": "oge", "lt": "olt", "le": "ole", "eq": "oeq", "ne": "une"}
_INTRINSICS = {"sqrt", "exp", "log", "sin", "cos", "tanh", "floor", "ceil", "exp2", "log2", "log10"}
_LOGICAL = {f"{kind}_{name}" for kind in ("logical", "bitwise") for name in ("and", "or", "xor", "not")}
_BINARY = {"mul": "fmul", "div": "fdiv", "true_divide": "fdiv", "fmod": "frem"}

Slot: TypeAlias = tuple[str, str]
"""A value in the code, as its name or literal and its type."""


@dataclass
class Block:
    """A sequence of instructions without branches, and the values that it has computed.

    Args:
        lines: The instructions.
        known: The computed values, by what they stand for.
    """

    lines: list[str] = field(default_factory=list)
    known: dict[Any, Slot] = field(default_factory=dict)


class Code:
    """The instructions of one function, with unique names.

    Args:
        kinds: The kinds of the step's values.
        declared: The declarations of functions that are called, to which others are added.
    """

    def __init__(self, kinds: Kinds, declared: set[str]) -> None:
        self.kinds, self.declared = kinds, declared
        self.count = 0

    def put(self, block: Block, text: str) -> str:
        """Append an instruction to a block.

        Args:
            block: The block.
            text: The instruction, without its result.

        Returns:
            The name of its result.
        """
        self.count += 1
        name = f"%v{self.count}"
        block.lines.append(f"  {name} = {text}")
        return name

    def call(self, block: Block, intrinsic: str, ty: str, *args: str) -> str:
        """Append a call of an LLVM intrinsic on floats or doubles.

        Args:
            block: The block.
            intrinsic: The name of the intrinsic, such as "sqrt".
            ty: The type of its arguments and result.
            *args: The arguments.

        Returns:
            The name of its result.
        """
        symbol = f"@llvm.{intrinsic}.{'f32' if ty == 'float' else 'f64'}"
        self.declared.add(f"declare {ty} {symbol}({', '.join([ty] * len(args))})")
        return self.put(block, f"call {ty} {symbol}({', '.join(f'{ty} {a}' for a in args)})")

    def library(self, block: Block, function: str, ty: str, *args: str) -> str:
        """Append a call of a function of the C library on floats or doubles.

        Args:
            block: The block.
            function: The name of the function for doubles, such as "atan2".
            ty: The type of its arguments and result.
            *args: The arguments.

        Returns:
            The name of its result.
        """
        symbol = f"@{function}{'f' if ty == 'float' else ''}"
        self.declared.add(f"declare {ty} {symbol}({', '.join([ty] * len(args))})")
        return self.put(block, f"call {ty} {symbol}({', '.join(f'{ty} {a}' for a in args)})")

    def convert(self, block: Block, slot: Slot, ty: str) -> str:
        """Convert a value to float, double or i1.

        Args:
            block: The block.
            slot: The value.
            ty: The type.

        Returns:
            The name of the converted value.
        """
        value, have = slot
        if have == ty:
            return value
        if have == "i1":
            return self.put(block, f"uitofp i1 {value} to {ty}")
        if ty == "i1":
            return self.put(block, f"fcmp une {have} {value}, {literal(0, have)}")
        return self.put(block, f"{'fpext' if ty == 'double' else 'fptrunc'} {have} {value} to {ty}")

    def load(self, block: Block, pointer: str, dtype: torch.dtype, index: str) -> Slot:
        """Load an element of a tensor; elements of 16 bits are loaded as floats.

        Args:
            block: The block.
            pointer: The address of the tensor.
            dtype: The dtype of the tensor.
            index: The index of the element.

        Returns:
            The value.
        """
        ty, kept = TYPES[dtype]
        at = self.put(block, f"getelementptr inbounds {kept}, ptr {pointer}, i64 {index}")
        raw = self.put(block, f"load {kept}, ptr {at}")
        if dtype == torch.bfloat16:
            wide = self.put(block, f"zext i16 {raw} to i32")
            high = self.put(block, f"shl i32 {wide}, 16")
            return self.put(block, f"bitcast i32 {high} to float"), ty
        if dtype == torch.float16:
            return self.put(block, f"fpext half {raw} to float"), ty
        if dtype == torch.bool:
            return self.put(block, f"icmp ne i8 {raw}, 0"), ty
        return raw, ty

    def store(self, block: Block, slot: Slot, pointer: str, dtype: torch.dtype, index: str) -> None:
        """Store an element of a tensor, rounded to nearest, ties to even.

        Args:
            block: The block.
            slot: The value.
            pointer: The address of the tensor.
            dtype: The dtype of the tensor.
            index: The index of the element.
        """
        ty, kept = TYPES[dtype]
        value = self.convert(block, slot, ty)
        if dtype == torch.bfloat16:
            value = self.put(block, f"trunc i32 {self._to_bfloat16(block, value)} to i16")
        elif dtype == torch.float16:
            value = self.put(block, f"fptrunc float {value} to half")
        elif dtype == torch.bool:
            value = self.put(block, f"zext i1 {value} to i8")
        at = self.put(block, f"getelementptr inbounds {kept}, ptr {pointer}, i64 {index}")
        block.lines.append(f"  store {kept} {value}, ptr {at}")

    def _to_bfloat16(self, block: Block, value: str) -> str:
        """Return the 16 bits of the nearest bfloat16, ties to even, as an i32."""
        bits = self.put(block, f"bitcast float {value} to i32")
        high = self.put(block, f"lshr i32 {bits}, 16")
        odd = self.put(block, f"and i32 {high}, 1")
        bias = self.put(block, f"add i32 {odd}, 32767")
        rounded = self.put(block, f"lshr i32 {self.put(block, f'add i32 {bits}, {bias}')}, 16")
        nan = self.put(block, f"fcmp uno float {value}, {value}")
        return self.put(block, f"select i1 {nan}, i32 32704, i32 {rounded}")

    def rounded(self, block: Block, value: str, dtype: torch.dtype) -> str:
        """Round a float to a 16-bit dtype; other dtypes are not changed.

        Args:
            block: The block.
            value: The name of the value.
            dtype: The dtype.

        Returns:
            The name of the rounded value, which is still a float.
        """
        if dtype == torch.bfloat16:
            high = self.put(block, f"shl i32 {self._to_bfloat16(block, value)}, 16")
            return self.put(block, f"bitcast i32 {high} to float")
        if dtype == torch.float16:
            return self.put(block, f"fpext half {self.put(block, f'fptrunc float {value} to half')} to float")
        return value

    def largest(self, block: Block, ty: str, a: str, b: str, greater: str = "ogt") -> str:
        """Return the larger of two values; it is NaN if one of them is.

        Args:
            block: The block.
            ty: The type of both values.
            a: The name of the first value.
            b: The name of the second value.
            greater: The comparison; "olt" gives the smaller value.

        Returns:
            The name of the result.
        """
        first = self.put(block, f"fcmp {greater} {ty} {a}, {b}")
        chosen = self.put(block, f"select i1 {first}, {ty} {a}, {ty} {b}")
        nan = self.put(block, f"fcmp uno {ty} {a}, {a}")
        return self.put(block, f"select i1 {nan}, {ty} {a}, {ty} {chosen}")

    def operation(self, block: Block, node: Node, get: Callable[[Any], Slot]) -> Slot:
        """Compute the result of one operation on numbers.

        Args:
            block: The block.
            node: The operation.
            get: A function that returns the value of a node.

        Returns:
            The value.

        Raises:
            Unsupported: If there is no code for the operation.
        """
        ty = TYPES[node.dtype][0]
        name = node.op.split(".")[0]

        def number(value: Any, to: str = ty) -> str:
            value = value.node if isinstance(value, Number) else value
            return self.convert(block, get(value), to) if isinstance(value, Node) else literal(value, to)

        def arg(i: int, default: Any = None, to: str = ty) -> str:
            return number(node.args[i] if i < len(node.args) else default, to)

        def put(text: str) -> str:
            return self.put(block, text)

        def both(left: int, right: int) -> str:
            dtypes = [
                torch.empty((0,) * bool(a.shape), dtype=a.dtype, device="meta") if isinstance(a, Node) else a
                for a in (node.args[left], node.args[right])
            ]
            return TYPES[torch.result_type(*dtypes)][0]

        if node.op in VIEWS or node in self.kinds.identities:
            value = arg(0)
        elif node.op in FILLS:
            return number(FILLS[node.op](*node.args)), ty
        elif ty == "i1" and not (name in _COMPARISONS or name in _LOGICAL or name in ("where", "isnan", "isinf")):
            raise Unsupported(f"{node.op} of booleans")
        elif name in ("add", "sub", "rsub"):
            a, b = (arg(1), arg(0)) if name == "rsub" else (arg(0), arg(1))
            alpha = node.kwargs.get("alpha", node.args[2] if len(node.args) > 2 else 1)
            if alpha != 1:
                if name == "rsub":
                    raise Unsupported("rsub with alpha")
                b = put(f"fmul {ty} {b}, {number(alpha)}")
            value = put(f"f{'add' if name == 'add' else 'sub'} {ty} {a}, {b}")
        elif name in _BINARY:
            if node.kwargs.get("rounding_mode"):
                raise Unsupported(f"{node.op} with rounding")
            value = put(f"{_BINARY[name]} {ty} {arg(0)}, {arg(1)}")
        elif name == "remainder":
            a, b, zero = arg(0), arg(1), literal(0, ty)
            rest = put(f"frem {ty} {a}, {b}")
            flips = put(f"xor i1 {put(f'fcmp olt {ty} {rest}, {zero}')}, {put(f'fcmp olt {ty} {b}, {zero}')}")
            turn = put(f"and i1 {put(f'fcmp une {ty} {rest}, {zero}')}, {flips}")
            value = put(f"select i1 {turn}, {ty} {put(f'fadd {ty} {rest}, {b}')}, {ty} {rest}")
        elif name in _INTRINSICS:
            value = self.call(block, name, ty, arg(0))
        elif name == "round" and len(node.args) == 1:
            value = self.call(block, "roundeven", ty, arg(0))
        elif name == "abs":
            value = self.call(block, "fabs", ty, arg(0))
        elif name == "neg":
            value = put(f"fneg {ty} {arg(0)}")
        elif name == "square":
            value = put(f"fmul {ty} {arg(0)}, {arg(0)}")
        elif name in ("rsqrt", "reciprocal"):
            x = self.call(block, "sqrt", ty, arg(0)) if name == "rsqrt" else arg(0)
            value = put(f"fdiv {ty} {literal(1, ty)}, {x}")
        elif name in ("sign", "sgn"):
            x, zero = arg(0), literal(0, ty)
            up, down = put(f"fcmp ogt {ty} {x}, {zero}"), put(f"fcmp olt {ty} {x}, {zero}")
            below = put(f"select i1 {down}, {ty} {literal(-1, ty)}, {ty} {zero}")
            value = put(f"select i1 {up}, {ty} {literal(1, ty)}, {ty} {below}")
        elif name == "atan2":
            y, x = arg(0), arg(1)
            if ty == "float":
                value = atan2(put, partial(self.call, block), y, x)
            else:
                value = self.library(block, "atan2", ty, y, x)
        elif name == "pow":
            value = self._power(block, node, ty, arg)
        elif name in ("maximum", "minimum") or node.op in ("max.other", "min.other"):
            value = self.largest(block, ty, arg(0), arg(1), "ogt" if name.startswith("max") else "olt")
        elif name in ("clamp", "clamp_min", "clamp_max"):
            value = arg(0)
            for bound, test in (
                (1 if name != "clamp_max" else None, "olt"),
                ({"clamp": 2, "clamp_max": 1}.get(name), "ogt"),
            ):
                key = "min" if test == "olt" else "max"
                given = node.args[bound] if bound is not None and bound < len(node.args) else node.kwargs.get(key)
                if given is None:
                    continue
                limit = number(given)
                beyond = put(f"fcmp {test} {ty} {value}, {limit}")
                value = put(f"select i1 {beyond}, {ty} {limit}, {ty} {value}")
        elif name == "where":
            if len(node.args) != 3:
                raise Unsupported("where without values")
            value = put(f"select i1 {arg(0, to='i1')}, {ty} {arg(1)}, {ty} {arg(2)}")
        elif name == "lerp":
            a, b = arg(0), arg(1)
            span = put(f"fsub {ty} {b}, {a}")
            near, far = (put(f"fmul {ty} {span}, {w}") for w in (arg(2), put(f"fsub {ty} {literal(1, ty)}, {arg(2)}")))
            low = put(f"fcmp olt {ty} {self.call(block, 'fabs', ty, arg(2))}, {literal(0.5, ty)}")
            value = put(f"select i1 {low}, {ty} {put(f'fadd {ty} {a}, {near}')}, {ty} {put(f'fsub {ty} {b}, {far}')}")
        elif name in ("addcmul", "addcdiv"):
            scale = node.kwargs.get("value", 1)
            x = arg(1) if scale == 1 else put(f"fmul {ty} {number(scale)}, {arg(1)}")
            product = put(f"{'fmul' if name == 'addcmul' else 'fdiv'} {ty} {x}, {arg(2)}")
            value = put(f"fadd {ty} {arg(0)}, {product}")
        elif name in _COMPARISONS:
            inner = both(0, 1)
            if inner == "i1":
                inner = "float"
            value = put(f"fcmp {_COMPARISONS[name]} {inner} {arg(0, to=inner)}, {arg(1, to=inner)}")
        elif name in ("logical_and", "logical_or", "logical_xor", "bitwise_and", "bitwise_or", "bitwise_xor"):
            value = put(f"{name.split('_')[1]} i1 {arg(0, to='i1')}, {arg(1, to='i1')}")
        elif name in ("logical_not", "bitwise_not"):
            value = put(f"xor i1 {arg(0, to='i1')}, true")
        elif name in ("isnan", "isinf"):
            x, inner = arg(0, to=both(0, 0)), both(0, 0)
            value = (
                put(f"fcmp uno {inner} {x}, {x}")
                if name == "isnan"
                else put(f"fcmp oeq {inner} {self.call(block, 'fabs', inner, x)}, {literal(math.inf, inner)}")
            )
        else:
            raise Unsupported(f"the operation {node.op}")
        return self.rounded(block, value, node.dtype), ty

    def _power(self, block: Block, node: Node, ty: str, arg: Callable[..., str]) -> str:
        exponent = node.args[1]
        simple = not isinstance(exponent, Node)
        if simple and exponent in (2, 3):
            square = self.put(block, f"fmul {ty} {arg(0)}, {arg(0)}")
            return square if exponent == 2 else self.put(block, f"fmul {ty} {square}, {arg(0)}")
        if simple and exponent in (0.5, -0.5):
            root = self.call(block, "sqrt", ty, arg(0))
            return root if exponent > 0 else self.put(block, f"fdiv {ty} {literal(1, ty)}, {root}")
        if simple and exponent in (1, -1):
            return arg(0) if exponent == 1 else self.put(block, f"fdiv {ty} {literal(1, ty)}, {arg(0)}")
        return self.call(block, "pow", ty, arg(0), arg(1))
