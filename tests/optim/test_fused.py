"""The compiled step against the definition, `UpdateRule.step`; and that everything else takes the plain path."""

import os
import re
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from optim import RULES, AdamWRule, Optimizer, UpdateRule, backend, fused
from optim.rule import State, moment_dtype, zero_moment, zero_step
from tests.conftest import REPOSITORY
from tests.optim.harness import assert_same, parameters, randn, set_grads, snapshot, states, train
from tests.optim.specs import SPECS

pytestmark = pytest.mark.skipif(not backend.use_fused(), reason="llvmlite is not installed, or OPTIM_BACKEND=torch")

COMPILED = sorted(name for name in RULES if not fused.supports(SPECS[name].rule(), torch.empty(4, 3)))


class Plain(Exception):
    """A step went by the plain path."""


@pytest.fixture
def only_compiled(monkeypatch):
    """The plain path raises, so that a test sees the engine or fails."""

    def refuse(self, *args, **kwargs):
        raise Plain(self.name)

    original = UpdateRule.step
    monkeypatch.setattr(UpdateRule, "step", refuse)
    return original


def one_step(rule, p, g, state, plain, lr=0.05, weight_decay=0.1):
    """(parameter and state after the compiled step, after the definition), from the same start."""
    twin, kept = p.clone(), {key: value.clone() for key, value in state.items()}
    fused.step(rule, [p], [g], [state], lr=lr, weight_decay=weight_decay)
    plain(rule, twin, g, kept, lr=lr, weight_decay=weight_decay)
    return [p, *state.values()], [twin, *kept.values()]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", COMPILED)
def test_equals_the_definition(name, dtype, only_compiled):
    """Each of ten steps, with and without decay, to a few units in the last place of each tensor's size."""
    ulps = 16 * torch.finfo(dtype).eps
    for hyper in SPECS[name].inputs:
        rule = SPECS[name].rule(hyper)
        if fused.supports(rule, torch.empty(6, 35)):
            continue  # an option with operations that have no loop; held by test_the_table
        for shape in ((6, 35), (517,)):
            p = randn(shape, 1, dtype)
            state = rule.init(p)
            for t in range(10):
                got, want = one_step(rule, p, randn(shape, t, dtype), state, only_compiled, weight_decay=0.1 * (t % 2))
                for x, y in zip(got, want, strict=True):
                    # a sign, a clip or a threshold at rounding level may fall to either side: at most one in a hundred
                    off = (x - y).abs() > ulps * y.abs().amax().clamp_min(1)
                    assert off.double().mean() <= 0.01, f"{hyper} {shape}, step {t}: {(x - y).abs().amax()}"


@pytest.mark.parametrize("name", COMPILED)
def test_threads_runs_and_pools_give_the_same_bits(name, only_compiled):
    """One thread or three, alone or in a list, once or twice: the same bits, over several chunks and rows."""
    shapes = [(400, 300), (7,), (70_000,), (3, 40_000)]
    outcomes = []
    before = torch.get_num_threads()
    try:
        for threads, together in ((1, True), (3, True), (3, True), (2, False)):
            torch.set_num_threads(threads)
            params = parameters(shapes, torch.float32)
            if together:
                optimizer = Optimizer(params, SPECS[name].rule(), lr=0.05, weight_decay=0.1)
                train(optimizer, params, range(3))
                outcomes.append([*params, *states(optimizer)])
            else:
                alone = [Optimizer([p], SPECS[name].rule(), lr=0.05, weight_decay=0.1) for p in params]
                for t in range(3):
                    set_grads(params, t + 1)
                    for optimizer in alone:
                        optimizer.step()
                outcomes.append([*params, *(x for optimizer in alone for x in states(optimizer))])
    finally:
        torch.set_num_threads(before)
    for other in outcomes[1:]:
        assert_same(other, outcomes[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bits_round_to_nearest_even(dtype, only_compiled):
    """Every finite value and NaN come back from memory and are rounded as torch rounds them."""
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    p = bits.view(dtype).clone()
    g = randn(p.shape, 3, torch.float32)
    want = (p.float() - 0.01 * g).to(dtype)
    fused.step(RULES["sgd"](), [p], [g], [{"step": zero_step()}], lr=0.01, weight_decay=0.0)
    assert torch.equal(p.isnan(), want.isnan()) and torch.equal(p.nan_to_num(nan=0.0), want.nan_to_num(nan=0.0))


def test_infinite_parameters_and_gradients(only_compiled):
    """Without decay an infinite parameter is not made NaN by 0 times it; non-finite gradients spread nowhere."""
    p, g = torch.tensor([torch.inf, 1.0, 1.0, 1.0]), torch.tensor([1.0, torch.nan, torch.inf, 1.0])
    fused.step(RULES["sgd"](), [p], [g], [{"step": zero_step()}], lr=1.0, weight_decay=0.0)
    assert torch.equal(p.nan_to_num(nan=7.0, posinf=8.0, neginf=9.0), torch.tensor([8.0, 7.0, 9.0, 0.0]))


def test_finite_gradients():
    grads = [torch.ones(3), torch.tensor([1.0, torch.nan]), torch.zeros(0), torch.full((70_000,), 3e38),
             torch.tensor(-torch.inf, dtype=torch.float64), torch.ones(4, 4, dtype=torch.bfloat16)[:, ::2],
             torch.ones(5, dtype=torch.float16)]
    grads[3][69_999] = torch.inf
    assert fused.all_finite(grads) == [bool(g.isfinite().all()) for g in grads]


def test_layouts(only_compiled):
    """Dense tensors in any order of dimensions, views into larger storage and gradients of another layout."""
    base = randn((5, 7), 1, torch.float32)
    for p, g in ((base.T.contiguous().T, base), (base.T.contiguous().T, base.T.contiguous().T),
                 (torch.zeros(9, 7)[2:7].copy_(base), base), (base.clone(), base.T.contiguous().T)):
        flat = base.clone()
        one, two = AdamWRule().init(p), AdamWRule().init(flat)
        for _ in range(3):
            fused.step(AdamWRule(), [p], [g], [one], lr=0.1, weight_decay=0.1)
            fused.step(AdamWRule(), [flat], [base], [two], lr=0.1, weight_decay=0.1)
        assert_same([p], [flat])


class Wrapped(Tensor):
    """A subclass, as DTensor is one."""


@pytest.mark.parametrize("what", ["strided", "subclass", "negative"])
def test_what_is_left_to_the_plain_path(what, only_compiled):
    p, g = torch.ones(4, 6), torch.ones(4, 6)
    if what == "strided":
        p = torch.ones(4, 12)[:, ::2]
    elif what == "subclass":
        p = p.as_subclass(Wrapped)
    else:
        g = torch._neg_view(g)
    params = [torch.ones(2), p]
    with pytest.raises(Plain):
        fused.step(AdamWRule(), params, [torch.ones(2), g], [AdamWRule().init(x) for x in params],
                   lr=0.1, weight_decay=0.0)


def test_a_state_of_another_size_is_never_read_past_its_end(only_compiled):
    p = torch.ones(4)
    with pytest.raises(Plain):
        fused.step(AdamWRule(), [p], [p.clone()], [AdamWRule().init(torch.ones(3))], lr=0.1, weight_decay=0.0)


@dataclass(frozen=True, kw_only=True)
class Refused(UpdateRule):
    """A rule that looks at a value, multiplies matrices or writes in place."""

    name: ClassVar[str] = "refused"
    how: str

    def init(self, param: Tensor) -> State:
        return {"step": zero_step(), "exp_avg": zero_moment(param)}

    def update(self, grad: Tensor, state: State, param: Tensor) -> tuple[Tensor, State]:
        g = grad.to(moment_dtype(param))
        if self.how == "branch":
            g = 2 * g if float(state["step"]) > 0 else g
        elif self.how == "product":
            g = g @ g.mT @ g
        else:
            g = g.clone().mul_(2)
        return g, {"step": state["step"] + 1, "exp_avg": g}


@pytest.mark.parametrize("how, reason", [("branch", "while tracing"), ("product", "operation"), ("place", "in place")])
def test_refusals_say_why_and_step_all_the_same(how, reason):
    rule = Refused(how=how)
    assert re.search(reason, fused.supports(rule, torch.empty(3, 3)))
    p, twin = Parameter(randn((3, 3), 1)), randn((3, 3), 1)
    optimizer, state = Optimizer([p], rule, lr=0.1), rule.init(twin)
    for t in range(2):
        p.grad = randn((3, 3), t)
        optimizer.step()
        rule.step(twin, p.grad, state, lr=0.1, weight_decay=0.0)
    assert_same([p.detach()], [twin])


def test_the_environment_chooses(monkeypatch, only_compiled):
    p = Parameter(torch.ones(3))
    p.grad = torch.ones(3)
    optimizer = Optimizer([p], AdamWRule(), lr=0.1)
    optimizer.step()
    monkeypatch.setenv("OPTIM_BACKEND", "torch")
    with pytest.raises(Plain):
        optimizer.step()
    monkeypatch.setenv("OPTIM_BACKEND", "auto")
    monkeypatch.setattr(backend, "_has_llvm", lambda: False)
    with pytest.raises(Plain):
        optimizer.step()
    monkeypatch.setenv("OPTIM_BACKEND", "cuda")
    with pytest.raises(ValueError, match="OPTIM_BACKEND"):
        backend.use_fused()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="a system without fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_process_has_threads_of_its_own():
    params = parameters([(300, 700)], torch.float32)
    optimizer = Optimizer(params, AdamWRule(), lr=0.05)
    train(optimizer, params, range(2))
    before = snapshot(params)
    pid = os.fork()
    if pid == 0:
        set_grads(params, 3)
        optimizer.step()
        os._exit(0 if not torch.equal(params[0], before[0]) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def test_the_table():
    """optim/README.md says of every rule whether its step is compiled."""
    rows = re.findall(r"^\| `(\w+)` \|.*\| ([^|]+) \|$", (REPOSITORY / "optim" / "README.md").read_text(), re.M)
    stated = {name: last.strip() for name, last in rows if name in RULES}
    assert set(stated) == set(RULES)
    for name, text in stated.items():
        assert text.startswith("compiled") == (name in COMPILED), f"{name}: the table says {text!r}"
