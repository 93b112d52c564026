"""The recording of a rule's step as a list of tensor operations, on tensors without data."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from optim.rule import State, UpdateRule


class Unsupported(Exception):
    """A step cannot be compiled, for the reason that the message states."""


@dataclass(eq=False)
class Node:
    """One value of a step: an input, a constant or the result of an operation on other values.

    Args:
        op: "input:NAME", "constant", or the name of torch's operation, such as "add.Tensor".
        shape: The shape of the value.
        dtype: The dtype of the value.
        args: The positional arguments of the operation: nodes for tensors, and plain values.
        kwargs: The keyword arguments of the operation.
    """

    op: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)


class Number(float):
    """A number that the step computes with and that compiled code reads when it runs.

    Its value is not part of the code, so that a scheduled momentum needs one trace per step but no compilation. Numbers
    in `LITERALS` are part of the code.

    Attributes:
        node: The value in the trace.
    """

    node: Node

    def __new__(cls, value: float, index: int) -> "Number":
        """Create a number with the position `index` among those of its trace."""
        made = super().__new__(cls, value)
        made.node = Node("input:number", (), torch.float64, (index,))
        return made


LITERALS = frozenset({0.0, 0.5, 1.0, 2.0, 3.0, math.inf})
"""Magnitudes that are usually part of a formula and not settings; some operations have shorter forms for them."""


@dataclass(frozen=True)
class Trace:
    """The recorded values of a step.

    Args:
        inputs: The inputs by name: "param", "grad", "lr", "weight_decay" and "state:KEY".
        outputs: What the step writes, by name: "param" and "state:KEY".
        numbers: The numbers that the step computes with.
    """

    inputs: dict[str, Node]
    outputs: dict[str, Node]
    numbers: tuple[Number, ...] = ()

    def structure(self) -> str:
        """Return a text that is equal for two traces that only differ in the values of their numbers.

        Returns:
            The text.
        """
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

    Returns:
        The recorded step.

    Raises:
        Unsupported: If the step reads values (a Python branch on a tensor), writes in place, or fails.
    """
    tensors: dict[str, Tensor] = {"param": param, "grad": grad} | {f"state:{k}": v for k, v in state.items()}
    with torch.inference_mode(False):  # in inference mode, the recorder would not see individual operations
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
    except Exception as error:  # a rule may do anything with tensors without data
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
    """Record every operation that runs inside it as a `Node`."""

    def __init__(self, inputs: Mapping[str, Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.held: dict[int, tuple[Tensor, Node]] = {}  # by id; the tensor is kept alive so that ids stay unique
        self.numbers: list[Number] = []
        for name, t in inputs.items():
            self.held[id(t)] = (t, Node(f"input:{name}", tuple(t.shape), t.dtype))

    def node(self, t: Tensor) -> Node:
        """Return the node of a tensor; a tensor that no operation created is a constant of the rule."""
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
