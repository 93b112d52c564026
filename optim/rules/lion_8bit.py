"""Lion with its momentum stored in 8 bits."""

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from optim.optimizer import Optimizer, Params
from optim.rule import UpdateRule
from optim.rules.lion import LionRule
from optim.rules.wrappers.quantized import Quantized


@dataclass(frozen=True, kw_only=True)
class Lion8bitRule(Quantized):
    """Lion with its momentum stored in 8 bits: `LionRule` inside `Quantized`.

    Args:
        inner: The rule inside, a `LionRule`.

    State:
        1 byte per parameter, plus a scale per block of 256 entries, which is 1.02 bytes in total; tensors with fewer
        than 4096 entries take 4 bytes per parameter.

    Source:
        Chen et al. 2023, arXiv 2302.06675; bitsandbytes 0.50.2 (Lion8bit).
    """

    name: ClassVar[str] = "lion_8bit"

    inner: UpdateRule = LionRule()


class Lion8bit(Optimizer):
    """Lion with 8-bit momentum for all parameters.

    Args:
        params: The model, its parameters (with or without names), or param groups, as for `Optimizer`.
        lr: Learning rate.
        betas: See `LionRule`.
        weight_decay: Decoupled weight decay.
        fields: Fields of `Lion8bitRule`.

    Example:
        >>> import torch
        >>> from optim import Lion8bit
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Linear(64, 64)
        >>> optimizer = Lion8bit(model.named_parameters(), lr=1e-3)
        >>> model(torch.ones(2, 64)).square().sum().backward()
        >>> optimizer.step()
        >>> sorted(optimizer.state[model.weight])
        ['exp_avg', 'exp_avg_absmax', 'step']
    """

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        **fields: Any,
    ) -> None:
        super().__init__(params, Lion8bitRule().with_settings(betas=betas, **fields), lr=lr, weight_decay=weight_decay)
