"""The loops of a compiled step: one pass over the elements, or the rows, of a chunk."""

from collections.abc import Sequence

from optim.cpu_jit.arithmetic import Block, Code, Slot
from optim.cpu_jit.kinds import FULL, ROW, SCALAR, TYPES, Reduction
from optim.cpu_jit.layout import ARGUMENTS, HEADER, Layout, combined, finished, from_scratch, start_of, term_of
from optim.cpu_jit.trace import Node


class Body(Code):
    """One pass over a chunk, as loops and the code before, between and after them.

    Args:
        layout: The layout of the step.
        number: The number of the body.

    Attributes:
        head: The code that runs once.
        segments: The code that runs once per row, before each loop.
        loops: The code of each loop, which runs once per element.
        after: The code that runs once per row, after each loop.
        sums: The reductions of each loop, with their types and terms.
    """

    def __init__(self, layout: Layout, number: int) -> None:
        super().__init__(layout.kinds, layout.declared)
        self.layout, self.number = layout, number
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
        """Return the address of an input.

        Args:
            name: The name of the input.

        Returns:
            The name of the pointer.
        """
        if name not in self.head.known:
            at = self.put(self.head, f"getelementptr inbounds i64, ptr %table, i64 {self.layout.pointers[name]}")
            self.head.known[name] = self.put(self.head, f"load ptr, ptr {at}"), "ptr"
        return self.head.known[name][0]

    def get(self, node: Node, loop: int) -> Slot:
        """Return the value of a node inside a loop.

        Args:
            node: The node.
            loop: The number of the loop.

        Returns:
            The value.
        """
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
            self.head.known[node] = from_scratch(self, self.head, self.layout, node)
        return self.head.known[node]

    def _row_reduction(self, block: Block, node: Node) -> None:
        reduction = self.kinds.reductions[node]
        if self.kinds[reduction.operand][0] == ROW:  # over dimensions of one element
            block.known[node] = self.get(reduction.operand, self.kinds[node][2])
            return
        if self.kinds[node][1] + 1 < self.number:  # an earlier body has computed and stored it
            place = self._kept(block, self.layout.kept.setdefault(node, len(self.layout.kept)))
            ty = TYPES[node.dtype][0]
            value = self.put(block, f"load double, ptr {place}")
            block.known[node] = self.convert(block, (value, "double"), ty), ty
            return
        level = self.kinds[node][2] - 1
        total = self._accumulated(reduction, level)
        block.known[node] = finished(self, block, reduction, total, node)

    def _kept(self, block: Block, number: int) -> str:
        """Return the address at which a reduction over this row is stored."""
        key = ("kept",)
        if key not in self.head.known:
            at = self.put(self.head, f"getelementptr inbounds i64, ptr %table, i64 {HEADER - 1}")
            self.head.known[key] = self.put(self.head, f"load ptr, ptr {at}"), "ptr"
        row = self.put(block, "mul i64 %r, $KEPT")
        index = self.put(block, f"add i64 {row}, {number}")
        return self.put(block, f"getelementptr inbounds double, ptr {self.head.known[key][0]}, i64 {index}")

    def _keep(self) -> None:
        """Store reductions over rows that this body computes first and a later one needs."""
        for node, number in self.layout.kept.items():
            if self.kinds[node][1] + 1 == self.number:
                level = self.kinds[node][2]
                value = self.get(node, level)
                block = self.segments[level]
                wide = self.convert(block, value, "double")
                block.lines.append(f"  store double {wide}, ptr {self._kept(block, number)}")

    def _accumulated(self, reduction: Reduction, loop: int) -> Slot:
        """Return the result of a reduction over a loop, which is known after the loop."""
        sums = self.sums[loop]
        if reduction not in sums:
            ty, term = term_of(self, self.loops[loop], reduction, self.get(reduction.operand, loop))
            sums[reduction] = (ty, term)
        return f"%total{loop}_{list(sums).index(reduction)}", sums[reduction][0]

    def writing(self, name: str) -> str:
        """Return the last body, which writes the parameter and the state.

        Args:
            name: The name of the function.

        Returns:
            The text of the function.
        """
        outputs = self.layout.trace.outputs
        last = max((self.kinds[node][2] for node in outputs.values()), default=0)
        self._grow(last)
        full: list[tuple[str, Slot]] = []
        rows: list[tuple[str, Slot]] = []
        for key, node in outputs.items():
            place = self.layout.kind_of_place(key)
            if place != SCALAR and node is not self.layout.trace.inputs[key]:  # an unchanged entry is not written
                (full if place == FULL else rows).append((key, self.get(node, last)))
        for key, value in full:
            self.store(self.loops[last], value, self.pointer(key), self.layout.trace.inputs[key].dtype, f"%i{last}")
        for key, value in rows:
            self.store(self.after[last], value, self.pointer(key), self.layout.trace.inputs[key].dtype, "%r")
        return self._text(name, Block())

    def reducing(self, name: str, wanted: Sequence[tuple[int, Reduction]]) -> str:
        """Return a body that computes reductions.

        Args:
            name: The name of the function.
            wanted: The reductions, each with its place among the partial results of a chunk.

        Returns:
            The text of the function.
        """
        end = Block()
        self._keep()
        for j, reduction in wanted:
            kind, _, level = self.kinds[reduction.operand]
            ty = "double" if reduction.how == "sum" else TYPES[reduction.operand.dtype][0]
            held = self.put(self.head, f"alloca {ty}")
            self.head.lines.append(f"  store {ty} {start_of(reduction, ty)}, ptr {held}")
            self._grow(level)
            if kind == FULL:
                block, (term, _) = self.after[level], self._accumulated(reduction, level)
            else:
                block = self.segments[level]
                _, term = term_of(self, block, reduction, self.get(reduction.operand, level))
            total = combined(self, block, reduction, ty, self.put(block, f"load {ty}, ptr {held}"), term)
            block.lines.append(f"  store {ty} {total}, ptr {held}")
            value = self.convert(end, (self.put(end, f"load {ty}, ptr {held}"), ty), "double")
            at = self.put(end, f"getelementptr inbounds double, ptr %partial, i64 {j}")
            end.lines.append(f"  store double {value}, ptr {at}")
        return self._text(name, end)

    def _text(self, name: str, end: Block) -> str:
        by_rows = self.kinds.rows is not None
        lines = [f"define internal void @{name}({ARGUMENTS}) noinline {{", "entry:", *self.head.lines]
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
                start = start_of(reduction, ty)
                phis.append(f"  %acc{j}_{s} = phi {ty} [ {start}, %seg{j} ], [ %sum{j}_{s}, %loop{j} ]")
                totals.append(f"  %total{j}_{s} = phi {ty} [ {start}, %seg{j} ], [ %sum{j}_{s}, %loop{j} ]")
            updates = Block()
            for s, (reduction, (ty, term)) in enumerate(sums):
                new = combined(self, updates, reduction, ty, f"%acc{j}_{s}", term)
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
