"""What the toolkit does with a model, compared with what torch says of it: one class of the zoo at a time.

Each check gives an `Outcome`:

- right: equal to one-row autograd, or to what the model itself computes;
- refused: an error of the project's own, with what to do, before anything was computed;
- wrong: a number that differs, the worst silent defect; the note has the figure;
- crash: any other error.

References are written here out of torch alone. They run in float64 all through (`in_float64`), also where a model
asks for float32, so that a difference above rounding is a fault.
"""

from __future__ import annotations

import math
import re
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from transformers.pytorch_utils import Conv1D

import optim
from datatools import (
    CoLM,
    DatatoolsError,
    Projector,
    batch_rows,
    covered,
    order,
    per_sample_grads,
)
from datatools.colm.exact import exact_gradients
from datatools.colm.last_layer import LastLayer
from datatools.colm.probes import directional_derivatives
from datatools.colm.replay import evaluating
from datatools.projectors import PROJECTORS
from pipelines.models import causal
from pipelines.models.lora import add_lora
from pipelines.models.losses import collate, row_losses, seen_parameters
from pipelines.settings.parts import LoraConfig, TrainingConfig
from pipelines.training.fit import fit
from tests.zoo.build import FIRST_TOKEN, HIDDEN, LAST_TOKEN, build

Kind = Literal["right", "refused", "wrong", "crash"]
Row = tuple[list[int], list[int]]

THREE = (7, 4, 5)
"""Tokens of the rows of a batch; what is shorter is padded on the right."""
SQUARE = (5, 3, 5, 4, 2)
"""As many rows as tokens: a layer that puts tokens first cannot be told from one that puts rows first by its size."""
TOLERANCE = 1e-8
SINGLE = 2e-3
"""Largest relative error of a parameter's gradient in float64, and in float32."""


@dataclass(frozen=True)
class Outcome:
    kind: Kind
    note: str = ""
    share: float | None = None
    """Of the numbers in weight matrices, how many the per-example gradients hold."""


class Wrong(AssertionError):
    """A number that is not what it should be."""


class _Float64(TorchFunctionMode):
    """Every float32 that is asked for is float64."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = {key: _double(value) for key, value in (kwargs or {}).items()}
        if func is Tensor.float:
            func = Tensor.double
        return func(*(_double(value) for value in args), **kwargs)


def _double(value: Any) -> Any:
    return torch.float64 if value is torch.float32 else value


@contextmanager
def in_float64() -> Iterator[None]:
    """Inside, float64 models compute in float64 what they would compute in float32."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with _Float64():
            yield
    finally:
        torch.set_default_dtype(before)


def rows(lengths: Sequence[int], *, seed: int = 0) -> list[Row]:
    """Random rows (input_ids, labels) whose first two tokens carry no loss."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for length in lengths:
        ids = torch.randint(FIRST_TOKEN, LAST_TOKEN, (length,), generator=generator).tolist()
        found.append((ids, [-100] * min(2, length - 1) + ids[min(2, length - 1) :]))
    return found


def reference(model: nn.Module, row: Row, names: Sequence[str]) -> tuple[dict[str, Tensor], float]:
    """Autograd's gradient of the mean loss of one row alone, without padding, and the loss."""
    known = dict(model.named_parameters())
    asked = {name: known[name].requires_grad for name in names}
    for name in names:
        known[name].requires_grad_(True)
    with torch.enable_grad():
        loss = _row_loss(model, row)
        grads = torch.autograd.grad(loss, [known[name] for name in names], allow_unused=True)
    for name, before in asked.items():
        known[name].requires_grad_(before)
    return {
        name: torch.zeros_like(known[name]) if grad is None else grad for name, grad in zip(names, grads, strict=True)
    }, float(loss.detach())


def _row_loss(model: nn.Module, row: Row) -> Tensor:
    ids, labels = (torch.tensor(part)[None] for part in row)
    logits = model(input_ids=ids, use_cache=False).logits
    return functional.cross_entropy(logits[0, :-1], labels[0, 1:], ignore_index=-100)


def error_of(got: Mapping[str, Tensor], want: Mapping[str, Tensor]) -> tuple[float, str]:
    """The largest relative error of one tensor and its name; a tensor's size counts as 1e-4 of all at least."""
    total = math.sqrt(sum(float(w.double().square().sum()) for w in want.values()))
    worst, where = 0.0, ""
    for name, w in want.items():
        error = float((got[name].double() - w.double()).norm()) / max(float(w.double().norm()), 1e-4 * total, 1e-30)
        if not error <= worst:
            worst, where = error, name
    return worst, where


def expect(error: float, tolerance: float, what: str) -> None:
    if not error <= tolerance:
        raise Wrong(f"{what}: relative error {error:.1e}")


# ----------------------------------------------------------------------------------------------------------- matrices


@dataclass(frozen=True)
class Matrices:
    """Which parameters are hidden weight matrices, told by the modules that hold them.

    must: name -> (stack, inputs): how many matrices the tensor holds, and the size of their inputs.
    never: names of what no rule for matrices may get. What is in neither may go either way: projections outside the
    layers, routers' and mixers' tensors of an unusual form, convolutions over several channels.
    """

    must: dict[str, tuple[int, int]]
    never: set[str]

    @classmethod
    def of(cls, model: nn.Module) -> Matrices:
        head = model.get_output_embeddings()  # type: ignore[operator]
        known = {name for name, _ in model.named_parameters()}
        modules = dict(model.named_modules())
        must: dict[str, tuple[int, int]] = {}
        never: set[str] = set()
        for path, module in modules.items():
            above = [modules[path[:i]] for i, c in enumerate(path) if c == "."]
            in_layers = any(isinstance(m, nn.ModuleList | nn.ModuleDict) for m in above[:-1]) and not _TOWER.search(
                path
            )
            kind = type(module).__name__.lower()
            for name, p in module.named_parameters(prefix=path, recurse=False):
                local = name.rpartition(".")[2]
                if name not in known:
                    continue  # a second name of a shared one
                if p.ndim < 2 or isinstance(module, nn.Embedding) or module is head:
                    never.add(name)
                elif isinstance(module, nn.Linear | Conv1D):
                    norm = any(type(m).__name__.endswith("Norm") for m in above)  # a network inside a norm
                    if in_layers and not norm and min(p.shape) > 1 and "embed" not in path.rpartition(".")[2]:
                        must[name] = (1, p.shape[0] if isinstance(module, Conv1D) else p.shape[1])
                elif isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
                    if p.shape[1] == 1 and module.groups > 1:
                        never.add(name)  # depthwise: one filter a channel
                elif _VECTORS.search(local) or "norm" in kind or p.numel() == max(p.shape):
                    never.add(name)
                elif "expert" in kind and p.ndim == 3:
                    must[name] = (p.shape[0], _inputs(local, p))
                elif "router" in kind and p.ndim == 2:
                    must[name] = (1, p.shape[1])
        return cls(must, never)


_TOWER = re.compile(r"vision|visual|image|audio|multi_modal|tower")
"""Parts of a model that read no text."""
_VECTORS = re.compile(r"bias|^(A_log|D|dt_bias|static_weight|scale|seg_embed|mask_emb|rel_pos_.|pos_embed|probe)$")
"""Parameters of two dimensions or more that are a vector a head, a channel, an expert or a position."""


def _inputs(local: str, p: Tensor) -> int:
    """Inputs of stacked experts [experts, out, in] or [experts, in, out]: into the layer come HIDDEN numbers."""
    into = "down" not in local
    if local == "weight":  # used as F.linear(x, weight[i])
        return int(p.shape[2])
    return HIDDEN if into else int(p.shape[1] * p.shape[2] // HIDDEN)


def matrix_share(model: nn.Module, names: Sequence[str]) -> float:
    """Of the numbers in weight matrices, the share that is in `names`."""
    known = dict(model.named_parameters())
    must = Matrices.of(model).must
    return sum(known[n].numel() for n in must if n in set(names)) / sum(known[n].numel() for n in must)


# -------------------------------------------------------------------------------------------------------------- checks


def check_gradients(name: str) -> Outcome:
    """Per-example gradients of every parameter that `covered` claims."""
    model = build(name, dtype=torch.float64)
    known = dict(model.named_parameters())
    names = covered(model, list(known))
    share = round(matrix_share(model, names), 3)
    mixture = any("expert" in type(m).__name__.lower() for m in model.modules())
    if not names:
        return Outcome("right", share=0.0)
    with in_float64():
        _compare(model, rows(THREE), names, TOLERANCE, "rows of different lengths", dense_losses)
        inner = seen_parameters(model, {n: known[n] for n in names}, "hooks")
        if mixture:
            model.set_experts_implementation("batched_mm")  # type: ignore[operator]
        _compare(model, rows(SQUARE, seed=1), inner, TOLERANCE, "as many rows as tokens")
    _compare(build(name), rows(THREE), inner, SINGLE, "in float32")
    return Outcome("right", share=share)


def dense_losses(model: Any, batch: Mapping[str, Tensor]) -> Tensor:
    """Mean loss of each row's supervised tokens, out of logits at every position."""
    logits, labels = model(input_ids=batch["input_ids"], use_cache=False).logits[:, :-1], batch["labels"][:, 1:]
    losses = functional.cross_entropy(logits.mT, labels, reduction="none", ignore_index=-100)
    return losses.sum(1) / (labels != -100).sum(1).clamp_min(1)


def _compare(
    model: nn.Module, data: list[Row], names: Sequence[str], tolerance: float, what: str, losses: Any = row_losses
) -> None:
    want = [reference(model, row, names)[0] for row in data]
    got = per_sample_grads(losses, model, collate(data), names)
    for i, one in enumerate(want):
        error, where = error_of({n: g[i] for n, g in got.items()}, one)
        expect(error, tolerance, f"{what}, row {i}, {where}")


def check_lora(name: str) -> Outcome:
    """Per-example gradients of LoRA on every linear layer."""
    for dtype, tolerance in ((torch.float64, TOLERANCE), (torch.float32, SINGLE)):
        model = build(name, dtype=dtype)
        try:
            wrapped = add_lora(model, LoraConfig(rank=3, alpha=6.0, targets="auto"), seed=0)
        except DatatoolsError as error:
            return Outcome("refused", _short(error))
        wrapped = wrapped.to(dtype).eval()
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for key, p in wrapped.named_parameters():
                if "lora_" in key:
                    p.copy_(0.3 * torch.randn(p.shape, generator=generator))
        adapters = {key: p for key, p in wrapped.named_parameters() if "lora_" in key}
        names = seen_parameters(wrapped, adapters, "hooks")
        if not names:
            return Outcome("right", share=0.0)
        share = sum(adapters[key].numel() for key in names) / sum(p.numel() for p in adapters.values())
        if dtype == torch.float64:
            with in_float64():
                _compare(wrapped, rows(THREE), names, tolerance, "rows of different lengths")
                _compare(wrapped, rows(SQUARE, seed=1), names, tolerance, "as many rows as tokens")
        else:
            _compare(wrapped, rows(THREE), names, tolerance, "in float32")
    return Outcome("right", share=round(share, 3))


def check_values(name: str) -> Outcome:
    """The matrix that a coreset reads: its rows are the values and nothing else; its gradients are exact."""
    model = build(name, dtype=torch.float64)
    data = rows(THREE)
    batch = collate(data)
    generator = torch.Generator().manual_seed(0)
    with in_float64():
        try:
            target = LastLayer.of(model)
        except DatatoolsError as error:
            return Outcome("refused", _short(error))
        z = torch.randn(3, *target.shape, generator=generator)
        with torch.no_grad():
            chosen = target.embed(torch.ones(target.shape)) != 0
            noise = torch.randn(target.parameter.shape, generator=generator)
            before = _Attention.of(model, batch)
            inside = _Attention.of(model, batch, target.parameter, noise * chosen)
            outside = _Attention.of(model, batch, target.parameter, noise * ~chosen)
        note = _only_values(before, inside, outside)
        if target.kind != "values":
            note = f"{target.kind} of the last mixer"
        want = torch.stack(
            [
                torch.stack([(reference(model, row, [target.name])[0][target.name] * target.embed(k)).sum() for k in z])
                for row in data
            ]
        )
        with evaluating(model):
            exact = exact_gradients(model, row_losses, batch, target)
        got = torch.einsum("bij,kij->bk", exact.double(), z)
        expect(float((got - want).norm() / want.norm()), 1e-6, "exact gradients")
    return Outcome("right", note)


class _Attention(TorchFunctionMode):
    """What the attentions of a forward pass computed, in order: ("weights", probabilities, or queries and keys) and
    ("values", values), which are "shared" where they are the keys too.
    """

    def __init__(self) -> None:
        super().__init__()
        self.events: list[tuple[str, Tensor]] = []
        self.logits = torch.zeros(0)
        self._kept: list[Tensor] = []  # probabilities, whose memory no other tensor may get
        self._keys: Tensor | None = None

    @classmethod
    def of(
        cls, model: nn.Module, batch: Mapping[str, Tensor], parameter: Tensor | None = None, move: Tensor | None = None
    ) -> _Attention:
        found = cls()
        if parameter is not None and move is not None:
            parameter.add_(move)
        try:
            with found:
                found.logits = model(input_ids=batch["input_ids"], use_cache=False).logits
        finally:
            if parameter is not None and move is not None:
                parameter.sub_(move)
        return found

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is functional.scaled_dot_product_attention:
            q, k, v = (*args, *(kwargs[key] for key in ("query", "key", "value")[len(args) :] if key in kwargs))[:3]
            shared = k.shape == v.shape and torch.equal(k, v)
            self.events.append(("weights", (q if shared else torch.cat([q.flatten(), k.flatten()])).clone()))
            self.events.append(("values", v.clone()))
            return func(*args, **kwargs)
        if func in (torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.bmm, Tensor.bmm) and len(args) == 2:
            if any(args[0].untyped_storage().data_ptr() == p.untyped_storage().data_ptr() for p in self._kept[-1:]):
                keys = self._keys
                if keys is not None and keys.shape == args[1].mT.shape and torch.equal(keys, args[1].mT):
                    self.events.pop()  # the weights of shared keys move with the values
                self.events.append(("values", args[1].clone()))
            self._keys = args[1]
        result = func(*args, **kwargs)
        if func in (functional.softmax, torch.softmax, Tensor.softmax) and result.ndim >= 3:
            self.events.append(("weights", result.clone()))
            self._kept.append(result)
        return result


def _only_values(before: _Attention, inside: _Attention, outside: _Attention) -> str:
    """The first thing that moving the chosen rows moves is values; that moving the others moves is not."""
    if not float((inside.logits - before.logits).abs().max()) > 1e-9:
        raise Wrong("moving the value rows changes no output")
    if not before.events:
        return "no attention to compare with"
    kinds = [kind for kind, _ in before.events]
    if [kind for kind, _ in inside.events] != kinds or [kind for kind, _ in outside.events] != kinds:
        raise Wrong("moving weights changes which attentions there are")
    first = _first_change(before, inside)
    if first is None and "values" not in kinds[-1:]:
        return "values not seen"
    if first is None or kinds[first] != "values":
        raise Wrong(f"moving the value rows first changes {'nothing of attention' if first is None else kinds[first]}")
    other = _first_change(before, outside)
    if other is not None and kinds[other] == "values":
        raise Wrong("moving the other rows changes values")
    later = {
        kind for kind, moved in zip(kinds[first + 1 :], _changes(before, inside)[first + 1 :], strict=True) if moved
    }
    return "its layer, or others behind, attend again" if later else ""


def _changes(a: _Attention, b: _Attention) -> list[bool]:
    return [
        x.shape != y.shape or float((x - y).nan_to_num().abs().max()) > 1e-9  # NaN: rows that are masked as a whole
        for (_, x), (_, y) in zip(a.events, b.events, strict=True)
    ]


def _first_change(a: _Attention, b: _Attention) -> int | None:
    return next((i for i, moved in enumerate(_changes(a, b)) if moved), None)


def rules_of(model: nn.Module, optimizer_name: str, **options: Any) -> dict[str, Any]:
    """The parameters that a matrix rule steps as matrices, and by which rule."""
    optimizer = optim.create(optimizer_name, model.named_parameters(), lr=1e-3, **options)
    groups = [group for group in optimizer.param_groups if group["rule"].name == optimizer_name]
    return {name: group["rule"] for group in groups for name in group["param_names"]}


def check_groups(name: str) -> Outcome:
    """Muon and NorMuon get the weight matrices, each expert as one, rows being outputs; the others can be made.

    Fused matrices are steps of their parts by default, which hold the same numbers.
    """
    model = build(name)
    known = dict(model.named_parameters())
    matrices = Matrices.of(model)
    for optimizer_name in ("muon", "normuon"):
        got, split = (rules_of(model, optimizer_name, split_fused=split) for split in (False, True))
        if got.keys() != split.keys():
            raise Wrong(f"{optimizer_name}: {sorted(got.keys() ^ split.keys())[:2]} depend on split_fused")
        missing = sorted(set(matrices.must) - set(got))
        extra = sorted(matrices.never & set(got))
        if missing or extra:
            raise Wrong(
                f"{optimizer_name}: {len(missing)} matrices left out {missing[:2]}, {len(extra)} others {extra[:2]}"
            )
        for key, (stack, inputs) in matrices.must.items():
            stacks = got[key].stacks(known[key].detach())
            found = sum(s.shape[0] for s in stacks), stacks[0].shape[-1]
            if found != (stack, inputs):
                raise Wrong(f"{optimizer_name}: {key} as {found} (matrices, inputs), not {(stack, inputs)}")
            parts = split[key].stacks(known[key].detach())
            if sum(part.numel() for part in parts) != known[key].numel() or parts[0].shape[-1] != inputs:
                raise Wrong(f"{optimizer_name}: the parts of {key} are {[tuple(part.shape) for part in parts]}")
    for optimizer_name in optim.OPTIMIZERS:
        optim.create(optimizer_name, model.named_parameters(), lr=1e-3)
    optim.create("adamw", model.named_parameters(), lr=1e-3, block_ratios="paper")
    return Outcome("right")


def check_features(name: str) -> Outcome:
    """One row's feature: the optimizer's update of its gradient, projected."""
    model = build(name)
    known = dict(model.named_parameters())
    names = seen_parameters(model, {n: known[n] for n in covered(model, list(known))}, "hooks")
    if not names:
        return Outcome("refused", "covered claims no parameter")
    optimizer = optim.create("adamw", [(n, known[n]) for n in names], lr=1e-4)
    batch = collate(rows(THREE))
    row_losses(model, batch).sum().backward()
    optimizer.step()
    projector: Projector = PROJECTORS["sjlt"](64, 0)
    features, losses, norms = batch_rows(model, row_losses, batch, optim.UpdateMap.of(optimizer), projector)
    if not (features.isfinite().all() and losses.isfinite().all() and norms.isfinite().all() and (norms > 0).all()):
        raise Wrong("features are not finite")
    return Outcome("right")


def check_coreset(name: str) -> Outcome:
    """One coreset step with exact gradients; and derivatives by probes, where torch has them."""
    model = build(name)
    try:
        colm = CoLM(model, row_losses, keep=2)
    except DatatoolsError as error:
        return Outcome("refused", _short(error))
    data = rows(THREE)
    batch = collate(data)
    selection = colm(batch, step=1, lengths=[len(ids) for ids, _ in data], watch=True)
    assert colm.last is not None and colm.last.match_error is not None
    if len(selection.indices) != 2 or not math.isfinite(colm.last.match_error):
        raise Wrong(f"{len(selection.indices)} rows chosen, match error {colm.last.match_error}")
    z = torch.randn(2, *colm.target.shape, generator=torch.Generator().manual_seed(0))
    try:
        with evaluating(model):
            along = directional_derivatives(model, row_losses, batch, colm.target, z)
            exact = exact_gradients(model, row_losses, batch, colm.target)
    except DatatoolsError as error:
        return Outcome("right", f"probes refused: {_short(error)}")
    want = torch.einsum("bij,kij->bk", exact, z)
    expect(float((along - want).norm() / want.norm()), SINGLE, "probes")
    return Outcome("right")


def check_order(name: str) -> Outcome:
    """A gradient and a Hessian-vector product as order estimation takes them."""
    from pipelines.order.setting import functional_loss

    model = build(name, dtype=torch.float64)
    data = rows(THREE)
    batch = collate(data)
    count = sum(label != -100 for _, labels in data for label in labels[1:])
    with in_float64():
        params = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
        problem = order.Problem(functional_loss(model), [(count, batch)], [(count, batch)])
        got = problem.gradient(params, 0)
        want: dict[str, Tensor] = {n: torch.zeros_like(p) for n, p in params.items()}
        for row in data:
            own = sum(label != -100 for label in row[1][1:])
            for n, g in reference(model, row, list(params))[0].items():
                want[n] += g * own / count
        error, where = error_of(got, want)
        expect(error, TOLERANCE, f"gradient, {where}")
        generator = torch.Generator().manual_seed(0)
        v = {n: torch.randn(p.shape, generator=generator) for n, p in params.items()}
        error, where = error_of(problem.hvp(params, 0, v), _product(model, data, v, count))
        expect(error, TOLERANCE, f"Hessian-vector product, {where}")
    return Outcome("right")


def _product(model: nn.Module, data: list[Row], v: Mapping[str, Tensor], count: int) -> dict[str, Tensor]:
    """Autograd's derivative of the gradient along v, row by row."""
    known = dict(model.named_parameters())
    total = {n: torch.zeros_like(known[n]) for n in v}
    params = [known[n] for n in v]
    with sdpa_kernel(SDPBackend.MATH):  # the fused kernels have no second derivative
        for row in data:
            own = sum(label != -100 for label in row[1][1:])
            grads = torch.autograd.grad(_row_loss(model, row), params, create_graph=True, allow_unused=True)
            slope = sum((g * v[n]).sum() for n, g in zip(v, grads, strict=True) if g is not None)
            found = torch.autograd.grad(slope, params, allow_unused=True)
            for n, h in zip(v, found, strict=True):
                if h is not None:
                    total[n] += h * own / count
    return total


def check_training(name: str) -> Outcome:
    """One training step by the project's trainer."""
    model = build(name)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    data = rows(THREE)
    recipe = TrainingConfig(batch_size=3, epochs=1, max_steps=1, learning_rate=1e-3)
    with tempfile.TemporaryDirectory() as folder:
        done = fit(model, data.__getitem__, range(3), recipe, Path(folder), seed=0)
    if not math.isfinite(done.losses[0]):
        raise Wrong(f"the loss is {done.losses[0]}")
    if not any((p != before[n]).any() for n, p in model.named_parameters()):
        raise Wrong("no parameter moved")
    if bad := [n for n, p in model.named_parameters() if not p.isfinite().all()]:
        raise Wrong(f"{bad[0]} is not finite behind the step")
    return Outcome("right")


CHECKS: Mapping[str, Callable[[str], Outcome]] = {
    "gradients": check_gradients,
    "lora": check_lora,
    "values": check_values,
    "groups": check_groups,
    "features": check_features,
    "coreset": check_coreset,
    "order": check_order,
    "training": check_training,
}


NO_ROWS = ("groups",)
"""Checks that read parameters alone."""


def check(name: str, only: Sequence[str] | None = None) -> dict[str, Outcome]:
    """All checks of a class by name; none raises."""
    found = {}
    for key, run in CHECKS.items():
        if only is None or key in only:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                found[key] = _outcome(name, run, key not in NO_ROWS)
    return found


def _outcome(name: str, run: Callable[[str], Outcome], reads_rows: bool) -> Outcome:
    if reads_rows:
        try:
            causal.check(build(name), name)  # as loading a model does
        except DatatoolsError as error:
            return Outcome("refused", _short(error))
        except Exception as error:
            return Outcome("crash", f"loading: {_short(error)} [{_where(error)}]")
    try:
        return run(name)
    except Wrong as error:
        return Outcome("wrong", str(error))
    except Exception as error:
        return Outcome("crash", f"{_short(error)} [{_where(error)}]")


def _short(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return f"{type(error).__name__}: {text[:180]}"


def _where(error: BaseException) -> str:
    last = traceback.extract_tb(error.__traceback__)[-1]
    return f"{Path(last.filename).name}:{last.lineno}"
