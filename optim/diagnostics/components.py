"""Which part of a transformer needs a matrix method: the arms of an ablation, and the mechanism in closed form."""

from collections.abc import Iterable, Mapping
from types import MappingProxyType

import torch
from jaxtyping import Float
from torch import Tensor

from optim.checks import check_choice
from optim.diagnostics.spectrum import roles

_FFN = ("ffn_in", "ffn_gate", "ffn_out")

ARMS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "all": ("q", "k", "v", "o", *_FFN),
        "none": (),
        "q": ("q",),
        "k": ("k",),
        "v": ("v",),
        "o": ("o",),
        "ffn_in": ("ffn_in", "ffn_gate"),
        "ffn_out": ("ffn_out",),
        "qk": ("q", "k"),
        "vo": ("v", "o"),
        "ffn": _FFN,
        "vo+ffn": ("v", "o", *_FFN),
        "vo+ffn_in": ("v", "o", "ffn_in", "ffn_gate"),
        "vo+ffn_out": ("v", "o", "ffn_out"),
    }
)
"""The arms of the ablation in arXiv 2509.26030: the roles that Muon steps, with Adam elsewhere, each at its own tuned
learning rate.

The paper finds, at 160M parameters, that "vo+ffn" is close to "all" and "qk" is close to "none".
"""

Named = list[tuple[str, Tensor]]


def by_component(named_parameters: Iterable[tuple[str, Tensor]], arm: str) -> tuple[Named, Named]:
    """Divide parameters into those of the arm's roles, for Muon, and all others, for Adam.

    Args:
        named_parameters: (name, parameter) pairs.
        arm: A key of `ARMS`.

    Returns:
        The pairs of the arm's roles and all other pairs, each in the given order.

    Raises:
        ValueError: For an unknown arm, or for a matrix that contains roles of both parts (query, key and value in one
            matrix).

    Example:
        >>> from optim import diagnostics
        >>> model = torch.nn.ModuleDict({"v_proj": torch.nn.Linear(4, 4), "q_proj": torch.nn.Linear(4, 4)})
        >>> mine, others = diagnostics.by_component(model.named_parameters(), "vo")
        >>> [name for name, _ in mine]
        ['v_proj.weight']
    """
    check_choice("by_component", tuple(ARMS), arm=arm)
    chosen: Named = []
    rest: Named = []
    for name, param in named_parameters:
        held = {role for role, _ in roles(name, param, heads=1)}
        inside = held & set(ARMS[arm])
        if inside and inside != held:
            raise ValueError(
                f"by_component: {name!r} holds {', '.join(sorted(held))} in one matrix, but arm {arm!r} only has "
                f"{', '.join(sorted(inside))}; split the matrix, or choose an arm that has all of them or none"
            )
        (chosen if inside else rest).append((name, param))
    return chosen, rest


def tail_learning(
    frequencies: Float[Tensor, " k"], keys: Float[Tensor, "d k"], values: Float[Tensor, "d k"], *, eps: float = 0.05
) -> dict[str, float]:
    """Return how well one step of gradient descent, of sign descent, and along the polar factor learns rare facts.

    A linear associative memory starts at W = 0: fact k of K has probability softmax(F^T W E_k)_k, and the loss is sum_k
    p_k CE_k. Each method takes one full-gradient step, of a size at which the best fact has probability 1 - eps. For
    many facts the worst fact under "polar" is within about eps of the best, whatever the bases and frequencies are;
    under "sign" this only holds for aligned bases.

    Args:
        frequencies: p [K], with sum 1; computed in float64.
        keys: E [d, K] with orthonormal columns.
        values: F [d, K] with orthonormal columns.
        eps: One minus the probability of the best fact after the step.

    Returns:
        The probability of the worst fact for "gd", "sign" and "polar".

    Raises:
        ValueError: For shapes that do not match, or if no step size gives the best fact that probability.

    Source:
        arXiv 2509.26030.

    Example:
        >>> from optim import diagnostics
        >>> found = diagnostics.tail_learning(torch.tensor([0.7, 0.2, 0.1]), torch.eye(3), torch.eye(3))
        >>> found["gd"] < found["polar"]
        True
    """
    p, e, f = (x.double() for x in (frequencies, keys, values))
    count = len(p)
    if e.shape != f.shape or e.shape[1:] != p.shape or count < 2:
        raise ValueError(
            f"tail_learning: frequencies {tuple(p.shape)}, keys {tuple(e.shape)}, values {tuple(f.shape)}; expected "
            "the shapes [K], with K of at least 2, [d, K] and [d, K]"
        )
    descent = f @ (torch.eye(count, dtype=p.dtype) - 1 / count) @ torch.diag(p) @ e.T
    u, s, vh = torch.linalg.svd(descent)
    rank = int((s > s[0] * 1e-12).sum())
    signs = torch.sign(torch.round(descent, decimals=14))  # entries that only differ from zero by rounding stay zero
    directions = {"gd": descent, "sign": signs, "polar": u[:, :rank] @ vh[:rank]}
    return {name: _worst(f.T @ way @ e, eps) for name, way in directions.items()}


def _worst(logits: Tensor, eps: float) -> float:
    """Return the worst probability at the step size at which the best is 1 - eps.

    `logits` [K, K] are those of a step of size 1, with fact k in column k.
    """

    def right(step: float) -> Tensor:
        return (step * logits).softmax(0).diagonal()

    low, high = 0.0, 1.0
    while float(right(high).max()) < 1 - eps:
        low, high = high, 2 * high
        if high > 1e30:
            raise ValueError(f"tail_learning: no step size gives any fact a probability of {1 - eps:g}")
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if float(right(middle).max()) < 1 - eps else (low, middle)
    return float(right(high).min())
