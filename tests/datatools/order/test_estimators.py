"""What theory promises of the estimators, on problems small enough to know."""

import itertools
import math
from dataclasses import replace
from functools import partial

import pytest
import torch

from datatools import DataError, UsageError
from datatools.order import Diverged, load_surrogate, memory_map, precompute, search
from datatools.order.anchors import anchor_path
from datatools.order.estimators import fut as table
from datatools.order.estimators import moments, pairwise, reduced, trusted
from datatools.order.estimators.layout import Layout
from datatools.order.estimators.linear import Linear
from datatools.order.problem import Problem
from datatools.order.recipe import Recipe, train
from datatools.order.reference_run import ReferenceRun, record
from optim import AdaBeliefRule, AdamW8bitRule, AdamWRule, LionRule, MuonRule, SGDRule, SophiaGRule, SPAMRule
from tests.datatools.order.quadratics import loss, random_problem, recipe, run


def drawn(steps: int, seed: int) -> list[int]:
    return torch.randperm(steps, generator=torch.Generator().manual_seed(seed)).tolist()


frozen = partial(reduced.precompute, second_moment="expected", k=16)


def reference(problem: Problem, rule=None, rate: float = 0.05, size: int = 5, **more) -> ReferenceRun:  # type: ignore[no-untyped-def]
    rates = [rate * (1 + 0.1 * t) for t in range(len(problem.batches))]
    return run(problem, rule or AdamWRule(), [0.3] * size, rates, **more)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(
    "rule, more",
    [
        (AdamWRule(), {}),
        (SGDRule(momentum=0.9), {}),
        (LionRule(), {}),
        (AdamWRule(), {"weight_decay": 0.1, "clip": 0.5}),
    ],
    ids=["adamw", "sgd", "lion", "decay and clipping"],
)
def test_own_moments_with_products_are_exact_on_quadratics(seed, rule, more) -> None:  # type: ignore[no-untyped-def]
    steps, size = 2 + seed, 1 + seed % 5
    problem = random_problem(steps, size, seed)
    ref = reference(problem, rule, size=size, **more)
    order = drawn(steps, seed)
    true, _ = train(problem, ref.recipe, order, ref.start.params)
    got = moments.precompute(ref, problem, hessian="exact").final(order)
    torch.testing.assert_close(got["theta"], true["theta"], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("derivative", ["none", "exact", "secant"])
def test_the_reference_order_reproduces_the_reference(derivative: str) -> None:
    problem = random_problem(6, 4, 0)
    ref = reference(problem, size=4)
    for estimate in (
        table.precompute(ref, problem, derivative=derivative),  # type: ignore[arg-type]
        moments.precompute(ref, problem, hessian="none"),
        moments.precompute(ref, problem, hessian="exact"),
    ):
        torch.testing.assert_close(estimate.final(ref.sequence), ref.end.params, rtol=1e-12, atol=0)
    true = problem.held_out_loss(ref.end.params)
    for make in (pairwise.precompute, reduced.precompute, frozen):
        assert make(ref, problem).score(ref.sequence) == pytest.approx(true, abs=1e-12)


@pytest.mark.parametrize(
    "make",
    [table.precompute, moments.precompute, pairwise.precompute, reduced.precompute, frozen],
    ids=["table", "moments", "pairwise", "reduced", "frozen"],
)
def test_relabelled_batches_give_the_same_scores(make) -> None:  # type: ignore[no-untyped-def]
    problem = random_problem(6, 4, 1)
    ref = reference(problem, size=4)
    names = drawn(6, 3)  # batch b is called names[b]
    shuffled = [problem.batches[names.index(b)] for b in range(6)]
    renamed = Problem(loss, shuffled, problem.validation)
    ref2 = record(
        renamed, ref.recipe, [names[b] for b in ref.sequence], ref.start.params, anchors=len(ref.sequence) + 1
    )
    first, second = make(ref, problem), make(ref2, renamed)
    for seed in range(5):
        order = drawn(6, seed)
        assert second.score([names[b] for b in order]) == pytest.approx(first.score(order), rel=1e-9)


def test_pairwise_and_reduced_follow_the_truth_where_steps_are_small() -> None:
    """The spread over orders is of second order in the learning rate, the error of third: their quotient of first."""
    problem = random_problem(7, 5, 2)
    errors = {}
    for rate in (0.01, 0.005):
        ref = run(problem, SGDRule(momentum=0.8), [0.3] * 5, [rate] * 7)
        orders = [drawn(7, seed) for seed in range(8)]
        true = torch.tensor([problem.held_out_loss(train(problem, ref.recipe, o, ref.start.params)[0]) for o in orders])
        for name, estimate in {
            "one anchor": pairwise.precompute(ref, problem, anchors=1),
            "all anchors": pairwise.precompute(ref, problem),
            "reduced": reduced.precompute(ref, problem, k=7, second_moment="expected"),
        }.items():
            errors[name, rate] = float((estimate.scores(orders) - true).abs().max() / true.std())
    for name in ("one anchor", "all anchors", "reduced"):
        assert errors[name, 0.005] < 0.1, errors
        assert errors[name, 0.005] < 0.6 * errors[name, 0.01] or errors[name, 0.005] < 1e-5, errors
    assert errors["reduced", 0.01] < 1e-5, "k = p: the model is the problem itself"


@pytest.mark.parametrize("seed", [3, 4, 5])
def test_pairwise_and_reduced_know_the_derivative_of_clipping(seed: int) -> None:
    """As above, where every gradient is clipped: only its direction changes with the parameters."""
    problem = random_problem(7, 5, seed)
    errors = {}
    for rate in (0.04, 0.02):
        ref = run(problem, SGDRule(momentum=0.8), [0.3] * 5, [rate] * 7, clip=0.2)
        assert all(ref.recipe.clip_factor(problem.gradient(ref.start.params, b)) < 0.9 for b in range(7))
        orders = [drawn(7, number) for number in range(8)]
        true = torch.tensor([problem.held_out_loss(train(problem, ref.recipe, o, ref.start.params)[0]) for o in orders])
        for name, estimate in {
            "pairwise": pairwise.precompute(ref, problem),
            "reduced": reduced.precompute(ref, problem, k=7, second_moment="expected", anchors=None),
        }.items():
            errors[name, rate] = float((estimate.scores(orders) - true).abs().max() / true.std())
    for name in ("pairwise", "reduced"):
        assert errors[name, 0.02] < 0.1 and errors[name, 0.02] < 0.7 * errors[name, 0.04], errors


def test_scores_of_many_orders_are_those_of_each() -> None:
    problem = random_problem(9, 5, 3)
    for make in (pairwise.precompute, reduced.precompute, frozen):
        estimate = make(reference(problem), problem)
        orders = [drawn(9, seed) for seed in range(40)]
        together = estimate.scores(orders)
        torch.testing.assert_close(together, torch.tensor([estimate.score(o) for o in orders], dtype=torch.float64))


NEEDS_GPU = (pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here"))


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=NEEDS_GPU)])
@pytest.mark.parametrize("name", ["pairwise", "reduced", "frozen", "moments", "own-moments", "table", "groups"])
def test_a_reference_run_is_read_to_the_device_of_the_problem(tmp_path, name: str, device: str) -> None:  # type: ignore[no-untyped-def]
    """Recorded on a CPU, used where the data lies: the same estimates."""
    problem, orders = random_problem(5, 4, 0), [drawn(5, seed) for seed in range(4)]
    options = {"groups": {"groups": [0, 0, 1, 1, 1]}, "frozen": {"second_moment": "expected", "k": 4}}.get(name, {})
    name = "reduced" if name == "frozen" else name
    ref = reference(problem, size=4, clip=0.5)
    wanted = precompute(name, ref, problem, **options).scores(orders)
    ref.save(tmp_path)
    data = (problem.batches, problem.validation)
    there = Problem(loss, *([tuple(t.to(device) for t in batch) for batch in part] for part in data))
    again = ReferenceRun.load(tmp_path, device)
    assert all(p.device.type == device for anchor in again.anchors for p in anchor.params.values())
    torch.testing.assert_close(precompute(name, again, there, **options).scores(orders), wanted)


@pytest.mark.parametrize("name", ["pairwise", "reduced", "frozen", "moments", "own-moments", "table", "groups"])
def test_a_saved_estimate_is_read_again(tmp_path, name: str) -> None:  # type: ignore[no-untyped-def]
    problem = random_problem(5, 4, 3)
    ref = reference(problem, size=4)
    options = {"groups": {"groups": [0, 0, 1, 1, 1]}, "frozen": {"second_moment": "expected", "k": 3}}.get(name, {})
    made = precompute("reduced" if name == "frozen" else name, ref, problem, **options)  # type: ignore[arg-type]
    made.save(tmp_path, ref)
    before = problem.cost.gradients
    read = load_surrogate(tmp_path, ref, problem)
    assert problem.cost.gradients == before and type(read) is type(made) and read.cost == made.cost
    for seed in range(3):
        assert read.score(drawn(5, seed)) == made.score(drawn(5, seed))
    assert read.trust(drawn(5, 1)) == made.trust(drawn(5, 1))
    other = reference(problem, rate=0.01, size=4)
    with pytest.raises(DataError, match="computed from another reference run"):
        load_surrogate(tmp_path, other, problem)
    path = tmp_path / "tensors.safetensors"
    path.write_bytes(path.read_bytes()[:4])
    with pytest.raises(DataError, match="tensors.safetensors is damaged"):
        load_surrogate(tmp_path, ref, problem)


def test_several_epochs_repeat_batches() -> None:
    problem = random_problem(3, 4, 4)
    rates = [0.05] * 6
    params = {"theta": torch.full((4,), 0.3, dtype=torch.float64)}
    ref = record(problem, recipe(AdamWRule(), rates), [0, 1, 2, 0, 1, 2], params, anchors=7)
    order = [2, 2, 0, 1, 1, 0]
    true, _ = train(problem, ref.recipe, order, params)
    got = moments.precompute(ref, problem, hessian="exact").final(order)
    torch.testing.assert_close(got["theta"], true["theta"], rtol=1e-9, atol=1e-12)
    assert math.isfinite(pairwise.precompute(ref, problem).score(order))
    with pytest.raises(UsageError, match="batch 0 appears 3 times, but 2 times"):
        pairwise.precompute(ref, problem).score([0, 0, 0, 1, 1, 2])


def test_a_killed_recording_goes_on(tmp_path) -> None:  # type: ignore[no-untyped-def]
    problem = random_problem(6, 4, 5)
    params = {"theta": torch.full((4,), 0.3, dtype=torch.float64)}
    rec = recipe(AdamWRule(), [0.05] * 6)
    whole = record(problem, rec, range(6), params, anchors=4, folder=tmp_path / "whole")

    class Killed(Exception):
        pass

    def kill(position: int) -> None:
        if position == 5:
            raise Killed

    with pytest.raises(Killed):
        record(problem, rec, range(6), params, anchors=4, folder=tmp_path / "part", observe=kill)
    assert not (tmp_path / "part" / "meta.json").exists()
    before = problem.cost.gradients
    record(problem, rec, range(6), params, anchors=4, folder=tmp_path / "part")
    assert problem.cost.gradients - before == 2, "it goes on at the anchor before step 4"
    read = ReferenceRun.load(tmp_path / "part")
    assert read.recipe == whole.recipe and read.sequence == whole.sequence
    for a, b in zip(read.anchors, whole.anchors, strict=True):
        assert torch.equal(a.params["theta"], b.params["theta"])
        assert torch.equal(a.states["theta"]["exp_avg_sq"], b.states["theta"]["exp_avg_sq"])
    with pytest.raises(DataError, match="another reference run"):
        record(problem, rec, [1, 0, 2, 3, 4, 5], params, anchors=4, folder=tmp_path / "part")
    with pytest.raises(DataError, match="another model than"):
        ReferenceRun(whole.sequence, rec, whole.anchors, {"model": "a"}).check_same({"model": "b"})


def test_missing_states_are_refused_by_name(tmp_path) -> None:  # type: ignore[no-untyped-def]
    from datatools.files import sealed

    problem = random_problem(3, 4, 5)
    run_ = reference(problem, size=4)
    run_.save(tmp_path)
    path = anchor_path(tmp_path, 1)
    sealed.write_tensors(path, {k: v for k, v in sealed.read_tensors(path).items() if "exp_avg_sq" not in k})
    with pytest.raises(DataError, match=r"anchor-00001.*lacks 'theta/exp_avg_sq'"):
        ReferenceRun.load(tmp_path)


def test_a_random_loss_is_refused() -> None:
    def noisy(params, batch):  # type: ignore[no-untyped-def]
        return loss(params, batch) * (1 + 0.1 * torch.rand(()))

    clean = random_problem(3, 4, 6)
    with pytest.raises(DataError, match="it is random .dropout"):
        reference(Problem(noisy, clean.batches, clean.validation), size=4)


def test_a_loss_without_gradient_is_refused() -> None:
    def detached(params, batch):  # type: ignore[no-untyped-def]
        return loss({n: p.detach() for n, p in params.items()}, batch)

    clean = random_problem(3, 4, 6)
    with pytest.raises(UsageError, match="no backward"):
        reference(Problem(detached, clean.batches, clean.validation), size=4)


@pytest.mark.parametrize("rule", [SPAMRule(), SophiaGRule(), AdamW8bitRule()])
def test_rules_that_gradients_alone_do_not_replay_are_refused(rule) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(UsageError, match="cannot be replayed from gradients alone"):
        recipe(rule, [0.1])


def test_decay_that_the_rate_does_not_scale_is_refused() -> None:
    rule, rates = AdaBeliefRule(fixed_decay=True), (0.1,)
    assert Recipe({"p": rule}, rates, {"p": 1.0}, {"p": 0.0})
    with pytest.raises(UsageError, match="fixed_decay"):
        Recipe({"p": rule}, rates, {"p": 1.0}, {"p": 0.1})


def test_rules_without_linear_moments_are_refused_where_they_must_be() -> None:
    problem = random_problem(4, 3, 7)
    ref = reference(problem, LionRule(), size=3)
    for make in (pairwise.precompute, frozen):
        with pytest.raises(UsageError, match=r"trained with lion. Use the estimator 'moments'"):
            make(ref, problem)


@pytest.mark.parametrize("order", [[0, 1, 2], [0, 1, 2, 2], [0, 1, 2, 9]])
def test_no_permutation_is_refused(order: list[int]) -> None:
    problem = random_problem(4, 3, 7)
    ref = reference(problem, size=3)
    for make in (pairwise.precompute, reduced.precompute, frozen, moments.precompute, table.precompute):
        with pytest.raises(UsageError, match="an order is a permutation of it"):
            make(ref, problem).score(order)


def test_trust_falls_where_the_estimate_does() -> None:
    problem = random_problem(6, 4, 8)
    orders = [drawn(6, seed) for seed in range(6)]
    small, large = (run(problem, SGDRule(), [0.3] * 4, [rate] * 6) for rate in (0.01, 1.5))
    for make in (pairwise.precompute, reduced.precompute, frozen):
        low = [max(make(small, problem).trust(o).values()) for o in orders]
        high = [max(make(large, problem).trust(o).values()) for o in orders]
        assert sum(low) < sum(high)
    assert all(trusted(frozen(small, problem).trust(o)) for o in orders)
    assert not any(trusted(frozen(large, problem).trust(o)) for o in orders)


def test_replay_measures_the_error_about_the_order_whose_truth_is_known() -> None:
    """Zero where the reference's gradients are known at every step; decay and carried moments belong to every order."""
    problem = random_problem(6, 4, 8)
    start = {"theta": torch.full((4,), 0.3, dtype=torch.float64)}
    buffer = {"momentum_buffer": torch.tensor([1.0, -2, 0, 1], dtype=torch.float64)}
    for rule in (SGDRule(momentum=0.9), SGDRule()):
        warm = {"theta": rule.init(start["theta"]) | (buffer if rule.momentum else {})}
        found = {}
        for anchors in (7, 3):
            ref = record(problem, recipe(rule, [0.1] * 6), range(6), start, warm, anchors=anchors)
            found[anchors] = (pairwise.precompute(ref, problem).replay, moments.precompute(ref, problem).replay)
        assert max(found[7]) < 1e-9 < 1e-3 < min(found[3]), rule
    decayed = record(problem, recipe(SGDRule(), [0.001] * 6, weight_decay=1.0), range(6), start, anchors=7)
    assert pairwise.precompute(decayed, problem).replay < 0.05, "decay moves all orders alike"
    with_momentum = run(problem, SGDRule(momentum=0.9), [0.3] * 4, [0.01] * 6)
    made = table.precompute(with_momentum, problem)
    assert made.trust(drawn(6, 1))["frozen"] == 0.9 and not trusted(made.trust(drawn(6, 1)))
    assert trusted(table.precompute(run(problem, SGDRule(), [0.3] * 4, [0.01] * 6), problem).trust(drawn(6, 1)))


def test_filter_is_the_optimizer_s() -> None:
    """E and e against AdamW's own first moment, bias correction and a schedule included."""
    g = torch.randn(5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    rates = [0.1, 0.2, 0.1, 0.05, 0.3]
    m, x, carried, steps = torch.tensor(0.7, dtype=torch.float64), 0.0, 0.7, 3
    moved, old = Linear(0.9, torch.ones(1), torch.ones(1), steps).filter(rates)
    for t, rate in enumerate(rates):
        assert float(moved[:, t] @ g + old[t] * carried) == pytest.approx(-x, abs=1e-15)
        m = 0.9 * m + 0.1 * g[t]
        x -= rate * float(m) / (1 - 0.9 ** (steps + t + 1))
    assert float(moved[:, -1] @ g + old[-1] * carried) == pytest.approx(-x, abs=1e-15)


@pytest.mark.parametrize("anchors", [2, 3])
def test_moments_along_all_directions_are_exact_on_quadratics(anchors: int) -> None:
    """Gradients are affine there: right between any two anchors, and right along any direction that was measured."""
    problem = random_problem(6, 4, 9)
    start = {"theta": torch.full((4,), 0.3, dtype=torch.float64)}
    ref = record(problem, recipe(AdamWRule(), [0.05] * 6), range(6), start, anchors=anchors)
    errors = []
    for k in (0, 1, 4):
        before = problem.cost.gradients
        made = moments.precompute(ref, problem, directions=k)
        assert made.cost.gradients == problem.cost.gradients - before == 6 * (anchors + 2 * k) + 1
        order = drawn(6, 1)
        true, _ = train(problem, ref.recipe, order, ref.start.params)
        errors.append(float((made.final(order)["theta"] - true["theta"]).norm()))
        assert set(made.trust(order)) == {"curvature", "drift", "replay"}
    assert errors[2] < 1e-10 < errors[1] < errors[0]


@pytest.mark.parametrize("killed_at", [None, 3])
def test_a_plain_loop_records_the_same_run(tmp_path, killed_at) -> None:  # type: ignore[no-untyped-def]
    """Two groups with rates and decay of their own, clipping, two epochs; and, killed, a recording that goes on."""
    from datatools.order import Recipe, Recorder
    from optim import AdamW

    g = torch.Generator().manual_seed(0)
    one, two = (torch.nn.Parameter(torch.randn(3, generator=g, dtype=torch.float64)) for _ in range(2))
    optimizer = AdamW(
        [{"params": [("one", one)], "lr": 0.1}, {"params": [("two", two)], "lr": 0.05, "weight_decay": 0.3}],
        weight_decay=0.0,
    )
    rec = Recipe.of(optimizer, [0.1] * 6, clip=1.0)
    assert rec.factors == {"one": 1.0, "two": 0.5} and rec.weight_decay == {"one": 0.0, "two": 0.3}
    problem = random_problem(3, 6, 3)
    sequence = [0, 1, 2, 1, 0, 2]
    start = {"one": one.detach().clone(), "two": two.detach().clone()}
    ref = record(problem, rec, sequence, start, anchors=4)

    def recorder() -> Recorder:
        return Recorder(steps=6, anchors=4, clip=1.0, folder=tmp_path)

    seen = recorder()
    for step, batch in enumerate(sequence, start=1):
        if step == killed_at:
            seen = recorder()
        optimizer.zero_grad()
        loss({"one": one, "two": two}, problem.batches[batch]).backward()
        torch.nn.utils.clip_grad_norm_([one, two], 1.0)
        seen(step, ["xyz"[batch], str(batch)], optimizer)
        optimizer.step()
    run_, order = seen.finish(optimizer)
    assert order.batches == (("x", "0"), ("y", "1"), ("z", "2")) and order.sequence == tuple(sequence)
    read = ReferenceRun.load(tmp_path)
    for found in (run_, read):
        assert found.recipe == ref.recipe and found.sequence == ref.sequence
        for a, b in zip(found.anchors, ref.anchors, strict=True):
            assert a.position == b.position
            torch.testing.assert_close(a.params, b.params, rtol=1e-12, atol=0)
            torch.testing.assert_close(a.states, b.states, rtol=1e-12, atol=0)
    with pytest.raises(DataError, match="0 of 4 steps were recorded"):
        Recorder(steps=6)(5, ["x"], optimizer)
    with pytest.raises(UsageError, match="step 7 of a run of 6"):
        recorder()(7, ["x"], optimizer)
    optimizer.param_groups[1]["lr"] = 0.1
    with pytest.raises(UsageError, match="the learning rate of 'two' against the first group's changed at step 6"):
        seen(6, ["x"], optimizer)


RULES = [AdamWRule(), LionRule(), SGDRule(momentum=0.9), MuonRule(ns_dtype="float32")]  # 16 bits round by the stack


@pytest.mark.parametrize("rule", RULES, ids=lambda r: r.name)
def test_orders_that_step_together_step_as_each_does_alone(rule) -> None:  # type: ignore[no-untyped-def]
    g = torch.Generator().manual_seed(0)
    shapes = {"a": (3, 2), "b": (2, 4)}
    params = {n: torch.randn(s, generator=g) for n, s in shapes.items()}
    rec = Recipe(dict.fromkeys(shapes, rule), (0.1, 0.2), {"a": 1.0, "b": 0.5}, {"a": 0.3, "b": 0.0}, clip=1.5)
    layout = Layout.of(params)
    alone = [(params, rec.init(params)) for _ in range(3)]
    places = layout.vector(params).expand(3, -1)
    states = {n: {k: v.expand(3, *v.shape) for k, v in s.items()} for n, s in rec.init(params).items()}
    for t in range(2):
        grads = torch.randn(3, layout.size, generator=g) * torch.tensor([[0.1], [1.0], [3.0]])
        alone = [rec.step(*one, layout.tensors(grad), t) for one, grad in zip(alone, grads, strict=True)]
        places, states = moments.stepped_together(rec, layout, places, states, grads, t)
    for r, (end, state) in enumerate(alone):
        torch.testing.assert_close(places[r], layout.vector(end), rtol=1e-4, atol=1e-5)
        for n in shapes:
            for k, v in state[n].items():
                torch.testing.assert_close(states[n][k][r], v, rtol=1e-4, atol=1e-5)


def test_moments_of_many_orders_are_those_of_each() -> None:
    problem = random_problem(6, 4, 3)
    ref, orders = reference(problem, size=4), [drawn(6, seed) for seed in range(5)]
    for options in ({"directions": 2}, {"hessian": "none"}, {"hessian": "exact"}):
        together, each = (moments.precompute(ref, problem, **options) for _ in range(2))  # type: ignore[arg-type]
        torch.testing.assert_close(
            together.scores(orders), torch.tensor([each.score(o) for o in orders], dtype=torch.float64)
        )
        before = problem.cost.gradients
        assert [together.trust(o) for o in orders] == [pytest.approx(each.trust(o), rel=1e-5) for o in orders]
        assert problem.cost.gradients == before, "what was scored is not stepped again"


def test_rows_that_stand_for_their_batch_are_exact() -> None:
    """Anchors at the ends only; samples with the batch's Hessian and another gradient. And their cost is counted."""
    problem = random_problem(6, 4, 5)
    start = {"theta": torch.full((4,), 0.3, dtype=torch.float64)}
    ref = record(problem, recipe(AdamWRule(), [0.05] * 6), range(6), start, anchors=2)
    order = drawn(6, 1)
    true, _ = train(problem, ref.recipe, order, ref.start.params)
    with pytest.raises(UsageError, match="samples="):
        moments.precompute(ref, problem, hessian="rows")
    errors = []
    for shift in (0.0, 0.5):
        problem.samples = [(a * (1 - shift), c + 0.4) for a, c in problem.batches]
        problem.share, before = 0.25, problem.cost.gradients
        made = reduced.precompute(ref, problem)
        once = 2 * 6 * 1.25 + 6 * 0.25 + 1  # and the reference order, replayed; a held-out gradient
        assert made.cost.gradients == problem.cost.gradients - before == once
        errors.append(float((made.final(order)["theta"] - true["theta"]).norm()))  # type: ignore[attr-defined]
        assert problem.cost.gradients - before == once + 6 * 0.25
        assert (made.trust(order)["replay"] < 1e-6) == (shift == 0.0)
    without = moments.precompute(ref, problem).final(order)["theta"] - true["theta"]
    assert errors[0] < 1e-10 < errors[1] < float(without.norm())


def wells() -> tuple[Problem, ReferenceRun]:
    """One number: batch 0 moves it by +2, batch 1 by -2, batch 2 has no loss from 1 on. Only (0, 2, 1) diverges."""

    def falling(params, kind):  # type: ignore[no-untyped-def]
        x = params["theta"].sum()
        return (-10 * x + 1e-6 * x**2, 10 * x + 1e-6 * x**2, -torch.log(1 - x), x**2)[kind]

    problem = Problem(falling, [0, 1, 2], [3], samples=[0, 1, 2])
    params = {"theta": torch.zeros(1, dtype=torch.float64)}
    return problem, record(problem, recipe(SGDRule(), [0.2] * 3), [1, 0, 2], params, anchors=4)


def test_an_estimate_that_diverges_is_the_worst_and_is_not_trusted(tmp_path) -> None:  # type: ignore[no-untyped-def]
    problem, ref = wells()
    orders = [list(o) for o in itertools.permutations(range(3))]
    made = precompute("reduced", ref, problem)
    scores = made.scores(orders).tolist()
    assert [o for o, v in zip(orders, scores, strict=True) if v == math.inf] == [[0, 2, 1]]
    assert [trusted(made.trust(o)) for o in orders if o == [0, 2, 1]] == [False]
    assert all(math.isfinite(v) for v in made.trust([1, 0, 2]).values()), "scored together, it alone diverges"
    assert [0, 2, 1] not in map(list, search(made, "random", budget=200, keep=6).sequences)
    with pytest.raises(Diverged, match=r"the loss of batch 2 is nan; lower the learning rate"):
        train(problem, ref.recipe, [0, 2, 1], ref.start.params)
    lost = replace(moments.precompute(ref, problem, hessian="rows"), replay=math.nan)
    lost.save(tmp_path, ref)
    read = load_surrogate(tmp_path, ref, problem)
    assert not trusted(read.trust([1, 0, 2])) and read.score([1, 0, 2]) == made.score([1, 0, 2])


@pytest.mark.parametrize("method", ["local", "genetic", "borda", "random"])
def test_a_search_of_nothing_but_diverging_estimates_is_refused(method: str) -> None:
    problem, ref = wells()
    made = replace(pairwise.precompute(ref, problem), constant=math.nan)
    with pytest.raises(
        DataError, match="has a finite estimate, because the estimated runs diverge; lower the learning rate"
    ):
        search(made, method, budget=50)
    slow = replace(moments.precompute(ref, problem), problem=Problem(lambda p, b: torch.tensor(math.nan), [0], [0]))
    with pytest.raises(DataError, match="has a finite estimate"):
        search(slow, method, budget=50)


def test_a_map_of_a_run_that_diverges_is_refused() -> None:
    problem, ref = wells()

    def final(sequence):  # type: ignore[no-untyped-def]
        return moments.precompute(ref, problem, hessian="rows").final(sequence)

    with pytest.raises(Diverged, match="training diverges in a random order with batch 2 moved"):
        memory_map(ref.sequence, final, problem.train_loss, problem.held_out_loss, batches=[2], positions=3)


# ------------------------------------------------------------------------------------------------- the table, projected


def sketched(k: int, seed: int = 0, **more) -> tuple[table.Table, table.Table]:  # type: ignore[no-untyped-def]
    problem = random_problem(4, 200, 0)
    ref = reference(problem, size=200)
    return table.precompute(ref, problem, projection=k, seed=seed, **more), table.precompute(ref, problem, **more)


@pytest.mark.parametrize("k", [10, 200, 5000])
def test_a_projected_term_comes_back_with_the_error_of_theory(k: int) -> None:
    """sqrt((p - 1) / k), as of spec A.5 but for one: signs have no fourth moment to pay for."""
    errors = [sketched(k, seed)[0].trust([1, 0, 3, 2])["sketch"] for seed in range(4)]
    assert sum(errors) / 4 == pytest.approx(math.sqrt(201 / k), rel=0.2)
    made, _ = sketched(k)
    assert made.gradients.shape == (4, 4, k) and made.cost.bytes == 4 * 4 * k * 4
    assert not trusted(made.trust([1, 0, 3, 2]))


@pytest.mark.parametrize("more", [{}, {"derivative": "exact"}, {"derivative": "exact", "order": 2}])
def test_the_projected_table_becomes_the_whole_one(more) -> None:  # type: ignore[no-untyped-def]
    """No two of the 200 coordinates fall into one of 2^22 buckets: what is left is float32's rounding."""
    made, whole = sketched(1 << 22, **more)
    assert made.sketch_error < 1e-7
    for seed in range(3):
        assert made.score(drawn(4, seed)) == pytest.approx(whole.score(drawn(4, seed)), rel=1e-6)
    rough, same, other = (sketched(40, seed, **more)[0].score([3, 1, 0, 2]) for seed in (0, 0, 1))
    assert rough == same != other, "a seed is a projection"


def test_a_projected_table_is_read_again_and_secants_of_it_are_refused(tmp_path) -> None:  # type: ignore[no-untyped-def]
    made, _ = sketched(40)
    made.save(tmp_path, made.reference)
    read = load_surrogate(tmp_path, made.reference, made.problem)
    assert read.score([3, 1, 0, 2]) == made.score([3, 1, 0, 2]) and read.trust([3, 1, 0, 2]) == made.trust([3, 1, 0, 2])
    with pytest.raises(UsageError, match="elementwise quotients of secants"):
        sketched(40, derivative="secant")
