"""Properties 1 to 25 of an optimizer: what torch requires of its own, for a rule under `Optimizer`.

Each is a function of an `OptimSpec` whose first line is the property; it raises AssertionError where it does not hold.
"""

import copy
import io
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import Parameter
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from optim import OPTIMIZERS, SCHEDULES, Optimizer, UpdateRule, backend, cpu_jit, create, schedule, stacks
from optim.cpu_jit import kernel
from optim.schedules import schedule_options
from tests.optim.harness import (
    assert_close,
    assert_same,
    assert_same_dict,
    fit,
    make,
    named,
    parameters,
    randn,
    regression,
    set_grads,
    snapshot,
    states,
    train,
)
from tests.optim.spec import OptimSpec

FLOATS = (torch.float64, torch.float32, torch.bfloat16)


def lowers_the_loss(spec: OptimSpec) -> None:
    """20 steps lower a simple loss, for contiguous and non-contiguous parameters; maximize is refused."""
    for hyper in spec.inputs:
        for strided in (False, True):
            w, loss = regression(spec)
            if strided:
                w.data = w.data.T.contiguous().T
                assert not w.is_contiguous()
            first, last = fit(make(spec, [w], hyper, lr=spec.lr, weight_decay=0.0), loss, 20)
            if hyper.get("eps", 0) != 1e12:
                assert last < first, f"{hyper}: {first} -> {last}"
    with pytest.raises(ValueError, match="maximize"):
        Optimizer([{"params": parameters([(4, 3)]), "maximize": True}], spec.rule(), lr=0.1)


def follows_schedules(spec: OptimSpec) -> None:
    """Every shipped schedule drives the learning rate of every group, and the loss falls."""
    for name in SCHEDULES:
        w, loss = regression(spec)
        other = Parameter(w.detach().clone())
        optimizer = make(spec, [{"params": [w]}, {"params": [other], "lr": spec.lr / 10}], lr=spec.lr, weight_decay=0.0)
        warmup = {"warmup_steps": 3} if "warmup_steps" in schedule_options(name) else {}
        factor = schedule(name, total_steps=20, **warmup)
        scheduler = LambdaLR(optimizer, factor)
        first, last = fit(optimizer, lambda loss=loss: loss(), 20, scheduler)
        assert last < first, name
        assert [g["lr"] for g in optimizer.param_groups] == [spec.lr * factor(20), spec.lr / 10 * factor(20)]


def tensor_lr(spec: OptimSpec) -> None:
    """A 0-dimensional or one-element tensor learning rate equals the float, step by step."""
    for lr in (torch.tensor(0.05, dtype=torch.float64), torch.tensor([0.05], dtype=torch.float64)):
        a, b = parameters(spec.shapes), parameters(spec.shapes)
        with_float, with_tensor = make(spec, a, lr=0.05), make(spec, b, lr=lr)
        for t in range(5):
            train(with_float, a, [t])
            train(with_tensor, b, [t])
            assert_close(b, a, torch.float64, f"step {t}")


def grouped_equals_single(spec: OptimSpec) -> None:
    """The grouped fast path equals the definition written back, parameters and state, through missing gradients."""
    for hyper in spec.inputs:
        for dtype in FLOATS:
            fast, slow = parameters(spec.shapes, dtype), parameters(spec.shapes, dtype)
            rule = spec.rule(hyper)
            optimizer = Optimizer(fast, rule, lr=0.05, weight_decay=0.1)
            kept = [rule.init(p) for p in slow]
            for t in range(7):
                set_grads(fast, t + 1)
                set_grads(slow, t + 1)
                for i in range(len(fast)):
                    if t == 3 or (i == 0 and t in (4, 5)):  # a step without any gradient, a layer frozen for two more
                        fast[i].grad = slow[i].grad = None
                optimizer.step()
                with torch.no_grad():
                    ready = [(p.grad, state) for p, state in zip(slow, kept, strict=True) if p.grad is not None]
                    for state in kept:
                        state.update(rule.told(state, lr=0.05, weight_decay=0.1))
                    if ready:
                        rule.share([grad for grad, _ in ready], [state for _, state in ready], kept)
                    for p, state in zip(slow, kept, strict=True):
                        if p.grad is not None:
                            UpdateRule.step(rule, p, p.grad, state, lr=0.05, weight_decay=0.1)
            assert_close(fast, slow, dtype, f"{hyper} {dtype}")
            wanted = [state[key] for state in kept for key in sorted(state)]
            inner = torch.promote_types(dtype, torch.float32)
            assert_close(states(optimizer), wanted, inner, f"state of {hyper} {dtype}")


def mixed_dtypes(spec: OptimSpec) -> None:
    """Parameters of several dtypes in one list step as they do alone (to the bit, unless matrices step in stacks)."""
    shape = spec.shapes[0]
    together = [Parameter(randn(shape, i, dtype)) for i, dtype in enumerate(FLOATS * 2)]
    alone = [Parameter(p.detach().clone()) for p in together]
    optimizer, singles = make(spec, together), [make(spec, [p]) for p in alone]
    for t in range(3):
        set_grads(together, t)
        set_grads(alone, t)
        optimizer.step()
        for single in singles:
            single.step()
    if type(spec.rule()).step_all is UpdateRule.step_all:
        assert_same(together, alone)
    for p, twin in zip(together, alone, strict=True):
        assert_close([p], [twin], p.dtype)


def default_dtype(spec: OptimSpec) -> None:
    """The default dtype changes neither results nor the dtype of anything in the state."""
    outcomes = []
    before = torch.get_default_dtype()
    try:
        for default in (torch.float32, torch.float64):
            torch.set_default_dtype(default)
            params = parameters(spec.shapes, torch.float32)
            optimizer = make(spec, params)
            train(optimizer, params, range(3))
            outcomes.append([*params, *states(optimizer)])
    finally:
        torch.set_default_dtype(before)
    assert_same(*outcomes)


def chunks(spec: OptimSpec) -> None:
    """Cutting tensors into chunks of any size changes nothing (of sums: nothing to speak of)."""
    outcomes = []
    limit = kernel.CHUNK
    try:
        for bound in (limit, 13, 1):
            kernel.CHUNK = bound
            params = parameters(spec.shapes, torch.float32)
            optimizer = make(spec, params)
            train(optimizer, params, range(3))
            outcomes.append([*params, *states(optimizer)])
    finally:
        kernel.CHUNK = limit
    for other in outcomes[1:]:
        assert_close(other, outcomes[0], torch.float32)
        if spec.rule().elementwise:
            assert_same(other, outcomes[0])


class Memory(TorchDispatchMode):
    """Counts the bytes of tensors made inside it that are alive at once; meta tensors have none."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, Tensor) and not t.is_meta and t.untyped_storage()._cdata not in known | self.alive.keys():
                storage = t.untyped_storage()
                self.alive[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self.alive = {key: held for key, held in self.alive.items() if not held[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self.alive.values()))
        return out


def bounded_memory(spec: OptimSpec) -> None:
    """A compiled step makes no temporaries; a plain one holds at most the stated number, of one tensor."""
    shape = (96, 96)
    compiled = backend.use_cpu_jit() and not cpu_jit.supports(spec.rule(), torch.empty(shape))
    for path, stated in (("auto", 0 if compiled else spec.temporaries), ("torch", spec.temporaries)):
        for count in (1, 3):
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv("OPTIM_BACKEND", path)
                patch.setattr(stacks, "LIMIT", 1)  # stacks are bounded by that: test_stacks.py
                params = parameters([shape] * count, torch.float32)
                optimizer = make(spec, params)
                train(optimizer, params, range(2))
                set_grads(params, 3)
                with Memory() as memory:
                    optimizer.step()
            held = memory.peak / (4 * 96 * 96)
            assert held <= stated + 0.05, f"{path}: {held:.2f} temporaries of a parameter, stated {stated}"


def gradient_scaler(spec: OptimSpec) -> None:
    """torch.amp.GradScaler: an overflow leaves parameters, state and step count; otherwise it is an unscaled step."""
    params, plain = parameters(spec.shapes, torch.float32), parameters(spec.shapes, torch.float32)
    optimizer, unscaled = make(spec, params), make(spec, plain)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(torch.zeros(()))
    for t in range(4):
        set_grads(params, t, scale=scaler.get_scale())
        overflow = t == 2
        if overflow:
            params[0].grad.view(-1)[0] = torch.inf
        before = snapshot([*params, *(states(optimizer) if t else [])])
        scaler.step(optimizer)
        if overflow:
            assert_same([*params, *states(optimizer)], before, "after an overflow")
        else:
            set_grads(plain, t)
            unscaled.step()
        scaler.update()
    assert_same(params, plain)


def meta_parameters(spec: OptimSpec) -> None:
    """Parameters on the meta device: built without data, refused at the step, stepping after they materialise."""
    shape = spec.shapes[0]
    p = Parameter(torch.empty(shape, device="meta"))
    optimizer = make(spec, [("layer.weight", p)])
    p.grad = torch.empty(shape, device="meta")
    with pytest.raises(TypeError, match=r"layer\.weight.*meta"):
        optimizer.step()
    real = parameters([shape])
    again = make(spec, real)
    train(again, real, range(1))
    assert all(x.device.type == "cpu" for x in states(again))


def groups(spec: OptimSpec) -> None:
    """Learning rate, weight decay and rule per group; a group with lr 0 stands still."""
    shape = spec.shapes[0]
    still, decayed, usual = parameters([shape] * 3)
    start = snapshot([still, decayed, usual])
    optimizer = make(
        spec,
        [
            {"params": [still], "lr": 0.0, "tag": "kept"},
            {"params": [decayed], "weight_decay": 0.5, "lr": 0.2},
            {"params": [usual], "rule": spec.rule(spec.inputs[-1])},
        ],
    )
    for p in (still, usual):
        p.grad = torch.ones_like(p)
    decayed.grad = torch.zeros_like(decayed)  # a zero gradient is no missing gradient: decay happens
    optimizer.step()
    assert_same([still], [start[0]])
    if spec.rest_decay is not None and not spec.rule().__dict__.get("cautious_decay"):
        assert_close([decayed], [start[1] * (1 - 0.2 * 0.5 * spec.rest_decay)], torch.float64)
    alone = Parameter(start[2].clone())
    alone.grad = torch.ones_like(alone)
    make(spec, [alone], spec.inputs[-1]).step()
    assert_same([usual], [alone])
    assert optimizer.param_groups[0]["tag"] == "kept"
    assert optimizer.state_dict()["param_groups"][0]["tag"] == "kept"
    usual: tuple[dict[str, Any], ...] = (
        {"momentum": 0.5},
        {"betas": (0.5, 0.6)},
        {"alpha": 0.5},
        {"lr_decay": 0.5},
        {"beta2_decay": -0.5},
    )
    changed = next(hyper for hyper in usual if set(hyper) <= spec.rule().settings())
    over = Optimizer([{"params": parameters([shape]), **changed}], spec.rule(), lr=0.1).param_groups[0]
    assert over["rule"] == spec.rule({**spec.default, **changed}) and not set(changed) & set(over)


def nothing_to_do(spec: OptimSpec) -> None:
    """No gradient anywhere, or zero gradients without decay, move nothing; a missing gradient makes no state."""
    params = parameters(spec.shapes)
    start = snapshot(params)
    optimizer = make(spec, params)
    optimizer.step()
    assert_same(params, start, "no gradient:")
    assert not optimizer.state
    for p in params:
        p.grad = torch.zeros_like(p)
    for _ in range(3):
        make(spec, params, weight_decay=0.0).step()
    assert_same(params, start, "zero gradient:")


def state_dict_twins(spec: OptimSpec) -> None:
    """A state dict loaded into a twin continues bit for bit, with named and unnamed parameters in any mix."""
    for hyper in spec.inputs:
        for saved_named in (False, True):
            for loaded_named in (False, True):
                a = parameters(spec.shapes, torch.float32)
                first = make(spec, named(a) if saved_named else a, hyper)
                train(first, a, range(4))
                a[0].grad = None
                first.step()
                b = [Parameter(p.detach().clone()) for p in a]
                second = make(spec, named(b) if loaded_named else b, hyper)
                second.load_state_dict(first.state_dict())
                train(first, a, range(4, 14))
                train(second, b, range(4, 14))
                assert_same(a, b)
                assert_same(states(first), states(second))
                if saved_named == loaded_named:
                    assert_same_dict(first.state_dict(), second.state_dict())


def older_state_dicts(spec: OptimSpec) -> None:
    """Fields that a saved rule lacks count as defaults; a number as step count loads; extra group keys survive."""
    params = parameters(spec.shapes)
    optimizer = make(spec, [{"params": params, "tag": 7}], {})
    train(optimizer, params, range(3))
    saved = copy.deepcopy(optimizer.state_dict())
    del saved["param_groups"][0]["rule"][list(saved["param_groups"][0]["rule"])[-1]]
    for state in saved["state"].values():
        state["step"] = 3
    twin = [Parameter(p.detach().clone()) for p in params]
    other = make(spec, twin, {})
    other.load_state_dict(saved)
    assert other.param_groups[0]["tag"] == 7
    train(optimizer, params, [5])
    train(other, twin, [5])
    assert_same(params, twin)
    strange = copy.deepcopy(optimizer.state_dict())
    strange["param_groups"][0]["rule"]["no_such_field"] = 1
    with pytest.raises(ValueError, match="no_such_field"):
        other.load_state_dict(strange)


def saved_files(spec: OptimSpec) -> None:
    """A state dict goes through torch.save and torch.load unchanged, with weights_only too."""
    for hyper in spec.inputs:
        params = parameters(spec.shapes, torch.bfloat16)
        optimizer = make(spec, named(params), hyper)
        train(optimizer, params, range(2))
        for weights_only in (True, False):
            file = io.BytesIO()
            torch.save(optimizer.state_dict(), file)
            file.seek(0)
            loaded = torch.load(file, weights_only=weights_only)
            assert_same_dict(loaded, optimizer.state_dict())
            twin = [Parameter(p.detach().clone()) for p in params]
            other = make(spec, named(twin), hyper)
            other.load_state_dict(loaded)
            assert_same_dict(other.state_dict(), optimizer.state_dict())


def loading_copies(spec: OptimSpec) -> None:
    """Loading leaves the dict alone and shares no memory with it; steps stay on the CPU; bad ones change nothing."""
    params = parameters(spec.shapes, torch.float32)
    optimizer = make(spec, named(params))
    train(optimizer, params, range(2))
    saved = copy.deepcopy(optimizer.state_dict())
    kept = copy.deepcopy(saved)
    twin = [Parameter(p.detach().clone()) for p in params]
    other = make(spec, named(twin))
    other.load_state_dict(saved)
    train(other, twin, range(3))
    assert_same_dict(saved, kept)
    assert all(other.state[p]["step"].device.type == "cpu" for p in twin)
    bad: list[tuple[str, Any]] = [
        ("another rule", lambda d: d["param_groups"][0]["rule"].update(name="other")),
        ("in the place where", lambda d: d["param_groups"][0]["param_names"].reverse()),
        ("entries", lambda d: d["state"][0].pop("step")),
        ("shape", lambda d: d["state"][0].update(step=torch.zeros(2))),
        ("number of parameter groups", lambda d: d["param_groups"].append(d["param_groups"][0])),
        ("size of optimizer's group", lambda d: d["param_groups"][0]["params"].pop()),
    ]
    before = copy.deepcopy(other.state_dict())
    for message, spoil in bad:
        spoiled = copy.deepcopy(saved)
        spoil(spoiled)
        with pytest.raises(ValueError, match=message):
            other.load_state_dict(spoiled)
        assert_same_dict(other.state_dict(), before, message)


def hooks(spec: OptimSpec) -> None:
    """Step and state-dict hooks, local and global, fire in torch's order, see plain values, and can be removed."""
    params = parameters(spec.shapes[:1])
    optimizer = make(spec, params)
    calls: list[str] = []

    def note(name: str) -> Any:
        return lambda *args: calls.append(name)

    def seen(_: Any, saved: dict[str, Any]) -> None:
        calls.append("saved " + saved["param_groups"][0]["rule"]["name"])

    def dtypes(opt: Any) -> None:
        made = spec.rule().init(params[0]).values()
        calls.append("loaded " + str({x.dtype for x in states(opt)} == {x.dtype for x in made}))

    handles = [
        register_optimizer_step_pre_hook(note("global pre")),
        register_optimizer_step_post_hook(note("global post")),
        optimizer.register_step_pre_hook(note("pre")),
        optimizer.register_step_post_hook(note("post")),
        optimizer.register_state_dict_pre_hook(note("before saving")),
        optimizer.register_state_dict_post_hook(seen),
        optimizer.register_load_state_dict_pre_hook(note("before loading")),
        optimizer.register_load_state_dict_post_hook(dtypes),
    ]
    train(optimizer, params, [0])
    assert calls == ["global pre", "pre", "post", "global post"]
    calls.clear()
    optimizer.load_state_dict(optimizer.state_dict())
    assert calls == ["before saving", f"saved {spec.name}", "before loading", "loaded True"]
    calls.clear()
    for handle in handles:
        handle.remove()
    train(optimizer, params, [1])
    optimizer.load_state_dict(optimizer.state_dict())
    assert not calls
    assert not optimizer._optimizer_state_dict_post_hooks and not optimizer._optimizer_load_state_dict_pre_hooks


def copies(spec: OptimSpec) -> None:
    """deepcopy and pickling continue bit for bit; repr shows the rule."""
    params = parameters(spec.shapes)
    optimizer = make(spec, named(params))
    train(optimizer, params, range(3))
    file = io.BytesIO()
    torch.save(optimizer, file)
    file.seek(0)
    twins = [copy.deepcopy(optimizer), torch.load(file, weights_only=False)]
    assert repr(spec.rule()) in repr(optimizer)
    train(optimizer, params, range(3, 6))
    for twin in twins:
        assert type(twin) is type(optimizer) and optimizer.defaults.items() <= twin.defaults.items()
        theirs = [p for group in twin.param_groups for p in group["params"]]
        train(twin, theirs, range(3, 6))
        assert_same(params, theirs)
        assert_same_dict(twin.state_dict(), optimizer.state_dict())


def errors(spec: OptimSpec) -> None:
    """Wrong arguments: the exact exception, naming what came."""
    shape = spec.shapes[0]
    (p,), rule = parameters([shape]), spec.rule()
    for hyper, part in spec.errors:
        with pytest.raises(ValueError, match=part):
            spec.rule(hyper)
    bad: list[tuple[type[Exception], str, Any]] = [
        (TypeError, "iterable", lambda: Optimizer(p, rule, lr=0.1)),
        (TypeError, "dict", lambda: Optimizer({"a": p}, rule, lr=0.1)),
        (TypeError, "a class", lambda: Optimizer([p], type(rule), lr=0.1)),
        (ValueError, "empty", lambda: Optimizer([], rule, lr=0.1)),
        (ValueError, "more than one", lambda: Optimizer([{"params": [p]}, {"params": [p]}], rule, lr=0.1)),
        (ValueError, "names", lambda: Optimizer([("a", p), *parameters([shape])], rule, lr=0.1)),
        (ValueError, "lr", lambda: Optimizer([p], rule, lr=-0.1)),
        (ValueError, "lr", lambda: Optimizer([p], rule, lr=float("nan"))),
        (ValueError, "lr", lambda: Optimizer([p], rule, lr="0.1")),
        (ValueError, "lr", lambda: Optimizer([p], rule, lr=torch.ones(2))),
        (ValueError, "weight_decay", lambda: Optimizer([p], rule, lr=0.1, weight_decay=-1.0)),
        (ValueError, "weight_decay", lambda: Optimizer([{"params": [p], "weight_decay": "x"}], rule, lr=0.1)),
        (TypeError, "integer|int64", lambda: Optimizer([("ids", torch.zeros(shape).long())], rule, lr=0.1)),
        (TypeError, "no_such", lambda: spec.rule({"no_such": 1})),
        (TypeError, "no_such", lambda: create(spec.name, named([p]), lr=0.1, no_such=1)),
        (ValueError, f"did you mean '{spec.name}'", lambda: create(spec.name + "x", named([p]), lr=0.1)),
        (ValueError, "fused", lambda: Optimizer([{"params": [p], "fused": True}], rule, lr=0.1)),
    ]
    for kind, part, call in bad:
        with pytest.raises(kind, match=part):
            call()
    for part, repeated in (("such as number 1", [p, p]), ("such as 'b'", [("a", p), ("b", p)])):
        with pytest.warns(UserWarning, match=f"a parameter group with duplicate parameters.*{part}"):
            (group,) = Optimizer([{"params": repeated}], rule, lr=0.1).param_groups
        assert group["params"] == [p]
    assert OPTIMIZERS[spec.name].__doc__


def complex_parameters(spec: OptimSpec) -> None:
    """A complex parameter is refused by name, before and after construction."""
    bad = Parameter(torch.zeros(spec.shapes[0], dtype=torch.complex64))
    with pytest.raises(TypeError, match=r"wave.*complex64"):
        make(spec, [("wave", bad)])
    good = parameters(spec.shapes[:1])
    optimizer = make(spec, good)
    with pytest.raises(TypeError, match="number 1"):
        optimizer.add_param_group({"params": [bad]})
    assert len(optimizer.param_groups) == 1


def sparse_gradients(spec: OptimSpec) -> None:
    """A sparse gradient is refused by name before any parameter has moved."""
    params = parameters([(4, 3), (4, 3)])
    start = snapshot(params)
    optimizer = make(spec, [("dense", params[0]), ("table", params[1])])
    set_grads(params, 1)
    params[1].grad = params[1].grad.to_sparse()
    with pytest.raises(TypeError, match="table.*sparse"):
        optimizer.step()
    assert_same(params, start)
    assert not optimizer.state


def closures(spec: OptimSpec) -> None:
    """The closure runs once, with gradients enabled; its loss is returned as it is."""
    w, loss = regression(spec)
    optimizer = make(spec, [w], lr=spec.lr)
    modes: list[bool] = []

    def closure() -> Tensor:
        modes.append(torch.is_grad_enabled())
        optimizer.zero_grad()
        value = loss()
        value.backward()
        return value

    with torch.no_grad():
        returned = optimizer.step(closure)
    assert modes == [True]
    assert isinstance(returned, Tensor) and returned.item() > loss().item()
    assert optimizer.step() is None


def lazy_state(spec: OptimSpec) -> None:
    """No state before the first step, and tensors under torch's names after it."""
    params = parameters(spec.shapes, torch.bfloat16)
    optimizer = make(spec, params)
    assert not optimizer.state
    train(optimizer, params, [0])
    for p in params:
        state = optimizer.state[p]
        assert state and all(isinstance(v, Tensor) for v in state.values())
        assert float(state["step"]) == 1 and state["step"].shape == ()
    moments = sum(v.numel() * v.element_size() for v in optimizer.state[params[0]].values() if v.ndim > 0)
    assert moments == spec.state_bytes * params[0].numel()


def compiles(spec: OptimSpec) -> None:
    """`update` traces as one graph and gives the same result compiled."""
    rule, (p,) = spec.rule(), parameters(spec.shapes[:1])
    compiled = torch.compile(rule.update, backend="eager", fullgraph=True)
    state = rule.init(p)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for t in range(2):
            grad = randn(spec.shapes[0], t)
            got, new = compiled(grad, state, p.detach())
            want, state = rule.update(grad, state, p.detach())
            assert_close([got, *new.values()], [want, *state.values()], torch.float64)
    torch.compiler.reset()


def kernels_match(spec: OptimSpec) -> None:
    """Two steps with every Triton kernel that the rule has, interpreted here, are those of the definition."""
    if not backend.interpreted:
        pytest.skip("triton is not installed, or kernels are made for a GPU")
    for hyper in spec.inputs[:2]:  # the interpreter is slow
        ends = {}
        for path in ("triton", "torch"):
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv("OPTIM_BACKEND", path)
                patch.setenv("TRITON_INTERPRET", "1")
                params = parameters(spec.shapes, torch.float32)
                optimizer = make(spec, params, hyper)
                train(optimizer, params, range(2))
                ends[path] = snapshot([*params, *(s for s in states(optimizer) if s.is_floating_point())])
        assert_close(ends["triton"], ends["torch"], torch.float32, f"{hyper}")


PROPERTIES = {
    "01": lowers_the_loss,
    "02": follows_schedules,
    "03": tensor_lr,
    "04": grouped_equals_single,
    "05": kernels_match,
    "06": mixed_dtypes,
    "07": default_dtype,
    "08": chunks,
    "09": bounded_memory,
    "10": gradient_scaler,
    "11": meta_parameters,
    "12": groups,
    "13": nothing_to_do,
    "14": state_dict_twins,
    "15": older_state_dicts,
    "16": saved_files,
    "17": loading_copies,
    "18": hooks,
    "19": copies,
    "20": errors,
    "21": complex_parameters,
    "22": sparse_gradients,
    "23": closures,
    "24": lazy_state,
    "25": compiles,
}
