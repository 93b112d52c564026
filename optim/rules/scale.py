"""SCALE: the gradient with rows scaled to equal size, and momentum only in the last layer."""

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from optim.checks import check_choice, check_unit_interval
from optim.linalg import unit_rms
from optim.moments import moment_dtype, zero_moment
from optim.param_groups import NamedParams, Settings
from optim.roles import Kind
from optim.rule import OfParam, State
from optim.rules.matrices import MatrixOptimizer, MatrixRule

_CHOICES = {"axis": ("inputs", "outputs"), "normaliser": ("rms", "l2")}


@dataclass(frozen=True, kw_only=True)
class SCALERule(MatrixRule):
    """SCALE: the gradient, or its momentum, with rows or columns scaled to equal size.

        u = D / max(rms of D along `axis`, 1e-8)

    Here D = G, or with momentum D = B, where B <- mu B + (1 - mu) G. A zero row stays zero. All other rows have a root
    mean square of 1, however small they were. Steps therefore do not shrink near an optimum, so that the learning rate
    has to decrease.

    Args:
        axis: "inputs" for one root mean square per output; "outputs" for one per input, or per feature of an embedding.
        normaliser: "rms", or "l2" as in the paper's formula, which makes u smaller by the square root of the axis's
            length.
        momentum: mu; 0 for no momentum.

    Shapes:
        Matrices [m, n]; not elementwise.

    State:
        0 bytes per parameter (4 bytes in the last layer, which has momentum) and a step count.

    Source:
        arXiv 2506.16659, 2025; OptimAI-Lab/Minimalist_LLM_Pretraining, whose learning rates assume "rms".
    """

    name: ClassVar[str] = "scale"

    momentum: float = 0.0
    axis: str = "inputs"
    normaliser: str = "rms"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_unit_interval("SCALERule", momentum=self.momentum)
        for key, choices in _CHOICES.items():
            check_choice("SCALERule", choices, **{key: getattr(self, key)})

    def init(self, param: OfParam) -> State:
        """Return a zero step count, and a zero buffer if there is momentum.

        Raises:
            ValueError: For a vector or scalar.
        """
        return super().init(param) | ({"momentum_buffer": zero_moment(param)} if self.momentum else {})

    def update(self, grad: OfParam, state: State, param: OfParam) -> tuple[OfParam, State]:
        """Return the direction u of the class docstring and the new state.

        The direction is in float32, or in the parameter's dtype if that is larger.
        """
        d = grad.to(moment_dtype(param))
        new = {"step": state["step"] + 1}
        if self.momentum:
            d = new["momentum_buffer"] = state["momentum_buffer"].lerp(d, 1 - self.momentum)
        dim = -1 if self.axis == "inputs" else -2
        stacks = []
        for x in self.stacks(d):
            length = max(x.shape[dim], 1) if self.normaliser == "l2" else 1
            stacks.append(unit_rms(x, dim=dim, eps=1e-8 / length**0.5) / length**0.5)
        return self.directed(stacks, grad.shape), new


class SCALE(MatrixOptimizer):
    """SCALE for all matrices, including embeddings and the head, and AdamW for vectors.

    Args:
        named_parameters: The model or its named parameters, as for `MatrixOptimizer`.
        lr: Learning rate of the matrices.
        weight_decay: Decoupled weight decay of the matrices.
        momentum: Momentum of the last layer, the output head. With tied embeddings no tensor has momentum by default,
            as in the published code. ``assign={"embed_tokens": {"axis": "outputs", "momentum": 0.9}}`` gives the tied
            tensor momentum.
        options: Other fields of `SCALERule`, and the keywords of `MatrixOptimizer`.

    Example:
        >>> import torch
        >>> from optim import SCALE
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Linear(8, 4)
        >>> optimizer = SCALE(model.named_parameters(), lr=1e-3)
        >>> model(torch.ones(2, 8)).square().sum().backward()
        >>> optimizer.step()
        >>> sorted(optimizer.state[model.weight])
        ['step']
    """

    def __init__(
        self,
        named_parameters: NamedParams,
        lr: float | Tensor = 1e-3,
        weight_decay: float = 0.0,
        *,
        momentum: float = 0.9,
        **options: Any,
    ) -> None:
        kinds: dict[Kind, Settings] = {
            "matrix": {}, "embedding": {"axis": "outputs"}, "head": {"momentum": momentum},
            "adapter of an embedding": {},
        }  # fmt: skip
        usual: dict[str, Any] = {"adamw_eps_before_correction": True}
        super().__init__(named_parameters, SCALERule, lr, weight_decay, kinds=kinds, **(usual | options))
