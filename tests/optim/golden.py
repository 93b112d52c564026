"""Golden cases and their problems. Formats: tests/golden/README.md."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

Named = list[tuple[str, torch.nn.Parameter]]
DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16}


class NotBuilt(Exception):
    """The case is of an optimizer, a problem or a setting that is not supported here; the argument says which."""


@dataclass(frozen=True)
class Case:
    """One case of a manifest."""

    folder: Path
    entry: dict[str, Any]
    problem: dict[str, Any]

    @property
    def id(self) -> str:
        return f"{self.folder.name}:{self.entry['case']}"


HELD_ELSEWHERE = {
    "OneBitAdam": "tests/optim/distributed/test_onebit.py",
    **dict.fromkeys(
        ("mezo", "zo_sgd", "zo_sgd_momentum", "zo_adam", "zo_sgd_sign", "zo_sgd_conserve", "zo_blockwise", "zo_sparse",
         "zo_hybrid", "forward_grad"),
        "tests/optim/zeroth_order/test_golden.py",
    ),
    "diagnostic: spectrum isotropy": "tests/optim/diagnostics/test_spectrum.py",
    "diagnostic: l-infinity smoothness": "tests/optim/diagnostics/test_smoothness.py",
    "diagnostic: blockwise sharpness": "tests/optim/diagnostics/test_sharpness.py",
    "diagnostic: condition number and TSCNC penalties": "tests/optim/diagnostics/test_conditioning.py",
    "diagnostic: double descent versus conditioning": "tests/optim/diagnostics/test_double_descent.py",
    "swan/sinkgd/mngd functions": "tests/optim/test_linalg.py",
}  # fmt: skip
"""Golden optimizer -> the test that holds its cases: not of rules on gradients that are given."""


def every_case(root: Path) -> Iterator[Case]:
    """Every case of ``root/manifest.json`` and of every ``root/*/manifest.json``, whoever holds it."""
    for path in (root / "manifest.json", *sorted(root.glob("*/manifest.json"))):
        if not path.is_file():
            continue
        manifest = json.loads(path.read_text(encoding="utf-8"))
        for entry in manifest.get("cases", []):
            problem = manifest.get("problems", {}).get(entry.get("problem"), {})
            yield Case(path.parent, entry, problem)


def cases(root: Path) -> Iterator[Case]:
    """Those of rules on gradients that are given or made: neither `HELD_ELSEWHERE` nor for information only."""
    return (
        case
        for case in every_case(root)
        if case.entry.get("optimizer") not in HELD_ELSEWHERE and not for_information(case)
    )


def for_information(case: Case) -> bool:
    """Whether the manifest says that the case is none to be held."""
    return str(case.entry.get("notes", "")).startswith("informative")


def of_kind(root: Path, *optimizers: str) -> list[Case]:
    """The cases of these golden optimizers, in any set of the folder."""
    return [case for case in every_case(root) if case.entry.get("optimizer") in optimizers]


def stored_file(root: Path, name: str) -> Path | None:
    """A file of that name in one of the folder's sets, if one has it."""
    return next(iter(sorted([*root.glob(name), *root.glob(f"*/{name}")])), None)


def input_file(case: Case) -> Path:
    """The problem's arrays."""
    return case.folder / case.problem.get("file", f"problem_{case.entry['problem']}.npz")


def kind_of(case: Case) -> str:
    """The problem's kind, as the manifest says, or as its arrays show where the manifest has names alone."""
    if "kind" in case.problem:
        return str(case.problem["kind"])
    if not input_file(case).is_file():
        raise NotBuilt(f"problem {case.entry['problem']!r}, which has no file")
    inputs = arrays(input_file(case))
    if any(key.startswith("grad/") for key in inputs):
        return "recorded_grads"
    if {"X", "Y"} <= set(inputs) and sum(key.startswith("init/") for key in inputs) == 1:
        return "regression"
    raise NotBuilt(f"a problem of the arrays {sorted(inputs)}")


@cache
def arrays(path: Path) -> dict[str, np.ndarray]:
    with np.load(path, allow_pickle=False) as stored:
        return {key: stored[key] for key in stored.files}


# ---------------------------------------------------------------------------------------------------------- problems


def set_recorded(inputs: dict[str, np.ndarray], t: int, named: Named) -> None:
    """Recorded gradients of step t; none where has_grad says so."""
    for name, p in named:
        present = f"has_grad/{name}" not in inputs or bool(inputs[f"has_grad/{name}"][t])
        p.grad = torch.tensor(inputs[f"grad/{name}"][t], dtype=p.dtype) if present else None


def loss_softmax_rosen(inputs: dict[str, np.ndarray], p: dict[str, Tensor]) -> Tensor:
    x = torch.as_tensor(inputs["X"]).to(p["W"].dtype)
    logits = x @ p["W"].T + p["b"]
    r0, r1 = p["r"]
    rosenbrock = (1 - r0) ** 2 + 10 * (r1 - r0**2) ** 2
    return torch.nn.functional.cross_entropy(logits, torch.as_tensor(inputs["y"])) + 0.05 * rosenbrock


def loss_convnet(inputs: dict[str, np.ndarray], p: dict[str, Tensor]) -> Tensor:
    dtype = p["K"].dtype
    h = torch.tanh(torch.nn.functional.conv2d(torch.as_tensor(inputs["X"]).to(dtype), p["K"], p["kb"])).flatten(1)
    return ((h @ p["V"].T - torch.as_tensor(inputs["t"]).to(dtype)) ** 2).mean()


def loss_regression(inputs: dict[str, np.ndarray], p: dict[str, Tensor]) -> Tensor:
    (w,) = p.values()
    x, y = (torch.as_tensor(inputs[k]).to(w.dtype) for k in "XY")
    return 0.5 / len(x) * ((x @ w.T - y) ** 2).sum()


LOSSES: dict[str, Callable[[dict[str, np.ndarray], dict[str, Tensor]], Tensor]] = {
    "softmax_rosen": loss_softmax_rosen,
    "convnet": loss_convnet,
    "regression": loss_regression,
}


def golden(case: Case) -> dict[str, Tensor]:
    """The stored trajectory name -> [steps + 1, *shape]."""
    stored = arrays(case.folder / case.entry["file"])
    if "hyper_parameters" in case.entry:
        return {n: torch.as_tensor(stored[f"param/{n}"]) for n in case.entry["parameters"]}
    return {n: torch.as_tensor(stored[f"{case.entry['case']}/params/{n}"]).double() for n in case.entry["params"]}
