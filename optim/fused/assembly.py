"""From a traced step to LLVM assembly: one loop over memory where the operations would make many.

Values come in three kinds. *Scalars* (one a tensor: step counts, corrections, norms) are computed once a tensor, *rows*
(one a row, where the rule reduces rows of a matrix) once a row, and *full* values (one an element) in loops. A
reduction of the whole tensor ends a pass over memory: what depends on it belongs to the next *stage*. So a step is

    scalars 0, body 1, scalars 1, ..., scalars K, body K + 1

where body k makes the reductions that scalars k need, and the last body writes the parameter and the state: nothing is
written before everything has been read, and every body computes again what it needs. A body runs on a chunk (a range of
elements, or of rows), and its reductions are combined in the order of the chunks: results depend on the size of chunks,
not on the number of threads. A reduction of a row ends a loop over that row: *levels* are to the loops of a row what
stages are to passes. Reductions of rows that a later body needs again are kept, a number a row.

Sums are accumulated in float64, in an order that the compiler chooses and the code then fixes.

Two things keep bodies from running. A *guard*, whether the greatest magnitude of the gradient is finite, is found by
body 1; without it nothing is written. And a reduction that only one branch of ``where`` reads is not made where the
condition, a scalar of an earlier stage, chooses the other branch: a step may measure something once and keep it.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from optim.fused.arithmetic import Block, Code, Slot, literal
from optim.fused.kinds import FULL, ROW, SCALAR, TYPES, Kinds, Reduction
from optim.fused.trace import Node, Trace, Unsupported

_HEADER = 4
"""Numbers before the pointers of a tensor in the table: its first chunk, how many it has, where the guard is told and
where reductions of rows are kept."""

_ARGUMENTS = "ptr %table, i64 %lo, i64 %hi, ptr %scratch, ptr %partial"


@dataclass(frozen=True)
class Assembly:
    """The text of a module with the function `run`, and what its caller must know.

    passes: K above. scratch, partials, kept: float64 numbers that a tensor, a chunk and a row need. row: elements of a
    row, or 0 if chunks are ranges of elements.
    """

    text: str
    passes: int
    scratch: int
    partials: int
    kept: int
    row: int


class _Step:
    """What the functions of one step share: the places of scalars in scratch memory and the reductions asked for."""

    def __init__(self, trace: Trace, guarded: bool) -> None:
        self.trace, self.kinds = trace, Kinds(trace)
        self.guard = _finite(trace.inputs["grad"]) if guarded else None
        self.conditions = self.kinds.conditions([*trace.outputs.values(), *([self.guard] if self.guard else [])])
        self.pointers = {
            name: _HEADER + i
            for i, name in enumerate(["param", "grad", *(name for name in trace.inputs if name.startswith("state:"))])
        }
        self.slots: dict[Node, int] = {}
        self.wanted: dict[int, list[Reduction]] = {}
        self.kept: dict[Node, int] = {}
        self.declared: set[str] = set()

    def kind_of_place(self, name: str) -> str:
        return self.kinds[self.trace.inputs[name]][0]

    def slot(self, node: Node) -> int:
        return self.slots.setdefault(node, len(self.slots))

    @property
    def last(self) -> int:
        """The last stage."""
        nodes = [*self.trace.outputs.values(), *([self.guard] if self.guard else [])]
        return max(self.kinds[node][1] for node in nodes)

    def partial(self, stage: int, reduction: Reduction) -> int:
        wanted = self.wanted.setdefault(stage, [])
        if reduction not in wanted:
            wanted.append(reduction)
        return wanted.index(reduction)


def _finite(grad: Node) -> Node:
    largest = Node("linalg_vector_norm.default", (), grad.dtype, (grad, math.inf))
    return Node("lt.Scalar", (), torch.bool, (largest, math.inf))


def assemble(trace: Trace, *, guarded: bool = False) -> Assembly:
    """The code of a step; guarded: of one that leaves a tensor as it is if the gradient is not finite.

    Raises: Unsupported, with the reason, where an operation or a shape does not fit the scheme.
    """
    step = _Step(trace, guarded)
    kinds = step.kinds
    for name, node in trace.outputs.items():
        place, kind = step.kind_of_place(name), kinds[node][0]
        if place != kind and kind != SCALAR and not (place == FULL and kind == ROW):
            raise Unsupported(f"a {kind} value for {name}, which holds one a {place}")
    last = step.last
    guard = [(step.guard, True)] if step.guard else []
    functions = _gated(step, last + 1, guard, lambda name: _Body(step, last + 1).writing(name), None)
    for stage in range(last, -1, -1):  # backwards: a function decides what those before it must provide
        functions.append(_scalars(step, stage, writing=stage == last))
        if stage:
            functions += _reducing(step, stage)
    row = 0 if kinds.rows is None else kinds.numel // max(kinds.rows, 1)
    width = max((len(wanted) for wanted in step.wanted.values()), default=0)
    step.declared.add("declare double @llvm.maximum.f64(double, double)")  # of _COMBINE
    text = (
        "\n".join(
            [
                *functions,
                _driver(last, len(step.pointers) + _HEADER, len(step.slots), width),
                *_COMBINE,
                *sorted(step.declared),
                _LOOP_HINT,
            ]
        )
        .replace("$WIDTH", str(width))
        .replace("$KEPT", str(len(step.kept)))
    )
    return Assembly(text, last, len(step.slots), width, len(step.kept), row)


class _Body(Code):
    """One pass over a chunk, as loops with what stands before, between and after them.

    head: once; segments[j]: once a row, before loop j; after[j]: once a row, after it.
    """

    def __init__(self, step: _Step, number: int) -> None:
        super().__init__(step.kinds, step.declared)
        self.step, self.number = step, number
        self.head = Block()
        self.segments: list[Block] = []
        self.loops: list[Block] = []
        self.after: list[Block] = []
        self.sums: list[dict[Reduction, tuple[str, str]]] = []

    def _grow(self, level: int) -> None:
        while len(self.loops) <= level:
            for blocks in (self.segments, self.loops, self.after):
                blocks.append(Block())
            self.sums.append({})

    def pointer(self, name: str) -> str:
        if name not in self.head.known:
            at = self.put(self.head, f"getelementptr inbounds i64, ptr %table, i64 {self.step.pointers[name]}")
            self.head.known[name] = self.put(self.head, f"load ptr, ptr {at}"), "ptr"
        return self.head.known[name][0]

    def get(self, node: Node, loop: int) -> Slot:
        """The value of a node where loop `loop` runs."""
        kind, _, level = self.kinds[node]
        self._grow(max(level, loop))
        if kind == SCALAR:
            return self._scalar(node)
        block = self.segments[level] if kind == ROW else self.loops[loop]
        if node not in block.known:
            if node.op.startswith("input:"):
                name = node.op.removeprefix("input:")
                index = "%r" if kind == ROW else f"%i{loop}"
                block.known[node] = self.load(block, self.pointer(name), node.dtype, index)
            elif node in self.kinds.reductions:
                self._row_reduction(block, node)
            else:
                block.known[node] = self.operation(block, node, lambda n: self.get(n, level if kind == ROW else loop))
        return block.known[node]

    def _scalar(self, node: Node) -> Slot:
        if node not in self.head.known:
            self.head.known[node] = _from_scratch(self, self.head, self.step, node)
        return self.head.known[node]

    def _row_reduction(self, block: Block, node: Node) -> None:
        reduction = self.kinds.reductions[node]
        if self.kinds[reduction.operand][0] == ROW:  # over dimensions of one element
            block.known[node] = self.get(reduction.operand, self.kinds[node][2])
            return
        if self.kinds[node][1] + 1 < self.number:  # an earlier body has read all that this needs
            place = self._kept(block, self.step.kept.setdefault(node, len(self.step.kept)))
            ty = TYPES[node.dtype][0]
            value = self.put(block, f"load double, ptr {place}")
            block.known[node] = self.convert(block, (value, "double"), ty), ty
            return
        level = self.kinds[node][2] - 1
        total = self._accumulated(reduction, level)
        block.known[node] = _finished(self, block, reduction, total, node)

    def _kept(self, block: Block, number: int) -> str:
        """Where a reduction of this row is kept."""
        key = ("kept",)
        if key not in self.head.known:
            at = self.put(self.head, f"getelementptr inbounds i64, ptr %table, i64 {_HEADER - 1}")
            self.head.known[key] = self.put(self.head, f"load ptr, ptr {at}"), "ptr"
        row = self.put(block, "mul i64 %r, $KEPT")
        index = self.put(block, f"add i64 {row}, {number}")
        return self.put(block, f"getelementptr inbounds double, ptr {self.head.known[key][0]}, i64 {index}")

    def _keep(self) -> None:
        """Keep what this body is the first to know and a later one needs."""
        for node, number in self.step.kept.items():
            if self.kinds[node][1] + 1 == self.number:
                level = self.kinds[node][2]
                value = self.get(node, level)
                block = self.segments[level]
                wide = self.convert(block, value, "double")
                block.lines.append(f"  store double {wide}, ptr {self._kept(block, number)}")

    def _accumulated(self, reduction: Reduction, loop: int) -> Slot:
        """The reduction over loop `loop`, as known after it."""
        sums = self.sums[loop]
        if reduction not in sums:
            ty, term = _term(self, self.loops[loop], reduction, self.get(reduction.operand, loop))
            sums[reduction] = (ty, term)
        return f"%total{loop}_{list(sums).index(reduction)}", sums[reduction][0]

    def writing(self, name: str) -> str:
        """The last body: parameter and state."""
        outputs = self.step.trace.outputs
        last = max((self.kinds[node][2] for node in outputs.values()), default=0)
        self._grow(last)
        full: list[tuple[str, Slot]] = []
        rows: list[tuple[str, Slot]] = []
        for key, node in outputs.items():
            place = self.step.kind_of_place(key)
            if place != SCALAR and node is not self.step.trace.inputs[key]:  # a slow statistic stays as it is
                (full if place == FULL else rows).append((key, self.get(node, last)))
        for key, value in full:
            self.store(self.loops[last], value, self.pointer(key), self.step.trace.inputs[key].dtype, f"%i{last}")
        for key, value in rows:
            self.store(self.after[last], value, self.pointer(key), self.step.trace.inputs[key].dtype, "%r")
        return self._text(name, Block())

    def reducing(self, name: str, wanted: Sequence[tuple[int, Reduction]]) -> str:
        """A body that makes these reductions, each with its place among the partial results of its chunk."""
        end = Block()
        self._keep()
        for j, reduction in wanted:
            kind, _, level = self.kinds[reduction.operand]
            ty = "double" if reduction.how == "sum" else TYPES[reduction.operand.dtype][0]
            held = self.put(self.head, f"alloca {ty}")
            self.head.lines.append(f"  store {ty} {_start(reduction, ty)}, ptr {held}")
            self._grow(level)
            if kind == FULL:
                block, (term, _) = self.after[level], self._accumulated(reduction, level)
            else:
                block = self.segments[level]
                _, term = _term(self, block, reduction, self.get(reduction.operand, level))
            total = _combined(self, block, reduction, ty, self.put(block, f"load {ty}, ptr {held}"), term)
            block.lines.append(f"  store {ty} {total}, ptr {held}")
            value = self.convert(end, (self.put(end, f"load {ty}, ptr {held}"), ty), "double")
            at = self.put(end, f"getelementptr inbounds double, ptr %partial, i64 {j}")
            end.lines.append(f"  store double {value}, ptr {at}")
        return self._text(name, end)

    def _text(self, name: str, end: Block) -> str:
        by_rows = self.kinds.rows is not None
        lines = [f"define internal void @{name}({_ARGUMENTS}) noinline {{", "entry:", *self.head.lines]
        if by_rows:
            width = self.kinds.numel // max(self.kinds.rows or 1, 1)
            lines += [
                "  br label %next",
                "next:",
                "  %r = phi i64 [ %lo, %entry ], [ %r1, %rowend ]",
                "  %inside = icmp slt i64 %r, %hi",
                "  br i1 %inside, label %row, label %done",
                "row:",
                f"  %from = mul i64 %r, {width}",
                f"  %to = add i64 %from, {width}",
            ]
            first, past, exit_ = "%from", "%to", "rowend"
        else:
            first, past, exit_ = "%lo", "%hi", "done"
        lines.append("  br label %seg0")
        for j, (segment, loop, after) in enumerate(zip(self.segments, self.loops, self.after, strict=True)):
            sums = list(self.sums[j].items())
            phis, totals = [], []
            for s, (reduction, (ty, _)) in enumerate(sums):
                start = _start(reduction, ty)
                phis.append(f"  %acc{j}_{s} = phi {ty} [ {start}, %seg{j} ], [ %sum{j}_{s}, %loop{j} ]")
                totals.append(f"  %total{j}_{s} = phi {ty} [ {start}, %seg{j} ], [ %sum{j}_{s}, %loop{j} ]")
            updates = Block()
            for s, (reduction, (ty, term)) in enumerate(sums):
                new = _combined(self, updates, reduction, ty, f"%acc{j}_{s}", term)
                updates.lines[-1] = updates.lines[-1].replace(f"{new} =", f"%sum{j}_{s} =", 1)
            lines += [f"seg{j}:", *segment.lines]
            if loop.lines:
                lines += [
                    f"  %any{j} = icmp slt i64 {first}, {past}",
                    f"  br i1 %any{j}, label %loop{j}, label %after{j}",
                    f"loop{j}:",
                    f"  %i{j} = phi i64 [ {first}, %seg{j} ], [ %n{j}, %loop{j} ]",
                    *phis,
                    *loop.lines,
                    *updates.lines,
                    f"  %n{j} = add nuw nsw i64 %i{j}, 1",
                    f"  %more{j} = icmp slt i64 %n{j}, {past}",
                    f"  br i1 %more{j}, label %loop{j}, label %after{j}, !llvm.loop !0",
                ]
            else:
                lines.append(f"  br label %after{j}")
            following = f"seg{j + 1}" if j + 1 < len(self.loops) else exit_
            lines += [f"after{j}:", *totals, *after.lines, f"  br label %{following}"]
        if by_rows:
            lines += ["rowend:", "  %r1 = add nuw nsw i64 %r, 1", "  br label %next"]
        return "\n".join([*lines, "done:", *end.lines, "  ret void", "}"])


def _reducing(step: _Step, stage: int) -> list[str]:
    """Body `stage`, which makes those of its reductions that the step will read."""
    wanted = list(enumerate(step.wanted.get(stage, [])))
    known = {
        reduction: [(node, value) for node, value in step.conditions.get(reduction, ()) if step.kinds[node][1] < stage]
        for _, reduction in wanted
    }
    always = [(j, reduction) for j, reduction in wanted if not known[reduction]]
    shared = [
        condition
        for condition in next((c for c in known.values() if c), [])
        if all(condition in c for c in known.values() if c)
    ]
    kept = any(step.kinds[node][1] + 1 == stage for node in step.kept)
    some = (lambda name: _Body(step, stage).reducing(name, always)) if always or kept else None
    return _gated(step, stage, shared, lambda name: _Body(step, stage).reducing(name, wanted), some)


def _gated(
    step: _Step,
    number: int,
    conditions: Sequence[tuple[Node, bool]],
    then: Callable[[str], str],
    otherwise: Callable[[str], str] | None,
) -> list[str]:
    """The body of that number: one of two functions, made under the given name, by scalars that are known before it."""
    name = f"body{number}"
    if not conditions:
        return [then(name)]
    code, block = Code(step.kinds, step.declared), Block()
    holds = "true"
    for node, value in conditions:
        found = code.convert(block, _from_scratch(code, block, step, node), "i1")
        holds = code.put(block, f"and i1 {holds}, {found if value else code.put(block, f'xor i1 {found}, true')}")
    made = [then(f"{name}all"), *([otherwise(f"{name}some")] if otherwise else [])]
    call = [f"  call void @{name}{part}({_ARGUMENTS})" for part in ("all", "some")]
    return [
        *made,
        "\n".join(
            [
                f"define internal void @{name}({_ARGUMENTS}) {{",
                "entry:",
                *block.lines,
                f"  br i1 {holds}, label %then, label %otherwise",
                "then:",
                call[0],
                "  ret void",
                "otherwise:",
                *(call[1:] if otherwise else []),
                "  ret void",
                "}",
            ]
        ),
    ]


def _from_scratch(code: Code, block: Block, step: _Step, node: Node) -> Slot:
    ty = TYPES[node.dtype][0]
    if node.op == "constant":
        return literal(node.args[0], ty), ty
    at = code.put(block, f"getelementptr inbounds double, ptr %scratch, i64 {step.slot(node)}")
    return code.convert(block, (code.put(block, f"load double, ptr {at}"), "double"), ty), ty


def _start(reduction: Reduction, ty: str) -> str:
    return literal(0.0 if reduction.how == "sum" else float("-inf"), ty)


def _term(code: Code, block: Block, reduction: Reduction, value: Slot) -> tuple[str, str]:
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


def _combined(code: Code, block: Block, reduction: Reduction, ty: str, a: str, b: str) -> str:
    if reduction.how == "sum":
        return code.put(block, f"fadd reassoc {ty} {a}, {b}")
    return code.call(block, "maximum", ty, a, b)


def _finished(code: Code, block: Block, reduction: Reduction, total: Slot, node: Node) -> Slot:
    value, ty = total
    if reduction.negated:
        value = code.put(block, f"fneg {ty} {value}")
    if reduction.finish == "mean":
        value = code.put(block, f"fdiv {ty} {value}, {literal(reduction.count, ty)}")
    if reduction.finish == "root":
        value = code.call(block, "sqrt", ty, value)
    want = TYPES[node.dtype][0]
    return code.rounded(block, code.convert(block, (value, ty), want), node.dtype), want


def _scalars(step: _Step, stage: int, *, writing: bool) -> str:
    """The scalars of a stage, kept in scratch memory for later; the last stage writes those of the state."""
    code, block = Code(step.kinds, step.declared), Block()

    def get(node: Node) -> Slot:
        if node not in block.known:
            block.known[node] = made(node)
        return block.known[node]

    def made(node: Node) -> Slot:
        _, at, _ = step.kinds[node]
        if at < stage or node.op == "constant":
            return _from_scratch(code, block, step, node)
        if node.op in ("input:lr", "input:weight_decay", "input:number"):
            at = 2 + node.args[0] if node.op == "input:number" else int(node.op != "input:lr")
            place = code.put(block, f"getelementptr inbounds double, ptr %settings, i64 {at}")
            return code.put(block, f"load double, ptr {place}"), "double"
        if node.op.startswith("input:"):
            place = code.put(
                block, f"getelementptr inbounds i64, ptr %table, i64 {step.pointers[node.op.removeprefix('input:')]}"
            )
            return code.load(block, code.put(block, f"load ptr, ptr {place}"), node.dtype, "0")
        if node in step.kinds.reductions:
            return reduced(node, step.kinds.reductions[node])
        return code.operation(block, node, get)

    def reduced(node: Node, reduction: Reduction) -> Slot:
        if step.kinds[reduction.operand][0] == SCALAR:
            if reduction.squared or reduction.absolute:
                value, ty = get(reduction.operand)
                return code.call(block, "fabs", ty, value), ty
            return get(reduction.operand)
        j = step.partial(stage, reduction)
        total = code.put(block, f"call double @combine_{reduction.how}(ptr %table, ptr %partials, i64 {j})")
        return _finished(code, block, reduction, (total, "double"), node)

    outputs: list[tuple[str, Slot]] = []
    if writing:
        outputs = [(name, get(node)) for name, node in step.trace.outputs.items() if step.kind_of_place(name) == SCALAR]
    for node, number in list(step.slots.items()):
        if step.kinds[node][1] == stage:
            value = code.convert(block, get(node), "double")
            at = code.put(block, f"getelementptr inbounds double, ptr %scratch, i64 {number}")
            block.lines.append(f"  store double {value}, ptr {at}")
    guard = get(step.guard)[0] if writing and step.guard else None
    for name, (value, ty) in outputs:
        place = code.put(block, f"getelementptr inbounds i64, ptr %table, i64 {step.pointers[name]}")
        pointer = code.put(block, f"load ptr, ptr {place}")
        node = step.trace.inputs[name]
        if guard is not None:
            old = code.convert(block, code.load(block, pointer, node.dtype, "0"), ty)
            value = code.put(block, f"select i1 {guard}, {ty} {value}, {ty} {old}")
        code.store(block, (value, ty), pointer, node.dtype, "0")
    if guard is not None:
        place = code.put(block, "getelementptr inbounds i64, ptr %table, i64 2")
        code.store(block, (guard, "i1"), code.put(block, f"load ptr, ptr {place}"), torch.bool, "0")
    head = f"define internal void @scalars{stage}(ptr %table, ptr %scratch, ptr %partials, ptr %settings) noinline {{"
    return "\n".join([head, *block.lines, "  ret void", "}"])


def _driver(last: int, pointers: int, scratch: int, width: int) -> str:
    """`run(what, items, n, counter, table, scratch, partials, settings)`: takes items until the counter reaches n.

    An item is (tensor, lo, hi, chunk). what: 0 for all of a step on tensors of one chunk, 2k + 1 for scalars k of a
    tensor, 2k + 2 for body k + 1 of a chunk.
    """
    calls = []
    for stage in range(last + 1):
        calls += [
            f"call void @scalars{stage}(ptr %row, ptr %slots, ptr %partials, ptr %settings)",
            f"call void @body{stage + 1}(ptr %row, i64 %lo, i64 %hi, ptr %slots, ptr %partial)",
        ]
    cases = " ".join(f"i64 {i + 1}, label %case{i + 1}" for i in range(len(calls)))
    lines = [
        "define void @run(i64 %what, ptr %items, i64 %n, ptr %counter, ptr %tables, ptr %scratch, ptr %partials, "
        "ptr %settings) {",
        "entry:",
        "  br label %next",
        "next:",
        "  %at = atomicrmw add ptr %counter, i64 1 monotonic",
        "  %some = icmp slt i64 %at, %n",
        "  br i1 %some, label %item, label %done",
        "item:",
        "  %first = mul i64 %at, 4",
        *(
            f"  %f{j} = add i64 %first, {j}\n  %a{j} = getelementptr inbounds i64, ptr %items, i64 %f{j}\n"
            f"  %{name} = load i64, ptr %a{j}"
            for j, name in enumerate(("t", "lo", "hi", "chunk"))
        ),
        f"  %rowat = mul i64 %t, {pointers}",
        "  %row = getelementptr inbounds i64, ptr %tables, i64 %rowat",
        f"  %slotat = mul i64 %t, {scratch}",
        "  %slots = getelementptr inbounds double, ptr %scratch, i64 %slotat",
        f"  %partat = mul i64 %chunk, {width}",
        "  %partial = getelementptr inbounds double, ptr %partials, i64 %partat",
        f"  switch i64 %what, label %case0 [ {cases} ]",
        "case0:",
        *(f"  {call}" for call in calls),
        "  br label %next",
    ]
    for i, call in enumerate(calls):
        lines += [f"case{i + 1}:", f"  {call}", "  br label %next"]
    return "\n".join([*lines, "done:", "  ret void", "}"])


_COMBINE = [
    f"""define internal double @combine_{how}(ptr %table, ptr %partials, i64 %j) noinline {{
entry:
  %first = load i64, ptr %table
  %countat = getelementptr inbounds i64, ptr %table, i64 1
  %count = load i64, ptr %countat
  %end = add i64 %first, %count
  br label %next
next:
  %c = phi i64 [ %first, %entry ], [ %c1, %more ]
  %sum = phi double [ {start}, %entry ], [ %new, %more ]
  %inside = icmp slt i64 %c, %end
  br i1 %inside, label %more, label %done
more:
  %row = mul i64 %c, $WIDTH
  %at = add i64 %row, %j
  %place = getelementptr inbounds double, ptr %partials, i64 %at
  %value = load double, ptr %place
  %new = {combined}
  %c1 = add i64 %c, 1
  br label %next
done:
  ret double %sum
}}"""
    for how, start, combined in (
        ("sum", literal(0.0, "double"), "fadd double %sum, %value"),
        ("max", literal(float("-inf"), "double"), "call double @llvm.maximum.f64(double %sum, double %value)"),
    )
]

_LOOP_HINT = """!0 = distinct !{!0, !1}
!1 = !{!"llvm.loop.vectorize.enable", i1 true}"""
