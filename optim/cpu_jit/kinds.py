"""The kind of each value of a step (one per tensor, per row or per element) and when it can be computed."""

import ctypes
import math
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from optim.cpu_jit.trace import Node, Trace, Unsupported

FULL, ROW, SCALAR = "full", "row", "scalar"
TYPES = {  # dtype -> (type of arithmetic, type in memory)
    torch.float32: ("float", "float"),
    torch.float64: ("double", "double"),
    torch.bfloat16: ("float", "i16"),
    torch.float16: ("float", "half"),
    torch.bool: ("i1", "i8"),
}
VIEWS = {
    "view.default",
    "_unsafe_view.default",
    "reshape.default",
    "unsqueeze.default",
    "squeeze.dim",
    "squeeze.default",
    "squeeze.dims",
    "expand.default",
    "detach.default",
    "alias.default",
    "clone.default",
    "lift_fresh.default",
    "_to_copy.default",
    "contiguous.default",
}
FILLS: dict[str, Callable[..., Any]] = {
    "zeros_like.default": lambda *_: 0.0,
    "ones_like.default": lambda *_: 1.0,
    "full_like.default": lambda _, x: x,
    "zeros.default": lambda *_: 0.0,
    "ones.default": lambda *_: 1.0,
    "full.default": lambda _, x: x,
    "scalar_tensor.default": lambda x: x,
    "new_zeros.default": lambda *_: 0.0,
    "new_ones.default": lambda *_: 1.0,
    "new_full.default": lambda _, __, x: x,
}
REDUCTIONS = {"sum", "mean", "amax", "amin", "max", "min", "linalg_vector_norm"}


def literal(value: float, ty: str) -> str:
    """Return a number as an exact LLVM literal.

    Args:
        value: The number.
        ty: Its LLVM type: "float", "double" or "i1".

    Returns:
        The literal.
    """
    if ty == "i1":
        return "true" if value else "false"
    value = float(value)
    if ty == "float":
        value = ctypes.c_float(value).value
    return f"0x{struct.unpack('<Q', struct.pack('<d', value))[0]:016X}"


@dataclass(frozen=True)
class Reduction:
    """A reduction of one value.

    Args:
        operand: The value that is reduced.
        how: How it is accumulated: "sum" or "max".
        squared: Whether squares are accumulated.
        negated: Whether negated values are accumulated, as for a minimum.
        absolute: Whether absolute values are accumulated.
        finish: What is computed from the total: "mean", "root", or "" for the total itself.
        count: The number of values that are reduced to one.
    """

    operand: Node
    how: str
    squared: bool
    negated: bool
    absolute: bool
    finish: str
    count: int


def _in_both(
    first: tuple[tuple[Node, bool], ...], second: tuple[tuple[Node, bool], ...]
) -> tuple[tuple[Node, bool], ...]:
    return tuple(one for one in first if one in second)


class Kinds:
    """The kind, stage and level of every value, which follow from those of its arguments.

    Args:
        trace: The recorded step.
    """

    def __init__(self, trace: Trace) -> None:
        self.shape = trace.inputs["param"].shape
        self.numel = math.prod(self.shape)
        self.rows: int | None = None
        self.known: dict[Node, tuple[str, int, int]] = {}
        self.reductions: dict[Node, Reduction] = {}
        self.identities: set[Node] = set()

    def __getitem__(self, node: Node) -> tuple[str, int, int]:
        if node not in self.known:
            self.known[node] = self._find(node)
        return self.known[node]

    def conditions(self, outputs: Sequence[Node]) -> dict[Reduction, tuple[tuple[Node, bool], ...]]:
        """Return the conditions of `where` under which each reduction is read.

        Args:
            outputs: The values that the step writes.

        Returns:
            For each reduction, scalars and the truth values that they must have. Their order is that of the rule, not
            that of a set: it is part of the assembly, by which machine code is found in files.
        """
        order: dict[Node, None] = {}

        def visit(node: Node) -> None:
            if node not in order:
                for argument in node.args + tuple(node.kwargs.values()):
                    if isinstance(argument, Node):
                        visit(argument)
                order[node] = None

        held: dict[Node, tuple[tuple[Node, bool], ...]] = {}
        for node in outputs:
            visit(node)
            held[node] = ()
        found: dict[Reduction, tuple[tuple[Node, bool], ...]] = {}
        for node in reversed(order):
            by_branch = node.op.split(".")[0] == "where" and len(node.args) == 3 and self[node.args[0]][0] == SCALAR
            for i, argument in enumerate(node.args + tuple(node.kwargs.values())):
                if isinstance(argument, Node):
                    own = ((node.args[0], i == 1),) if by_branch and i else ()
                    at = (*held[node], *(one for one in own if one not in held[node]))
                    held[argument] = _in_both(held[argument], at) if argument in held else at
            if self[node] and node in self.reductions:
                reduction = self.reductions[node]
                found[reduction] = _in_both(found[reduction], held[node]) if reduction in found else held[node]
        return found

    def _set_rows(self, rows: int) -> None:
        if self.rows not in (None, rows):
            raise Unsupported(f"two different numbers of rows: {self.rows} and {rows}")
        self.rows = rows

    def _find(self, node: Node) -> tuple[str, int, int]:
        if node.dtype not in TYPES:
            raise Unsupported(f"a value of {node.dtype}")
        if node.op in ("input:lr", "input:weight_decay", "input:number", "constant") or node.op in FILLS:
            return SCALAR, 0, 0
        if node.op.startswith("input:"):
            return self._input(node), 0, 0
        if node.op.split(".")[0] in REDUCTIONS and node.op not in ("max.other", "min.other"):
            return self._reduction(node)
        nodes = [a for a in (*node.args, *node.kwargs.values()) if isinstance(a, Node)]
        if not nodes:
            raise Unsupported(f"the operation {node.op}")
        found = [self[n] for n in nodes]
        kinds = {kind for kind, _, _ in found}
        kind = FULL if FULL in kinds else ROW if ROW in kinds else SCALAR
        size = math.prod(node.shape)
        if (kind == FULL and size != self.numel) or (kind == ROW and size not in (self.rows, self.numel)):
            raise Unsupported(f"{node.op} to shape {node.shape} from a parameter of shape {self.shape}")
        if kind != SCALAR:
            if ROW in kinds:
                self._check_rows(node, [n for n, (k, _, _) in zip(nodes, found, strict=True) if k == ROW])
            for n, (k, _, _) in zip(nodes, found, strict=True):
                if k == FULL and n.shape != node.shape and node.op not in VIEWS:
                    raise Unsupported(f"{node.op} of shapes {n.shape} and {node.shape}")
        if kind == ROW and size == self.numel != self.rows:
            raise Unsupported(f"{node.op} spreads rows over shape {node.shape}")
        return kind, max(s for _, s, _ in found), max(level for _, _, level in found)

    def _input(self, node: Node) -> str:
        if node.shape == self.shape:
            return FULL
        size = math.prod(node.shape)
        if size == 1:
            return SCALAR
        if self.numel % max(size, 1) or size == 0:
            raise Unsupported(f"a state of shape {node.shape} for a parameter of shape {self.shape}")
        self._set_rows(size)
        return ROW

    def _check_rows(self, node: Node, rows: Sequence[Node]) -> None:
        """Check that row values extend along the leading dimensions of what they are combined with."""
        if node.op in VIEWS:
            return
        for n in rows:
            padded = (1,) * (len(node.shape) - len(n.shape)) + n.shape
            lead = 0
            while lead < len(padded) and padded[lead] == node.shape[lead]:
                lead += 1
            if math.prod(padded[:lead]) != self.rows or math.prod(padded[lead:]) != 1:
                raise Unsupported(f"{node.op} of a row value of shape {n.shape} with shape {node.shape}")

    def _reduction(self, node: Node) -> tuple[str, int, int]:
        name = node.op.split(".")[0]
        operand = node.args[0]
        kind, stage, level = self[operand]
        arguments = list(node.args[1:])
        order = node.kwargs.get("ord", 2)
        if name == "linalg_vector_norm" and arguments:
            order = arguments.pop(0)
        dims = node.kwargs.get("dim", arguments[0] if arguments else None)
        ndim = len(operand.shape)
        if isinstance(dims, int):
            dims = (dims,)
        axes = sorted({d % ndim for d in dims}) if dims and ndim else list(range(ndim))
        count = math.prod(operand.shape[d] for d in axes)
        if name == "linalg_vector_norm" and order not in (2, math.inf):
            raise Unsupported(f"a norm of order {order}")
        if count == 1 and name != "linalg_vector_norm":
            self.identities.add(node)
            return kind, stage, level
        largest = name in ("amax", "amin", "max", "min") or order == math.inf
        self.reductions[node] = Reduction(
            operand,
            how="max" if largest else "sum",
            squared=name == "linalg_vector_norm" and order == 2,
            negated=name in ("amin", "min"),
            absolute=order == math.inf,
            finish={"mean": "mean", "linalg_vector_norm": "root" if order == 2 else ""}.get(name, ""),
            count=count,
        )
        if name in ("max", "min") and node.op != f"{name}.default":
            raise Unsupported(f"the operation {node.op}")
        if kind == SCALAR:
            if count != 1:
                raise Unsupported(f"{node.op} of a value that is the same everywhere")
            return SCALAR, stage, level
        wide = [d for d in range(ndim) if operand.shape[d] != 1]
        cut = [d for d in wide if d in axes]
        if cut != wide[len(wide) - len(cut) :]:
            raise Unsupported(f"{node.op} over the leading dimensions of shape {operand.shape}")
        rest = math.prod(operand.shape) // count if count else 0
        if rest == 1:
            return SCALAR, stage + 1, 0
        if kind == ROW:
            if count == 1:
                return ROW, stage, level
            raise Unsupported(f"{node.op} over some of the rows")
        self._set_rows(rest)
        return ROW, stage, level + 1
