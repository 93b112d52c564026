"""What the functions of one compiled step share: places in memory, and reductions from their start to their end."""

import math

import torch

from optim.cpu_jit.arithmetic import Block, Code, Slot, literal
from optim.cpu_jit.kinds import TYPES, Kinds, Reduction
from optim.cpu_jit.trace import Node, Trace, Unsupported

HEADER = 4
"""Numbers before the pointers of a tensor in the table: its first chunk, how many it has, where the guard is told and
where reductions of rows are kept."""

ARGUMENTS = "ptr %table, i64 %lo, i64 %hi, ptr %scratch, ptr %partial"


class Layout:
    """What the functions of one step share: the places of scalars in scratch memory and the reductions asked for."""

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
        """The kind of value that the place of an input holds: one per element, per row or per tensor."""
        return self.kinds[self.trace.inputs[name]][0]

    def slot(self, node: Node) -> int:
        """The place of a scalar in scratch memory."""
        return self.slots.setdefault(node, len(self.slots))

    @property
    def last(self) -> int:
        """The last stage."""
        nodes = [*self.trace.outputs.values(), *([self.guard] if self.guard else [])]
        return max(self.kinds[node][1] for node in nodes)

    def partial(self, stage: int, reduction: Reduction) -> int:
        """The place of a reduction among the partial results of a chunk."""
        wanted = self.wanted.setdefault(stage, [])
        if reduction not in wanted:
            wanted.append(reduction)
        return wanted.index(reduction)


def _finite(grad: Node) -> Node:
    largest = Node("linalg_vector_norm.default", (), grad.dtype, (grad, math.inf))
    return Node("lt.Scalar", (), torch.bool, (largest, math.inf))


def from_scratch(code: Code, block: Block, layout: Layout, node: Node) -> Slot:
    """A scalar of an earlier stage, as it was kept."""
    ty = TYPES[node.dtype][0]
    if node.op == "constant":
        return literal(node.args[0], ty), ty
    at = code.put(block, f"getelementptr inbounds double, ptr %scratch, i64 {layout.slot(node)}")
    return code.convert(block, (code.put(block, f"load double, ptr {at}"), "double"), ty), ty


def start_of(reduction: Reduction, ty: str) -> str:
    """The value that a reduction starts from."""
    return literal(0.0 if reduction.how == "sum" else float("-inf"), ty)


def term_of(code: Code, block: Block, reduction: Reduction, value: Slot) -> tuple[str, str]:
    """(type, value) of what an element adds to the reduction."""
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
    """Two partial results as one."""
    if reduction.how == "sum":
        return code.put(block, f"fadd reassoc {ty} {a}, {b}")
    return code.call(block, "maximum", ty, a, b)


def finished(code: Code, block: Block, reduction: Reduction, total: Slot, node: Node) -> Slot:
    """The value of a node from the total of its reduction."""
    value, ty = total
    if reduction.negated:
        value = code.put(block, f"fneg {ty} {value}")
    if reduction.finish == "mean":
        value = code.put(block, f"fdiv {ty} {value}, {literal(reduction.count, ty)}")
    if reduction.finish == "root":
        value = code.call(block, "sqrt", ty, value)
    want = TYPES[node.dtype][0]
    return code.rounded(block, code.convert(block, (value, ty), want), node.dtype), want
