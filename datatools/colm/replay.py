"""Run only the last layers of a model again, on their stored input."""

from __future__ import annotations

from collections.abc import Callable, Iterator, MutableMapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from datatools.colm.target import Target
from datatools.errors import DataError
from datatools.gradients import Batch, Loss, _Bound, _frozen, keep_gradients


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put `model` into eval mode with no parameter requiring a gradient; both are restored at the end.

    Args:
        model: the model.

    """
    keep_gradients(model)
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with _frozen(model):
            yield
    finally:
        for module, mode in modes:
            module.training = mode


class _Stop(Exception):
    pass


@contextmanager
def replaying(model: nn.Module, losses: Loss, batch: Batch, target: Target) -> Iterator[None]:
    """Inside the block, forward passes on `batch` run only the target's decoder layer and the following layers.

    The earlier layers run once, without gradients, when the block is entered; their output is reused. In models where
    this would not give the same losses (`LastLayer.replays`), no layer is skipped.

    Args:
        model: the model that contains the target.
        losses: (model, batch) -> mean loss of each row, floating dtype [b].
        batch: inputs of b rows, the same for every forward pass in the block.
        target: the matrix.

    Raises:
        DataError: if the forward pass does not call the target's layer.

    """
    if not target.replays:
        yield
        return
    *before, last = target.layers
    given: dict[str, Any] = {}
    blank: dict[nn.Module, Any] = {}

    def stop(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given["args"] = args
        given["kwargs"] = {k: dict(v) if isinstance(v, MutableMapping) else v for k, v in kwargs.items()}
        raise _Stop

    def note(layer: nn.Module, _: Any, output: Any) -> None:
        # the type and shapes of what a skipped layer returns; its values are not read
        blank[layer] = tree_map_only(Tensor, lambda t: t.new_zeros(()).expand(t.shape), output)

    with ExitStack() as hooks:
        hooks.callback(last.register_forward_pre_hook(stop, with_kwargs=True).remove)
        for layer in before:
            hooks.callback(layer.register_forward_hook(note).remove)
        try:
            with torch.no_grad():
                losses(model, batch)
            raise DataError(f"{type(model).__name__}: its forward pass does not call the layer of {target.name}")
        except _Stop:
            pass

    reached = False  # whether this forward pass has reached the target's layer

    def begin(*_: Any) -> None:
        nonlocal reached
        reached = False

    def restart(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
        nonlocal reached
        if reached:
            return None
        reached = True
        again = dict(given["kwargs"])
        for key, value in again.items():
            if isinstance(value, dict) and isinstance(kwargs.get(key), MutableMapping):  # layers communicate through it
                kwargs[key].update(value)
                again[key] = kwargs[key]
            elif isinstance(value, Tensor):
                again[key] = value.clone()
        return tuple(a.clone() if isinstance(a, Tensor) else a for a in given["args"]), again

    def skipping(layer: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
        def skip(*args: Any, **kwargs: Any) -> Any:
            return forward(*args, **kwargs) if reached else tree_map_only(Tensor, torch.clone, blank[layer])

        return skip

    own = [(layer, layer.__dict__.get("forward")) for layer in before]
    with ExitStack() as hooks:
        hooks.callback(model.register_forward_pre_hook(begin).remove)
        hooks.callback(last.register_forward_pre_hook(restart, with_kwargs=True).remove)
        try:
            for layer in before:
                layer.forward = skipping(layer, layer.forward)
            yield
        finally:
            for layer, forward in own:
                if forward is None:
                    del layer.forward
                else:
                    layer.forward = forward


def loss_of(
    model: nn.Module, losses: Loss, batch: Batch, target: Target
) -> Callable[[Float[Tensor, "rows columns"]], Float[Tensor, " b"]]:
    """Express the losses as a function of the target's parameter, which is substituted and never written to.

    Args:
        model: the model that contains the target.
        losses: (model, batch) -> mean loss of each row, floating dtype [b].
        batch: inputs of b rows.
        target: the matrix.

    Returns:
        Value of the whole parameter -> losses [b].

    """
    bound = _Rows(model, losses)
    return lambda value: torch.func.functional_call(bound, {f"module.{target.name}": value}, (batch,))


class _Rows(_Bound):
    def forward(self, batch: Batch) -> Tensor:
        return self.loss(self.module, batch)
