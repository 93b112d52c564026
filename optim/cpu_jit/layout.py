"""What the functions of one compiled step share: places in memory, and the parts of reductions."""

import math

import torch

from optim.cpu_jit.arithmetic import Block, Code, Slot
from optim.cpu_jit.kinds import TYPES, Kinds, Reduction, literal
from optim.cpu_jit.trace import Node, Trace, Unsupported

HEADER = 4
"""The number of entries before the pointers of a tensor in the table: its first chunk, its number of chunks, the
address of the guard, and the address of the stored reductions over rows."""

ARGUMENTS = "ptr %table, i64 %lo, i64 %hi, ptr %scratch, ptr %partial"


class Layout:
    """The places of scalars in scratch memory and the reductions that the functions of one step need.

    Args:
        trace: The recorded step.
        guarded: Whether a tensor is left unchanged if its gradient is not finite.
    """

    def __init__(self, trace: Trace, guarded: bool) -> None:
        self.trace, self.kinds = trace, Kinds(trace)
        self.guard = _finite(trace.inputs["grad"]) if guarded else None
        self.conditions = self.kinds.conditions([*trace.outputs.values(), *([self.guard] if self.guard else [])])
        self.pointers = {
            name: HEADER + i
            for i, name in enumerate(["param", "grad", *(name for name in trace.inputs if name.startswith("state:"))])
        }
        self.slots: dict[Node, int] = {}
        self.wanted: dict[int, list[Reduction]] = {}
        self.kept: dict[Node, int] = {}
        self.declared: set[str] = set()

    def kind_of_place(self, name: str) -> str:
        """Return the kind of value that an input holds.

        Args:
            name: The name of the input.

        Returns:
            The kind: one value per element, per row or per tensor.
        """
        return self.kinds[self.trace.inputs[name]][0]

    def slot(self, node: Node) -> int:
        """Return the place of a scalar in scratch memory.

        Args:
            node: The scalar.

        Returns:
            The index.
        """
        return self.slots.setdefault(node, len(self.slots))

    @property
    def last(self) -> int:
        """The last stage."""
        nodes = [*self.trace.outputs.values(), *([self.guard] if self.guard else [])]
        return max(self.kinds[node][1] for node in nodes)

    def partial(self, stage: int, reduction: Reduction) -> int:
        """Return the place of a reduction among the partial results of a chunk.

        Args:
            stage: The stage that needs the reduction.
            reduction: The reduction.

        Returns:
            The index.
        """
        wanted = self.wanted.setdefault(stage, [])
        if reduction not in wanted:
            wanted.append(reduction)
        return wanted.index(reduction)


def _finite(grad: Node) -> Node:
    largest = Node("linalg_vector_norm.default", (), grad.dtype, (grad, math.inf))
    return Node("lt.Scalar", (), torch.bool, (largest, math.inf))


def from_scratch(code: Code, block: Block, layout: Layout, node: Node) -> Slot:
    """Load a scalar of an earlier stage from scratch memory.

    Args:
        code: The code of the function.
        block: The block to which instructions are added.
        layout: The layout of the step.
        node: The scalar.

    Returns:
        The value.
    """
    ty = TYPES[node.dtype][0]
    if node.op == "constant":
        return literal(node.args[0], ty), ty
    at = code.put(block, f"getelementptr inbounds double, ptr %scratch, i64 {layout.slot(node)}")
    return code.convert(block, (code.put(block, f"load double, ptr {at}"), "double"), ty), ty


def start_of(reduction: Reduction, ty: str) -> str:
    """Return the initial value of a reduction.

    Args:
        reduction: The reduction.
        ty: The LLVM type in which it is accumulated.

    Returns:
        The literal.
    """
    return literal(0.0 if reduction.how == "sum" else float("-inf"), ty)


def term_of(code: Code, block: Block, reduction: Reduction, value: Slot) -> tuple[str, str]:
    """Compute what an element contributes to a reduction.

    Args:
        code: The code of the function.
        block: The block to which instructions are added.
        reduction: The reduction.
        value: The value of the element.

    Returns:
        The type and the name of the term.

    Raises:
        Unsupported: For a maximum of booleans.
    """
    if reduction.how == "sum":
        wide = code.convert(block, value, "double")
        return "double", code.put(block, f"fmul double {wide}, {wide}") if reduction.squared else wide
    term, ty = value
    if ty == "i1":
        raise Unsupported("a maximum of booleans")
    if reduction.absolute:
        term = code.call(block, "fabs", ty, term)
    return ty, code.put(block, f"fneg {ty} {term}") if reduction.negated else term


def combined(code: Code, block: Block, reduction: Reduction, ty: str, a: str, b: str) -> str:
    """Combine two partial results.

    Args:
        code: The code of the function.
        block: The block to which instructions are added.
        reduction: The reduction.
        ty: The type of the partial results.
        a: The name of the first one.
        b: The name of the second one.

    Returns:
        The name of the result.
    """
    if reduction.how == "sum":
        return code.put(block, f"fadd reassoc {ty} {a}, {b}")
    return code.call(block, "maximum", ty, a, b)


def finished(code: Code, block: Block, reduction: Reduction, total: Slot, node: Node) -> Slot:
    """Compute the value of a node from the total of its reduction.

    Args:
        code: The code of the function.
        block: The block to which instructions are added.
        reduction: The reduction.
        total: The total.
        node: The node.

    Returns:
        The value.
    """
    value, ty = total
    if reduction.negated:
        value = code.put(block, f"fneg {ty} {value}")
    if reduction.finish == "mean":
        value = code.put(block, f"fdiv {ty} {value}, {literal(reduction.count, ty)}")
    if reduction.finish == "root":
        value = code.call(block, "sqrt", ty, value)
    want = TYPES[node.dtype][0]
    return code.rounded(block, code.convert(block, (value, ty), want), node.dtype), want
