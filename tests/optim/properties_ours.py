"""Properties 26 to 36, ours on top of torch's, and H1 to H9, what makes a rule usable for selection and order."""

import io
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import Parameter
from torch.optim.lr_scheduler import LambdaLR

from optim import Optimizer, UpdateMap, UpdateRule, rule_from, schedule
from tests.optim.harness import (
    as_arrays,
    assert_close,
    assert_same,
    assert_same_dict,
    fit,
    make,
    named,
    parameters,
    randn,
    set_grads,
    snapshot,
    states,
    train,
)
from tests.optim.spec import OptimSpec, direction
from tests.optim.specs import ORACLE_DECAY

DTYPES = st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16])


def drawn_shapes(spec: OptimSpec) -> st.SearchStrategy[tuple[int, ...]]:
    return st.lists(st.integers(0, 5), min_size=spec.min_ndim, max_size=4).map(tuple)


def equals_the_published_code(spec: OptimSpec) -> None:
    """100 float32 steps equal published code."""
    shapes = [(4, 3), (3, 5)]
    ours, theirs = parameters(shapes, torch.float32), parameters(shapes, torch.float32)
    oracle, hyper = spec.oracle(theirs, 0.01)
    optimizer = make(spec, ours, hyper, lr=0.01, weight_decay=ORACLE_DECAY.get(spec.name, 0.1))
    for t in range(100):
        train(optimizer, ours, [t])
        train(oracle, theirs, [t])
    assert_close(ours, theirs, torch.float32)


def equals_the_formula(spec: OptimSpec) -> None:
    """12 float64 steps equal the reference written from the paper, with a spike, a zero and a missing gradient."""
    for hyper in spec.inputs:
        for shape in spec.shapes:
            if 0 in shape:
                continue
            p = Parameter(randn(shape, 5))
            grads: list[Tensor | None] = [randn(shape, 100 + t) for t in range(12)]
            grads[3], grads[5], grads[8] = torch.zeros(shape, dtype=torch.float64), None, 1000 * grads[8]
            reference = spec.reference.run(p.detach().numpy(), as_arrays(grads), lr=0.03, weight_decay=0.1, **hyper)
            optimizer = make(spec, [p], hyper, lr=0.03, weight_decay=0.1)
            for t, (grad, want) in enumerate(zip(grads, reference, strict=True)):
                p.grad = None if grad is None else grad.clone()
                optimizer.step()
                where = f"{hyper} {shape}, step {t}"
                np.testing.assert_allclose(p.detach().numpy(), want, rtol=1e-8, atol=1e-9, err_msg=where)


def resumes(spec: OptimSpec) -> None:
    """Stopped, saved to a file and resumed with its scheduler, a run ends with the same bits; bfloat16 too."""
    for dtype in (torch.float32, torch.bfloat16):

        def start(dtype: torch.dtype = dtype) -> tuple[list[Parameter], Optimizer, LambdaLR]:
            params = parameters(spec.shapes, dtype)
            optimizer = make(spec, named(params))
            return params, optimizer, LambdaLR(optimizer, schedule("cosine", total_steps=12, warmup_steps=2))

        def go(params: list[Parameter], optimizer: Optimizer, scheduler: LambdaLR, steps: range) -> None:
            for t in steps:
                train(optimizer, params, [t])
                scheduler.step()

        whole = start()
        go(*whole, range(12))
        first = start()
        go(*first, range(5))
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "checkpoint.pt"
            saved = {"params": [p.data for p in first[0]], "opt": first[1].state_dict(), "lr": first[2].state_dict()}
            torch.save(saved, file)
            loaded = torch.load(file, weights_only=True)
        second = start()
        for p, value in zip(second[0], loaded["params"], strict=True):
            p.data.copy_(value)
        second[1].load_state_dict(loaded["opt"])
        second[2].load_state_dict(loaded["lr"])
        go(*second, range(5, 12))
        assert_same(whole[0], second[0], str(dtype))
        assert_same_dict(whole[1].state_dict(), second[1].state_dict())


def awkward_models(spec: OptimSpec) -> None:
    """Tied weights, LoRA pairs, and parameters frozen and thawed in between (each with its own step count)."""
    tied = torch.nn.Linear(4, 4, bias=False)
    model = torch.nn.Sequential(tied, torch.nn.Tanh(), tied)
    a, b = parameters([(2, 4), (4, 2)], torch.float32)
    b.data.zero_()
    pairs = [*model.named_parameters(), ("lora_A", a), ("lora_B", b)]
    assert len(pairs) == 3
    optimizer = make(spec, pairs)
    x = randn((5, 4), 3, torch.float32)
    for t in range(6):
        a.requires_grad_(t not in (2, 3))
        optimizer.zero_grad()
        (model(x) + x @ a.T @ b.T).square().mean().backward()
        optimizer.step()
    assert [float(optimizer.state[p]["step"]) for _, p in pairs] == [6, 4, 6]
    assert all(p.isfinite().all() for _, p in pairs)


def nan_stays_put(spec: OptimSpec) -> None:
    """A NaN gradient harms nothing else; an elementwise rule confines it to a coordinate, others skip it and say so."""
    shape = (4, 3)
    params, clean = parameters([shape] * 2), parameters([shape] * 2)
    optimizer, untouched = make(spec, named(params)), make(spec, named(clean))
    train(optimizer, params, [0])
    train(untouched, clean, [0])
    set_grads(params, 5)
    set_grads(clean, 5)
    params[0].grad[1, 1] = torch.nan
    before = snapshot([params[0], *optimizer.state[params[0]].values()])
    if spec.rule().elementwise:
        optimizer.step()
        untouched.step()
        hurt = params[0].isnan()
        others = torch.ones(shape, dtype=torch.bool)
        others[1, 1] = False
        assert not hurt[others].any()
        assert_same([params[0][others]], [clean[0][others]])
    else:
        with pytest.warns(RuntimeWarning, match="'p0'.*not finite"):
            optimizer.step()
        untouched.step()
        assert_same([params[0], *optimizer.state[params[0]].values()], before)
    if type(spec.rule()).step_all is UpdateRule.step_all:
        assert_same([params[1]], [clean[1]])
    assert_close([params[1]], [clean[1]], torch.float64)  # of a stack of another size, products may round otherwise


def keeps_its_state_small(spec: OptimSpec) -> None:
    """The state keeps the shapes and dtypes of `init`, few bits or many, through steps, saving and loading."""
    for hyper in spec.inputs:
        for dtype in (torch.float64, torch.float32, torch.bfloat16):
            params = parameters(spec.shapes, dtype)
            optimizer = make(spec, named(params), hyper)
            train(optimizer, params, range(2))
            file = io.BytesIO()
            torch.save(optimizer.state_dict(), file)
            file.seek(0)
            other = make(spec, named([Parameter(p.detach().clone()) for p in params]), hyper)
            other.load_state_dict(torch.load(file, weights_only=True))
            for p, twin in zip(params, other.param_groups[0]["params"], strict=True):
                wanted = {key: (t.shape, t.dtype) for key, t in spec.rule(hyper).init(p).items()}
                for state in (optimizer.state[p], other.state[twin]):
                    assert {key: (t.shape, t.dtype) for key, t in state.items()} == wanted, f"{hyper} {dtype}"
            assert_same(states(other), states(optimizer))


def odd_shapes(spec: OptimSpec) -> None:
    """Odd sizes, empty tensors, strides and offsets into larger storage: the step equals that of a plain copy."""
    for shape in spec.odd_shapes:
        for view in (False, True):
            plain = Parameter(randn(shape, 1))
            p = plain
            if view:  # every second entry, one row in
                wide = torch.zeros(shape[0] + 1, *shape[1:], 2, dtype=torch.float64)
                p = Parameter(wide[1:, ..., 1])
                p.data.copy_(plain.data)
            twin = Parameter(plain.detach().clone())
            optimizer, other = make(spec, [p]), make(spec, [twin])
            for t in range(3):
                p.grad, twin.grad = randn(shape, t), randn(shape, t)
                optimizer.step()
                other.step()
            assert p.shape == shape
            assert_close([p], [twin], torch.float64, f"{shape} {view}")


def limits(spec: OptimSpec) -> None:
    """At the limits of its hyper-parameters the rule is the method that it extends."""
    for what, hyper, base in spec.limits:
        grad = randn((4, 3), 4)
        assert_close([direction(spec.rule(hyper), grad)], [base(grad)], torch.float64, what, factor=1e3)


def symmetries(spec: OptimSpec) -> None:
    """The invariances that the method claims."""
    for what, hyper, on_grads, on_direction in spec.symmetries:
        grads = [randn((4, 3), t) for t in range(3)]
        got = direction(spec.rule(hyper), *[on_grads(g).contiguous() for g in grads])
        assert_close([got], [on_direction(direction(spec.rule(hyper), *grads))], torch.float64, what, factor=100)


def deterministic(spec: OptimSpec) -> None:
    """The same start and gradients give the same bits, twice."""
    outcomes = []
    for _ in range(2):
        params = parameters(spec.shapes, torch.float32)
        optimizer = make(spec, params)
        train(optimizer, params, range(5))
        outcomes.append([*params, *states(optimizer)])
    assert_same(*outcomes)


def pure(spec: OptimSpec) -> None:
    """`init`, `update` and `decay` leave their arguments alone and keep shapes and dtypes, whatever those are."""

    @given(drawn_shapes(spec), DTYPES, st.sampled_from(spec.inputs), st.integers(0, 99))
    def check(shape: tuple[int, ...], dtype: torch.dtype, hyper: dict[str, Any], seed: int) -> None:
        rule = spec.rule(hyper)
        p, grad = randn(shape, seed, dtype), randn(shape, seed + 1, dtype)
        state = rule.init(p)
        before = snapshot([p, grad, *state.values()])
        d, new = rule.update(grad, state, p)
        rule.decay(d, new, p)
        assert_same([p, grad, *state.values()], before)
        assert d.shape == p.shape and d.dtype == torch.promote_types(dtype, torch.float32)
        assert {k: (v.shape, v.dtype) for k, v in new.items()} == {k: (v.shape, v.dtype) for k, v in state.items()}

    if spec.min_ndim == 0:  # where a float64 scalar, a bias correction say, is no mere scalar: torch promotes
        for hyper in spec.inputs:
            check = example(shape=(), dtype=torch.float32, hyper=hyper, seed=0)(check)
    check()


def one_map(spec: OptimSpec, shape: tuple[int, ...], hyper: dict[str, Any], dtype: torch.dtype) -> UpdateMap:
    """The map of a rule after two steps on one parameter."""
    p = Parameter(randn(shape, 3, dtype))
    optimizer = make(spec, [("p", p)], hyper)
    train(optimizer, [p], range(2))
    return UpdateMap.of(optimizer)


def batches(spec: OptimSpec) -> None:
    """`per_sample` equals a loop over the batch, for any shape, also for a subset of names, and touches no state."""

    @given(drawn_shapes(spec), st.integers(0, 4), st.sampled_from(spec.inputs))
    def check(shape: tuple[int, ...], batch: int, hyper: dict[str, Any]) -> None:
        update_map = one_map(spec, shape, hyper, torch.float64)
        before = snapshot([update_map.params["p"], *update_map.states["p"].values()])
        grads = randn((batch, *shape), 8)
        got = update_map.per_sample({"p": grads})["p"]
        assert got.shape == grads.shape
        for i in range(batch):
            assert_close([got[i]], [update_map({"p": grads[i]})["p"]], torch.float64, f"{shape} {i}")
        assert_same([update_map.params["p"], *update_map.states["p"].values()], before)
        assert update_map.per_sample({}) == {}

    check()


def predicts_the_step(spec: OptimSpec) -> None:
    """The map says what `step` then does, from a live optimizer and from its state dict; a snapshot stays as it was."""
    for hyper in spec.inputs:
        params = parameters(spec.shapes)
        optimizer = make(spec, named(params), hyper, lr=0.1, weight_decay=0.2)
        train(optimizer, params, range(3))
        before = snapshot(params)
        maps = [
            UpdateMap.of(optimizer),
            UpdateMap.of(optimizer, copy=False),
            UpdateMap.from_state_dict(optimizer.state_dict(), dict(named(params))),
        ]
        set_grads(params, 9)
        grads = {name: p.grad for name, p in named(params)}
        answers = [m(grads) for m in maps]
        optimizer.step()
        rule: UpdateRule = spec.rule(hyper)
        for answer in answers:
            for (name, p), old in zip(named(params), before, strict=True):
                pulled = rule.decay(answer[name], optimizer.state[p], old)  # the state after the update
                want = old - 0.1 * (answer[name] + 0.2 * pulled)
                assert_close([p.detach()], [want], torch.float64, f"{hyper} {name}")
        assert_same(maps[0](grads).values(), answers[0].values(), "the snapshot")
        assert_same(maps[0].params.values(), before, "the snapshot's parameters")


def differentiable(spec: OptimSpec) -> None:
    """`update` has a forward derivative in the gradient, equal to a finite difference (order estimation needs it)."""
    for hyper in spec.inputs:
        update_map = one_map(spec, (4, 3), hyper, torch.float64)
        grad, tangent = randn((4, 3), 20), randn((4, 3), 21)
        _, slope = torch.func.jvp(lambda g, m=update_map: m({"p": g})["p"], (grad,), (tangent,))
        h = 1e-6
        ahead, behind = (update_map({"p": grad + s * h * tangent})["p"] for s in (1, -1))
        torch.testing.assert_close(slope, (ahead - behind) / (2 * h), rtol=1e-4, atol=1e-6)


def low_precision(spec: OptimSpec) -> None:
    """16-bit parameters keep float32 moments, also after loading; a step is a float32 step, rounded once."""
    for dtype in (torch.bfloat16, torch.float16):
        low = parameters(spec.shapes, dtype)
        exact = [Parameter(p.detach().float()) for p in low]
        optimizer, other = make(spec, named(low), lr=1e-2), make(spec, named(exact), lr=1e-2)
        for t in range(5):
            set_grads(low, t)
            for p, e in zip(low, exact, strict=True):
                e.grad = p.grad.float()
                e.data.copy_(p.data)  # the same start of each step
            optimizer.step()
            other.step()
            assert_same(low, [e.detach().to(dtype) for e in exact], str(dtype))
        twin = make(spec, named([Parameter(p.detach().clone()) for p in low]), lr=1e-2)
        twin.load_state_dict(optimizer.state_dict())
        assert {x.dtype for x in states(twin) if x.is_floating_point()} == {torch.float32}
        assert_same(states(twin), states(optimizer))


def converges(spec: OptimSpec) -> None:
    """Falling learning rates bring a quadratic and Rosenbrock's function down by a factor of 1000."""
    stretch = torch.tensor([[1.0], [4.0], [20.0]], dtype=torch.float64)
    goal = randn((3, 4), 6)

    def quadratic(w: Tensor) -> Tensor:
        return 0.5 * (stretch * (w - goal).square()).sum()

    def rosenbrock(xy: Tensor) -> Tensor:
        x, y = xy[:, 0], xy[:, 1]
        return ((1 - x) ** 2 + 10 * (y - x**2) ** 2).sum()

    starts = (randn((3, 4), 2), torch.tensor([[-1.0, 1.5], [0.0, -1.0]], dtype=torch.float64))
    for loss, start, (lr, steps) in zip((quadratic, rosenbrock), starts, spec.descent, strict=True):
        for hyper in spec.inputs:
            eps = hyper.get("eps", 0)
            smaller = any(hyper.get(key) for key in ("dampening", "lr_decay", "warmup_init"))
            if smaller or (isinstance(eps, float) and eps > 1e-4):
                continue  # a scaled-down step is the same method at another lr
            if hyper.get("center"):
                continue  # SWAN's rows keep their means
            if hyper.get("grafting") in ("none", "sgd"):
                continue  # nothing bounds Shampoo's steps
            if loss is rosenbrock and hyper != spec.inputs[0]:
                continue  # thousands of steps: once per rule
            p = Parameter(start.clone())
            optimizer = make(spec, [p], hyper, lr=lr, weight_decay=0.0)
            scheduler = LambdaLR(optimizer, schedule("linear", total_steps=steps))
            first, last = fit(optimizer, lambda p=p, loss=loss: loss(p), steps, scheduler)
            assert last < 1e-3 * first, f"{loss.__name__}, {hyper}: {first} -> {last}"


def refuses_wrong_gradients(spec: OptimSpec) -> None:
    """A map refuses unknown names and wrong shapes, and an optimizer without names, saying which."""
    update_map = one_map(spec, (4, 3), spec.default, torch.float64)
    with pytest.raises(KeyError, match="'q'"):
        update_map({"q": torch.zeros(4, 3)})
    for call, shape in (
        (update_map, (3, 4)),
        (update_map, (2, 4, 3)),
        (update_map.per_sample, (4, 3)),
        (update_map.per_sample, (2, 3, 4)),
        (update_map.per_sample, ()),
    ):
        with pytest.raises(ValueError, match=r"'p' has shape .* expected"):
            call({"p": torch.zeros(shape)})
    with pytest.raises(ValueError, match="names"):
        UpdateMap.of(make(spec, parameters([(4, 3)])))


def describes_itself(spec: OptimSpec) -> None:
    """A rule is its name and plain fields: equal through JSON and back, frozen, hashable, keyword-only."""
    for hyper in spec.inputs:
        rule = spec.rule(hyper)
        described = json.loads(json.dumps(rule.describe()))
        assert rule_from(described) == rule and not rule.differences(described)
        assert hash(rule) == hash(spec.rule(hyper)) and rule.name == spec.name
        with pytest.raises((AttributeError, TypeError)):
            rule.name2 = 1  # type: ignore[attr-defined]
        for other in spec.inputs:
            assert bool(rule.differences(spec.rule(other).describe())) == (spec.rule(other) != rule)
    with pytest.raises(TypeError):
        type(spec.rule())(0.9)


def elementwise_or_not(spec: OptimSpec) -> None:
    """`elementwise` is true exactly when the direction of a slice is the slice of the direction."""
    rule = spec.rule()
    grads = [randn((4, 3), t) for t in range(3)]
    whole, part = direction(rule, *grads)[1:3, :2], direction(rule, *[g[1:3, :2] for g in grads])
    assert torch.allclose(whole, part, rtol=1e-9) == rule.elementwise


def swaps(spec: OptimSpec) -> None:
    """`eval()` writes the averaged weights that the rule has, and `train()` the others back, to the bit."""
    for hyper in spec.inputs:
        params = parameters(spec.shapes, torch.float32)
        optimizer = make(spec, named(params), hyper)
        optimizer.eval()
        optimizer.train()
        train(optimizer, params, range(4))
        before = snapshot(params)
        wanted = [optimizer.param_groups[0]["rule"].average(optimizer.state[p], p) for p in params]
        optimizer.eval()
        optimizer.eval()
        if not spec.rule(hyper).averages:
            assert wanted == [None] * len(params)
            assert_same(params, before)
            continue
        assert_same(params, [x.detach() for x in wanted])
        assert not torch.equal(params[0], before[0])
        with pytest.raises(RuntimeError, match="train"):
            train(optimizer, params, [4])
        twin = [Parameter(p.detach().clone()) for p in params]
        other = make(spec, named(twin), hyper)
        other.load_state_dict(optimizer.state_dict())
        other.train()
        assert_close(twin, before, torch.float32)
        optimizer.train()
        optimizer.train()
        assert_same(params, before)
        train(optimizer, params, [4])


PROPERTIES = {
    "26": equals_the_published_code,
    "27": equals_the_formula,
    "28": resumes,
    "29": awkward_models,
    "30": nan_stays_put,
    "31": keeps_its_state_small,
    "32": odd_shapes,
    "33": limits,
    "34": symmetries,
    "35": swaps,
    "36": deterministic,
    "H1": pure,
    "H2": batches,
    "H3": predicts_the_step,
    "H4": differentiable,
    "H5": low_precision,
    "H6": converges,
    "H7": refuses_wrong_gradients,
    "H8": describes_itself,
    "H9": elementwise_or_not,
}
