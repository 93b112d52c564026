"""AdaHessian: Adam with the Hessian diagonal instead of the gradient's second moment."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from optim.checks import check_choice, check_non_negative, check_share, checked_betas
from optim.curvature import CurvatureRule
from optim.moments import correction, zero_moment, zero_step
from optim.optimizer import Optimizer, Params
from optim.rule import OfParam, State

VARIANTS = ("instruction", "image")


@dataclass(frozen=True, kw_only=True)
class AdaHessianRule(CurvatureRule):
    """AdaHessian: Adam with the magnitude of the Hessian's diagonal instead of the squared gradient.

        u = m^ / (sqrt(v^)^k + eps),  m^ = m / (1 - b1^t),  v^ = v / (1 - b2^n)

    Here m <- b1 m + (1 - b1) g, k is `hessian_power` and n is the number of refreshes. A refresh sets v <- b2 v + (1 -
    b2) D^2, where D is the block average of |z H z| for random signs z.

    Until the first refresh u = m^, which is SGD with momentum. Otherwise, a |z H z| that happens to be zero would give
    steps of size m^ / eps.

    Args:
        betas: (b1, b2), the decay rates of the two moments.
        eps: Added to the denominator.
        hessian_power: The exponent k.
        refresh_every: Steps from one refresh to the next.
        variant: Which entries are averaged. "instruction" (instruction/adahessian.py, the paper's method) averages
            matrices over their rows, and tensors with more dimensions over their trailing dimensions: the last one of
            three, and all but the first two of four or more. "image" (image_classification/optim_adahessian.py) only
            averages kernels with four dimensions, over the last two.
        spatial_average_block_size: Four numbers, for tensors of 1, 2, 3, and 4 or more dimensions. A positive number
            averages consecutive entries of the flattened tensor in groups of that size instead.

    Shapes:
        `update` is elementwise; the average at a refresh needs whole rows.

    State:
        8 bytes per parameter (two float32 moments), a step count and a count of refreshes.

    Source:
        Yao et al. 2021, arXiv 2006.00719, algorithm 1; amirgholami/adahessian.

    Differs:
        The paper averages signed estimates; the published code averages magnitudes, as is done here. That code
        refreshes at every step (also the default here), so that n = t.
    """

    name: ClassVar[str] = "adahessian"
    probe: ClassVar[Literal["labels", "normal", "signs"]] = "signs"

    refresh_every: int = 1
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-4
    hessian_power: float = 1.0
    variant: str = "instruction"
    spatial_average_block_size: tuple[int, int, int, int] = (-1, -1, -1, -1)

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "betas", checked_betas("AdaHessianRule", self.betas))
        check_non_negative("AdaHessianRule", eps=self.eps)
        check_share("AdaHessianRule", hessian_power=self.hessian_power)
        check_choice("AdaHessianRule", VARIANTS, variant=self.variant)
        sizes = self.spatial_average_block_size
        four = isinstance(sizes, list | tuple) and len(sizes) == 4
        if not four or not all(isinstance(s, int) and (s == -1 or s > 0) for s in sizes):
            raise ValueError(
                f"AdaHessianRule: spatial_average_block_size = {sizes!r}; it must be four integers, each -1 or positive"
            )
        object.__setattr__(self, "spatial_average_block_size", tuple(sizes))

    def init(self, param: OfParam) -> State:
        """Return zero moments and zero counts."""
        return {
            "step": zero_step(),
            "exp_avg": zero_moment(param),
            "exp_hessian_diag_sq": zero_moment(param),
            "hessian_step": zero_step(),
        }

    def update(self, grad: OfParam, state: State, param: OfParam) -> tuple[OfParam, State]:
        """Return the direction u of the class docstring, in the moments' dtype, and the new state."""
        b1, b2 = self.betas
        v, n, t = state["exp_hessian_diag_sq"], state["hessian_step"], state["step"] + 1
        m = state["exp_avg"].lerp(grad.to(state["exp_avg"].dtype), 1 - b1)
        idle = (n == 0).double()  # 1 until the first refresh, when v / (1 - b2^n) would be 0 / 0
        root = (v / (correction(b2, n) + idle)).sqrt()
        if self.hessian_power != 1:
            root = root**self.hessian_power * (1 - idle)  # 0^0 would be 1
        direction = m / correction(b1, t) / (root + (idle + (1 - idle) * self.eps))
        direction = direction.to(m.dtype)  # the float64 corrections would promote a 0-d parameter
        return direction, {"step": t, "exp_avg": m, "exp_hessian_diag_sq": v, "hessian_step": n.clone()}

    def absorb(self, estimate: OfParam, state: State) -> State:
        """Return the new v and n after a refresh.

        Args:
            estimate: z H z, of the parameter's shape.
            state: The state of the parameter, which is not changed.

        Returns:
            The entries of the state that change.

        Raises:
            ValueError: If a block size does not divide the number of elements.
        """
        averaged = self.averaged(estimate.abs())
        v = state["exp_hessian_diag_sq"].lerp(averaged * averaged, 1 - self.betas[1])
        return {"exp_hessian_diag_sq": v, "hessian_step": state["hessian_step"] + 1}

    def averaged(self, x: Tensor) -> Tensor:
        """Return x with each entry replaced by the mean of its block.

        Args:
            x: A tensor of the parameter's shape.

        Returns:
            A tensor of the same shape.

        Raises:
            ValueError: If a block size does not divide the number of elements.
        """
        if x.ndim == 0 or x.numel() == 0:
            return x
        if self.variant == "image":
            return x.mean((-2, -1), keepdim=True).expand_as(x) if x.ndim == 4 else x
        size = self.spatial_average_block_size[min(x.ndim, 4) - 1]
        if size == -1:
            trailing = tuple(range(1 if x.ndim == 2 else 2, x.ndim))
            return x.mean(trailing, keepdim=True).expand_as(x) if trailing else x
        if x.numel() % size:
            raise ValueError(
                f"AdaHessianRule: blocks of {size} do not divide the {x.numel()} elements of a parameter of shape "
                f"{tuple(x.shape)}; change spatial_average_block_size"
            )
        return x.reshape(-1, size).mean(1, keepdim=True).expand(-1, size).reshape(x.shape)


class AdaHessian(Optimizer):
    """AdaHessian for all parameters; call `optim.curvature.refresh` before every step.

    Args:
        params: The model, its parameters (with or without names), or param groups, as for `Optimizer`.
        lr: Learning rate.
        betas, eps: See `AdaHessianRule`.
        weight_decay: Decoupled weight decay.
        hessian_power, variant, spatial_average_block_size, refresh_every: See `AdaHessianRule`.

    Example:
        >>> import torch
        >>> from optim import AdaHessian, curvature
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Linear(8, 4)
        >>> optimizer = AdaHessian(model.named_parameters(), lr=1e-3)
        >>> labels = torch.tensor([0, 1, 2])
        >>> loss_fn = lambda: torch.nn.functional.cross_entropy(model(torch.ones(3, 8)), labels)
        >>> loss_fn().backward()
        >>> _ = curvature.refresh(optimizer, loss_fn)
        >>> optimizer.step()
        >>> sorted(optimizer.state[model.weight])
        ['exp_avg', 'exp_hessian_diag_sq', 'hessian_step', 'step']
    """

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 0.15,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-4,
        weight_decay: float = 0.0,
        hessian_power: float = 1.0,
        *,
        variant: str = "instruction",
        spatial_average_block_size: tuple[int, int, int, int] = (-1, -1, -1, -1),
        refresh_every: int = 1,
    ) -> None:
        rule = AdaHessianRule(
            betas=betas,
            eps=eps,
            hessian_power=hessian_power,
            variant=variant,
            spatial_average_block_size=spatial_average_block_size,
            refresh_every=refresh_every,
        )
        super().__init__(params, rule, lr=lr, weight_decay=weight_decay)
