"""Optimizers with curvature: the battery, and when and how estimates are refreshed."""

import copy
import inspect
from dataclasses import replace
from importlib import import_module

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import Parameter, functional

from optim import AdaHessianRule, Optimizer, SGDRule, SophiaG, SophiaGRule, SophiaH, SophiaHRule, UpdateMap, curvature
from optim.curvature import CurvatureRule
from tests.optim import properties, properties_ours
from tests.optim.curvature.losses import classifier
from tests.optim.harness import as_arrays, assert_same, make, named, parameters, randn, set_grads, snapshot, states
from tests.optim.specs import SPECS
from tests.processes import spawn
from tests.reference import adahessian

NAMES = sorted(name for name, spec in SPECS.items() if isinstance(spec.rule(), CurvatureRule))
POSITIVE = {"sophia_g"}  # B g^2 is never negative


def estimate(name: str, p: Tensor, t: int) -> Tensor:
    """Curvature of a size at which some coordinates are clipped and some are not."""
    drawn = 300 * randn(tuple(p.shape), 31 * t + p.numel(), torch.promote_types(p.dtype, torch.float32))
    return drawn.abs() if name in POSITIVE else drawn


def train_with_curvature(optimizer, params, steps):
    """`harness.train` with an estimate before every step, also for published code that takes one."""
    rule = optimizer.param_groups[0].get("rule")
    name = rule.name if rule else {"PublishedSophiaG": "sophia_g"}.get(type(optimizer).__name__, "")
    for t in steps:
        given = {p: estimate(name, p, t) for p in params}
        if rule is None:
            optimizer.absorb(given)
        else:
            curvature.absorb(optimizer, given)
        set_grads(params, t + 1)
        optimizer.step()


FUNCTIONS = properties.PROPERTIES | properties_ours.PROPERTIES
WITH_TRAIN = [*sorted(number for number, f in FUNCTIONS.items() if "train(" in inspect.getsource(f)), "H2", "H4"]


@pytest.mark.parametrize("number", WITH_TRAIN)
@pytest.mark.parametrize("name", NAMES)
def test_the_battery_holds_with_curvature(name, number, monkeypatch):
    """The battery's rules see no curvature; here they do, in every property that trains."""
    for module in (properties, properties_ours):
        monkeypatch.setattr(module, "train", train_with_curvature)
    whole = tuple(hyper for hyper in SPECS[name].inputs if "spatial_average_block_size" not in hyper or number != "H2")
    FUNCTIONS[number](replace(SPECS[name], inputs=whole))  # H2 draws shapes that blocks do not divide


@pytest.mark.parametrize("name", NAMES)
def test_the_formula_holds_with_curvature(name):
    """12 float64 steps equal the reference, with refreshes now and then and a missing gradient."""
    spec = SPECS[name]
    for hyper in spec.inputs:
        for shape in ((4, 3), (5,), (), (2, 2, 3), (2, 2, 2, 4)):
            if hyper.get("spatial_average_block_size") and shape == ():
                continue
            p = Parameter(randn(shape, 5))
            grads: list[Tensor | None] = [randn(shape, 100 + t) for t in range(12)]
            grads[5] = None
            given = [None if t % 3 == 1 else estimate(name, p, t) for t in range(12)]
            reference = spec.reference.run(
                p.detach().numpy(), as_arrays(grads), lr=0.03, weight_decay=0.1, estimates=as_arrays(given), **hyper
            )
            optimizer = make(spec, [p], hyper, lr=0.03, weight_decay=0.1)
            for t, (grad, want) in enumerate(zip(grads, reference, strict=True)):
                if given[t] is not None:
                    curvature.absorb(optimizer, {p: given[t]})
                p.grad = grad
                optimizer.step()
                where = f"{hyper} {shape}, step {t}"
                np.testing.assert_allclose(p.detach().numpy(), want, rtol=1e-9, atol=1e-12, err_msg=where)


def test_adahessian_averages_blocks():
    for shape in ((6,), (4, 6), (2, 3, 4), (2, 3, 2, 2), (2, 2, 2, 2, 2), (0, 3), ()):
        for fields in ({}, {"variant": "image"}, {"spatial_average_block_size": (3, 8, 12, 4)}):
            x = randn(shape, 3).abs()
            got = AdaHessianRule(**fields).averaged(x)
            np.testing.assert_allclose(got.numpy(), adahessian.averaged(x.numpy(), **fields), rtol=1e-12)
    p = Parameter(torch.ones(5))
    optimizer = Optimizer([p], AdaHessianRule(spatial_average_block_size=(2, -1, -1, -1)), lr=0.1)
    with pytest.raises(ValueError, match=r"blocks of 2 do not divide the 5 elements.*shape \(5,\)"):
        curvature.absorb(optimizer, {p: torch.ones(5)})


# ------------------------------------------------------------------------------------------------------------- refresh


def step(optimizer: Optimizer, loss, **options) -> bool:
    optimizer.zero_grad()
    loss().backward()
    done = curvature.refresh(optimizer, loss, **options)
    optimizer.step()
    return done


def test_when_curvature_is_due():
    """Sophia-H and AdaHessian from the first step on, Sophia-G after the first k; `every` overrides the rules' k."""
    for rule, every, want in (
        (SophiaHRule(refresh_every=3), None, [0, 3, 6]),
        (SophiaGRule(refresh_every=3), None, [3, 6]),
        (AdaHessianRule(), None, list(range(8))),
        (SophiaHRule(), 4, [0, 4]),
    ):
        w, loss, _ = classifier()
        optimizer = Optimizer([w], rule, lr=0.01)
        assert [t for t in range(8) if step(optimizer, loss, every=every)] == want
    for wrong in (0, -1, 2.5, True):
        with pytest.raises(ValueError, match="every"):
            curvature.refresh(optimizer, loss, every=wrong)


def test_other_rules_cost_nothing():
    """Without a rule that wants curvature the loss is not computed; `torch.optim` is such a case too."""
    p = Parameter(torch.ones(2))

    def never() -> Tensor:
        raise AssertionError("computed")

    assert not curvature.refresh(Optimizer([p], SGDRule(), lr=0.1), never)
    assert not curvature.refresh(torch.optim.AdamW([p]), never)
    assert not curvature.refresh(SophiaG([p]), never)  # not due


@pytest.mark.parametrize("make_rule", [SophiaGRule, SophiaHRule, AdaHessianRule])
def test_a_refresh_changes_curvature_and_nothing_else(make_rule):
    """Gradients, parameters, momentum, step counts and the global generator stay; dropout may be in the loss."""
    w, x = Parameter(randn((3, 2), 1)), randn((7, 2), 2)
    optimizer = Optimizer([("w", w)], make_rule(), lr=0.01)

    def loss() -> Tensor:
        return functional.cross_entropy(functional.dropout(x, 0.5) @ w.T, torch.zeros(7).long())

    for _ in range(2):
        step(optimizer, loss, every=2)
    loss().backward()
    kept = snapshot([w, w.grad, optimizer.state[w]["step"], optimizer.state[w]["exp_avg"], torch.get_rng_state()])
    before = snapshot(states(optimizer))
    assert curvature.refresh(optimizer, loss, every=2)
    after = [w.detach(), w.grad, optimizer.state[w]["step"], optimizer.state[w]["exp_avg"], torch.get_rng_state()]
    assert_same(kept, after)
    assert any(not torch.equal(a, b) for a, b in zip(before, states(optimizer), strict=True))


@pytest.mark.parametrize("make_rule", [SophiaGRule, SophiaHRule, AdaHessianRule])
def test_resumed_is_bit_identical(make_rule):
    """Stopped between two refreshes: the state dict is all that is needed, whatever the global generator did."""

    def start(weight: Tensor | None = None):
        w, loss, _ = classifier()
        if weight is not None:
            w.data.copy_(weight)
        return w, loss, Optimizer([("w", w)], make_rule(), lr=0.05)

    w, loss, optimizer = start()
    for _ in range(4):
        step(optimizer, loss, every=3)
    twin, twin_loss, other = start(w.detach())
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    torch.randn(17)
    for _ in range(5):
        step(optimizer, loss, every=3)
        step(other, twin_loss, every=3)
    assert_same([w, *states(optimizer)], [twin, *states(other)])
    _third, third_loss, another = start(w.detach())
    another.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    curvature.refresh(optimizer, loss, every=1)
    curvature.refresh(another, third_loss, every=1, seed=1)
    assert not all(torch.equal(a, b) for a, b in zip(states(optimizer), states(another), strict=True))


def test_rules_may_be_mixed():
    """Each group gets its own estimate at its own time; a frozen parameter and one without curvature are left out."""
    a, b, c, d, e = parameters([(3, 2)] * 5)
    optimizer = Optimizer(
        [
            {"params": [a, d], "rule": SophiaGRule(refresh_every=1)},
            {"params": [b], "rule": SophiaHRule()},
            {"params": [c], "rule": SGDRule()},
            {"params": [e], "rule": AdaHessianRule()},
        ],
        SGDRule(),
        lr=0.01,
    )
    x = randn((7, 2), 2)

    def loss() -> Tensor:
        return functional.cross_entropy(x @ (a + b * c + e).T, torch.zeros(7).long())

    d.requires_grad_(False)
    assert step(optimizer, loss)
    assert a not in optimizer.state or not optimizer.state[a]["hessian"].any()  # not before its first step
    assert optimizer.state[b]["hessian"].any() and optimizer.state[e]["exp_hessian_diag_sq"].any()
    assert d not in optimizer.state and set(optimizer.state[c]) == {"step"}
    h = optimizer.state[b]["hessian"].clone()
    assert step(optimizer, loss)
    assert optimizer.state[a]["hessian"].any() and torch.equal(optimizer.state[b]["hessian"], h)


def test_curvature_that_is_not_finite_is_left_out_by_name():
    a, b = parameters([(2,), (2,)])
    optimizer = SophiaH([("fine", a), ("broken", b)], lr=0.1)
    with pytest.warns(RuntimeWarning, match=r"'broken'.*not finite"):
        curvature.refresh(optimizer, lambda: (a**3).sum() + (b**3).sum() * torch.inf)
    assert optimizer.state[a]["hessian"].isfinite().all() and b not in optimizer.state


def test_low_precision_parameters_have_float32_curvature():
    w = Parameter(randn((3, 2), 1, torch.bfloat16))
    x = randn((7, 2), 2, torch.bfloat16)

    def loss() -> Tensor:
        return functional.cross_entropy((x @ w.T).float(), torch.zeros(7).long())

    for rule in (SophiaGRule(), SophiaHRule(), AdaHessianRule()):
        optimizer = Optimizer([w], rule, lr=1e-3)
        for _ in range(3):
            step(optimizer, loss, every=1)
        kept = [value for value in optimizer.state[w].values() if value.ndim]
        assert {value.dtype for value in kept} == {torch.float32} and all(value.any() for value in kept)


@pytest.mark.parametrize("name", NAMES)
def test_a_map_reads_the_slow_diagonal_and_never_renews_it(name):
    """per_sample of a map that follows the optimizer: another curvature, other directions; the state stays."""
    params = parameters([(4, 3), (5,)])
    optimizer = make(SPECS[name], named(params))
    train_with_curvature(optimizer, params, range(2))
    grads = {n: randn((6, *p.shape), 9) for n, p in named(params)}
    update_map = UpdateMap.of(optimizer, copy=False)
    before = snapshot(states(optimizer))
    first = update_map.per_sample(grads)
    assert_same(states(optimizer), before)
    curvature.absorb(optimizer, {p: 10 * estimate(name, p, 4) for p in params})
    second = update_map.per_sample(grads)
    assert all(not torch.equal(first[n], second[n]) for n in first)


@pytest.mark.parametrize("make_rule", [SophiaGRule, SophiaHRule, AdaHessianRule])
def test_sharded_parameters_are_refused(make_rule):
    """At the first call, also by the rule whose first refresh comes later; a frozen one is in nobody's way."""
    w, loss, _ = classifier()
    w.placements = ("shard",)
    optimizer = Optimizer([w], make_rule(), lr=0.1)
    with pytest.raises(TypeError, match="sharded"):
        curvature.refresh(optimizer, loss)
    for estimate_of in (lambda: curvature.gauss_newton(loss, [w], seed=0), lambda: curvature.hvp(loss, [w], [w])):
        with pytest.raises(TypeError, match="sharded"):
            estimate_of()
    assert not curvature.refresh(Optimizer([w.requires_grad_(False)], make_rule(), lr=0.1), loss)


@pytest.mark.parametrize("make_rule", [SophiaGRule, SophiaHRule, AdaHessianRule])
def test_a_refresh_draws_the_dropout_of_the_next_pass_and_updates_buffers(make_rule):
    w, norm = Parameter(randn((3, 2), 1, torch.float32)), torch.nn.BatchNorm1d(2)
    x, masks = randn((7, 2), 2, torch.float32), []

    def loss() -> Tensor:
        masks.append(functional.dropout(torch.ones(7, 2), 0.5))
        return functional.cross_entropy(masks[-1] * norm(x) @ w.T, torch.zeros(7).long())

    optimizer = Optimizer([w], make_rule(refresh_every=1), lr=0.01)
    step(optimizer, loss)
    loss().backward()
    seen, passes = len(masks), int(norm.num_batches_tracked)
    curvature.refresh(optimizer, loss)
    loss()
    assert not torch.equal(masks[seen], masks[seen - 1]) and torch.equal(masks[seen], masks[-1])
    assert int(norm.num_batches_tracked) == passes + 2


RANK = """
import sys
import torch
import torch.distributed as dist
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel
from optim import AdaHessianRule, Optimizer, SophiaGRule, SophiaHRule, curvature

rank, folder = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
torch.manual_seed(0)
x, y = torch.randn(2, 6, 4), torch.tensor([[0, 1, 2, 0, 1, 2]] * 2)
end = {}
for rule in (SophiaGRule(refresh_every=2), SophiaHRule(refresh_every=2), AdaHessianRule()):
    torch.manual_seed(1)
    model = torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.Tanh(), torch.nn.Linear(5, 3))
    wrapped = DistributedDataParallel(model)
    optimizer = Optimizer(wrapped.named_parameters(), rule, lr=1e-2)
    torch.manual_seed(rank)  # the global generators differ: probes must not come from them
    loss = lambda: functional.cross_entropy(wrapped(x[rank]), y[rank])
    for step in range(5):
        optimizer.zero_grad()
        loss().backward()
        curvature.refresh(optimizer, loss)
        optimizer.step()
    for name, p in model.named_parameters():
        end |= {f"{rule.name}/{name}/{key}": value for key, value in optimizer.state[p].items()}
        end[f"{rule.name}/{name}"] = p.detach()
torch.save(end, f"{folder}/{rank}.pt")
dist.destroy_process_group()
"""


NEEDS_GPU = (pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here"))


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=NEEDS_GPU)])
def test_what_ranks_exchange_lies_where_the_parameters_do(monkeypatch, device):
    """NCCL reduces no tensors of the CPU: the count of labels has to move."""
    w, x = Parameter(randn((3, 2), 1).to(device)), randn((7, 2), 2).to(device)
    devices = []
    for module in ("losses", "gauss_newton"):
        monkeypatch.setattr(import_module(f"optim.curvature.{module}"), "rank_count", lambda: 2)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda t: devices.append(t.device))
    labels = torch.zeros(7, dtype=torch.int64, device=device)
    curvature.gauss_newton(lambda: functional.cross_entropy(x @ w.T, labels), [w], seed=0)
    assert devices == [w.device] * 3, "which parameters are reached, the gradient, the count of labels"


UNEVEN = """
import sys
import torch
import torch.distributed as dist
from torch.nn import functional
from optim import curvature

rank, folder = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
both, first, second, neither = params = [torch.nn.Parameter(torch.full((3, 2), 0.1 * (i + 1))) for i in range(4)]
x = torch.arange(10.0).reshape(5, 2) / 10
loss = lambda: functional.cross_entropy(x @ (both * (first if rank == 0 else second)).T, torch.zeros(5).long())
found = {
    "hutchinson": curvature.hutchinson(loss, params, [torch.ones(3, 2)] * 4),
    "gauss_newton": curvature.gauss_newton(loss, params, seed=0),
}
torch.save(found, f"{folder}/{rank}.pt")
dist.destroy_process_group()
"""


@pytest.mark.distributed
def test_ranks_may_reach_different_parameters(tmp_path):
    """As experts do: all ranks make the same calls, and where only one reaches a parameter the other counts as zero."""
    ranks = [spawn(UNEVEN, str(rank), str(tmp_path), OMP_NUM_THREADS="1") for rank in range(2)]
    try:
        for process in ranks:
            _, errors = process.communicate(timeout=120)
            assert process.returncode == 0, errors
    finally:
        for process in ranks:
            process.kill()
    one, other = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    for kind, found in one.items():
        assert [h is None for h in found] == [False, False, False, True] == [h is None for h in other[kind]]
        for a, b in zip(found[:3], other[kind][:3], strict=True):
            assert torch.equal(a, b) and a.any(), kind
    both, first = (Parameter(torch.full((3, 2), 0.1 * (i + 1))) for i in range(2))
    x = torch.arange(10.0).reshape(5, 2) / 10
    alone = curvature.hutchinson(
        lambda: functional.cross_entropy(x @ (both * first).T, torch.zeros(5).long()),
        [both, first],
        [torch.ones(3, 2)] * 2,
    )
    torch.testing.assert_close(one["hutchinson"][1], alone[1] / 2)


@pytest.mark.distributed
def test_ranks_agree_and_average(tmp_path):
    """Two processes under DDP, half of the rows each: equal curvature, and that of one process with all rows."""
    ranks = [spawn(RANK, str(rank), str(tmp_path), OMP_NUM_THREADS="1") for rank in range(2)]
    for process in ranks:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert first.keys() == second.keys()
    for key, value in first.items():
        assert torch.equal(value, second[key]), key
    torch.manual_seed(0)
    x, y = torch.randn(2, 6, 4).reshape(12, 4), torch.tensor([0, 1, 2, 0, 1, 2] * 2)
    for rule in (SophiaHRule(refresh_every=2), AdaHessianRule()):  # Sophia-G's labels depend on the rank
        torch.manual_seed(1)
        model = torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.Tanh(), torch.nn.Linear(5, 3))
        optimizer = Optimizer(model.named_parameters(), rule, lr=1e-2)
        for _ in range(5):
            step(optimizer, lambda model=model: functional.cross_entropy(model(x), y))
        for name, p in model.named_parameters():
            for key, value in optimizer.state[p].items():
                torch.testing.assert_close(first[f"{rule.name}/{name}/{key}"], value, rtol=1e-3, atol=1e-6)
