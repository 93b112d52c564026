"""Per-example gradients of the last value projection of a decoder, without a backward pass through all of it.

A matrix inside the last decoder layer changes nothing before that layer. So the exact gradient of each example needs
one forward pass, of which only what follows the projection is differentiated; and a directional derivative needs the
last layer alone, run again on its stored input ("replay"): every other layer is skipped inside the model's own forward
pass, so that masks, positions, scaling of logits and the head are the model's own code, whatever the architecture.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from datatools.errors import DataError
from datatools.gradients import Batch, Loss, _Bound, _frozen, token_batches

LAYOUTS: Mapping[str, str] = {
    "v_proj": "all",
    "value_proj": "all",
    "qkv_proj": "tail",
    "c_attn": "tail",
    "Wqkv": "tail",
    "query_key_value": "all",
    "kv_b_proj": "all",
}
"""Name of a value projection -> which of its outputs are values: all of them, or those behind queries and keys.

Where queries, keys and values are interleaved (query_key_value, kv_b_proj) the whole matrix is taken.
"""


@dataclass(frozen=True)
class LastLayer:
    """The decoder's layers and the matrix in the last of them whose gradient is a row's feature.

    name: the parameter, as in `model.named_parameters()`: LoRA's B if the projection has an adapter, else its weight.
    outputs: which of the projection's outputs count. shape: [outputs, inputs] of the matrix, or [outputs, rank].
    """

    layers: tuple[nn.Module, ...]
    projection: nn.Module
    name: str
    outputs: slice
    shape: tuple[int, int]
    parameter: nn.Parameter
    transposed: bool = False
    adapter: str | None = None

    @classmethod
    def of(cls, model: nn.Module, projection: str | None = None) -> LastLayer:
        """Find them in `model`.

        projection: the full name of a linear layer inside the last decoder layer, where its name is not in `LAYOUTS`.
        Raises: DataError for an unknown architecture, saying what was looked for.
        """
        path, layers = _decoder(model)
        last = layers[-1]
        names = dict(last.named_modules())
        if projection is None:
            found = [name for name in names if name.rpartition(".")[2] in LAYOUTS]
            if not found:
                linear = sorted({name for name, m in names.items() if _matrix(m) is not None})
                raise DataError(
                    f"{type(model).__name__}: no value projection in its last layer ({path}.{len(layers) - 1}); looked "
                    f"for {', '.join(LAYOUTS)} and found the linear layers {linear}; name one of them (projection=)"
                )
            inner = found[0]
        else:
            inner = projection.removeprefix(f"{path}.{len(layers) - 1}.")
            if inner not in names:
                raise DataError(f"{type(model).__name__}: no layer {projection!r} in {path}.{len(layers) - 1}")
        module = names[inner]
        weight = _matrix(module)
        where = f"{path}.{len(layers) - 1}.{inner}"
        if weight is None:
            raise DataError(f"{where} is a {type(module).__name__}; expected a linear layer, plain or with LoRA")
        transposed = not isinstance(getattr(module, "base_layer", module), nn.Linear)  # GPT-2's Conv1D is [in, out]
        rows = weight.shape[1] if transposed else weight.shape[0]
        outputs = slice(0, rows)
        if LAYOUTS.get(inner.rpartition(".")[2]) == "tail":
            outputs = slice(rows - _values(model, rows), rows)
        adapter = _adapter(module, where)
        if adapter is not None:
            b = module.lora_B[adapter].weight
            shape = (outputs.stop - outputs.start, b.shape[1])
            return cls(layers, module, f"{where}.lora_B.{adapter}.weight", outputs, shape, b, False, adapter)
        base = "base_layer." if hasattr(module, "base_layer") else ""
        shape = (outputs.stop - outputs.start, weight.shape[0] if transposed else weight.shape[1])
        return cls(layers, module, f"{where}.{base}weight", outputs, shape, weight, transposed)

    @property
    def numel(self) -> int:
        """Numbers in the matrix."""
        return self.shape[0] * self.shape[1]

    def embed(self, direction: Tensor) -> Tensor:
        """A direction [*shape] as one of the whole parameter: zero for outputs that do not count."""
        whole = torch.zeros_like(self.parameter)
        part = (whole.T if self.transposed else whole)[self.outputs]
        part.copy_(direction)
        return whole

    def contract(self, x: Tensor, g: Tensor) -> Tensor:
        """Inputs x [b, ..., in] and output gradients g [b, ..., out] -> per-example gradients [b, *shape], float32."""
        x, g = x.flatten(1, -2), g[..., self.outputs].flatten(1, -2).float()  # latents may have a dimension of heads
        if self.adapter is not None:
            scale = self.projection.scaling[self.adapter]  # type: ignore[index]
            a = self.projection.lora_A[self.adapter].weight.detach()  # type: ignore[index, union-attr]
            x = x.float() @ (a.float() * float(scale)).mT
        return g.mT @ x.float()


def _decoder(model: nn.Module) -> tuple[str, tuple[nn.Module, ...]]:
    """(name, layers) of the list of like layers that holds the most parameters."""
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise DataError(f"{type(model).__name__} is an encoder-decoder; coresets need a decoder-only model")
    lists = {
        name: list(module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) and any(True for _ in module[-1].parameters())
    }
    if not lists:
        raise DataError(f"{type(model).__name__}: no decoder found; looked for an nn.ModuleList of layers")
    name = max(lists, key=lambda key: sum(p.numel() for layer in lists[key] for p in layer.parameters()))
    return name, tuple(lists[name])


def _matrix(module: nn.Module) -> nn.Parameter | None:
    """The weight of a Linear or of GPT-2's Conv1D, plain or under an adapter."""
    base = getattr(module, "base_layer", module)
    if isinstance(base, nn.Linear) or type(base).__name__ == "Conv1D":
        return base.weight  # type: ignore[return-value]
    return None


def _values(model: nn.Module, rows: int) -> int:
    """How many of a joint projection's outputs are values, by the numbers of heads in the model's configuration."""
    config: Any = getattr(model, "config", None)
    heads: int = getattr(config, "num_attention_heads", None) or 0
    pairs: int = getattr(config, "num_key_value_heads", None) or heads
    if not heads or rows % (heads + 2 * pairs):
        raise DataError(
            f"{type(model).__name__}: its joint projection has {rows} outputs, and the configuration does not say how "
            "many are values; looked for num_attention_heads and num_key_value_heads"
        )
    return int(rows // (heads + 2 * pairs) * pairs)


def _adapter(module: nn.Module, where: str) -> str | None:
    """The plain LoRA adapter in force on `module`, if any. Raises: DataError for several, merged ones or variants."""
    if not hasattr(module, "lora_A"):
        return None
    active = list(getattr(module, "active_adapters", []))
    adapters = [name for name in active if name in module.lora_A]  # type: ignore[operator]
    if len(adapters) != 1 or getattr(module, "merged", False) or getattr(module, "lora_variant", None):
        raise DataError(f"{where}: expected one plain LoRA adapter in force, not {active}; merge or disable the others")
    return str(adapters[0])


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """`model` in eval mode inside, and no parameter asks for a gradient; behind it each has its own setting again."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with _frozen(model):
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def pieces(
    batch: Batch, lengths: Sequence[int] | None, token_budget: int
) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
    """(rows, part of the batch), longest rows first: padded tokens of a part stay within `token_budget`.

    lengths: tokens of each row, of a batch padded on the right; columns that only hold padding are cut off. None: the
    place behind the last attended token, or the whole width without an attention mask.
    """
    n, width = batch["input_ids"].shape
    if lengths is None:
        mask = batch.get("attention_mask")
        if mask is None or mask.ndim != 2:
            lengths = [width] * n
        else:
            lengths = (width - mask.flip(1).to(torch.int64).argmax(1)).tolist()
    for group in token_batches(lengths, token_budget):
        rows, longest = torch.tensor(group), max(lengths[i] for i in group)
        yield (
            rows,
            {
                key: tensor[rows.to(tensor.device)][:, :longest]
                if tensor.ndim == 2 and tensor.shape[1] == width
                else tensor[rows.to(tensor.device)]
                for key, tensor in batch.items()
            },
        )


def exact_gradients(model: nn.Module, losses: Loss, batch: Batch, target: LastLayer) -> Tensor:
    """The gradient of each row's loss for the target's matrix: [b, *shape] float32; inside `evaluating`.

    One forward pass; backward from the losses to the projection's output and no further. What comes before that output
    keeps no activation, also where the embeddings ask for gradients (`enable_input_require_grads`, as adapters with
    gradient checkpointing need).
    """
    held: dict[str, Tensor] = {}

    def capture(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        held["x"], held["y"] = inputs[0], output.detach().requires_grad_(True)
        torch.set_grad_enabled(True)  # the graph begins here; `no_grad` below puts the mode back
        return held["y"]

    handle = target.projection.register_forward_hook(capture)
    try:
        with torch.no_grad():
            values = losses(model, batch)
            (g,) = torch.autograd.grad(values.sum(), held["y"])
    finally:
        handle.remove()
    with torch.no_grad():
        return target.contract(held["x"], g)


class _Stop(Exception):
    pass


@contextmanager
def replaying(model: nn.Module, losses: Loss, batch: Batch, target: LastLayer) -> Iterator[None]:
    """Inside, the model's forward pass on `batch` runs its last decoder layer and what follows; the rest is skipped.

    The layers before run once, without gradients, on entry; their result is what the last layer gets.
    """
    *before, last = target.layers
    kept: dict[str, Any] = {}

    def stop(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        kept["hidden"] = (args[0] if args else kwargs["hidden_states"]).detach()
        raise _Stop

    def note(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        kept["output"] = output

    with ExitStack() as hooks:
        hooks.callback(last.register_forward_pre_hook(stop, with_kwargs=True).remove)
        if before:
            hooks.callback(before[-1].register_forward_hook(note).remove)
        try:
            with torch.no_grad():
                losses(model, batch)
            raise DataError(f"{type(model).__name__}: its forward pass does not call its last layer")
        except _Stop:
            pass

    def skip(*args: Any, **kwargs: Any) -> Any:
        return kept["output"]  # of the right type; nobody reads its values

    def restart(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        if args:
            return (kept["hidden"], *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": kept["hidden"]}

    own = [(layer, layer.__dict__.get("forward")) for layer in before]
    with ExitStack() as hooks:
        hooks.callback(last.register_forward_pre_hook(restart, with_kwargs=True).remove)
        try:
            for layer in before:
                layer.forward = skip
            yield
        finally:
            for layer, forward in own:
                if forward is None:
                    del layer.forward
                else:
                    layer.forward = forward


def _loss_of(model: nn.Module, losses: Loss, batch: Batch, target: LastLayer) -> Callable[[Tensor], Tensor]:
    """Losses [b] as a function of the target's parameter, which is swapped, never written to."""
    bound = _Rows(model, losses)
    return lambda value: torch.func.functional_call(bound, {f"module.{target.name}": value}, (batch,))


class _Rows(_Bound):
    def forward(self, batch: Batch) -> Tensor:
        return self.loss(self.module, batch)


def directional_derivatives(
    model: nn.Module, losses: Loss, batch: Batch, target: LastLayer, directions: Tensor, *, chunk: int = 8
) -> Tensor:
    """z_k . gradient_i for directions z [K, *shape]: [b, K] float32, by forward-mode passes through the last layer.

    Inside `evaluating`.

    Exact up to rounding, and without the cancellation of differences of losses, which bfloat16 does not survive.
    chunk: directions at a time; memory is that of so many forward passes of one layer and the head.
    Raises: DataError for a model with an operation that torch has no forward-mode derivative of.
    """
    value = target.parameter.detach()
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), replaying(model, losses, batch, target):
        loss = _loss_of(model, losses, batch, target)

        def along(direction: Tensor) -> Tensor:
            slope: Tensor = torch.func.jvp(loss, (value,), (direction,))[1]
            return slope

        try:
            found = [
                torch.vmap(along)(torch.stack([target.embed(z) for z in part]))
                for part in torch.split(directions, chunk)
            ]
        except RuntimeError as error:
            text = str(error).splitlines()[0]
            if not isinstance(error, NotImplementedError) and "functorch" not in text:
                raise
            raise DataError(
                f"{type(model).__name__}: its last layer cannot be differentiated forwards, which probes need "
                f"({text[:120]}); choose other features (exact)"
            ) from error
    return torch.cat(found).mT.float()


def central_differences(
    model: nn.Module, losses: Loss, batch: Batch, target: LastLayer, direction: Tensor, *, eps: float = 1e-3
) -> Tensor:
    """(L(w + eps z) - L(w - eps z)) / (2 eps) of each row for one direction z [*shape]: [b] float32; two replays,
    inside `evaluating`.

    Source: CoLM, arXiv 2407.19580, equation 3 (SPSA), in its published code's form.
    """
    value, move = target.parameter.detach(), eps * target.embed(direction)
    with torch.no_grad(), replaying(model, losses, batch, target):
        loss = _loss_of(model, losses, batch, target)
        up, down = loss(value + move), loss(value - move)
    return ((up.double() - down.double()) / (2 * eps)).float()
