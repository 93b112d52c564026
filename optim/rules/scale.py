"""SCALE: the gradient with rows of one size, and momentum in the last layer alone."""

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from optim.checks import check_unit_interval
from optim.linalg import unit_rms
from optim.param_groups import NamedParams, Settings
from optim.roles import Kind
from optim.rule import State, moment_dtype, zero_moment
from optim.rules.matrices import MatrixOptimizer, MatrixRule

_CHOICES = {"axis": ("inputs", "outputs"), "normaliser": ("rms", "l2")}


@dataclass(frozen=True, kw_only=True)
class SCALERule(MatrixRule):
    """u = D / max(rms of D along `axis`, 1e-8), with D = G, or with momentum D = B, B <- mu B + (1 - mu) G.

    Shapes: matrices [m, n]; not elementwise. A zero row stays zero; other rows have rms 1 however small, so near an
    optimum steps do not shrink: the learning rate must.
    State: 0 bytes a parameter (4 with momentum, in the last layer) and a step count.
    Source: arXiv 2506.16659; OptimAI-Lab/Minimalist_LLM_Pretraining, whose learning rates go with the rms.

    - `axis`: "inputs", one rms for each output, or "outputs", one for each input, or each feature of an embedding.
    - `normaliser`: "rms", or "l2" as in the paper's formula, smaller by the square root of the axis's length.
    """

    name: ClassVar[str] = "scale"

    momentum: float = 0.0
    axis: str = "inputs"
    normaliser: str = "rms"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_unit_interval("SCALERule", momentum=self.momentum)
        for key, choices in _CHOICES.items():
            if getattr(self, key) not in choices:
                raise ValueError(f"SCALERule: {key} = {getattr(self, key)!r}; it must be one of {', '.join(choices)}")

    def init(self, param: Tensor) -> State:
        """A step count, and a zero buffer if there is momentum; ValueError for a vector or scalar."""
        return super().init(param) | ({"momentum_buffer": zero_moment(param)} if self.momentum else {})

    def update(self, grad: Tensor, state: State, param: Tensor) -> tuple[Tensor, State]:
        """The direction u of the class docstring, in float32 or the parameter's dtype if that is larger."""
        d = grad.to(moment_dtype(param))
        new = {"step": state["step"] + 1}
        if self.momentum:
            d = new["momentum_buffer"] = state["momentum_buffer"].lerp(d, 1 - self.momentum)
        dim = -1 if self.axis == "inputs" else -2
        stacks = []
        for x in self.stacks(d):
            length = max(x.shape[dim], 1) if self.normaliser == "l2" else 1
            stacks.append(unit_rms(x, dim=dim, eps=1e-8 / length**0.5) / length**0.5)
        return self.joined(stacks, grad.shape), new


class SCALE(MatrixOptimizer):
    """SCALE for all matrices, embeddings and the head among them, and AdamW for vectors.

    momentum: of the last layer, the output head. With tied embeddings there is none by itself, as in the published
    code, where no tensor then has momentum; ``assign={"embed_tokens": {"axis": "outputs", "momentum": 0.9}}`` gives it
    to the tied one. options: other fields of `SCALERule`, and the keywords of `MatrixOptimizer`.
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
