"""What every rank of a job does; imported by the ranks and, for the names, by the tests."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.nn import Parameter

from optim import OneBitAdam, Optimizer, create
from optim.distributed import OwnerComputes
from tests.optim.harness import randn
from tests.optim.spec import Shape
from tests.optim.specs import SPECS

SHAPES: tuple[Shape, ...] = ((7, 5), (4, 6), (1, 6), (8, 3), (2, 3, 2), (5,))
"""Rows that no number of ranks divides, a tensor that leaves ranks without rows, more dimensions and fewer."""


FEW_ROWS = ("adamp", "muon", "normuon", "root", "sgdp", "stable_spam")
"""Rules to be stepped on shards without an owner, with a tensor that leaves ranks without rows."""


def shapes_of(name: str, shapes: tuple[Shape, ...] = SHAPES) -> list[Shape]:
    return [shape for shape in shapes if len(shape) >= SPECS[name].min_ndim]


def placing(kind: str) -> Callable[[Tensor], Tensor]:
    """How that kind of training lays out a whole tensor."""
    if kind not in ("rows", "shards"):
        return lambda x: x
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    return lambda x: distribute_tensor(x, mesh, [Shard(0)])


def train(name: str, kind: str, shapes: tuple[Shape, ...] = SHAPES, reload: bool = False) -> dict[str, Any]:
    """Four steps in float64, one of them without a gradient for the first tensor, one with a NaN in the second's.

    kind: "replicas", "rows" (DTensor), or a plain `Optimizer`: "one", "shards" (DTensor). reload: the last step by
    another optimizer, from the state dict of the first.
    """
    here = shapes_of(name, shapes)
    params = [Parameter(randn(shape, i)) for i, shape in enumerate(here)]
    placed = placing(kind)
    params = [Parameter(placed(p.detach())) for p in params]
    rule = SPECS[name].rule(SPECS[name].inputs[0])

    def made() -> Optimizer:
        plain = Optimizer([(f"p{i}", p) for i, p in enumerate(params)], rule, lr=0.05, weight_decay=0.1)
        return OwnerComputes(plain, elementwise=rule.elementwise) if kind in KINDS else plain

    optimizer = made()
    for t in range(4):
        for i, p in enumerate(params):
            grad = randn(here[i], 100 * t + i)
            if t == 2 and i == 1 and not rule.elementwise:
                grad.view(-1)[3] = torch.nan
            p.grad = None if t == 1 and i == 0 else placed(grad)
        if t == 3 and reload:
            saved = optimizer.state_dict()
            optimizer = made()
            optimizer.load_state_dict(saved)
        optimizer.step()
    whole = [p.full_tensor() if hasattr(p, "full_tensor") else p for p in params]
    return {
        "params": [p.detach().clone() for p in whole],
        "state": optimizer.state_dict()["state"],
        "held": sum(len(state) > 0 for state in optimizer.state.values()),
    }


def everything(names: list[str]) -> dict[tuple[str, str], Any]:
    """Every rule both ways, the last step after a reload; and one tensor alone, fewer than there are ranks."""
    found = {}
    for name in names:
        for kind in KINDS:
            if kind == "rows" and (
                SPECS[name].rule().elementwise or SPECS[name].rule().coupled or _refuses_shards(name)
            ):
                continue  # not divided: test_dtensor.py and test_hf.py
            found[name, kind] = train(name, kind, reload=kind == "replicas")
    return found | {("alone", kind): train("muon", kind, ((5, 4),)) for kind in KINDS}


def with_adamw(kind: str) -> dict[str, Any]:
    """Muon with AdamW for the rest, the last of three steps from a state dict: parameters and states, all whole."""
    shapes = {"up_proj.weight": (7, 5), "q_proj.weight": (1, 6), "embed_tokens.weight": (5, 3), "norm.weight": (3,)}
    placed = placing(kind)
    params = {name: Parameter(placed(randn(shape, i))) for i, (name, shape) in enumerate(shapes.items())}

    def made() -> Optimizer:
        plain = create("muon", params.items(), lr=0.05, weight_decay=0.1, ns_dtype="param")
        return OwnerComputes(plain) if kind in KINDS else plain

    optimizer = made()
    for t in range(3):
        for i, (name, p) in enumerate(params.items()):
            p.grad = placed(randn(shapes[name], 100 * t + i))
        if t == 2:
            saved = optimizer.state_dict()
            optimizer = made()
            optimizer.load_state_dict(saved)
        optimizer.step()
    whole = [p.full_tensor() if hasattr(p, "full_tensor") else p for p in params.values()]
    return {"params": [p.detach().clone() for p in whole], "state": optimizer.state_dict()["state"]}


KINDS = ("replicas", "rows")


def _refuses_shards(name: str) -> bool:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    try:
        SPECS[name].rule().init(distribute_tensor(torch.ones(4, 3), mesh, [Shard(0)]))
    except ValueError:
        return True
    return False


@contextmanager
def counted() -> Iterator[dict[str, int]]:
    """Bytes that this rank sends to others while the block runs, by collective."""
    sent = {"all_to_all": 0, "all_gather": 0, "all_reduce": 0}
    rank, size = dist.get_rank(), dist.get_world_size()
    real = dist.all_to_all_single, dist.all_gather_into_tensor, dist.all_reduce

    def all_to_all(out: Tensor, given: Tensor, outs: Any = None, ins: Any = None, **more: Any) -> None:
        own = given.numel() // size if ins is None else ins[rank]
        sent["all_to_all"] += (given.numel() - own) * given.element_size()
        real[0](out, given, outs, ins, **more)

    def all_gather(out: Tensor, given: Tensor, **more: Any) -> None:
        sent["all_gather"] += given.nbytes * (size - 1)
        real[1](out, given, **more)

    def all_reduce(given: Tensor, *args: Any, **more: Any) -> None:
        sent["all_reduce"] += given.nbytes
        real[2](given, *args, **more)

    with mock.patch.multiple(
        dist, all_to_all_single=all_to_all, all_gather_into_tensor=all_gather, all_reduce=all_reduce
    ):
        yield sent


def owner_bytes(kind: str, shapes: tuple[Shape, ...]) -> dict[str, int]:
    """Sent in one step of Muon."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    params = [Parameter(randn(shape, i, torch.float32)) for i, shape in enumerate(shapes)]
    if kind == "rows":
        params = [Parameter(distribute_tensor(p.detach(), mesh, [Shard(0)])) for p in params]
    optimizer = OwnerComputes(Optimizer(params, SPECS["muon"].rule(SPECS["muon"].inputs[0]), lr=0.1))
    for p in params:
        p.grad = torch.ones_like(p)
    with counted() as sent:
        optimizer.step()
    return sent


# --------------------------------------------------------------------------------------------------------- 1-bit Adam


def onebit(
    inputs: dict[str, Tensor], names: list[str], steps: list[int], hyper: dict[str, Any], dtype: torch.dtype
) -> dict[str, Any]:
    """A trajectory, with the gradients of this rank, and after each step moments and errors."""
    rank = dist.get_rank()
    named = [(n, Parameter(inputs[f"init/{n}"].to(dtype))) for n in names]
    masks = {n: inputs[f"mask/{n}"] for n in names if f"mask/{n}" in inputs}
    optimizer = OneBitAdam(named, **hyper, masks=masks, mask_unseen=False)
    path: dict[str, list[Tensor]] = {}
    for t in steps:
        for n, p in named:
            grads = [inputs[f"grad{r}/{n}"][t].to(dtype) for r in range(dist.get_world_size())]
            p.grad = grads[rank]
        optimizer.step()
        for n, p in named:
            errors = optimizer._errors.get(p, ())
            seen = {"params": p, **{key: optimizer.state[p][key] for key in ("exp_avg", "exp_avg_sq")}}
            seen |= dict(zip(("worker_error", "server_error"), errors, strict=False))
            for key, value in seen.items():
                path.setdefault(f"{key}/{n}", []).append(value.detach().double().clone())
    return {key: torch.stack(values) for key, values in path.items()}


STEPS, FREEZE_STEP, LR = 150, 75, 0.02


def least_squares(w: Tensor, rank: int, size: int) -> Tensor:
    """The gradient at w [40, 12] on a rank's own rows."""
    target, x = randn((40, 12), 1), randn((60, 12), 2)[rank::size]
    return (w - target) @ (x.T @ x) / len(x)


def onebit_training() -> dict[str, Any]:
    """Least squares, each rank with rows of its own: the parameter at the end, and bytes of the last step."""
    w = Parameter(torch.zeros(40, 12, dtype=torch.float64))
    optimizer = OneBitAdam([("w", w)], lr=LR, freeze_step=FREEZE_STEP)
    for t in range(STEPS):
        optimizer.param_groups[0]["lr"] = LR * (1 - t / STEPS)
        w.grad = least_squares(w.detach(), dist.get_rank(), dist.get_world_size())
        with counted() as sent:
            optimizer.step()
    return {"w": w.detach(), "sent": sent}


def onebit_not_finite() -> dict[str, Any]:
    """Two compressed steps of two parameters, the second with a NaN in one gradient of the last rank; then a reload."""
    named = [(name, Parameter(randn((5, 4), i))) for i, name in enumerate("ab")]
    optimizer = OneBitAdam(named, lr=LR, freeze_step=1)
    seen: list[dict[str, Tensor]] = []
    for t in range(3):
        for i, (name, p) in enumerate(named):
            p.grad = randn((5, 4), 10 * t + 3 * i + dist.get_rank())
            if t == 2 and name == "a" and dist.get_rank() == dist.get_world_size() - 1:
                p.grad[1, 2] = torch.nan
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            optimizer.step()
        kept = {"p": [p for _, p in named], "m": [optimizer.state[p]["exp_avg"] for _, p in named],
                "steps": [optimizer.state[p]["step"] for _, p in named]}  # fmt: skip
        for i, key in enumerate(("worker", "server")) if t else ():
            kept[key] = [optimizer._errors[p][i] for _, p in named]
        seen.append({f"{key}/{name}": x.detach().clone() for key, xs in kept.items()
                     for (name, _), x in zip(named, xs, strict=True)})  # fmt: skip
    optimizer.load_state_dict(optimizer.state_dict())
    return {"seen": seen, "said": [str(w.message) for w in caught], "errors": len(optimizer._errors)}


# --------------------------------------------------------------------------------------------------------------- a job


def job(names: list[str], cases: list[tuple[Any, ...]]) -> dict[str, Any]:
    """All that the tests ask of so many ranks: one start of the processes."""
    two = dist.get_world_size() == 2
    return {
        "owner": everything(names),
        "with_adamw": {kind: with_adamw(kind) for kind in KINDS if two},
        "shards": {name: train(name, "shards")["params"] for name in FEW_ROWS if two},
        "bytes": {kind: owner_bytes(kind, ((6, 8), (6, 8), (4, 5))) for kind in KINDS},
        "onebit": [onebit(*case) for case in cases],
        "training": onebit_training(),
        "not_finite": onebit_not_finite(),
    }
