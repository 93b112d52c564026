"""Pickled values read without running code: classes and functions in a pickle become records.

The index of a sharded checkpoint (`.metadata` of torch.distributed.checkpoint) is a pickle. Its instructions are only
parsed here (`pickletools`): numbers, texts and containers become themselves, and everything else becomes an `Inert`
that records what was requested.
"""

from __future__ import annotations

import pickletools
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any


@dataclass(eq=False)
class Inert:
    """A class or function that a pickle names, its arguments, and the state that it would get."""

    name: str
    args: tuple[Any, ...] = ()
    state: Any = field(default_factory=dict)


_MARK = object()
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_MAKE = {"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple, "EMPTY_SET": set}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_VALUES = {"BININT", "BININT1", "BININT2", "LONG1", "LONG4", "INT", "LONG", "BINFLOAT", "SHORT_BINUNICODE",
           "BINUNICODE", "BINUNICODE8", "SHORT_BINBYTES", "BINBYTES", "BINBYTES8"}  # fmt: skip


def read(data: bytes, known: Collection[str]) -> Any:
    """Return the value in a pickle, with records instead of objects.

    Args:
        data: The pickle.
        known: The classes and functions that may occur.

    Raises:
        ValueError: Another class or function occurs, or the bytes are not a pickle.
    """
    stack: list[Any] = []
    memo: dict[int, Any] = {}
    for op, arg, _ in pickletools.genops(data):
        if op.name == "STOP":
            return stack.pop()
        _take(op.name, arg, stack, memo, known)
    raise ValueError("its index does not end")


def _take(op: str, arg: Any, stack: list[Any], memo: dict[int, Any], known: Collection[str]) -> None:
    if op in _VALUES:
        stack.append(arg)
    elif op in _CONSTANTS:
        stack.append(_CONSTANTS[op])
    elif op in _MAKE:
        stack.append(_MAKE[op]())
    elif op in _TUPLES:
        stack[-_TUPLES[op]:] = [tuple(stack[-_TUPLES[op]:])]  # fmt: skip
    elif op == "MARK":
        stack.append(_MARK)
    elif op == "TUPLE":
        stack.append(tuple(_above_mark(stack)))
    elif op in ("MEMOIZE", "BINPUT", "LONG_BINPUT", "PUT"):
        memo[len(memo) if op == "MEMOIZE" else int(arg)] = stack[-1]
    elif op in ("BINGET", "LONG_BINGET", "GET"):
        stack.append(memo[int(arg)])
    elif op in ("GLOBAL", "STACK_GLOBAL"):
        name = arg.replace(" ", ".", 1) if op == "GLOBAL" else ".".join((stack.pop(-2), stack.pop()))
        if name not in known:
            raise ValueError(f"its index asks for {name}, which is not part of one")
        stack.append(Inert(name))
    elif op in ("REDUCE", "NEWOBJ"):
        args, what = stack.pop(), stack.pop()
        stack.append(Inert(what.name, tuple(args)))
    elif op == "BUILD":
        state = stack.pop()
        stack[-1].state = state
    elif op in ("SETITEM", "SETITEMS"):
        pairs = _above_mark(stack) if op == "SETITEMS" else [stack.pop(-2), stack.pop()]
        into = stack[-1].state if isinstance(stack[-1], Inert) else stack[-1]  # an OrderedDict
        into.update(zip(pairs[::2], pairs[1::2], strict=True))
    elif op in ("APPEND", "APPENDS"):
        more = _above_mark(stack) if op == "APPENDS" else [stack.pop()]
        stack[-1].extend(more)
    elif op not in ("PROTO", "FRAME"):
        raise ValueError(f"its index has an instruction {op}, which is not part of one")


def _above_mark(stack: list[Any]) -> list[Any]:
    """Remove and return the values above the last mark of the stack."""
    at = max(i for i, value in enumerate(stack) if value is _MARK)
    found = stack[at + 1 :]
    del stack[at:]
    return found
