"""The base model of an adapter, recorded before the adapter is put on and restored when it is removed.

Removing an adapter must leave the base model unchanged, but peft does not guarantee this: some initialisations (PiSSA,
OLoRA, LoftQ) change the base weights when the adapter is put on, trained biases belong to the base itself, and a layer
that was trained as a whole stays in place of the original. Therefore the state of the base is recorded before and
checked after: modules and parameters by identity, weights by their digest. Changed parts are restored, and changed
weights are read again from the model's files.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from datatools import DataError, files

READ_AGAIN: weakref.WeakKeyDictionary[nn.Module, Callable[[], nn.Module]] = weakref.WeakKeyDictionary()
"""Model -> a function that reads its weights again; `models.load` records it for every model."""


@dataclass(frozen=True)
class Standing:
    """The modules, parameters and weights of a plain model before an adapter was put on."""

    model: nn.Module
    modules: Mapping[str, nn.Module]
    tensors: Mapping[str, Tensor]
    digests: Mapping[str, str]

    @classmethod
    def of(cls, model: nn.Module) -> Standing:
        """Return the present state of a model.

        Args:
            model: The model.
        """
        tensors = dict(_tensors(model))
        return cls(model, dict(model.named_modules()), tensors, {name: tensor_digest(t) for name, t in tensors.items()})

    def changed(self) -> list[str]:
        """Return the names of weights that have changed."""
        return [name for name, tensor in self.tensors.items() if tensor_digest(tensor) != self.digests[name]]

    def restore(self) -> None:
        """Restore modules, parameters and weights.

        Raises:
            DataError: Weights have changed and cannot be read again.
        """
        for name, module in self.modules.items():
            if name:
                _parent(self.modules, name)._modules[name.rpartition(".")[2]] = module
        for name, tensor in self.tensors.items():
            holder, own = _parent(self.modules, name), name.rpartition(".")[2]
            if own in holder._parameters:
                holder._parameters[own] = tensor  # type: ignore[assignment]
        unmarked(self.model).requires_grad_(False)
        if changed := self.changed():
            read = READ_AGAIN.get(self.model)
            if read is not None:
                again = dict(_tensors(read()))
                with torch.no_grad():
                    for name in changed:
                        tensor = self.tensors[name]
                        if name in again and again[name].shape == tensor.shape:
                            tensor.data = again[name].to(tensor).clone()
                changed = self.changed()
            if changed:
                raise DataError(
                    f"an adapter changed {len(changed)} weights of its base model, first {changed[0]!r}, and they "
                    "cannot be restored; load the model again before using it"
                )


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield parameters and the buffers that are part of a saved model; others may depend on the length of a row."""
    kept = model.state_dict(keep_vars=True)
    yield from model.named_parameters()
    yield from ((name, buffer) for name, buffer in model.named_buffers() if name in kept)


def _parent(modules: Mapping[str, nn.Module], name: str) -> nn.Module:
    return modules[name.rpartition(".")[0]]


def tensor_digest(tensor: Tensor) -> str:
    """Return the xxh3-128 of the bytes of a tensor.

    Args:
        tensor: Any shape, dtype and device.
    """
    values = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return files.digest(values.numpy().data)


def unload(wrapped: Any) -> None:
    """Remove the adapters of a peft model. Its base model is unchanged to the bit and may take other adapters.

    Args:
        wrapped: The model of peft.

    Raises:
        DataError: The base weights have changed and cannot be read again.
    """
    standing: Standing = wrapped._datatools_standing
    wrapped.unload()
    standing.restore()


def unmarked(model: Any) -> Any:
    """Return a model without the marks that peft leaves when it restores the layers.

    Args:
        model: The model.
    """
    for mark in ("peft_config", "_hf_peft_config_loaded"):
        if mark in vars(model):
            delattr(model, mark)
    return model
