"""A rule's whole step as a list of tensor operations, recorded once on tensors without data."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from optim.rule import State, UpdateRule


class Unsupported(Exception):
    """The step cannot be compiled; the message says why."""


@dataclass(eq=False)
class Node:
    """One value of the step: an input, a constant or the result of an operation on other values.

    op: "input:NAME", "constant", or the name of torch's operation, such as "add.Tensor". args and kwargs hold nodes
    where the operation took tensors, otherwise plain values.
    """

    op: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)


class Number(float):
    """A number that the step calculates with, which compiled code reads when it runs: another value is the same code.

    So a momentum that is scheduled costs a trace a step, and no compilation. Those in `LITERALS` are part of the code.
    """

    node: Node

    def __new__(cls, value: float, index: int) -> "Number":
        """The number, which stands at place `index` among those of its trace."""
        made = super().__new__(cls, value)
        made.node = Node("input:number", (), torch.float64, (index,))
        return made


LITERALS = frozenset({0.0, 0.5, 1.0, 2.0, 3.0, math.inf})
"""Magnitudes of numbers that are more often part of a formula than settings: some operations have shorter forms."""


@dataclass(frozen=True)
class Trace:
    """Inputs by name ("param", "grad", "lr", "weight_decay", "state:KEY"), what the step writes to "param" and
    "state:KEY", and its numbers.
    """

    inputs: dict[str, Node]
    outputs: dict[str, Node]
    numbers: tuple[Number, ...] = ()

    def structure(self) -> str:
        """A text that is the same for two traces which differ in the values of their numbers at most."""
        index: dict[Node, int] = {}
        lines: list[str] = []

        def text(value: Any) -> str:
            if isinstance(value, Node):
                return f"%{visit(value)}"
            if isinstance(value, Number):
                return f"#{value.node.args[0]}"
            return f"({', '.join(map(text, value))})" if isinstance(value, tuple) else repr(value)

        def visit(node: Node) -> int:
            if node not in index:
                arguments = [*map(text, node.args), *(f"{key}={text(value)}" for key, value in node.kwargs.items())]
                index[node] = len(index)
                lines.append(f"{node.op} {node.shape} {node.dtype} {' '.join(arguments)}")
            return index[node]

        ends = [f"{name} %{visit(node)}" for name, node in (*self.inputs.items(), *self.outputs.items())]
        return "\n".join((*lines, *ends))


def trace(rule: UpdateRule, param: Tensor, grad: Tensor, state: Mapping[str, Tensor], *, decayed: bool) -> Trace:
    """Record `rule.stepped` on the shapes and dtypes of these tensors.

    Args:
        rule: The rule.
        param: The parameter.
        grad: The gradient.
        state: The state.
        decayed: Whether there is weight decay.

    Raises:
        Unsupported: If the step reads values (a Python branch on a tensor), writes in place, or fails.
    """
    tensors: dict[str, Tensor] = {"param": param, "grad": grad} | {f"state:{k}": v for k, v in state.items()}
    with torch.inference_mode(False):  # inside it, operations would not reach the recorder one by one
        metas = {name: torch.empty(t.shape, dtype=t.dtype, device="meta") for name, t in tensors.items()}
        for name in ("lr", "weight_decay"):
            metas[name] = torch.empty((), dtype=torch.float64, device="meta")
    recorder = _Recorder(metas)
    try:
        with torch.inference_mode(False), torch.no_grad(), recorder:
            given: State = {name: metas[f"state:{name}"] for name in state}
            weight_decay = metas["weight_decay"] if decayed else None
            moved, after = rule.stepped(metas["param"], metas["grad"], given, lr=metas["lr"], weight_decay=weight_decay)
            new = {"param": moved} | {f"state:{key}": t for key, t in after.items()}
    except Unsupported:
        raise
    except Exception as error:  # whatever a rule does to tensors without data
        raise Unsupported(f"{type(error).__name__} while tracing: {error}") from error
    missing = {f"state:{k}" for k in state} ^ (set(new) - {"param"})
    if missing:
        raise Unsupported(f"update changes the entries of the state: {sorted(missing)}")
    return Trace(
        {name: recorder.node(t) for name, t in metas.items()},
        {name: recorder.node(t) for name, t in new.items()},
        tuple(recorder.numbers),
    )


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Keeps every operation that runs inside it as a `Node`."""

    def __init__(self, inputs: Mapping[str, Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.held: dict[int, tuple[Tensor, Node]] = {}  # by id; the tensor is kept alive so that ids stay unique
        self.numbers: list[Number] = []
        for name, t in inputs.items():
            self.held[id(t)] = (t, Node(f"input:{name}", tuple(t.shape), t.dtype))

    def node(self, t: Tensor) -> Node:
        """The node of a tensor; one that no operation made is a constant of the rule."""
        if id(t) not in self.held:
            if t.ndim != 0 or t.is_meta:
                raise Unsupported(f"a constant tensor of shape {tuple(t.shape)}")
            self.held[id(t)] = (t, Node("constant", (), t.dtype, (t.item(),)))
        return self.held[id(t)][1]

    def _plain(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return self.node(value)
        if isinstance(value, float) and abs(value) not in LITERALS and not math.isnan(value):
            self.numbers.append(Number(value, len(self.numbers)))
            return self.numbers[-1]
        return tuple(self._plain(v) for v in value) if isinstance(value, list | tuple) else value

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        name = f"{func.overloadpacket.__name__}.{func._overloadname}"
        if func._schema.is_mutable:
            raise Unsupported(f"the operation {name} writes in place")
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and id(out) not in self.held:
            plain = {key: self._plain(value) for key, value in (kwargs or {}).items()}
            node = Node(name, tuple(out.shape), out.dtype, self._plain(args), plain)
            self.held[id(out)] = (out, node)
        return out
