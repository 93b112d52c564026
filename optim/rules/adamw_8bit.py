"""AdamW with both moments stored in 8 bits."""

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from optim.optimizer import Optimizer, Params
from optim.rule import UpdateRule
from optim.rules.adamw import AdamWRule
from optim.rules.wrappers.quantized import Quantized


@dataclass(frozen=True, kw_only=True)
class AdamW8bitRule(Quantized):
    """AdamW with both moments stored in 8 bits: `AdamWRule` inside `Quantized`.

    Args:
        inner: The rule inside, an `AdamWRule`.

    State:
        2 bytes per parameter, plus two scales per block of 256 entries, which is 2.03 bytes in total; tensors with
        fewer than 4096 entries take 8 bytes per parameter.

    Source:
        Dettmers et al. 2021, arXiv 2110.02861; bitsandbytes 0.50.2.
    """

    name: ClassVar[str] = "adamw_8bit"

    inner: UpdateRule = AdamWRule()


class AdamW8bit(Optimizer):
    """AdamW with 8-bit moments for all parameters; the first arguments are those of `torch.optim.AdamW`.

    Args:
        params: The model, its parameters (with or without names), or param groups, as for `Optimizer`.
        lr: Learning rate.
        betas, eps: See `AdamWRule`.
        weight_decay: Decoupled weight decay.
        fields: Fields of `AdamW8bitRule` and of `AdamWRule`.

    Example:
        >>> import torch
        >>> from optim import AdamW8bit
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Linear(64, 64)
        >>> optimizer = AdamW8bit(model.named_parameters(), lr=1e-3)
        >>> model(torch.ones(2, 64)).square().sum().backward()
        >>> optimizer.step()
        >>> sorted(optimizer.state[model.weight])
        ['exp_avg', 'exp_avg_absmax', 'exp_avg_sq', 'exp_avg_sq_absmax', 'step']
    """

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        **fields: Any,
    ) -> None:
        rule = AdamW8bitRule().with_settings(betas=betas, eps=eps, **fields)
        super().__init__(params, rule, lr=lr, weight_decay=weight_decay)
