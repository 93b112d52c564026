"""One of several processes: a model under FSDP2 whose optimizer's state is saved, loaded and gone on from."""

import copy
import warnings
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import fully_shard

from optim import create
from tests.optim.harness import randn

SETTINGS: dict[str, dict[str, Any]] = {
    "muon": {"ns_dtype": "param"},
    "adam_mini": {"blocks": "row"},
    "sgd": {"momentum": 0.9},
    "sgdp": {"momentum": 0.9},
    "sgd_sai": {"momentum": 0.9},
}
HOW = {
    "full": {"full_state_dict": True},
    "broadcast": {"full_state_dict": True, "broadcast_from_rank0": True},
    "sharded": {},
}


class Block(nn.Module):
    """Sides that two ranks divide unevenly, a vector and a tensor with fewer rows than ranks."""

    def __init__(self) -> None:
        super().__init__()
        self.up_proj = nn.Linear(6, 7)
        self.down_proj = nn.Linear(7, 6)
        self.gate_proj = nn.Parameter(torch.zeros(1, 6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down_proj(torch.tanh(self.up_proj(x + self.gate_proj)))


def model() -> nn.Module:
    made = nn.Sequential(Block(), Block()).double()
    with torch.no_grad():
        for i, p in enumerate(made.parameters()):
            p.copy_(0.3 * randn(tuple(p.shape), i))
    for layer in made:
        fully_shard(layer)
    return fully_shard(made)


def go(made: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    for t in steps:
        x = randn((4, 6), 100 + t)[rank::size]
        made(x).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()


def whole(made: nn.Module) -> dict[str, torch.Tensor]:
    return {n: p.detach().full_tensor().clone() for n, p in made.named_parameters()}  # type: ignore[attr-defined]


def resumed(names: list[str], hows: list[str]) -> dict[tuple[str, str], Any]:
    """(optimizer, how) -> (parameters of the run that went on, those of the one that was loaded), or a refusal."""
    warnings.filterwarnings("ignore")
    found: dict[tuple[str, str], Any] = {}
    for name in names:
        made = model()
        try:
            optimizer = create(name, made.named_parameters(), lr=0.01, weight_decay=0.1, **SETTINGS.get(name, {}))
            go(made, optimizer, range(3))
        except (ValueError, TypeError) as error:
            found |= {(name, how): str(error) for how in hows}
            continue
        start = {n: p.detach().clone() for n, p in made.named_parameters()}
        saved = {}
        for how in hows:
            saved[how] = copy.deepcopy(get_optimizer_state_dict(made, optimizer, options=StateDictOptions(**HOW[how])))
        go(made, optimizer, range(3, 6))
        for how in hows:
            other = model()
            second = create(name, other.named_parameters(), lr=0.01, weight_decay=0.1, **SETTINGS.get(name, {}))
            with torch.no_grad():
                for n, p in other.named_parameters():
                    p.copy_(start[n])
            set_optimizer_state_dict(other, second, saved[how], options=StateDictOptions(**HOW[how]))
            go(other, second, range(3, 6))
            found[name, how] = whole(made), whole(other)
    return found
