"""The compiled step against the definition, `UpdateRule.step`; and that everything else takes the plain path."""

import _thread
import gc
import os
import re
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from optim import RULES, AdamWRule, Optimizer, UpdateRule, backend, cpu_jit
from optim.cpu_jit import cache, kernel
from optim.cpu_jit.pools import Pool
from optim.cpu_jit.threads import together
from optim.moments import moment_dtype, zero_moment, zero_step
from optim.rule import State
from tests.conftest import REPOSITORY
from tests.optim.harness import assert_same, parameters, randn, set_grads, snapshot, states, train
from tests.optim.specs import SPECS

pytestmark = pytest.mark.skipif(not backend.use_cpu_jit(), reason="llvmlite is not installed, or OPTIM_BACKEND=torch")

COMPILED = sorted(name for name in RULES if not cpu_jit.supports(SPECS[name].rule(), torch.empty(4, 3)))


OF_THE_GROUP = {"prodigy"}
"""Rules with one number for all parameters of a group: a parameter alone has another."""


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


def fitting(name, *shapes):
    """Those shapes that the rule takes: some take matrices only."""
    return [shape for shape in shapes if len(shape) >= SPECS[name].min_ndim]


def one_step(rule, p, g, state, plain, lr=0.05, weight_decay=0.1):
    """(parameter and state after the compiled step, after the definition), from the same start."""
    twin, kept = p.clone(), {key: value.clone() for key, value in state.items()}
    cpu_jit.step(rule, [p], [g], [state], lr=lr, weight_decay=weight_decay)
    plain(rule, twin, g, kept, lr=lr, weight_decay=weight_decay)
    return [p, *state.values()], [twin, *kept.values()]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", COMPILED)
def test_equals_the_definition(name, dtype, only_compiled):
    """Each of ten steps, with and without decay, to a few units in the last place of each tensor's size."""
    ulps = 16 * torch.finfo(dtype).eps
    for hyper in SPECS[name].inputs:
        rule = SPECS[name].rule(hyper)
        if cpu_jit.supports(rule, torch.empty(6, 35)):
            continue  # an option with operations that have no loop; held by test_the_table
        for shape in fitting(name, (6, 35), (517,)):
            p = randn(shape, 1, dtype)
            state = rule.init(p)
            for t in range(10):
                got, want = one_step(rule, p, randn(shape, t, dtype), state, only_compiled, weight_decay=0.1 * (t % 2))
                for x, y in zip(got, want, strict=True):
                    # a sign, a clip or a threshold at rounding level may fall to either side: at most one in a hundred
                    off = (x - y).abs() > ulps * y.abs().amax().clamp_min(1)
                    assert off.double().mean() <= 0.01, f"{hyper} {shape}, step {t}: {(x - y).abs().amax()}"


@pytest.mark.parametrize("name", COMPILED)
def test_threads_runs_and_pools_give_the_same_bits(name, only_compiled, monkeypatch):
    """One thread or three, alone or in a list, once or twice: the same bits, over several chunks and rows."""
    monkeypatch.setattr(kernel, "CACHED", kernel.CHUNK)  # the larger ones are cut, whatever the rule
    shapes = fitting(name, (400, 300), (7,), (70_000,), (3, 40_000))
    outcomes = []
    before = torch.get_num_threads()
    try:
        alone_too = () if name in OF_THE_GROUP else ((2, False),)
        for threads, together in ((1, True), (3, True), (3, True), *alone_too):
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
    cpu_jit.step(RULES["sgd"](), [p], [g], [{"step": zero_step()}], lr=0.01, weight_decay=0.0)
    assert torch.equal(p.isnan(), want.isnan()) and torch.equal(p.nan_to_num(nan=0.0), want.nan_to_num(nan=0.0))


def test_infinite_parameters_and_gradients(only_compiled):
    """Without decay an infinite parameter is not made NaN by 0 times it; non-finite gradients spread nowhere."""
    p, g = torch.tensor([torch.inf, 1.0, 1.0, 1.0]), torch.tensor([1.0, torch.nan, torch.inf, 1.0])
    cpu_jit.step(RULES["sgd"](), [p], [g], [{"step": zero_step()}], lr=1.0, weight_decay=0.0)
    assert torch.equal(p.nan_to_num(nan=7.0, posinf=8.0, neginf=9.0), torch.tensor([8.0, 7.0, 9.0, 0.0]))


def test_finite_gradients():
    grads = [
        torch.ones(3),
        torch.tensor([1.0, torch.nan]),
        torch.zeros(0),
        torch.full((70_000,), 3e38),
        torch.tensor(-torch.inf, dtype=torch.float64),
        torch.ones(4, 4, dtype=torch.bfloat16)[:, ::2],
        torch.ones(5, dtype=torch.float16),
    ]
    grads[3][69_999] = torch.inf
    assert cpu_jit.all_finite(grads) == [bool(g.isfinite().all()) for g in grads]


@pytest.mark.parametrize("cached", [1 << 20, 1 << 15], ids=["whole", "cut"])
@pytest.mark.parametrize("name", [name for name in COMPILED if not RULES[name].elementwise])
def test_a_gradient_that_is_not_finite_leaves_its_tensor_alone(name, cached, only_compiled, monkeypatch):
    """Parameter and state to the bit, in the same pass over memory that would have stepped it; others are stepped."""
    monkeypatch.setattr(kernel, "CACHED", cached)
    rule = SPECS[name].rule()
    for shape in fitting(name, (300, 200), (60_000,), (3, 5)):
        params = [randn(shape, i, torch.float32) for i in range(4)]
        grads = [randn(shape, 10 + i, torch.float32) for i in range(4)]
        grads[1].view(-1)[-1], grads[3].view(-1)[0] = torch.nan, -torch.inf
        kept = [rule.init(p) for p in params]
        before = [snapshot([p, *state.values()]) for p, state in zip(params, kept, strict=True)]
        assert cpu_jit.step(rule, params, grads, kept, lr=0.1, weight_decay=0.1) == [True, False, True, False]
        for i, (p, state) in enumerate(zip(params, kept, strict=True)):
            if i in (1, 3):
                assert_same([p, *state.values()], before[i])
            else:
                assert not torch.equal(p, before[i][0])


@dataclass(frozen=True, kw_only=True)
class MeasuredOnce(UpdateRule):
    """The largest gradient and the deviation of the first gradient above 1, and then no more; both are 0 before it."""

    name: ClassVar[str] = "measured_once"
    elementwise: ClassVar[bool] = False

    def init(self, param: Tensor) -> State:
        return {"step": zero_step(), "spread": param.new_zeros(())}

    def update(self, grad: Tensor, state: State, param: Tensor) -> tuple[Tensor, State]:
        spread = torch.where(grad.amax() > 1, (grad - grad.mean()).square().sum().sqrt(), 0.0)
        spread = torch.where(state["spread"] == 0, spread, state["spread"])
        return spread * grad, {"step": state["step"] + 1, "spread": spread}


@pytest.mark.parametrize("cached", [1 << 20, 1 << 15], ids=["whole", "cut"])
def test_what_no_branch_reads_is_not_measured(cached, only_compiled, monkeypatch):
    """Reductions in the branches of `where` are made when their conditions hold, and then as the definition has them.

    That they are not made otherwise is seen in the time that a step takes; here, in the code.
    """
    monkeypatch.setattr(kernel, "CACHED", cached)
    rule, p = MeasuredOnce(), randn((50_000,), 1, torch.float32)
    state = rule.init(p)
    for t in range(5):
        g = randn((50_000,), t, torch.float32)
        g = g / g.amax() * (0.5 if t == 0 else 1.5)
        got, want = one_step(rule, p, g, state, only_compiled)
        for x, y in zip(got, want, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)
        assert (state["spread"] == 0) == (t == 0)
    text = cache.assembled(rule, True, tuple(state), [torch.float32] * 4, ((9,), (9,), (), ()))[0].text
    assert "@body1some" in text, "the guard alone"
    assert "@body2all" in text and "@body2some" not in text, "the deviation from the mean, or nothing"


def test_a_rule_with_a_list_is_stepped_plainly():
    """Fields are plain values, but one that cannot be hashed, and so has no compiled step, is no reason to fail."""

    @dataclass(frozen=True, kw_only=True)
    class Listed(MeasuredOnce):
        numbers: list[float]

    p = torch.ones(3)
    optimizer = Optimizer([p], Listed(numbers=[1.0]), lr=0.1)
    p.grad = torch.tensor([1.0, 2.0, 3.0])
    optimizer.step()
    assert not torch.equal(p, torch.ones(3))


def test_layouts(only_compiled):
    """Dense tensors in any order of dimensions, views into larger storage and gradients of another layout."""
    base = randn((5, 7), 1, torch.float32)
    for p, g in (
        (base.T.contiguous().T, base),
        (base.T.contiguous().T, base.T.contiguous().T),
        (torch.zeros(9, 7)[2:7].copy_(base), base),
        (base.clone(), base.T.contiguous().T),
    ):
        flat = base.clone()
        one, two = AdamWRule().init(p), AdamWRule().init(flat)
        for _ in range(3):
            cpu_jit.step(AdamWRule(), [p], [g], [one], lr=0.1, weight_decay=0.1)
            cpu_jit.step(AdamWRule(), [flat], [base], [two], lr=0.1, weight_decay=0.1)
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
        cpu_jit.step(
            AdamWRule(), params, [torch.ones(2), g], [AdamWRule().init(x) for x in params], lr=0.1, weight_decay=0.0
        )


def test_a_state_of_another_size_is_never_read_past_its_end(only_compiled):
    p = torch.ones(4)
    with pytest.raises(Plain):
        cpu_jit.step(AdamWRule(), [p], [p.clone()], [AdamWRule().init(torch.ones(3))], lr=0.1, weight_decay=0.0)


@dataclass(frozen=True, kw_only=True)
class Refused(UpdateRule):
    """A rule that looks at a value, multiplies matrices or writes in place."""

    name: ClassVar[str] = "refused"
    elementwise: ClassVar[bool] = False
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
    assert re.search(reason, cpu_jit.supports(rule, torch.empty(3, 3)))
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
        backend.use_cpu_jit()


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


@dataclass(frozen=True, kw_only=True)
class Looking(UpdateRule):
    """A rule that is elementwise by its flag, and looks at the shape or at several elements."""

    name: ClassVar[str] = "looking"
    how: str

    def init(self, param: Tensor) -> State:
        return {"step": zero_step()}

    def update(self, grad: Tensor, state: State, param: Tensor) -> tuple[Tensor, State]:
        scale = {
            "dimensions": lambda: 1.0 + param.ndim,
            "size": lambda: param.numel() ** 0.5,
            "constant": lambda: 6**0.5,
            "mean": lambda: grad.abs().mean(),
            "row": lambda: grad.abs().sum(-1, keepdim=True),
            "flags": lambda: (grad > 0) + (param > 0),
        }[self.how]()
        return grad * scale, {"step": state["step"] + 1}


@pytest.mark.parametrize("how", ["dimensions", "size", "mean", "row", "flags"])
def test_an_elementwise_rule_that_looks_at_the_shape(how):
    rule, shapes = Looking(how=how), [(4,), (), (4, 5), (1, 6), (2, 3, 4)]
    shapes = [shape for shape in shapes if shape or how != "row"]
    params, grads = [randn(s, 1) for s in shapes], [randn(s, 2) for s in shapes]
    twins = snapshot(params)
    cpu_jit.step(rule, params, grads, [rule.init(p) for p in params], lr=0.5, weight_decay=0.0)
    for twin, grad in zip(twins, grads, strict=True):
        rule.step(twin, grad, rule.init(twin), lr=0.5, weight_decay=0.0)
    assert_same(params, twins)
    assert bool(cpu_jit.supports(rule, torch.empty(4, 5))) == (how != "dimensions")


def test_a_refused_step_keeps_no_tensor_alive():
    """The refusal is cached; its traceback would hold the first call's gradient, as large as the parameter."""
    cache.kernel_of.cache_clear()
    rule, p = Refused(how="product"), randn((3, 3), 1)
    grad, state = p.clone(), rule.init(p)
    watched = weakref.ref(grad)
    cpu_jit.step(rule, [p], [grad], [state], lr=0.1, weight_decay=0.0)
    del grad, state
    gc.collect()
    assert watched() is None


def test_a_step_that_cannot_be_compiled_is_stepped_and_says_so_once(monkeypatch):
    def fail(text):
        raise RuntimeError("no such instruction")

    cache.kernel_of.cache_clear()
    monkeypatch.setattr(kernel.Kernel, "_made", {})
    monkeypatch.setattr(kernel, "_machine_code", fail)
    monkeypatch.setattr(cache, "_warned", set())
    p = randn((3,), 1, torch.float32)
    twin, rule = p.clone(), AdamWRule()
    with pytest.warns(RuntimeWarning, match="adamw: .*no such instruction") as caught:
        for weight_decay in (0.0, 0.1):
            cpu_jit.step(rule, [p], [p.clone()], [rule.init(p)], lr=0.1, weight_decay=weight_decay)
            rule.step(twin, twin.clone(), rule.init(twin), lr=0.1, weight_decay=weight_decay)
    assert len(caught) == 1
    assert_same([p], [twin])
    cache.kernel_of.cache_clear()


def test_a_first_step_in_inference_mode_is_compiled(only_compiled):
    cache.kernel_of.cache_clear()
    with torch.inference_mode():
        p = torch.ones(3)
        cpu_jit.step(AdamWRule(), [p], [p.clone()], [AdamWRule().init(p)], lr=0.1, weight_decay=0.0)
    p = torch.ones(3)
    cpu_jit.step(AdamWRule(), [p], [p.clone()], [AdamWRule().init(p)], lr=0.1, weight_decay=0.0)


def test_a_default_device_changes_nothing(only_compiled):
    rule, p, g = RULES["stable_spam"](), torch.ones(4, 4), torch.ones(4, 4)
    state = rule.init(p)
    cache.kernel_of.cache_clear()
    with torch.device("meta"):
        assert cpu_jit.all_finite([g, torch.full((2,), torch.nan, device="cpu")]) == [True, False]
        cpu_jit.step(rule, [p], [g], [state], lr=0.1, weight_decay=0.0)
    assert not torch.equal(p, torch.ones(4, 4))


def test_autograd_sees_that_parameter_and_state_change(only_compiled):
    p = Parameter(torch.ones(3))
    p.grad = torch.ones(3)
    optimizer = Optimizer([p], AdamWRule(), lr=0.1)
    optimizer.step()
    before = [t._version for t in (p, *optimizer.state[p].values())]
    seen = p.grad._version
    loss = (p * p).sum()
    optimizer.step()
    assert all(t._version > v for t, v in zip((p, *optimizer.state[p].values()), before, strict=True))
    assert p.grad._version == seen
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_strided_row_state_keeps_its_place():
    rule = RULES["adam_mini"](blocks="row")
    for grad in (torch.ones(4, 3), torch.ones(3, 4).T):
        p, memory = torch.ones(4, 3), torch.zeros(8)
        state = rule.init(p)
        state["exp_avg_sq"] = memory[::2].view(state["exp_avg_sq"].shape)
        cpu_jit.step(rule, [p], [grad], [state], lr=0.1, weight_decay=0.0)
        assert (memory[::2] > 0).all() and not memory[1::2].any()


def test_few_kernels_are_kept_and_those_in_use_keep_their_code(only_compiled):
    assert cache.kernel_of.cache_info().maxsize == cache.KERNELS
    p, rule = torch.ones(3), AdamWRule()
    step, numbers = cache.kernel_of(rule, False, tuple(rule.init(p)), (torch.float32,) * 5, 1)
    cache.kernel_of.cache_clear()
    cache.kernel_of(replace(rule, eps=1e-5), False, tuple(rule.init(p)), (torch.float32,) * 5, 1)
    cache.kernel_of.cache_clear()
    gc.collect()
    assert [k for k in kernel.Kernel._made.values() if k.full is not None] == [step]
    pool = Pool([0], tuple(rule.init(p)), [[p], [torch.ones(3)], *([t] for t in rule.init(p).values())])
    step.run(pool, 0.1, 0.0, numbers)
    assert not torch.equal(p, torch.ones(3))


def test_numbers_that_depend_on_the_shape_are_not_those_of_another_rule():
    """Two rules whose steps look alike on the shape that is traced, of which one fits every shape."""
    p, grad = randn((4, 5), 1), randn((4, 5), 2)
    cpu_jit.step(Looking(how="dimensions"), [p], [grad], [{"step": torch.zeros(())}], lr=0.1, weight_decay=0.0)
    for how in ("constant", "size", "constant"):
        rule, one, other = Looking(how=how), p.clone(), p.clone()
        cpu_jit.step(rule, [one], [grad], [rule.init(one)], lr=0.1, weight_decay=0.0)
        rule.step(other, grad, rule.init(other), lr=0.1, weight_decay=0.0)
        torch.testing.assert_close(one, other, rtol=1e-14, atol=1e-14)


def test_no_helper_works_after_an_exception():
    """The thread that steps is interrupted, and again while it waits: helpers have ended all the same."""
    entered, ended, caller = threading.Event(), threading.Event(), threading.current_thread()

    def work():
        if threading.current_thread() is caller:
            assert entered.wait(10)
            raise KeyboardInterrupt
        entered.set()
        time.sleep(0.1)
        _thread.interrupt_main()
        time.sleep(0.2)
        ended.set()

    with pytest.raises(KeyboardInterrupt):
        together(work, 1)
    assert ended.is_set()


def test_a_helper_that_comes_too_late_does_nothing():
    """All threads are busy: the caller does everything and what it asked for is withdrawn."""
    calls, gate = [], threading.Event()
    with ThreadPoolExecutor(1) as busy, pytest.MonkeyPatch.context() as patch:
        busy.submit(gate.wait, 10)
        patch.setattr("optim.cpu_jit.threads._executor", lambda _: busy)
        together(lambda: calls.append(threading.current_thread()), 3)
        gate.set()
    assert calls == [threading.current_thread()]


def test_without_threads_a_step_runs_on_its_own(monkeypatch, only_compiled):
    """As in a thread that outlives the main thread: the executor takes nothing any more."""
    closed = ThreadPoolExecutor(1)
    closed.shutdown()
    asked = []
    monkeypatch.setattr("optim.cpu_jit.threads._executor", lambda process: asked.append(process) or closed)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    p, rule = torch.ones(300_000), RULES["sgd"]()
    cpu_jit.step(rule, [p], [torch.ones(300_000)], [rule.init(p)], lr=0.5, weight_decay=0.0)
    assert asked and torch.equal(p, torch.full((300_000,), 0.5))


def test_threads_of_python_step_at_once(only_compiled):
    """Several threads of the program, each with a number of torch's threads of its own."""
    failures = []

    def train_alone(threads):
        torch.set_num_threads(threads)
        try:
            rule, p = RULES["sgd"](momentum=0.0), torch.zeros(200_000)
            state = rule.init(p)
            for _ in range(20):
                cpu_jit.step(rule, [p], [torch.ones(200_000)], [state], lr=1.0, weight_decay=0.0)
            assert torch.equal(p, torch.full((200_000,), -20.0))
        except BaseException as error:
            failures.append(error)

    before = torch.get_num_threads()
    running = [threading.Thread(target=train_alone, args=(n,)) for n in (2, 3, 4)]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()
    torch.set_num_threads(before)
    assert not failures


def test_the_table():
    """optim/README.md says of every rule whether its step is compiled."""
    rows = re.findall(r"^\| `(\w+)` \|.*\| ([^|]+) \|$", (REPOSITORY / "optim" / "README.md").read_text(), re.M)
    stated = {name: last.strip() for name, last in rows if name in RULES}
    assert set(stated) == set(RULES)
    for name, text in stated.items():
        assert text.startswith("compiled") == (name in COMPILED), f"{name}: the table says {text!r}"
