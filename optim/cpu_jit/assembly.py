"""Conversion of a traced step to LLVM assembly: one loop over memory instead of one loop per operation.

There are three kinds of values. *Scalars* (one per tensor: step counts, corrections, norms) are computed once per
tensor, *rows* (one per row, if the rule reduces rows of a matrix) once per row, and *full* values (one per element) in
loops. A reduction over the whole tensor ends a pass over memory: everything that depends on it belongs to the next
*stage*. A step consists of

    scalars 0, body 1, scalars 1, ..., scalars K, body K + 1

where body k computes the reductions that scalars k need, and the last body writes the parameter and the state. Nothing
is written before everything has been read, and every body recomputes what it needs. A body runs on a chunk (a range of
elements, or of rows), and its reductions are combined in the order of the chunks, so that results depend on the size of
chunks and not on the number of threads. A reduction over a row ends a loop over that row: *levels* are to the loops of
a row what stages are to passes. Reductions over rows that a later body needs again are stored, one number per row.

Sums are accumulated in float64, in an order that the compiler chooses and that is then fixed by the code.

Two conditions can prevent bodies from running. Body 1 computes a *guard*: whether the largest magnitude of the gradient
is finite; if it is not, nothing is written. And a reduction that only one branch of ``where`` reads is not computed if
the condition, which is a scalar of an earlier stage, selects the other branch. A step can therefore measure something
once and keep it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from optim.cpu_jit.arithmetic import Block, Code, Slot
from optim.cpu_jit.kinds import FULL, ROW, SCALAR, Reduction, literal
from optim.cpu_jit.layout import ARGUMENTS, HEADER, Layout, finished, from_scratch
from optim.cpu_jit.loops import Body
from optim.cpu_jit.trace import Node, Trace, Unsupported


@dataclass(frozen=True)
class Assembly:
    """The text of a module with the function `run`, and what its caller must know.

    Args:
        text: The assembly.
        passes: The number K of passes before the last one.
        scratch: The number of float64 numbers that a tensor needs.
        partials: The number of float64 numbers that a chunk needs.
        kept: The number of float64 numbers that a row needs.
        row: The number of elements of a row, or 0 if chunks are ranges of elements.
    """

    text: str
    passes: int
    scratch: int
    partials: int
    kept: int
    row: int


def assemble(trace: Trace, *, guarded: bool = False) -> Assembly:
    """Return the code of a step.

    Args:
        trace: The recorded step.
        guarded: Whether the code leaves a tensor unchanged if the gradient is not finite.

    Raises:
        Unsupported: With the reason, if an operation or a shape does not fit the scheme.

    Returns:
        The assembly and its memory requirements.
    """
    layout = Layout(trace, guarded)
    kinds = layout.kinds
    for name, node in trace.outputs.items():
        place, kind = layout.kind_of_place(name), kinds[node][0]
        if place != kind and kind != SCALAR and not (place == FULL and kind == ROW):
            raise Unsupported(f"a {kind} value for {name}, which needs a {place} value")
    last = layout.last
    guard = [(layout.guard, True)] if layout.guard else []
    functions = _gated(layout, last + 1, guard, lambda name: Body(layout, last + 1).writing(name), None)
    for stage in range(last, -1, -1):  # backwards, because a function determines what earlier ones must provide
        functions.append(_scalars(layout, stage, writing=stage == last))
        if stage:
            functions += _reducing(layout, stage)
    row = 0 if kinds.rows is None else kinds.numel // max(kinds.rows, 1)
    width = max((len(wanted) for wanted in layout.wanted.values()), default=0)
    layout.declared.add("declare double @llvm.maximum.f64(double, double)")  # of _COMBINE
    text = (
        "\n".join(
            [
                *functions,
                _driver(last, len(layout.pointers) + HEADER, len(layout.slots), width),
                *_COMBINE,
                *sorted(layout.declared),
                _LOOP_HINT.replace("true", "false") if any(map(_of_library, layout.declared)) else _LOOP_HINT,
            ]
        )
        .replace("$WIDTH", str(width))
        .replace("$KEPT", str(len(layout.kept)))
    )
    return Assembly(text, last, len(layout.slots), width, len(layout.kept), row)


def _reducing(layout: Layout, stage: int) -> list[str]:
    """Return the functions of body `stage`, which computes those of its reductions that the step will read."""
    wanted = list(enumerate(layout.wanted.get(stage, [])))
    known = {
        reduction: [
            (node, value) for node, value in layout.conditions.get(reduction, ()) if layout.kinds[node][1] < stage
        ]
        for _, reduction in wanted
    }
    always = [(j, reduction) for j, reduction in wanted if not known[reduction]]
    shared = [
        condition
        for condition in next((c for c in known.values() if c), [])
        if all(condition in c for c in known.values() if c)
    ]
    kept = any(layout.kinds[node][1] + 1 == stage for node in layout.kept)
    some = (lambda name: Body(layout, stage).reducing(name, always)) if always or kept else None
    return _gated(layout, stage, shared, lambda name: Body(layout, stage).reducing(name, wanted), some)


def _gated(
    layout: Layout,
    number: int,
    conditions: Sequence[tuple[Node, bool]],
    then: Callable[[str], str],
    otherwise: Callable[[str], str] | None,
) -> list[str]:
    """Return a body that calls one of two functions, depending on scalars that are known before it.

    `then` and `otherwise` return the text of a function with the given name.
    """
    name = f"body{number}"
    if not conditions:
        return [then(name)]
    code, block = Code(layout.kinds, layout.declared), Block()
    holds = "true"
    for node, value in conditions:
        found = code.convert(block, from_scratch(code, block, layout, node), "i1")
        holds = code.put(block, f"and i1 {holds}, {found if value else code.put(block, f'xor i1 {found}, true')}")
    made = [then(f"{name}all"), *([otherwise(f"{name}some")] if otherwise else [])]
    call = [f"  call void @{name}{part}({ARGUMENTS})" for part in ("all", "some")]
    return [
        *made,
        "\n".join(
            [
                f"define internal void @{name}({ARGUMENTS}) {{",
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


def _scalars(layout: Layout, stage: int, *, writing: bool) -> str:
    """Return the function that computes the scalars of a stage and stores them in scratch memory.

    The last stage writes those of the state.
    """
    code, block = Code(layout.kinds, layout.declared), Block()

    def get(node: Node) -> Slot:
        if node not in block.known:
            block.known[node] = made(node)
        return block.known[node]

    def made(node: Node) -> Slot:
        _, at, _ = layout.kinds[node]
        if at < stage or node.op == "constant":
            return from_scratch(code, block, layout, node)
        if node.op in ("input:lr", "input:weight_decay", "input:number"):
            at = 2 + node.args[0] if node.op == "input:number" else int(node.op != "input:lr")
            place = code.put(block, f"getelementptr inbounds double, ptr %settings, i64 {at}")
            return code.put(block, f"load double, ptr {place}"), "double"
        if node.op.startswith("input:"):
            place = code.put(
                block, f"getelementptr inbounds i64, ptr %table, i64 {layout.pointers[node.op.removeprefix('input:')]}"
            )
            return code.load(block, code.put(block, f"load ptr, ptr {place}"), node.dtype, "0")
        if node in layout.kinds.reductions:
            return reduced(node, layout.kinds.reductions[node])
        return code.operation(block, node, get)

    def reduced(node: Node, reduction: Reduction) -> Slot:
        if layout.kinds[reduction.operand][0] == SCALAR:
            if reduction.squared or reduction.absolute:
                value, ty = get(reduction.operand)
                return code.call(block, "fabs", ty, value), ty
            return get(reduction.operand)
        j = layout.partial(stage, reduction)
        total = code.put(block, f"call double @combine_{reduction.how}(ptr %table, ptr %partials, i64 {j})")
        return finished(code, block, reduction, (total, "double"), node)

    outputs: list[tuple[str, Slot]] = []
    if writing:
        outputs = [
            (name, get(node)) for name, node in layout.trace.outputs.items() if layout.kind_of_place(name) == SCALAR
        ]
    for node, number in list(layout.slots.items()):
        if layout.kinds[node][1] == stage:
            value = code.convert(block, get(node), "double")
            at = code.put(block, f"getelementptr inbounds double, ptr %scratch, i64 {number}")
            block.lines.append(f"  store double {value}, ptr {at}")
    guard = get(layout.guard)[0] if writing and layout.guard else None
    for name, (value, ty) in outputs:
        place = code.put(block, f"getelementptr inbounds i64, ptr %table, i64 {layout.pointers[name]}")
        pointer = code.put(block, f"load ptr, ptr {place}")
        node = layout.trace.inputs[name]
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
    """Return `run(what, items, n, counter, table, scratch, partials, settings)`, which processes items.

    It takes items until the counter reaches n. An item is (tensor, lo, hi, chunk). `what` is 0 for a whole step of
    tensors with one chunk, 2k + 1 for scalars k of a tensor, and 2k + 2 for body k + 1 of a chunk.
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


def _of_library(declaration: str) -> bool:
    """Return whether this declares a function of the C library, which prevents the vectorisation of loops."""
    return "@llvm." not in declaration


_LOOP_HINT = """!0 = distinct !{!0, !1}
!1 = !{!"llvm.loop.vectorize.enable", i1 true}"""
