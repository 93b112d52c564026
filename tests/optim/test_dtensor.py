"""Sharded parameters (DTensor, as FSDP2 makes them): every rule steps them as plain ones, or refuses them by name."""

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.nn import Parameter

from optim import RULES, BlockwiseAdamRule, MuonRule, Optimizer, SPAMRule, UpdateRule
from tests.optim.harness import parameters, set_grads
from tests.optim.specs import SPECS

SETTINGS = {"muon": {"ns_dtype": "param"}}
CASES = [RULES[name](**SETTINGS.get(name, {})) for name in sorted(RULES)] + [BlockwiseAdamRule(block="group")]


@pytest.fixture(scope="module")
def mesh() -> Iterator[DeviceMesh]:
    """One rank, gloo: what differs from a real mesh is the number of ranks alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def sharded(p: torch.Tensor, mesh: DeviceMesh) -> DTensor:
    return distribute_tensor(p.detach().clone(), mesh, [Shard(0)])


WHOLE = {"apollo", "fira", "galore"}  # their subspaces are those of whole matrices


@pytest.mark.parametrize("rule", [rule for rule in CASES if rule.name in WHOLE], ids=lambda rule: rule.name)
def test_a_subspace_refuses_shards(rule: UpdateRule, mesh: DeviceMesh) -> None:
    (p,) = parameters([(4, 3)])
    with pytest.raises(ValueError, match="parameter 'w'.*sharded.*whole matrix"):
        Optimizer([("w", Parameter(sharded(p, mesh)))], rule, lr=0.1)


def test_one_bit_refuses_shards(mesh: DeviceMesh) -> None:
    (p,) = parameters([(4, 3)])
    with pytest.raises(ValueError, match="parameter 'w'.*sharded, but every worker needs whole"):
        Optimizer([("w", Parameter(sharded(p, mesh)))], RULES["onebit_adam"](), lr=0.1)


BY_OWNERS = {
    "conda",
    "dion",
    "kron",
    "shampoo",
    "soap",
    "swan",
}  # decompositions have no form for shards; tests/optim/distributed has them by owners


@pytest.mark.parametrize("name", sorted(BY_OWNERS))
def test_decompositions_refuse_shards_in_the_step(name: str, mesh: DeviceMesh) -> None:
    (p,) = parameters([(4, 3)])
    shard = Parameter(sharded(p, mesh))
    optimizer = Optimizer([shard], RULES[name](), lr=0.1)
    shard.grad = sharded(torch.ones_like(p), mesh)
    with pytest.raises(TypeError, match="sharded.*OwnerComputes"):
        optimizer.step()
    assert torch.equal(shard.detach().full_tensor(), p.detach())


def test_codes_refuse_shards_unless_the_tensor_is_small(mesh: DeviceMesh) -> None:
    (p,) = parameters([(64, 64)])
    with pytest.raises(ValueError, match="parameter 'w'.*sharded.*blocks"):
        Optimizer([("w", Parameter(sharded(p, mesh)))], RULES["adamw_8bit"](), lr=0.1)


@pytest.mark.parametrize(
    "rule", [r for r in CASES if r.name not in WHOLE | BY_OWNERS | {"onebit_adam"}], ids=lambda rule: rule.name
)
def test_steps_as_a_plain_parameter(rule: UpdateRule, mesh: DeviceMesh) -> None:
    plain = parameters([(4, 3), (3, 5)] if SPECS[rule.name].min_ndim == 2 else [(4, 3), (5,)], torch.float32)
    shards = [Parameter(sharded(p, mesh)) for p in plain]
    ours, theirs = (Optimizer(params, rule, lr=0.05, weight_decay=0.1) for params in (plain, shards))
    for t in range(3):
        set_grads(plain, t + 1)
        for p, shard in zip(plain, shards, strict=True):
            shard.grad = sharded(p.grad, mesh)
        ours.step()
        theirs.step()
    for p, shard in zip(plain, shards, strict=True):
        torch.testing.assert_close(shard.detach().full_tensor(), p.detach(), rtol=1e-5, atol=1e-6)


def test_parts_of_shards_are_those_of_the_whole(mesh: DeviceMesh) -> None:
    """Fused matrices, whose parts follow one another or alternate."""
    for groups, sizes in ((1, (4, 2, 2)), (2, (2, 1, 1))):
        (plain,) = parameters([(8, 3)], torch.float32)
        shard = Parameter(sharded(plain, mesh))
        rule = MuonRule(split_sizes=sizes, split_groups=groups, ns_dtype="param")
        set_grads([plain], 1)
        shard.grad = sharded(plain.grad, mesh)
        for p in (plain, shard):
            Optimizer([p], rule, lr=0.05).step()
        torch.testing.assert_close(shard.detach().full_tensor(), plain.detach(), rtol=1e-5, atol=1e-6)


def test_a_mask_of_positions_refuses_shards(mesh: DeviceMesh) -> None:
    """With density below 1 SPAM is not elementwise: a shard would draw another mask than the whole."""
    (p,) = parameters([(4, 3)])
    with pytest.raises(ValueError, match=r"parameter 'w'.*density = 0\.5.*sharded"):
        Optimizer([("w", Parameter(sharded(p, mesh)))], SPAMRule(density=0.5), lr=0.1)
    Optimizer([("w", p)], SPAMRule(density=0.5), lr=0.1)
