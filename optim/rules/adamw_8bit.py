"""AdamW with both moments in 8 bits."""

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from optim.optimizer import Optimizer, Params
from optim.rule import UpdateRule
from optim.rules.adamw import AdamWRule
from optim.rules.wrappers.quantized import Quantized


@dataclass(frozen=True, kw_only=True)
class AdamW8bitRule(Quantized):
    """AdamW with both moments in 8 bits.

    `Quantized` says what that changes, `AdamWRule` the rest.

    State: 2 bytes a parameter, two codes, and two scales a block of 256: 2.03; in tensors below 4096 entries 8 bytes.
    Source: Dettmers et al. 2021, arXiv 2110.02861; bitsandbytes 0.50.2.
    """

    name: ClassVar[str] = "adamw_8bit"

    inner: UpdateRule = AdamWRule()


class AdamW8bit(Optimizer):
    """`Optimizer` running `AdamW8bitRule`; the first arguments as in `torch.optim.AdamW`.

    Further keywords are fields of `AdamW8bitRule` and of `AdamWRule`.
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
