"""QK-clip: query and key weights are scaled down when attention logits become too large."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from optim.checks import check_positive
from optim.roles import roles
from optim.saved import bare_name

_NORM = r"(rms_?|layer_?)?norm|ln"
_OF_QUERIES = re.compile(rf"(q|qk|query)_?({_NORM})|({_NORM})_(q|qk|query)")  # and not q_a_layernorm, of latents
_ROWS = 512  # queries whose logits are computed at a time


def _normalises_queries(name: str, module: nn.Module) -> bool:
    return _OF_QUERIES.fullmatch(name) is not None and not isinstance(module, nn.Identity)


class QKClip:
    """Scales query and key weights down so that no attention logit exceeds a threshold (MuonClip).

    The largest logit S of each head is recorded in forward passes with gradients. `clip`, which is called after each
    step of the optimizer, multiplies the head's queries and keys by sqrt(threshold / S) if S is larger than the
    threshold. Where several query heads share a key head, the queries alone are multiplied by threshold / S.

    With several processes, `clip` takes the largest logits of all of them, so that copies of a model stay equal; all
    processes of `process_group` must call it.

    Logits are those of `torch.nn.functional.scaled_dot_product_attention`. A model of transformers must be loaded with
    ``attn_implementation="sdpa"``, its default.

    Args:
        model: The model. Its attention modules are those with two linear layers of the given names, and those with
            query, key and value in one layer whose parts `optim.roles` finds (GPT-2, GPT-NeoX, Phi-3).
        threshold: The largest logit that is allowed.
        names: The names of the query and key layers.
        process_group: The processes with copies of the model; all by default.

    Raises:
        ValueError: If no module has such layers, if a layer has no floating-point weight of its own (adapters), or if
            queries are normalised, which bounds logits already. In the first forward pass, if the sizes of the layers
            are not those of queries and keys.

    Source:
        Kimi Team 2025, arXiv 2507.20534, algorithm 1.

    Differs:
        The paper scales the parts of multi-head latent attention; here they are whole queries and keys.

    Example:
        >>> from optim import QKClip
        >>> class Attention(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.q_proj, self.k_proj = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)
        ...
        ...     def forward(self, x):
        ...         q, k = (f(x).view(1, -1, 2, 2).transpose(1, 2) for f in (self.q_proj, self.k_proj))
        ...         return torch.nn.functional.scaled_dot_product_attention(q, k, k)
        >>> _ = torch.manual_seed(0)
        >>> model = Attention()
        >>> clip = QKClip(model, threshold=0.01)
        >>> _ = model(torch.ones(1, 3, 4))
        >>> clip.clip() > 0
        True
    """

    def __init__(
        self,
        model: nn.Module,
        threshold: float = 100.0,
        names: tuple[str, str] = ("q_proj", "k_proj"),
        process_group: "dist.ProcessGroup | None" = None,
    ) -> None:
        check_positive("QKClip", threshold=threshold)
        self.threshold, self.names, self.process_group = threshold, names, process_group
        self.largest: dict[nn.Module, Tensor] = {}
        """Attention module -> the largest logit of each head since the last `clip`, [heads]."""
        self._weights: dict[nn.Module, tuple[_Rows, _Rows]] = {}  # of queries and keys
        self._key_heads: dict[nn.Module, int] = {}
        self._mode = _Watch(self)
        self._hooks: list[Any] = []
        parts = {bare_name(key): role.parts for key, role in roles(model.named_parameters(), model).items()}
        for name, module in model.named_modules():
            places = [_Rows(f"{name}.{key}".removeprefix("."), getattr(module, key, None)) for key in names]
            if not all(isinstance(place.layer, nn.Module) for place in places):
                places = _fused_rows(name, module, parts)
            if not places:
                continue
            if found := [key for key, child in module.named_children() if _normalises_queries(key, child)]:
                self.remove()
                raise ValueError(f"QKClip: {name} normalises its queries ({found[0]}), which bounds its logits already")
            for place in places:
                own = place.layer._parameters.get("weight")
                if own is None or not own.is_floating_point():
                    self.remove()
                    raise ValueError(
                        f"QKClip: {place.name} is a {type(place.layer).__name__} without a floating-point weight of "
                        "its own, such as an adapter around a layer or a quantised layer, and cannot be scaled; merge "
                        "adapters, or train without QKClip"
                    )
            self._weights[module] = (places[0], places[1])
            self._hooks.append(module.register_forward_pre_hook(self._begin))
            self._hooks.append(module.register_forward_hook(self._end, always_call=True))
        if not self._hooks:
            raise ValueError(
                f"QKClip: no module of the model has layers {names[0]!r} and {names[1]!r}, or one layer of queries, "
                "keys and values whose parts are known; pass names="
            )

    def _begin(self, module: nn.Module, _: Any) -> None:
        self._mode.modules.append(module)
        self._mode.__enter__()  # type: ignore[no-untyped-call]

    def _end(self, module: nn.Module, _: Any, __: Any) -> None:
        if self._mode.modules and self._mode.modules[-1] is module:
            self._mode.__exit__(None, None, None)  # type: ignore[no-untyped-call]
            self._mode.modules.pop()

    def record(
        self, module: nn.Module, query: Tensor, key: Tensor, mask: Tensor | None, causal: bool, scale: float
    ) -> None:
        """Record the largest logits of one call of an attention.

        Args:
            module: The attention module.
            query: Queries [batch, heads, queries, dim].
            key: Keys [batch, key heads, keys, dim].
            mask: As in `scaled_dot_product_attention`.
            causal: Whether query i only sees keys up to i.
            scale: The factor of the logits.
        """
        with torch.no_grad():
            if module not in self._key_heads:
                self._key_heads[module] = self._checked_heads(module, query.shape[1], query.shape[-1])
            key = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
            most = query.new_full((query.shape[1],), -torch.inf, dtype=torch.float32)
            seen = torch.arange(key.shape[2], device=key.device)
            for start in range(0, query.shape[2], _ROWS):
                logits = scale * (query[:, :, start : start + _ROWS].float() @ key.float().mT)
                rows = torch.arange(start, start + logits.shape[2], device=key.device)
                if mask is not None:
                    part = mask if mask.shape[-2] == 1 else mask[..., start : start + _ROWS, :]
                    hidden = ~part if part.dtype == torch.bool else part < -1e4
                    logits = logits.masked_fill(hidden, -torch.inf)
                if causal:
                    logits = logits.masked_fill(seen > rows[:, None], -torch.inf)
                most = torch.maximum(most, logits.amax((0, 2, 3)))
            self.largest[module] = torch.maximum(most, self.largest.get(module, most))

    def _checked_heads(self, module: nn.Module, heads: int, size: int) -> int:
        """Return the number of key heads, after checking that the layers have the sizes of queries and keys."""
        queries, keys = self._weights[module]
        count = keys.rows // size
        if queries.rows != heads * size or keys.rows % size or not count or heads % count:
            raise ValueError(
                f"QKClip: the attention has {heads} query heads of size {size}, but {queries.name} has {queries.rows} "
                f"outputs for queries and {keys.name} has {keys.rows} for keys; layers that contain anything else "
                "cannot be scaled"
            )
        return count

    @torch.no_grad()
    def clip(self) -> int:
        """Scale the weights of all heads whose largest logit exceeds the threshold; call it after each step.

        Returns:
            The number of heads that were scaled.

        Raises:
            RuntimeError: If no attention was seen since the last call.
        """
        if not self.largest:
            raise RuntimeError(
                "QKClip: no call of scaled_dot_product_attention was seen in a forward pass with gradients; load the "
                "model with attn_implementation='sdpa', and call clip() once per step"
            )
        clipped = 0
        shared = dist.is_available() and dist.is_initialized()
        for module, largest in self.largest.items():
            if shared:
                dist.all_reduce(largest, dist.ReduceOp.MAX, group=self.process_group)
            factor = (self.threshold / largest.clamp(min=self.threshold)).to(largest.device)
            over = int((factor < 1).sum())
            clipped += over
            if not over:
                continue
            queries, keys = self._weights[module]
            if self._key_heads[module] == len(factor):
                factor = factor.sqrt()
                keys.scale(factor)
            queries.scale(factor)
        self.largest = {}
        return clipped

    def remove(self) -> None:
        """Stop recording."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.remove()


@dataclass(frozen=True)
class _Rows:
    """The outputs of a layer that are queries, or keys: all, or one part of each group of outputs."""

    name: str
    layer: Any
    part: int = 0
    sizes: tuple[int, ...] = ()
    groups: int = 1

    @property
    def rows(self) -> int:
        """How many outputs they are."""
        return self.groups * self.sizes[self.part] if self.sizes else self._turned(self.layer.weight).shape[0]

    def _turned(self, param: Tensor) -> Tensor:
        """Return a parameter with outputs first; those of Conv1D are last."""
        return param.mT if type(self.layer).__name__ == "Conv1D" and param.ndim == 2 else param

    def scale(self, factor: Tensor) -> None:
        """Multiply them by one factor per head."""
        for param in self.layer.parameters(recurse=False):
            rows = factor.to(param.dtype).repeat_interleave(self.rows // len(factor))
            if self.sizes:
                every = rows.new_ones(self.groups, sum(self.sizes))
                torch.split(every, list(self.sizes), 1)[self.part].copy_(rows.view(self.groups, -1))
                rows = every.flatten()
            self._turned(param).mul_(rows.view(-1, *[1] * (param.ndim - 1)))


def _fused_rows(name: str, module: nn.Module, parts: Mapping[str, Mapping[str, Any]]) -> list[_Rows]:
    """Return queries and keys of a module with a layer of queries, keys and values; empty if it has none."""
    for key, layer in module.named_children():
        path = f"{name}.{key}".removeprefix(".")
        found = parts.get(bare_name(f"{path}.weight"), {})
        if len(sizes := found.get("split_sizes", ())) == 3:
            return [_Rows(path, layer, part, tuple(sizes), found.get("split_groups", 1)) for part in range(2)]
    return []


class _Watch(TorchFunctionMode):
    """Sees calls of `scaled_dot_product_attention` inside attention modules."""

    def __init__(self, owner: QKClip) -> None:
        super().__init__()
        self.owner = owner
        self.modules: list[nn.Module] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is functional.scaled_dot_product_attention and self.modules and torch.is_grad_enabled():
            named = (
                dict(zip(("query", "key", "value", "attn_mask", "dropout_p", "is_causal"), args, strict=False)) | kwargs
            )
            query, scale = named["query"], named.get("scale")
            self.owner.record(
                self.modules[-1],
                query,
                named["key"],
                named.get("attn_mask"),
                bool(named.get("is_causal", False)),
                query.shape[-1] ** -0.5 if scale is None else scale,
            )
        return func(*args, **kwargs)
