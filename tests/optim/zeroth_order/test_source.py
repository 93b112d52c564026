"""Zeroth-order sources: what theory says of the estimates, and what a step may and may not touch."""

import math

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from optim import SGD, AdamW, BlockwiseAdam, Muon, Optimizer, SGDRule, create
from optim.zeroth_order import ZerothOrder, decay_groups, noise
from tests.processes import spawn

D = 6


def problem(dtype=torch.float64, d=D):
    """(parameter x, A, loss): f(x) = x^T A x / 2, A symmetric positive definite."""
    made = torch.Generator().manual_seed(0)
    b = torch.randn(d, d, generator=made, dtype=torch.float64)
    a = (b @ b.T / d + torch.eye(d, dtype=torch.float64)).to(dtype)
    x = nn.Parameter(torch.randn(d, generator=made, dtype=torch.float64).to(dtype))
    return x, a, lambda: 0.5 * x @ a @ x


def direction(source, name, shape):
    """The direction of the source's last step, as a tensor."""
    z = torch.zeros(shape, dtype=torch.float64)
    noise.add_normal_(z, 1.0, noise.mix(source.last.seeds[0], name))
    return z


def network(dtype=torch.float32, seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.LayerNorm(7), nn.Linear(7, 3)).to(dtype)
        x, y = torch.randn(12, 5, dtype=dtype), torch.randn(12, 3, dtype=dtype)
    return model, lambda: (model(x) - y).square().mean()


def weights(model):
    return {n: p.detach().clone() for n, p in model.named_parameters()}


# ------------------------------------------------------------------------------------------------------------- theory


@pytest.mark.parametrize("eps", [1e-3, 0.1, 10.0])
def test_two_sided_is_exact_on_a_quadratic(eps):
    """The truncation error is of the third derivative: here the projected gradient is x^T A z, whatever eps is."""
    x, a, loss = problem()
    source = ZerothOrder([("x", x)], eps=eps, seed=1)
    source.step(SGD([x], lr=0.0), loss)
    z = direction(source, "x", (D,))
    assert source.last.projected_grad[0] == pytest.approx(float(x.detach() @ a @ z), rel=1e-9 / min(1, eps))


@pytest.mark.parametrize("eps", [1e-2, 1.0])
def test_one_sided_carries_half_the_curvature(eps):
    x, a, loss = problem()
    source = ZerothOrder([("x", x)], eps=eps, seed=2, estimator="one-sided")
    source.step(SGD([x], lr=0.0), loss)
    z = direction(source, "x", (D,))
    want = float(x.detach() @ a @ z + 0.5 * eps * z @ a @ z)
    assert source.last.projected_grad[0] == pytest.approx(want, rel=1e-8)


@pytest.mark.parametrize(
    ("settings", "calls"),
    [({}, 4), ({"conserve": True}, 6), ({"blocks": str, "block_order": "joint"}, 7), ({"blocks": str}, 8)],
    ids=["one block", "conserve", "joint", "coordinate"],
)
def test_one_sided_evaluates_the_present_weights_once(settings, calls):
    """For three directions of one or two blocks; again where a block has stepped, and the quotients are from there."""
    x, a, _ = problem()
    y = nn.Parameter(x.detach().clone())
    named = [("x", x), ("y", y)] if "blocks" in settings else [("x", x)]
    seen = []

    def loss():
        both = x + 2 * y
        seen.append(float(0.5 * both @ a @ both))
        return seen[-1]

    source = ZerothOrder(named, estimator="one-sided", q=3, restore="copy", **settings)
    source.step(SGD([p for _, p in named], lr=0.01), loss)
    assert len(seen) == calls and source.last.losses == seen
    high, low = {  # of each direction, the places of f(p + eps z) and of f(p)
        4: ([0, 2, 3], [1] * 3), 6: ([1, 2, 3], [0] * 3), 7: ([0, 2, 3, 4, 5, 6], [1] * 6),
        8: ([0, 2, 3, 4, 6, 7], [1] * 3 + [5] * 3),
    }[calls]  # fmt: skip
    assert source.last.projected_grad == [(seen[i] - seen[j]) / 1e-3 for i, j in zip(high, low, strict=True)]


def test_estimates_average_to_the_gradient():
    """Mean of N estimates within five standard errors of the gradient, and E|pg z - g|^2 = (d + 1) |g|^2."""
    x, a, loss = problem()
    steps, grad = 10_000, (a @ x).detach()
    source = ZerothOrder([("x", x)], eps=1e-2, seed=3)
    optimizer = SGD([x], lr=0.0)
    total, spread = torch.zeros(D, dtype=torch.float64), 0.0
    for _ in range(steps):
        source.step(optimizer, loss)
        estimate = source.last.projected_grad[0] * direction(source, "x", (D,))
        total += estimate
        spread += float((estimate - grad).square().sum())
    standard_error = grad.norm() * math.sqrt((D + 1) / steps)
    assert (total / steps - grad).norm() < 5 * standard_error
    assert spread / steps == pytest.approx(float((D + 1) * grad.square().sum()), rel=0.1)


def test_q_directions_divide_the_variance():
    x, a, loss = problem()
    grad, optimizer = (a @ x).detach(), SGD([x], lr=1.0)
    for q, want in ((1, D + 1), (8, (D + 1) / 8)):
        source, start, spread = ZerothOrder([("x", x)], eps=1e-2, seed=4, q=q), x.detach().clone(), 0.0
        for _ in range(1500):
            source.step(optimizer, loss)
            spread += float((start - x.detach() - grad).square().sum())
            with torch.no_grad():
                x.copy_(start)
        assert spread / 1500 == pytest.approx(want * float(grad.square().sum()), rel=0.2)


def test_forward_gradient_is_the_directional_derivative():
    """Against back-propagation's <grad, v>, in float64."""
    model, loss = network(torch.float64)
    source = ZerothOrder(model.named_parameters(), estimator="forward", module=model, seed=5)
    returned = source.step(SGD(model.parameters(), lr=0.0), loss)
    value = loss()
    assert returned == pytest.approx(float(value.detach()), rel=1e-12)
    grads = torch.autograd.grad(value, list(model.parameters()))
    want = sum(float((g * direction(source, n, g.shape)).sum())
               for (n, _), g in zip(model.named_parameters(), grads, strict=True))  # fmt: skip
    assert source.last.projected_grad[0] == pytest.approx(want, rel=1e-10)


def test_conserve_never_increases_the_loss():
    """On a fixed batch, at a learning rate with which plain ZO-SGD diverges."""
    losses = {}
    for conserve in (True, False):
        model, loss = network()
        source = ZerothOrder(model.named_parameters(), conserve=conserve, seed=6, restore="copy")
        optimizer = SGD(model.parameters(), lr=0.3)
        losses[conserve] = [loss().detach().item()]
        for _ in range(40):
            source.step(optimizer, loss)
            losses[conserve].append(loss().detach().item())
    steps = list(zip(losses[True], losses[True][1:], strict=False))
    assert all(after <= before for before, after in steps) and losses[True][-1] < losses[True][0]
    assert any(after == before for before, after in steps), "some steps keep the weights"
    assert max(losses[False]) > losses[False][0]


def test_a_candidate_without_a_finite_loss_is_not_chosen():
    x = nn.Parameter(torch.ones(3))
    source = ZerothOrder([("x", x)], conserve=True, restore="copy")
    start = x.detach().clone()
    source.step(SGD([x], lr=1e30), lambda: float(x.detach().square().sum().square()))
    assert torch.equal(x, start) and source.last.kept == 0 and source.last.losses[-1] == math.inf


@pytest.mark.parametrize("settings", [{"restore": "copy"}, {"restore": "inplace"}, {"estimator": "one-sided"}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_restoring(settings, dtype):
    """With lr 0 the weights come back: exactly from a copy, otherwise within three units in the last place."""
    model, loss = network(dtype)
    before = weights(model)
    ZerothOrder(model.named_parameters(), **settings).step(SGD(model.parameters(), lr=0.0), loss)
    for name, p in model.named_parameters():
        if settings.get("restore") == "copy":
            assert torch.equal(p, before[name])
        else:
            unit = torch.finfo(dtype).eps * float(before[name].abs().max().clamp_min(1e-2))
            assert float((p.detach() - before[name]).abs().max()) <= 3 * unit


# ------------------------------------------------------------------------------------------------------ seeds, replay


def said(value):
    """The name of a case, the same in every process: functions by their place in memory would not be."""
    if isinstance(value, dict):
        return ", ".join(f"{k}={'function' if callable(v) else v}" for k, v in value.items()) or "default"
    return str(value)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"q": 3, "estimator": "one-sided"},
        {"restore": "copy"},
        {"sparsity": 0.5, "mask_steps": 2},
        {"sign": "elementwise"},
        {"conserve": True},
        {"conserve": True, "restore": "copy"},
        {"estimator": "one-sided", "restore": "copy"},
        {"blocks": lambda name: name.split(".")[0]},
        {"blocks": lambda name: name.split(".")[0], "block_order": "joint"},
    ],
    ids=said,
)
def test_replay_and_continuation_are_bit_for_bit(settings):
    """A run; its list of seeds and projected gradients on fresh weights; and a run that stops and goes on."""
    model, loss = network()
    source, optimizer = ZerothOrder(model.named_parameters(), seed=7, **settings), SGD(model.parameters(), lr=0.01)
    taken = []
    for _ in range(6):
        source.step(optimizer, loss)
        taken.append(source.last)
    again, _ = network()
    replaying = ZerothOrder(again.named_parameters(), seed=7, **settings)
    replaying.replay(SGD(again.parameters(), lr=0.01), taken)
    torch.testing.assert_close(weights(again), weights(model), rtol=0, atol=0)
    parts, half = network()
    for first in (0, 3):
        source = ZerothOrder(parts.named_parameters(), seed=7, **settings)
        source.taken = first
        for _ in range(3):
            source.step(SGD(parts.parameters(), lr=0.01), half)
    torch.testing.assert_close(weights(parts), weights(model), rtol=0, atol=0)


@pytest.mark.parametrize(("settings", "moves"), [({}, 1), ({"conserve": True}, 1), ({"q": 3}, 3)], ids=str)
def test_a_replay_that_restores_copies_only_makes_the_step(settings, moves, monkeypatch):
    """No weight is moved to where a loss would be evaluated: directions are added for the step alone."""
    model, loss = network()
    source = ZerothOrder(model.named_parameters(), seed=7, restore="copy", **settings)
    source.step(SGD(model.parameters(), lr=0.01), loss)
    again, _ = network()
    replaying, added = ZerothOrder(again.named_parameters(), seed=7, restore="copy", **settings), []
    real = replaying.add_direction_
    monkeypatch.setattr(replaying, "add_direction_", lambda name, *args: (added.append(name), real(name, *args)))
    replaying.replay(SGD(again.parameters(), lr=0.01), [source.last])
    expected = 0 if source.last.kept == 0 else moves * len(weights(again))
    assert len(added) == expected
    torch.testing.assert_close(weights(again), weights(model), rtol=0, atol=0)


def test_every_step_query_and_block_has_a_direction_of_its_own():
    model, loss = network()
    source = ZerothOrder(model.named_parameters(), q=2, blocks=lambda n: n.split(".")[0])
    seeds = []
    for _ in range(3):
        source.step(SGD(model.parameters(), lr=0.0), loss)
        seeds += source.last.seeds
    assert len(seeds) == 3 * 2 * 3 and len(set(seeds)) == len(seeds)
    a, b = (torch.zeros(70_000) for _ in range(2))
    noise.add_normal_(a, 1.0, noise.mix(seeds[0], "a"))
    noise.add_normal_(b, 1.0, noise.mix(seeds[0], "b"))
    assert abs(float(a @ b)) / 70_000 < 0.02, "tensors too"
    assert float(a.mean()) == pytest.approx(0, abs=0.02) and float(a.std()) == pytest.approx(1, abs=0.02)


def test_a_shard_has_the_entries_of_the_whole():
    n = noise.PIECE * 2 + 77
    whole = torch.zeros(n)
    noise.add_normal_(whole, 2.0, 5)
    for start, stop in ((0, 3), (5, noise.PIECE + 9), (noise.PIECE - 1, n), (n - 3, n), (9, 9)):
        part = torch.zeros(stop - start)
        noise.add_normal_(part, 2.0, 5, total=n, start=start)
        assert torch.equal(part, whole[start:stop])
    odd = torch.zeros(n // 7, 7).T  # not contiguous: its entries in its own order
    noise.add_normal_(odd, 2.0, 5, total=n)
    assert torch.equal(odd.reshape(-1), whole[: odd.numel()])


def test_sharded_parameters_step_as_whole_ones(monkeypatch):
    monkeypatch.setenv("OPTIM_BACKEND", "torch")  # compiled steps, which shards do not have, round otherwise
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        x, a, _loss = problem(torch.float32)
        whole = nn.Parameter(x.detach().clone())
        shard = nn.Parameter(distribute_tensor(x.detach().clone(), mesh, [Shard(0)]))
        for p, f in ((whole, lambda: 0.5 * whole @ a @ whole),
                     (shard, lambda: 0.5 * shard.full_tensor() @ a @ shard.full_tensor())):  # fmt: skip
            source = ZerothOrder([("x", p)], sparsity=0.25)
            for rule in (SGDRule(), SGDRule(momentum=0.9)):
                for _ in range(3):
                    source.step(Optimizer([p], rule, lr=0.05), f)
        assert torch.equal(shard.detach().full_tensor(), whole) and not torch.equal(whole, x)
    finally:
        dist.destroy_process_group()


def test_two_ranks_are_one_with_both_halves(tmp_path):
    """Each rank has half of the batch; only losses travel, and both end with the weights of the whole batch."""
    code = """
    import sys, torch, torch.distributed as dist
    from optim import SGD
    from optim.zeroth_order import ZerothOrder
    rank, ranks, where = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    if ranks > 1:
        dist.init_process_group("gloo", init_method=f"file://{where}/meet", rank=rank, world_size=ranks)
    torch.manual_seed(0)
    w = torch.nn.Parameter(torch.randn(4, 3, dtype=torch.float64))
    x = torch.randn(8, 3, dtype=torch.float64).chunk(ranks)[rank]
    source = ZerothOrder([("w", w)], q=2)
    for _ in range(4):
        source.step(SGD([w], lr=0.05), lambda: (x @ w.T).tanh().square().mean())
    torch.save(w.detach(), f"{where}/{ranks}-{rank}.pt")
    """
    runs = [spawn(code, str(rank), str(ranks), str(tmp_path), OMP_NUM_THREADS="1") for rank, ranks in
            ((0, 1), (0, 2), (1, 2))]  # fmt: skip
    for run in runs:
        _, errors = run.communicate(timeout=100)
        assert run.returncode == 0, errors
    one, first, second = (torch.load(tmp_path / f"{n}.pt") for n in ("1-0", "2-0", "2-1"))
    assert torch.equal(first, second)
    torch.testing.assert_close(first, one, rtol=1e-9, atol=1e-12)


# ------------------------------------------------------------------------------------------------- rules and sparsity


@pytest.mark.parametrize(
    "make",
    [
        lambda named: SGD(named, lr=0.05, momentum=0.9),
        lambda named: AdamW(named, lr=0.05, weight_decay=0.1),
        lambda named: Muon(named, lr=0.05),
        lambda named: BlockwiseAdam(named, lr=0.05),
        lambda named: torch.optim.AdamW([p for _, p in named], lr=0.05),
    ],
    ids=["momentum", "adamw", "muon", "blockwise_adam", "torch"],
)
def test_any_optimizer_steps_with_the_estimate(make):
    """As if the estimate had been written to every .grad and the optimizer stepped once."""
    model, loss = network(torch.float64)
    twin, _ = network(torch.float64)
    optimizer, theirs = make([*model.named_parameters()]), make([*twin.named_parameters()])
    source = ZerothOrder(model.named_parameters(), seed=8, restore="copy")
    for _ in range(3):
        source.step(optimizer, loss)
        for name, p in twin.named_parameters():
            z = direction(source, name, p.shape)
            p.grad = source.last.projected_grad[0] * z
        theirs.step()
        assert all(p.grad is None for p in model.parameters())
    torch.testing.assert_close(weights(model), weights(twin), rtol=1e-9, atol=1e-12)


def test_8_bit_optimizers_hold_one_gradient_at_a_time(monkeypatch):
    """Their tensors share nothing, so each is stepped alone: never do two of them have a gradient."""
    model, loss = network()
    optimizer = create("adamw_8bit", model.named_parameters(), lr=0.05, min_size=1)
    held = []
    real = optimizer.step
    monkeypatch.setattr(
        optimizer, "step", lambda: (held.append(sum(p.grad is not None for p in model.parameters())), real())
    )
    ZerothOrder(model.named_parameters(), seed=8).step(optimizer, loss)
    assert held == [1] * len([*model.parameters()])


def test_decay_is_mezos_and_by_name():
    """p <- p - lr (pg z + wd p) where the name is decayed, on the weights before the step."""
    model, loss = network(torch.float64)
    named = [("layer_norm.weight" if n == "2.weight" else n, p) for n, p in model.named_parameters()]
    groups = decay_groups(named, 0.5)
    assert [[n for n, _ in g["params"]] for g in groups] == [
        ["0.weight", "3.weight"], ["0.bias", "layer_norm.weight", "2.bias", "3.bias"]]  # fmt: skip
    source, before = ZerothOrder(named, restore="copy"), {n: p.detach().clone() for n, p in named}
    source.step(Optimizer(groups, SGDRule(), lr=0.1), loss)
    for name, p in named:
        wd = 0.5 if name in ("0.weight", "3.weight") else 0.0
        move = source.last.projected_grad[0] * direction(source, name, p.shape) + wd * before[name]
        torch.testing.assert_close(p.detach(), before[name] - 0.1 * move, rtol=1e-9, atol=1e-12)
    assert len(decay_groups(named, 0.5, decay_filter=lambda name: True)) == 1


def test_what_a_mask_drops():
    """The same share of each tensor; the published slip Phi(share); or the share of small weights, which it follows."""
    torch.manual_seed(0)
    params = {"big": nn.Parameter(torch.randn(200, 100)), "small": nn.Parameter(0.01 * torch.randn(150, 100))}

    def moved(**settings):
        source = ZerothOrder(params.items(), sparsity=0.5, **settings)
        found = {}
        for name, p in params.items():
            found[name] = torch.zeros_like(p)
            source.add_direction_(name, found[name], 1.0, 1, 0)
        return {name: float((z == 0).float().mean()) for name, z in found.items()}

    assert moved() == pytest.approx({"big": 0.5, "small": 0.5}, abs=0.02)
    assert moved(mask="normal") == pytest.approx({"big": 0.6915, "small": 0.6915}, abs=0.02)
    by_magnitude = moved(sparse_by="global")
    assert by_magnitude["small"] == 1.0 and by_magnitude["big"] == pytest.approx((0.5 * 35 - 15) / 20, abs=0.02)


def test_a_mask_is_kept_for_its_steps_and_holds_in_the_update():
    model, loss = network()
    source, optimizer = ZerothOrder(model.named_parameters(), sparsity=0.5, mask_steps=2, q=2, restore="copy"), None
    still = []
    for _ in range(4):
        before = weights(model)
        optimizer = SGD(model.parameters(), lr=0.1)
        source.step(optimizer, loss)
        still.append(torch.cat([(p == before[n]).flatten() for n, p in model.named_parameters()]))
    assert torch.equal(still[0], still[1]) and torch.equal(still[2], still[3]) and not torch.equal(still[1], still[2])
    assert 0.3 < float(still[0].float().mean()) < 0.7


def test_back_propagation_for_the_deep_part_keeps_no_graph_of_the_rest():
    """The last layer's gradient is exact; while it is computed, no other parameter asks for one."""
    model, loss = network(torch.float64)
    asked = []

    def watched():
        asked.append({n for n, p in model.named_parameters() if p.requires_grad and torch.is_grad_enabled()})
        return loss()

    want = torch.autograd.grad(loss(), [model[3].weight])[0]
    before = model[3].weight.detach().clone()
    source = ZerothOrder(model.named_parameters(), first_order=lambda n: n.startswith("3."))
    source.step(SGD(model.parameters(), lr=0.5), watched)
    torch.testing.assert_close(before - model[3].weight.detach(), 0.5 * want, rtol=1e-9, atol=1e-12)
    assert {frozenset(s) for s in asked} == {frozenset(), frozenset({"3.weight", "3.bias"})}
    assert all(p.requires_grad for p in model.parameters())


# ------------------------------------------------------------------------------------------------- memory and refusal


def test_a_step_allocates_less_than_one_tensor():
    """Tensors that live at once during a step of MeZO beyond those of the loss: one piece, not the largest tensor."""
    p = nn.Parameter(torch.zeros(40 * noise.PIECE))
    sizes = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.untyped_storage().data_ptr() != p.untyped_storage().data_ptr():
                sizes.append(out.untyped_storage().nbytes())
            return out

    source, optimizer = ZerothOrder([("p", p)]), SGD([p], lr=0.1, weight_decay=0.1)
    with Watch():
        source.step(optimizer, lambda: 1.0)
    assert 0 < max(sizes) <= 4 * noise.PIECE


def test_nothing_else_moves():
    """Not the global generator, not frozen parameters, not those in no block; and a failing loss leaves the weights."""
    model, loss = network()
    model[0].bias.requires_grad_(False)
    before, generator = weights(model), torch.get_rng_state()
    source = ZerothOrder(model.named_parameters(), blocks=lambda n: "b" if n.startswith("3.") else None, sparsity=0.3)
    source.step(SGD(model.parameters(), lr=0.1), loss)
    assert torch.equal(torch.get_rng_state(), generator)
    assert {n for n, p in model.named_parameters() if not torch.equal(p, before[n])} == {"3.weight", "3.bias"}
    calls = []

    def broken():
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return loss()

    before = weights(model)
    copied = ZerothOrder(model.named_parameters(), restore="copy")
    with pytest.raises(KeyboardInterrupt):
        copied.step(SGD(model.parameters(), lr=0.1), broken)
    torch.testing.assert_close(weights(model), before, rtol=0, atol=0)
    with pytest.raises(ValueError, match=r"loss of step 1 is nan at -eps z.*Lower eps"):
        values = iter([1.0, math.nan])
        copied.step(SGD(model.parameters(), lr=0.1), lambda: next(values))
    torch.testing.assert_close(weights(model), before, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("settings", "part"),
    [
        ({"eps": 0.0}, "eps = 0.0"),
        ({"eps": math.nan}, "eps = nan"),
        ({"q": 0}, "q = 0"),
        ({"q": True}, "q = True"),
        ({"sparsity": 1.0}, "sparsity = 1.0"),
        ({"mask_steps": 0}, "mask_steps = 0"),
        ({"estimator": "both"}, "estimator = 'both'.*two-sided"),
        ({"sign": "both"}, "sign = 'both'"),
        ({"mask": "both"}, "mask = 'both'"),
        ({"sparse_by": "both"}, "sparse_by = 'both'"),
        ({"block_order": "both"}, "block_order = 'both'"),
        ({"restore": "both"}, "restore = 'both'"),
        ({"estimator": "forward"}, "module="),
        ({"conserve": True, "first_order": lambda n: n == "3.bias"}, "conserve.*first_order"),
        ({"conserve": True, "blocks": lambda n: n}, "conserve.*blocks"),
        ({"first_order": lambda n: True}, "no parameter to estimate"),
        ({"blocks": lambda n: None}, "no parameter to estimate"),
    ],
    ids=said,
)
def test_refused_settings(settings, part):
    with pytest.raises(ValueError, match=part):
        ZerothOrder(network()[0].named_parameters(), **settings)


def test_refused_optimizers():
    model, loss = network()
    source = ZerothOrder(model.named_parameters(), conserve=True)
    for optimizer in (SGD(model.parameters(), lr=0.1, momentum=0.9), AdamW(model.parameters(), lr=0.1),
                      SGD(model.parameters(), lr=0.1, weight_decay=0.1)):  # fmt: skip
        with pytest.raises(ValueError, match="conserve.*plain SGD"):
            source.step(optimizer, loss)
    other = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="'other.weight', which the source does not have"):
        ZerothOrder(model.named_parameters()).step(SGD([("other.weight", other.weight)], lr=0.1), loss)
    first = ZerothOrder(model.named_parameters(), first_order=lambda n: n == "3.bias")
    with pytest.raises(ValueError, match="first_order"):
        first.replay(SGD(model.parameters(), lr=0.1), [])


def test_no_forward_rule():
    class Once(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return grad

    model, _ = network()
    source = ZerothOrder(model.named_parameters(), estimator="forward", module=model)
    with pytest.raises(ValueError, match="forward gradient: .*use the two-sided estimator"):
        source.step(SGD(model.parameters(), lr=0.1), lambda: Once.apply(model(torch.ones(2, 5))).sum())
