"""The sharpness of the loss in each block of a transformer, and the learning-rate ratios that it suggests."""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from optim import curvature
from optim.curvature.gauss_newton import CrossEntropies
from optim.moments import moment_dtype
from optim.roles import block_of


def block_sharpness(
    losses: Iterable[Callable[[], Tensor]],
    named_parameters: Iterable[tuple[str, Tensor]],
    *,
    labels: Literal["sampled", "data"] = "sampled",
    block: Callable[[str], str] = block_of,
    seed: int = 0,
) -> dict[str, float]:
    """Return S(b) = B |g_b|^2 / #b for each block b, an estimate of trace(H_bb) / #b, averaged over the batches.

        found = block_sharpness([lambda b=b: model(**b).loss for b in batches], model.named_parameters())
        groups = blockwise(model.named_parameters(), lr=6e-4, ratios=propose_ratios(found))

    Here g_b is the gradient, with respect to the block's #b parameters, of the mean cross-entropy of a batch of B
    predictions. Gradients in `param.grad` do not change.

    Args:
        losses: One function per batch, which computes that mean by `torch.nn.functional.cross_entropy` (called once).
        named_parameters: (name, parameter) pairs. Parameters that do not require a gradient, or on which no loss
            depends, are omitted.
        labels: "sampled" draws labels from the model's own distribution, so that the expectation of S is the
            Gauss-Newton trace. "data" keeps the labels of the batch, which gives the empirical Fisher; early in
            training and for large B it is dominated by the mean gradient.
        block: A function from parameter name to block, by default the role over all layers; ``lambda name: name``
            measures every tensor separately.
        seed: The seed of the labels.

    Returns:
        S by block.

    Cost:
        One forward and backward pass per batch.

    Raises:
        ValueError: Without a batch, or if cross_entropy is not called.

    Source:
        arXiv 2502.19002, which measures it after the first few per cent of training (embedding << QK < FFN < VO <<
        norm).

    Example:
        >>> from optim import diagnostics
        >>> model = torch.nn.ModuleDict({"q_proj": torch.nn.Linear(4, 3)})
        >>> x, y = torch.ones(5, 4), torch.zeros(5, dtype=torch.int64)
        >>> loss = lambda: torch.nn.functional.cross_entropy(model["q_proj"](x), y)
        >>> list(diagnostics.block_sharpness([loss], model.named_parameters()))
        ['qk']
    """
    names, params = [], []
    for name, param in named_parameters:
        if param.requires_grad:
            names.append(name)
            params.append(param)
    of = [block(name) for name in names]
    squares: dict[int, float] = {}  # by parameter; in some batches, a parameter may have no gradient
    batches = 0
    for batches, loss_fn in enumerate(losses, start=1):
        if labels == "sampled":
            estimates = curvature.gauss_newton(loss_fn, params, seed=_seed(seed, batches))
        elif labels == "data":
            estimates = _empirical(loss_fn, params)
        else:
            raise ValueError(f"block_sharpness: labels = {labels!r}; it must be 'sampled' or 'data'")
        for i, estimate in enumerate(estimates):
            if estimate is not None:
                squares[i] = squares.get(i, 0.0) + float(estimate.sum(dtype=torch.float64))
    if batches == 0:
        raise ValueError("block_sharpness: losses is empty; pass one function per batch")
    found: dict[str, float] = {}
    for b in dict.fromkeys(of):
        members = [i for i in squares if of[i] == b]
        if size := sum(params[i].numel() for i in members):
            found[b] = sum(squares[i] for i in members) / batches / size
    return found


def propose_ratios(sharpness: Mapping[str, float], *, largest: float = 10.0) -> dict[str, float]:
    """Return learning-rate ratios for `optim.blockwise`: 1 for the sharpest block, `largest` for the flattest.

        ratio_b = largest^(log(S_max / S_b) / log(S_max / S_min))

    This is only a starting point. The paper tuned its ratios by hand, in the order of S and with these two ends, and
    gives no formula; this formula is our own. It also increases the rate of the head, which the paper leaves unchanged.

    Args:
        sharpness: S by block.
        largest: The largest ratio.

    Returns:
        Ratios by block.

    Raises:
        ValueError: For a block whose sharpness is not a finite number above 0, by name, or for `largest` below 1.

    Source:
        arXiv 2502.19002.

    Example:
        >>> from optim import diagnostics
        >>> found = diagnostics.propose_ratios({"qk": 1.0, "ffn": 10.0, "vo": 100.0})
        >>> {name: round(ratio, 2) for name, ratio in found.items()}
        {'qk': 10.0, 'ffn': 3.16, 'vo': 1.0}
    """
    for name, value in sharpness.items():
        if not 0 < value < math.inf:
            raise ValueError(f"propose_ratios: the sharpness of {name!r} is {value!r}; it must be finite and above 0")
    if not 1 <= largest < math.inf:
        raise ValueError(f"propose_ratios: largest = {largest!r}; it must be a finite number of at least 1")
    if not sharpness:
        return {}
    top, spread = max(sharpness.values()), math.log(max(sharpness.values()) / min(sharpness.values()))
    return {b: largest ** (math.log(top / s) / spread) if spread > 0 else 1.0 for b, s in sharpness.items()}


def _seed(seed: int, batch: int) -> int:
    return (seed << 32) + batch


def _empirical(loss_fn: Callable[[], Tensor], params: list[Tensor]) -> list[Tensor | None]:
    """Return B g^2 for each parameter, with the loss's own labels."""
    with curvature.private(params):
        with _CountedTerms() as counted:
            loss = loss_fn()
        if counted.terms == 0:
            raise ValueError("block_sharpness: this loss does not call torch.nn.functional.cross_entropy with a label")
        curvature.graph_leaves(loss)
        grads = torch.autograd.grad(loss, params, allow_unused=True)
    return [None if g is None else counted.terms * g.to(moment_dtype(g)).square() for g in grads]


class _CountedTerms(CrossEntropies):
    """Count the labels of cross_entropy that are not ignored."""

    terms = 0

    def replaced(self, given: dict[str, Any]) -> dict[str, Any]:
        self.terms += int((given["target"] != given.get("ignore_index", -100)).sum())
        return {}
