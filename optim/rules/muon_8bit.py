"""Muon with its momentum stored in 8 bits."""

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
    """Muon with its momentum stored in 8 bits: `MuonRule` inside `Quantized`.

    The direction is computed from the full-precision momentum of the step and not from its codes.

    Args:
        inner: The rule inside, a `MuonRule`.
        code, block_size: See `Quantized`.

    State:
        1 byte per parameter, plus a scale per block of 2048 entries, which is 1.002 bytes in total; matrices with fewer
        than 4096 entries take 4 bytes per parameter.

    Source:
        arXiv 2509.23106, 2025 (there is no public code; the paper has no Nesterov momentum).
    """

    name: ClassVar[str] = "muon_8bit"

    inner: UpdateRule = MuonRule(nesterov=False)
    code: str = "linear"
    block_size: int = 2048


class Muon8bit(MatrixOptimizer):
    """Muon with 8-bit momentum for hidden matrices and AdamW for the rest, as param groups of one `Optimizer`.

    Args:
        named_parameters: The model or its named parameters, as for `MatrixOptimizer`.
        lr: Learning rate of the hidden matrices.
        weight_decay: Decoupled weight decay of the hidden matrices.
        adamw_8bit: Whether AdamW's moments are stored in 8 bits too, as dynamic codes in blocks of 256 entries.
        options: Fields of `Muon8bitRule` and of `MuonRule`, and the keywords of `MatrixOptimizer`; `adamw_betas` are
            (0.9, 0.95) by default. With a `scale` other than "match_rms_adamw", `adamw_lr` must be given.

    Example:
        >>> import torch
        >>> from optim import Muon8bit
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Linear(64, 64)
        >>> optimizer = Muon8bit(model.named_parameters(), lr=1e-3)
        >>> model(torch.ones(2, 64)).square().sum().backward()
        >>> optimizer.step()
        >>> sorted(optimizer.state[model.weight])
        ['momentum_buffer', 'momentum_buffer_absmax', 'step']
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
