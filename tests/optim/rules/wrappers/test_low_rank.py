"""GaLore, Fira and APOLLO beyond the battery: bases, the limiter, what is inside, bytes, float32."""

import json
from dataclasses import replace

import pytest
import torch
from torch.nn import Parameter

from optim import (
    AdamW8bitRule,
    AdamWRule,
    ApolloRule,
    CondaRule,
    FiraRule,
    GaLoreRule,
    LionRule,
    LowRank,
    Optimizer,
    Quantized,
    UpdateMap,
    create,
    rule_from,
)
from tests.optim import golden, golden_builders, golden_runs
from tests.optim.harness import assert_close, assert_same, named, parameters, randn, set_grads, train

RULES = {"galore": GaLoreRule, "fira": FiraRule, "apollo": ApolloRule}


@pytest.mark.golden
def test_golden_runs_in_float32(golden_dir):
    """The recorded float64 runs, in float32: to 2e-4 and 2e-5, as the manifest's other families allow."""
    seen = []
    for case in golden.cases(golden_dir):
        if case.entry["optimizer"] not in RULES:
            continue
        low = replace(case, entry=case.entry | {"param_dtype": "float32"})
        got, _ = golden_runs.run(low, golden_builders.BUILDERS[case.entry["optimizer"]])
        for name, want in golden.golden(case).items():
            torch.testing.assert_close(got[name], want, rtol=2e-4, atol=2e-5, msg=lambda m, c=case: f"{c.id}\n{m}")
        seen.append(case.entry["optimizer"])
    if not seen:
        pytest.skip(f"no case of these in {golden_dir}")


# --------------------------------------------------------------------------------------------------------------- bases


def test_the_basis_spans_the_first_singular_vectors_with_signs_fixed():
    tall, wide = (9, 6), (6, 9)
    for shape, proj_type, side in ((tall, "std", 1), (wide, "std", 0), (tall, "reverse_std", 0), (tall, "left", 0)):
        p, g = Parameter(torch.zeros(shape, dtype=torch.float64)), randn(shape, 1)
        p.grad = g
        optimizer = Optimizer([p], GaLoreRule(rank=3, proj_type=proj_type), lr=0.1)
        optimizer.step()
        basis = optimizer.state[p]["basis"]
        u, _, vt = torch.linalg.svd(g)
        best = (u if side == 0 else vt.mT)[:, :3]
        assert_close([basis @ basis.mT], [best @ best.mT], torch.float64)
        assert (basis.gather(0, basis.abs().argmax(0, keepdim=True)) > 0).all()


def test_only_a_step_renews_the_basis_and_only_when_it_is_due():
    (p,) = parameters([(8, 6)])
    optimizer = Optimizer([("p", p)], GaLoreRule(rank=2, update_proj_gap=3), lr=0.1)
    bases = []
    for t in range(7):
        if t:
            UpdateMap.of(optimizer, copy=False).per_sample({"p": randn((4, 8, 6), t)})
            assert torch.equal(optimizer.state[p]["basis"], bases[-1])
        train(optimizer, [p], [t])
        bases.append(optimizer.state[p]["basis"].clone())
    renewed = [t for t in range(1, 7) if not torch.equal(bases[t], bases[t - 1])]
    assert renewed == [3, 6]


def test_before_the_first_step_the_basis_is_the_first_coordinates():
    (p,) = parameters([(5, 4)])
    direction = UpdateMap.of(Optimizer([("p", p)], GaLoreRule(rank=2), lr=0.1))({"p": torch.ones(5, 4)})["p"]
    assert direction[:, :2].all() and not direction[:, 2:].any()


def drawn(rule, state, length=6, rank=3):
    return rule._basis(state, length, rank, torch.zeros((), dtype=torch.float64))


def test_random_bases_differ_by_parameter_seed_and_turn_and_are_not_kept():
    params = parameters([(8, 6), (8, 6), (6, 8)])
    rule = ApolloRule(rank=3, update_proj_gap=2)
    optimizer = Optimizer(params, rule, lr=0.1)
    before = torch.get_rng_state()
    params[2].requires_grad_(False)
    for t in range(5):
        set_grads(params[:2] if t < 3 else params, t)
        optimizer.step()
    assert torch.equal(torch.get_rng_state(), before)
    numbers = [float(optimizer.state[p]["number"]) for p in params]
    assert numbers == [1, 2, 3], "a parameter that comes later has the next number"
    assert all(t.numel() <= 24 for p in params for t in optimizer.state[p].values()), "nothing of a basis' size"
    state = dict(optimizer.state[params[0]])
    by_turn = [drawn(rule, state | {"step": torch.tensor(float(t))}) for t in range(4)]
    assert torch.equal(by_turn[0], by_turn[1]) and torch.equal(by_turn[2], by_turn[3])
    assert not torch.equal(by_turn[1], by_turn[2])
    assert not torch.equal(drawn(rule, state), drawn(rule, optimizer.state[params[1]]))
    assert not torch.equal(drawn(rule, state), drawn(replace(rule, seed=1), state))


def test_random_bases_keep_lengths_on_average():
    """E |g P|^2 = |g|^2: entries are normal over sqrt(r)."""
    rule = ApolloRule(rank=64, update_proj_gap=1)
    state = rule.init(torch.zeros(300, 300))
    basis = drawn(rule, state, 300, 64)
    g = randn((50, 300), 1)
    assert float((g @ basis).square().sum() / g.square().sum()) == pytest.approx(1, abs=0.05)
    assert float((basis * 8).std()) == pytest.approx(1, abs=0.02) and abs(float(basis.mean())) < 2e-3


# ------------------------------------------------------------------------------------------------------------- limiter


def steps_after_a_zero(rule, count=30):
    """Norms of the steps, relative to those without the zero gradient at step 4."""
    norms = []
    for zero in (True, False):
        p = Parameter(torch.zeros(8, 6, dtype=torch.float64))
        optimizer, moved = Optimizer([p], rule, lr=1.0), []
        for t in range(count):
            p.grad = randn((8, 6), t) * (0 if zero and t == 4 else 1)
            before = p.detach().clone()
            optimizer.step()
            moved.append(float((p.detach() - before).norm()))
        norms.append(moved)
    return [a / b for a, b in zip(*norms, strict=True)]


@pytest.mark.parametrize("rule", [ApolloRule(rank=2), ApolloRule(rank=1, scale_type="tensor", scale=128.0)],
                         ids=["apollo", "mini"])  # fmt: skip
def test_the_limiter_recovers_from_a_zero_gradient(rule):
    """As published it stands still: 1850 steps of 1 %, until it is back from 1e-8."""
    assert min(steps_after_a_zero(rule)[5:]) > 0.3
    assert max(steps_after_a_zero(replace(rule, limiter_reset=False))[5:]) < 1e-6


def test_fira_keeps_its_residual_after_a_zero_gradient():
    outcomes = []
    for reset in (True, False):
        rule = FiraRule(rank=2, limiter_reset=reset, exact_residual=True)
        p = Parameter(torch.zeros(8, 6, dtype=torch.float64))
        optimizer = Optimizer([p], rule, lr=1.0)
        for t in range(8):
            before = p.detach().clone()
            p.grad = randn((8, 6), t) * (t != 4)
            optimizer.step()
        basis, step = optimizer.state[p]["basis"], p.detach() - before
        outcomes.append(float((step - step @ basis @ basis.mT).norm() / step.norm()))
    assert outcomes[0] > 0.5 and outcomes[1] < 1e-6


def test_the_way_back_of_the_published_limiter_takes_a_thousand_steps():
    """1850 for |S| = 100: from 1e-10 of it, by 1 % a step."""
    rule, stored, steps = ApolloRule(limiter_reset=False), torch.tensor(0.0, dtype=torch.float64), 0
    s, step = torch.full((), 100.0, dtype=torch.float64), torch.tensor(9.0)
    while True:
        share, stored = rule._limit(s, stored, step)
        if share == 1:
            break
        steps += 1
    assert 1800 < steps < 1900


def test_the_limiter_lets_a_step_grow_by_its_factor():
    s, step = torch.tensor(3.0, dtype=torch.float64), torch.tensor(2.0)
    for limiter in (1.01, 1.5):
        rule = ApolloRule(limiter=limiter)
        share, stored = rule._limit(1000 * s, s, step)
        assert float(1000 * share) == pytest.approx(limiter, rel=1e-6) and float(stored / s) == pytest.approx(limiter)
        share, stored = rule._limit(0.1 * s, s, step)
        assert share == 1 and stored == 0.1 * s
        assert rule._limit(0 * s, s, step)[1] == s, "a step of nothing does not count"
    assert "limited" not in ApolloRule(limiter=0.0).init(torch.zeros(8, 6))


# ---------------------------------------------------------------------------------------------------------- relations


@pytest.mark.parametrize("rule", [GaLoreRule(rank=2), FiraRule(rank=2)], ids=lambda rule: rule.name)
def test_transposition(rule):
    """The smaller side is projected, whichever it is: of the transposed gradients the steps are transposed."""
    outcomes = []
    for turn in (False, True):
        p = Parameter(torch.zeros((5, 8) if turn else (8, 5), dtype=torch.float64))
        optimizer = Optimizer([p], rule, lr=0.1)
        for t in range(6):
            p.grad = randn((8, 5), t).T.contiguous() if turn else randn((8, 5), t)
            optimizer.step()
        outcomes.append(p.detach().T if turn else p.detach())
    assert_close([outcomes[0]], [outcomes[1]], torch.float64, factor=100)


def test_what_is_beside_the_subspace():
    """GaLore moves inside it; Fira's exact residual is orthogonal to it, the code's is not for scale < 1."""
    for rule, beside in ((GaLoreRule(rank=2), 0.0), (FiraRule(rank=2, exact_residual=True), None)):
        p = Parameter(torch.zeros(8, 6, dtype=torch.float64))
        optimizer = Optimizer([p], rule, lr=1.0)
        p.grad = randn((8, 6), 1)
        optimizer.step()
        basis = optimizer.state[p]["basis"]
        outside = p.detach() - p.detach() @ basis @ basis.mT
        assert (float(outside.norm()) < 1e-12) == (beside == 0.0)
    g, p = randn((8, 6), 2), torch.zeros(8, 6, dtype=torch.float64)
    state = rule.init(p)
    rule.share([g], [state], [state])
    inside = [
        replace(rule, exact_residual=exact, limiter=0.0, scale=0.25).update(g, state, p)[0] @ state["basis"]
        for exact in (True, False)
    ]
    low = replace(rule, form="project").update(g, state, p)[0] @ state["basis"]
    assert_close([inside[0]], [low], torch.float64)
    assert float((inside[1] - low).norm() / low.norm()) > 0.1


# -------------------------------------------------------------------------------------------------------------- inside


def test_other_rules_inside():
    """GaLore in 8 bits, and with Lion; found again from a description, and settings go through both."""
    (p,) = parameters([(96, 64)], torch.float32)
    inner = Quantized(inner=AdamWRule(eps=1e-6, bias_correction=False), min_size=0)
    rule = LowRank(inner=inner, rank=16)
    exact = Optimizer([Parameter(p.detach().clone())], LowRank(rank=16), lr=0.01)
    optimizer = Optimizer([p], rule, lr=0.01)
    twin = exact.param_groups[0]["params"][0]
    for t in range(5):
        set_grads([p], t)
        twin.grad = p.grad.clone()
        optimizer.step()
        exact.step()
    assert optimizer.state[p]["exp_avg"].dtype == torch.uint8 and optimizer.state[p]["exp_avg"].shape == (96, 16)
    start = parameters([(96, 64)], torch.float32)[0]
    apart = float(((p - twin).norm() / (twin - start).norm()).detach())
    assert 0 < apart < 0.05
    assert rule_from(json.loads(json.dumps(rule.describe()))) == rule
    assert rule.with_settings(betas=(0.5, 0.6)).inner.inner.betas == (0.5, 0.6)
    lion = LowRank(inner=LionRule(), correct_bias=False, rank=2)
    q = Parameter(torch.zeros(8, 6, dtype=torch.float64))
    q.grad = randn((8, 6), 1)
    optimizer = Optimizer([q], lion, lr=1.0)
    optimizer.step()
    low = q.detach() @ optimizer.state[q]["basis"]
    assert_close([low.abs()], [torch.full_like(low, 0.25)], torch.float64)
    with pytest.raises(ValueError, match="correct_bias=True needs an inner rule that has betas"):
        LowRank(inner=AdamW8bitRule())
    with pytest.raises(ValueError, match="without its own basis"):
        LowRank(inner=CondaRule(), correct_bias=False)


def test_create_gives_matrices_to_the_rule_and_the_rest_to_adamw():
    pairs = named(parameters([(8, 6), (6,)]))
    pairs = [("layers.0.mlp.up_proj.weight", pairs[0][1]), ("norm.weight", pairs[1][1])]
    for name, rule in RULES.items():
        optimizer = create(name, pairs, lr=0.01, rank=4, betas=(0.8, 0.9), adamw_lr=1e-3)
        matrices, rest = optimizer.param_groups
        assert matrices["rule"] == rule(rank=4).with_settings(betas=(0.8, 0.9)) and rest["rule"].name == "adamw"
        assert (matrices["lr"], rest["lr"]) == (0.01, 1e-3)
    mini = create("apollo", pairs, lr=0.01, rank=1, scale=128.0, scale_type="tensor")
    assert mini.param_groups[0]["rule"].scale == 128.0
    with pytest.raises(TypeError, match="no setting 'ranks'; did you mean 'rank'"):
        create("galore", pairs, lr=0.01, ranks=4)
    with pytest.raises(ValueError, match="'norm.weight'.*not a matrix"):
        Optimizer(pairs, GaLoreRule(), lr=0.01)


def test_layouts_that_the_rule_does_not_know_leave_no_trace():
    """Conv1D's matrices need none; a stack of experts would be taken for one matrix, and goes to AdamW."""
    shapes = {"h.0.mlp.c_fc.weight": (4, 16), "h.0.mlp.experts.up": (3, 4, 5), "h.1.mlp.experts.up": (3, 4, 5)}
    pairs = [(name, Parameter(torch.ones(shape))) for name, shape in shapes.items()]
    optimizer = create("galore", pairs, lr=0.01, assign={"h.1.": "matrix"})
    matrices, rest = optimizer.param_groups
    assert matrices["param_names"] == ["h.0.mlp.c_fc.weight", "h.1.mlp.experts.up"]
    assert rest["param_names"] == ["h.0.mlp.experts.up"]
    assert set(matrices) == set(rest) == {"params", "param_names", "rule", "lr", "weight_decay"}


@pytest.mark.parametrize("shape", [(576, 1536), (1536, 576), (576, 576)])
def test_bytes_are_those_of_the_table(shape):
    """At rank 128: 8 q r + 4 p r of GaLore, 4 more of Fira, 8 q r + 8 of APOLLO, and counters."""
    p, q, r = min(shape), max(shape), 128
    wanted = {"galore": 8 * q * r + 4 * p * r, "fira": 8 * q * r + 4 * p * r + 4, "apollo": 8 * q * r + 8}
    for name, rule in RULES.items():
        state = rule().init(torch.empty(shape, device="meta"))
        held = sum(t.numel() * t.element_size() for key, t in state.items() if key != "step")
        assert held == wanted[name], name


def test_a_run_with_renewals_goes_on_bit_for_bit():
    for name, rule in RULES.items():
        outcomes = []
        for cut in (False, True):
            params = parameters([(8, 6), (6, 9)], torch.float32)
            optimizer = Optimizer(named(params), rule(rank=2, update_proj_gap=3), lr=0.1)
            for t in range(9):
                if cut and t in (3, 5):
                    saved = optimizer.state_dict()
                    optimizer = Optimizer(named(params), rule(rank=2, update_proj_gap=3), lr=0.1)
                    optimizer.load_state_dict(saved)
                train(optimizer, params, [t])
            outcomes.append([p.detach() for p in params])
        assert_same(*outcomes, name)
