"""The gradient of each example of a batch, for any `nn.Module`.

Three methods give the same numbers. `loop` is the definition: one backward pass an example. `hooks` is the fast
default for linear layers and LoRA matrices: one backward pass for the whole batch that forms no weight gradient at
all, only the gradient g of each layer's output, from which a layer's per-example gradient is the product with the
layer's input x:

    weight [out, in]:  G_i = sum_s g_is x_is^T            bias [out]:  sum_s g_is
    LoRA y = W x + c B A x:   dA_i = c sum_s (B^T g_is) x_is^T,   dB_i = c sum_s g_is (A x_is)^T

`vmap` is torch.func's, for modules made of other layers that it can transform.

All need rows that do not see each other: the loss of row i may depend on row i alone (no batch normalisation). The
module must be in eval mode, or dropout would make the gradient a random number; that is checked.
Source: Goodfellow 2015, arXiv 1510.01799 (per-example gradients from one backward pass).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

Batch = Mapping[str, Tensor]
"""Tensors whose first dimension is the example."""
Loss = Callable[[Any, Batch], Tensor]
"""(module, batch of b examples) -> losses [b]."""
Visit = Callable[[str, Tensor], None]
"""Receives a parameter's name and its per-example gradients [b, *shape]; the tensor is not used again by the caller."""
Method = Literal["hooks", "loop", "vmap"]


def per_sample_grads(
    loss: Loss, module: nn.Module, batch: Batch, names: Sequence[str], *, method: Method = "hooks"
) -> dict[str, Tensor]:
    """Per-example gradients of `loss` for the parameters `names`: name -> [b, *shape], in the parameter's dtype.

    Cost: `hooks` one forward and about one forward's worth of backward; `loop` b passes with weight gradients.
    Memory: b gradients; use `visit_per_sample_grads` to hold one layer at a time.
    Raises: ValueError for an unknown parameter, a module in training mode, or a layer that the method cannot see
    (`covered` says which it can).
    """
    grads: dict[str, Tensor] = {}
    visit_per_sample_grads(loss, module, batch, names, grads.__setitem__, method=method)
    return {name: grads[name] for name in names}


def visit_per_sample_grads(
    loss: Loss, module: nn.Module, batch: Batch, names: Sequence[str], visit: Visit, *, method: Method = "hooks"
) -> Tensor:
    """Call `visit(name, grads [b, *shape])` once for each of `names`, layer by layer; the losses [b], detached.

    With `hooks` the last layer comes first and memory holds the per-example gradients of one layer, whatever the model.
    """
    known = dict(module.named_parameters())
    if missing := [name for name in names if name not in known]:
        raise ValueError(
            f"per-sample gradients: the module has no parameter {missing[0]!r} ({len(missing)} unknown names)"
        )
    if training := [name for name, child in module.named_modules() if child.training]:
        raise ValueError(
            f"per-sample gradients: {len(training)} modules are in training mode (first: {training[0]!r}); "
            "call module.eval(), dropout would make each gradient a random number"
        )
    with torch.enable_grad(), _frozen(module):
        if method == "hooks":
            return _visit_by_hooks(loss, module, batch, names, visit)
        if method == "loop":
            return _visit_by_loop(loss, module, batch, {name: known[name] for name in names}, visit)
        if method == "vmap":
            return _visit_by_vmap(loss, module, batch, {name: known[name] for name in names}, visit)
    raise ValueError(f"per-sample gradients: unknown method {method!r}; choose hooks, loop or vmap")


def covered(module: nn.Module, names: Sequence[str]) -> list[str]:
    """Those of `names` whose per-example gradients `hooks` can form: weights and biases of Linear, plain LoRA matrices.

    Left out: parameters shared between modules (tied embeddings), embeddings, norms, convolutions, DoRA.
    """
    sites = _sites(module)
    reachable = {name for site in sites.values() for name in site.names}
    return [name for name in names if name in reachable]


@contextmanager
def _frozen(module: nn.Module) -> Iterator[None]:
    """No parameter asks for a gradient, so that no backward pass forms weight gradients nobody reads."""
    asked = [p for p in module.parameters() if p.requires_grad]
    for p in asked:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in asked:
            p.requires_grad_(True)


def _visit_by_loop(
    loss: Loss, module: nn.Module, batch: Batch, params: dict[str, nn.Parameter], visit: Visit
) -> Tensor:
    for p in params.values():
        p.requires_grad_(True)
    try:
        grads: dict[str, list[Tensor]] = {name: [] for name in params}
        losses = []
        for i in range(_size(batch)):
            value = loss(module, {key: tensor[i : i + 1] for key, tensor in batch.items()}).sum()
            found = torch.autograd.grad(value, list(params.values()), allow_unused=True)
            for (name, p), grad in zip(params.items(), found, strict=True):
                grads[name].append(torch.zeros_like(p) if grad is None else grad)
            losses.append(value.detach())
    finally:
        for p in params.values():
            p.requires_grad_(False)
    for name in params:
        visit(name, torch.stack(grads.pop(name)))
    return torch.stack(losses)


class _Bound(nn.Module):
    """The loss as a module, so that `functional_call` can swap its parameters."""

    def __init__(self, module: nn.Module, loss: Loss) -> None:
        super().__init__()
        self.module, self.loss = module, loss

    def forward(self, row: Batch) -> Tensor:
        return self.loss(self.module, {key: tensor[None] for key, tensor in row.items()}).sum()


def _visit_by_vmap(
    loss: Loss, module: nn.Module, batch: Batch, params: dict[str, nn.Parameter], visit: Visit
) -> Tensor:
    bound = _Bound(module, loss)

    def one(p: dict[str, Tensor], row: Batch) -> tuple[Tensor, Tensor]:
        value: Tensor = torch.func.functional_call(
            bound, {f"module.{name}": tensor for name, tensor in p.items()}, (row,)
        )
        return value, value.detach()

    detached = {name: p.detach() for name, p in params.items()}
    with warnings.catch_warnings():  # torch loops over what it cannot batch, and says so each time
        warnings.filterwarnings("ignore", message="There is a performance drop")
        grads, losses = torch.vmap(torch.func.grad(one, has_aux=True), in_dims=(None, 0))(detached, dict(batch))
    for name in params:
        visit(name, grads.pop(name))
    return losses  # type: ignore[no-any-return]


@dataclass(frozen=True)
class _Site:
    """A layer whose input and output gradient give its parameters' per-example gradients."""

    module: nn.Module
    weight: str | None = None
    bias: str | None = None
    lora_a: str | None = None
    lora_b: str | None = None
    a: Tensor | None = None
    b: Tensor | None = None
    scale: float = 1.0

    @property
    def names(self) -> list[str]:
        return [name for name in (self.weight, self.bias, self.lora_a, self.lora_b) if name is not None]

    def only(self, wanted: set[str]) -> _Site:
        keep = {key: getattr(self, key) for key in ("weight", "bias", "lora_a", "lora_b")}
        return _Site(
            self.module,
            **{k: v if v in wanted else None for k, v in keep.items()},
            a=self.a,
            b=self.b,
            scale=self.scale,
        )

    def emit(self, x: Tensor, g: Tensor, visit: Visit) -> None:
        """`x` [b, s, in] and `g` [b, s, out] -> the per-example gradients of this layer's parameters."""
        if self.weight is not None:
            visit(self.weight, g.mT @ x)
        if self.bias is not None:
            visit(self.bias, g.sum(1))
        if self.a is not None:  # adapters are float32 also over a bfloat16 model
            x, g = x.to(self.a.dtype), g.to(self.a.dtype)
        if self.lora_a is not None:
            assert self.b is not None
            visit(self.lora_a, (g @ (self.b * self.scale)).mT @ x)
        if self.lora_b is not None:
            assert self.a is not None
            visit(self.lora_b, g.mT @ (x @ (self.a * self.scale).mT))


def _sites(module: nn.Module) -> dict[str, _Site]:
    """Module name -> site, for each Linear and plain LoRA layer; parameters that several modules share are left out."""
    owners: dict[int, int] = {}
    for _, p in module.named_parameters(remove_duplicate=False):
        owners[id(p)] = owners.get(id(p), 0) + 1
    sites: dict[str, _Site] = {}
    inside: list[str] = []
    for name, child in module.named_modules():
        if any(name.startswith(prefix) for prefix in inside):
            continue
        lora = _lora_of(child)
        if lora is not None:
            adapter, a, b, scale = lora
            sites[name] = _Site(
                child,
                lora_a=f"{name}.lora_A.{adapter}.weight",
                lora_b=f"{name}.lora_B.{adapter}.weight",
                a=a,
                b=b,
                scale=scale,
            )
            inside.append(name + ".")
        elif hasattr(child, "base_layer") and hasattr(child, "lora_A"):
            inside.append(name + ".")  # DoRA and other variants use their parts in ways of their own
        elif type(child) is nn.Linear:
            weight = f"{name}.weight" if name else "weight"
            bias = f"{name}.bias" if name else "bias"
            sites[name] = _Site(
                child,
                weight=weight if owners[id(child.weight)] == 1 else None,
                bias=bias if child.bias is not None and owners[id(child.bias)] == 1 else None,
            )
    return sites


def _lora_of(module: nn.Module) -> tuple[str, Tensor, Tensor, float] | None:
    """(adapter, A [r, in], B [out, r], scale) of a peft LoRA layer over a Linear with one plain adapter in force."""
    parts = [getattr(module, key, None) for key in ("base_layer", "lora_A", "lora_B", "scaling", "active_adapters")]
    base, a, b, scaling, active = parts
    if type(base) is not nn.Linear or not a or not b or scaling is None or active is None or len(active) != 1:
        return None
    adapter = active[0]
    plain = (
        not getattr(module, "merged", False)
        and not getattr(module, "lora_variant", None)
        and not getattr(module, "fan_in_fan_out", False)
    )
    if not plain or adapter not in a or a[adapter].bias is not None or b[adapter].bias is not None:
        return None
    return adapter, a[adapter].weight.detach(), b[adapter].weight.detach(), float(scaling[adapter])


def _visit_by_hooks(loss: Loss, module: nn.Module, batch: Batch, names: Sequence[str], visit: Visit) -> Tensor:
    wanted = set(names)
    sites = [site.only(wanted) for site in _sites(module).values()]
    sites = [site for site in sites if site.names]
    seen = {name for site in sites for name in site.names}
    if unseen := [name for name in names if name not in seen]:
        raise ValueError(
            f"per-sample gradients: hooks cannot see {unseen[0]!r} ({len(unseen)} of {len(names)} parameters): "
            "only Linear weights and biases and plain LoRA matrices that no other module shares; leave them out "
            "(`covered`) or use method='loop'"
        )
    size = _size(batch)
    held: dict[int, list[tuple[Tensor, Tensor | None]]] = {}  # calls of a layer in this pass: (input, output gradient)
    emitted: set[int] = set()

    def emit(site: _Site) -> None:
        """The sum over the layer's calls; one whose output the loss did not use adds nothing."""
        pairs = [(x, g) for x, g in held.pop(id(site)) if g is not None]
        if pairs:
            xs, gs = pairs[0] if len(pairs) == 1 else (torch.cat([p[k] for p in pairs], 1) for k in (0, 1))
            emitted.add(id(site))
            with torch.no_grad():
                site.emit(xs, gs, visit)

    def capture(site: _Site, x: Tensor, y: Tensor) -> Tensor:
        if size > 1 and (x.dim() < 2 or x.shape[0] != size):
            raise ValueError(
                f"per-sample gradients: layer of {site.names[0]!r} got input {tuple(x.shape)}, whose first "
                f"dimension is not the batch ({size} rows); use method='loop'"
            )
        if not y.requires_grad:  # nothing below asks for a gradient: the backward pass ends here
            y = y.detach().requires_grad_(True)
        calls = held.setdefault(id(site), [])
        call = len(calls)
        calls.append((x.detach().reshape(size, -1, x.shape[-1]), None))

        def arrived(g: Tensor) -> None:
            calls[call] = (calls[call][0], g.detach().reshape(size, -1, g.shape[-1]))
            if all(grad is not None for _, grad in calls):
                emit(site)

        y.register_hook(arrived)  # type: ignore[no-untyped-call]
        return y

    with _hooked(sites, capture):
        losses = loss(module, batch)
        if losses.shape != (size,):
            raise ValueError(
                f"per-sample gradients: the loss gave shape {tuple(losses.shape)}, expected one value a row, ({size},)"
            )
        if losses.requires_grad:
            torch.autograd.backward(losses.sum())
    parameters = dict(module.named_parameters())
    for site in sites:
        if id(site) in held:  # not all of its calls reach the loss
            emit(site)
        if id(site) not in emitted:  # the loss does not use this layer
            for name in site.names:
                visit(name, parameters[name].new_zeros(size, *parameters[name].shape))
    return losses.detach()


@contextmanager
def _hooked(sites: Sequence[_Site], capture: Callable[[_Site, Tensor, Tensor], Tensor]) -> Iterator[None]:
    """Each site's forward reports (input, output) to `capture`.

    A float32 LoRA layer runs as one product with W + c B A: the same function in exact arithmetic, at the cost of the
    bare layer. Lower precisions keep the two paths apart, where adding would round the adapter away.
    """
    handles = []
    patched: list[nn.Module] = []
    try:
        for site in sites:
            if site.a is not None and site.b is not None:
                base = site.module.base_layer
                assert isinstance(base, nn.Linear)
                if base.weight.dtype == torch.float32:
                    merged = torch.addmm(base.weight.detach(), site.b, site.a, alpha=site.scale)
                    site.module.forward = _merged_forward(merged, base.bias)
                    patched.append(site.module)
            handles.append(site.module.register_forward_hook(_reporter(site, capture)))
        yield
    finally:
        for handle in handles:
            handle.remove()
        for patched_module in patched:
            del patched_module.forward


def _merged_forward(weight: Tensor, bias: Tensor | None) -> Callable[..., Tensor]:
    def forward(x: Tensor, *_: Any, **__: Any) -> Tensor:
        return functional.linear(x, weight, bias)

    return forward


def _reporter(site: _Site, capture: Callable[[_Site, Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
    def hook(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return capture(site, inputs[0], output)

    return hook


def _size(batch: Batch) -> int:
    return len(next(iter(batch.values())))


def token_batches(lengths: Sequence[int], budget: int, *, padding: float = 0.125) -> list[list[int]]:
    """Indices of rows grouped so that padded tokens (longest row x rows) stay within `budget`, longest rows first.

    A batch is also closed before more than the share `padding` of it would be padding: on a CPU a padded token costs as
    much as a real one. A row longer than the budget is a batch of its own. The order is fixed by (length, index), so
    the batches, and with them every bit of the result, do not depend on anything else.
    """
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    batches: list[list[int]] = []
    real = 0  # tokens in the last batch
    for i in order:
        if batches:
            area = lengths[batches[-1][0]] * (len(batches[-1]) + 1)
            if area <= budget and area - real - lengths[i] <= padding * area:
                batches[-1].append(i)
                real += lengths[i]
                continue
        batches.append([i])
        real = lengths[i]
    return batches
