"""Lion with its momentum in 8 bits."""

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from optim.optimizer import Optimizer, Params
from optim.rule import UpdateRule
from optim.rules.lion import LionRule
from optim.rules.wrappers.quantized import Quantized


@dataclass(frozen=True, kw_only=True)
class Lion8bitRule(Quantized):
    """Lion with its momentum in 8 bits.

    `Quantized` says what that changes, `LionRule` the rest.

    State: 1 byte a parameter, a code, and a scale a block of 256: 1.02; in tensors below 4096 entries 4 bytes.
    Source: Chen et al. 2023, arXiv 2302.06675; bitsandbytes 0.50.2 (Lion8bit).
    """

    name: ClassVar[str] = "lion_8bit"

    inner: UpdateRule = LionRule()


class Lion8bit(Optimizer):
    """`Optimizer` running `Lion8bitRule`. Further keywords are fields of `Lion8bitRule`."""

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        **fields: Any,
    ) -> None:
        super().__init__(params, Lion8bitRule().with_settings(betas=betas, **fields), lr=lr, weight_decay=weight_decay)
