"""Muon with its momentum in 8 bits."""

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from optim.checks import check_flag
from optim.param_groups import NamedParams
from optim.rule import UpdateRule
from optim.rules.adamw import AdamWRule
from optim.rules.adamw_8bit import AdamW8bitRule
from optim.rules.matrices import MatrixOptimizer
from optim.rules.muon import MuonRule
from optim.rules.wrappers.quantized import Quantized


@dataclass(frozen=True, kw_only=True)
class Muon8bitRule(Quantized):
    """Muon with its momentum in 8 bits.

    `Quantized` says what that changes, `MuonRule` the rest. The direction is made of the momentum of this step
    in full precision, not of its codes.

    State: 1 byte a parameter, a code, and a scale a block of 2048: 1.002; in matrices below 4096 entries 4 bytes.
    Source: arXiv 2509.23106 (no public code; the paper has no Nesterov momentum).
    """

    name: ClassVar[str] = "muon_8bit"

    inner: UpdateRule = MuonRule(nesterov=False)
    code: str = "linear"
    block_size: int = 2048


class Muon8bit(MatrixOptimizer):
    """Hidden matrices by `Muon8bitRule`, the rest by AdamW: param groups of one `Optimizer`.

    lr, weight_decay: of the matrices.
    adamw_8bit: AdamW's moments in 8 bits too, dynamic codes in blocks of 256.
    options: fields of `Muon8bitRule` and of `MuonRule`, and the keywords of `MatrixOptimizer`; adamw_betas are
    (0.9, 0.95) unless given. With a `scale` other than "match_rms_adamw" give `adamw_lr` as well.
    """

    def __init__(
        self,
        named_parameters: NamedParams,
        lr: float | Tensor = 1e-3,
        weight_decay: float = 0.1,
        *,
        adamw_8bit: bool = False,
        **options: Any,
    ) -> None:
        check_flag("Muon8bit", adamw_8bit=adamw_8bit)
        usual: dict[str, Any] = {"adamw_betas": (0.9, 0.95)}
        wrapper = _in_8_bits if adamw_8bit else None
        super().__init__(named_parameters, Muon8bitRule, lr, weight_decay, adamw_wrapper=wrapper, **(usual | options))


def _in_8_bits(inner: AdamWRule) -> AdamW8bitRule:
    return AdamW8bitRule(inner=inner)
