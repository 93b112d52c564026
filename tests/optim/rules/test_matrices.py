"""Rules for matrices: layouts, stacks of like matrices, bases that only a step renews, fitted coefficients."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn import Parameter

from optim import RULES, CondaRule, KronRule, MuonRule, NorMuonRule, Optimizer, ROOTRule, UpdateMap, stacks
from optim.rules.root import fit_coefficients
from tests.optim.harness import assert_close, assert_same, randn, set_grads, train
from tests.optim.properties import Memory

NAMES = ("muon", "normuon", "root", "conda", "swan", "sinkgd", "scale")
HYPER = {"muon": {"scale": "original", "ns_dtype": "param"}, "normuon": {"ns_dtype": "param"},
          "root": {"quantile": 0.8}, "conda": {"update_proj_gap": 2},
         "scale": {"momentum": 0.9}}  # fmt: skip


def rule_of(name, **more):
    return RULES[name](**HYPER.get(name, {}), **more)


def moved(rule, start, grads):
    """A parameter after a step for each gradient."""
    p = Parameter(start.clone())
    optimizer = Optimizer([p], rule, lr=0.1, weight_decay=0.1)
    for grad in grads:
        p.grad = grad.clone()
        optimizer.step()
    return p.detach()


# ------------------------------------------------------------------------------------------------------------- layouts


@pytest.mark.parametrize("name", NAMES)
def test_transposed_is_the_step_of_the_transpose(name):
    start, grads = randn((6, 4), 1), [randn((6, 4), t) for t in range(2, 5)]
    want = moved(rule_of(name), start.T.contiguous(), [g.T.contiguous() for g in grads]).T
    assert_close([moved(rule_of(name, transposed=True), start, grads)], [want], torch.float64)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_batched_is_a_step_of_each(name, transposed):
    start, grads = randn((3, 6, 4), 1), [randn((3, 6, 4), t) for t in range(2, 5)]
    want = torch.stack([moved(rule_of(name, transposed=transposed), start[i], [g[i] for g in grads]) for i in range(3)])
    assert_close([moved(rule_of(name, batched=True, transposed=transposed), start, grads)], [want], torch.float64)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_matrices_one_below_the_other_are_stepped_by_themselves(name, transposed):
    """DBRX's experts, [experts x size, width]; also where each maps from its rows."""
    start, grads = randn((8, 3), 1), [randn((8, 3), t) for t in range(2, 5)]
    parts = [x.unflatten(0, (2, 4)) for x in (start, *grads)]
    alone = rule_of(name, transposed=transposed)
    want = torch.cat([moved(alone, parts[0][i], [g[i] for g in parts[1:]]) for i in range(2)])
    assert_close([moved(rule_of(name, batched=2, transposed=transposed), start, grads)], [want], torch.float64)


@pytest.mark.parametrize("name", NAMES)
def test_inputs_before_two_sides_of_outputs(name):
    """XLNet's [inputs, heads, size] is the transpose of [heads x size, inputs]."""
    start, grads = randn((6, 2, 2), 1), [randn((6, 2, 2), t) for t in range(2, 5)]
    want = moved(rule_of(name), start.flatten(1).T.contiguous(), [g.flatten(1).T.contiguous() for g in grads])
    assert_close([moved(rule_of(name, transposed=True), start, grads).flatten(1)], [want.T], torch.float64)


@pytest.mark.parametrize("name", [name for name in NAMES if name != "conda"])
def test_parts_of_rows_are_separate_parameters(name):
    """Fused query, key and value by `split_sizes`, heads by `num_heads`, in either orientation."""
    start, grads = randn((8, 5), 1), [randn((8, 5), t) for t in range(2, 5)]
    for sizes, layout in (((4, 2, 2), {"split_sizes": (4, 2, 2)}), ((4, 4), {"num_heads": 2})):
        parts = [torch.split(x, sizes) for x in (start, *grads)]
        want = torch.cat([moved(rule_of(name), part[0], part[1:]) for part in zip(*parts, strict=True)])
        assert_close([moved(rule_of(name, **layout), start, grads)], [want], torch.float64, str(layout))
        got = moved(rule_of(name, **layout, transposed=True), start.T.contiguous(), [g.T.contiguous() for g in grads])
        assert_close([got.T], [want], torch.float64, f"{layout}, transposed")


@pytest.mark.parametrize("name", [name for name in NAMES if name != "conda"])
def test_parts_that_alternate_are_separate_parameters(name):
    """Two heads of (query, key, value) in turn, or gate and up row by row, in every expert of a stack."""
    start, grads = randn((2, 12, 5), 1), [randn((2, 12, 5), t) for t in range(2, 5)]
    for sizes, groups in (((4, 1, 1), 2), ((1, 1), 6)):
        rows = torch.arange(12).view(groups, -1).split(sizes, dim=1)
        want = start.clone()
        for part in rows:
            for expert in range(2):
                at = (expert, part.flatten())
                want[at] = moved(rule_of(name), start[at], [g[at] for g in grads])
        rule = rule_of(name, split_sizes=sizes, split_groups=groups, batched=True)
        assert_close([moved(rule, start, grads)], [want], torch.float64, f"{sizes}, {groups} times")


@pytest.mark.parametrize("name", NAMES)
def test_convolutions_are_flattened(name):
    start, grads = randn((4, 3, 2, 2), 1), [randn((4, 3, 2, 2), t) for t in range(2, 5)]
    want = moved(rule_of(name), start.flatten(1), [g.flatten(1) for g in grads])
    assert_close([moved(rule_of(name), start, grads).flatten(1)], [want], torch.float64)


@pytest.mark.parametrize(
    ("shape", "layout", "part"),
    [
        ((5,), {}, "not a matrix"),
        ((4, 3), {"batched": True}, "three dimensions"),
        ((4, 3, 2, 2), {"transposed": True}, "transposed=True needs matrices"),
        ((5, 3), {"batched": 2}, "cannot be divided into 2 matrices"),
        ((4, 3, 2), {"batched": 2}, "cannot be divided into 2 matrices"),
        ((4, 3), {"batched": 2, "num_heads": 4}, "2 rows of a .* 4 heads"),
        ((4, 3), {"split_sizes": (2, 1)}, "split_sizes .* the 4 rows"),
        ((4, 3), {"split_sizes": (1, 1), "split_groups": 3}, "split_sizes .* 3 times, .* the 4 rows"),
        ((4, 3), {"num_heads": 3}, "4 rows of a .* 3 heads"),
    ],
)
def test_layouts_that_do_not_fit_are_refused(shape, layout, part):
    with pytest.raises(ValueError, match=rf"'w'.*{part}"):
        Optimizer([("w", Parameter(torch.zeros(shape)))], rule_of("muon", **layout), lr=0.1)


@pytest.mark.parametrize(
    ("layout", "part"),
    [
        ({"split_sizes": ()}, "split_sizes"),
        ({"split_sizes": (2, 0)}, "split_sizes"),
        ({"split_sizes": "222"}, "split_sizes"),
        ({"num_heads": 0}, "num_heads"),
        ({"split_sizes": (2, 2), "split_groups": 0}, "split_groups"),
        ({"split_groups": 2}, "needs split_sizes"),
        ({"num_heads": 2, "split_sizes": (2, 2)}, "set only one of them"),
        ({"transposed": 1}, "transposed"),
        ({"batched": 1}, "batched = 1"),
        ({"batched": -2}, "batched = -2"),
        ({"batched": "2"}, "batched = '2'"),
    ],
)
def test_layouts_that_are_none_are_refused(layout, part):
    with pytest.raises(ValueError, match=f"MuonRule: .*{part}"):
        MuonRule(**layout)


def test_norms_of_normuon_are_of_its_own_shape():
    """The published switch for convolutions: a second moment for every row of a kernel."""
    p = Parameter(torch.zeros(4, 3, 2, 2))
    assert NorMuonRule(conv_scale="kernel").init(p)["row_second_moment"].shape == (4, 3, 2, 1)
    assert NorMuonRule().init(p)["row_second_moment"].shape == (4, 1, 1, 1)
    assert NorMuonRule(transposed=True).init(Parameter(torch.zeros(4, 3)))["row_second_moment"].shape == (1, 3)


# -------------------------------------------------------------------------------------------------------------- stacks


def mixed(dtype=torch.float32):
    shapes = [(6, 4), (4, 6), (6, 4), (6, 4), (4, 3, 2, 2), (2, 2), (4, 3, 2, 2), (4, 6)]
    return [Parameter(randn(shape, i, dtype)) for i, shape in enumerate(shapes)]


@pytest.mark.parametrize("name", NAMES)
def test_stacked_steps_are_single_steps(name, monkeypatch):
    """Whatever the limit; through a missing gradient, which leaves a tensor with a step count of its own."""
    outcomes = []
    for limit in (1, 60, 1 << 22):
        monkeypatch.setattr(stacks, "LIMIT", limit)
        params = mixed()
        optimizer = Optimizer(params, rule_of(name), lr=0.05, weight_decay=0.1)
        for t in range(4):
            set_grads(params, t + 1)
            if t == 1:
                params[2].grad = None
            optimizer.step()
        assert [int(optimizer.state[p]["step"]) for p in params] == [4, 4, 3, 4, 4, 4, 4, 4]
        outcomes.append([*params, *(v for p in params for v in optimizer.state[p].values())])
    for other in outcomes[1:]:
        assert_close(other, outcomes[0], torch.float32, factor=10)


def test_stacks_are_formed_and_bounded(monkeypatch):
    """Six matrices of 24 elements under a limit of 60: three products of two at once, and never more memory."""
    seen = []
    original = torch.vmap
    monkeypatch.setattr(torch, "vmap", lambda f, **kw: lambda p, *a: seen.append(len(p)) or original(f, **kw)(p, *a))
    monkeypatch.setattr(stacks, "LIMIT", 60)
    params = [Parameter(randn((6, 4), i, torch.float32)) for i in range(7)]
    train(Optimizer(params, MuonRule(), lr=0.1), params, [0])
    assert seen == [2, 2, 2]

    monkeypatch.setattr(torch, "vmap", original)
    peaks = []
    for count in (4, 16):
        monkeypatch.setattr(stacks, "LIMIT", 4 * 32 * 32)
        params = [Parameter(randn((32, 32), i, torch.float32)) for i in range(count)]
        optimizer = Optimizer(params, MuonRule(ns_dtype="param"), lr=0.1)
        train(optimizer, params, [0])
        set_grads(params, 1)
        with Memory() as memory:
            optimizer.step()
        peaks.append(memory.peak / (4 * 4 * 32 * 32))
    assert peaks[0] == peaks[1] <= 14, "stacks' worth of memory"


def test_a_matrix_that_is_not_finite_stays_out_of_its_stack():
    params, clean = mixed(), mixed()
    optimizer, other = (Optimizer(ps, MuonRule(ns_dtype="param"), lr=0.1) for ps in (params, clean))
    set_grads(params, 1)
    set_grads(clean, 1)
    params[2].grad[0, 0] = torch.nan
    with pytest.warns(RuntimeWarning, match="number 2 .*not finite"):
        optimizer.step()
    other.step()
    assert_same([params[2]], [mixed()[2]])
    assert_close([params[0], params[3]], [clean[0], clean[3]], torch.float32)


# --------------------------------------------------------------------------------------------------------------- Conda


def test_only_a_step_renews_condas_basis():
    """At the first step and every gap after it, from the moment that the step makes; a map or `update` never does."""
    p = Parameter(randn((5, 3), 1))
    optimizer = Optimizer([("p", p)], CondaRule(update_proj_gap=2), lr=0.1)
    bases, moment = [], torch.zeros(5, 3, dtype=torch.float64)
    for t in range(4):
        p.grad = randn((5, 3), t + 2)
        if t:
            before = optimizer.state[p]["basis"].clone()
            UpdateMap.of(optimizer, copy=False)({"p": p.grad})
            assert torch.equal(optimizer.state[p]["basis"], before)
        moment = 0.9 * moment + 0.1 * p.grad
        optimizer.step()
        bases.append(optimizer.state[p]["basis"].clone())
        if t % 2 == 0:
            gram = bases[-1].T @ moment.T @ moment @ bases[-1]
            torch.testing.assert_close(gram, gram.diag().diag(), rtol=1e-9, atol=1e-12)
    assert torch.equal(bases[0], bases[1]) and torch.equal(bases[2], bases[3]) and not torch.equal(bases[1], bases[2])


def test_conda_keeps_its_basis_where_the_moment_is_zero():
    p = Parameter(randn((3, 4), 1))
    optimizer = Optimizer([p], CondaRule(update_proj_gap=1), lr=0.1)
    p.grad = torch.zeros_like(p)
    optimizer.step()
    assert torch.equal(optimizer.state[p]["basis"], torch.eye(3, dtype=torch.float64))


# ---------------------------------------------------------------------------------------------------------------- ROOT


def off(shape, triple, seed):
    s = np.linalg.svd(np.random.default_rng(seed).standard_normal(shape), compute_uv=False)
    s = s / np.linalg.norm(s)
    a, b, c = triple
    for _ in range(5):
        s = a * s + b * s**3 + c * s**5
    return float(np.mean((s - 1) ** 2))


def test_fitted_coefficients_bring_singular_values_nearer_to_one():
    """On matrices that the fit has not seen: much nearer for an elongated shape, not farther for a square one."""
    muon = (3.4445, -4.7750, 2.0315)
    long, square = fit_coefficients(48, 384), fit_coefficients(64, 64)
    assert long == fit_coefficients(48, 384)
    assert off((48, 384), long, 5) < 0.2 * off((48, 384), muon, 5)
    assert off((64, 64), square, 5) < off((64, 64), muon, 5)
    spectrum = randn((32, 32), 1) @ torch.diag(torch.logspace(0, -1, 32, dtype=torch.float64))
    assert fit_coefficients(32, 32, recorded=[spectrum]) != fit_coefficients(32, 32)
    with pytest.raises(ValueError, match="fit_coefficients"):
        fit_coefficients(0, 3)


def test_fitted_coefficients_of_a_large_shape_are_fitted_on_a_small_one():
    """Sides above 1024 shrink together; the spectrum keeps its size."""
    assert fit_coefficients(4096, 16384, samples=1) == pytest.approx(fit_coefficients(2048, 8192, samples=1), rel=0.3)


def test_root_uses_the_triple_of_the_shape():
    table = (((3, 4), (3.0, -3.0, 1.0)),)
    rule, grad = ROOTRule(shape_coefficients=table), randn((4, 3), 1)
    p = torch.zeros(4, 3, dtype=torch.float64)
    by_table = rule.update(grad, rule.init(p), p)[0]
    plain = replace(rule, shape_coefficients=(), ns_coefficients=((3.0, -3.0, 1.0),))
    assert_same([by_table], [plain.update(grad, plain.init(p), p)[0]])


def test_factors_of_kron_do_not_grow_while_there_are_no_gradients():
    """They overflowed at the first gradient after a thousand fits to nothing."""
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(4, 8))
    optimizer = Optimizer([weight], KronRule(update_probability=1.0), lr=1e-3)
    for _ in range(3):
        weight.grad = torch.zeros(4, 8)
        optimizer.step()
        assert torch.equal(optimizer.state[weight]["factor_left"][0], torch.eye(4))
    weight.grad = torch.randn(4, 8)
    optimizer.step()
    assert not torch.equal(optimizer.state[weight]["factor_left"][0], torch.eye(4))
