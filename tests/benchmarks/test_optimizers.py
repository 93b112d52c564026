"""What a step of every optimizer costs, beside torch's and pytorch-optimizer's, and beside moving its bytes once."""

import gc
import importlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import Parameter

from optim import RULES, LowRank, Optimizer, Quantized, UpdateRule
from optim.rules.muon import CONVENTIONS
from tests.benchmarks.measure import Report, Settings, interleaved, median, peak_bytes, ratio
from tests.optim.specs import SPECS

pytestmark = pytest.mark.bench

Shapes = list[tuple[int, ...]]

PEERS: dict[str, list[tuple[str, Callable[[list[Parameter]], torch.optim.Optimizer]]]] = {
    "adamw": [
        ("torch fused", lambda ps: torch.optim.AdamW(ps, lr=1e-4, weight_decay=0.01, fused=True)),
        ("torch foreach", lambda ps: torch.optim.AdamW(ps, lr=1e-4, weight_decay=0.01, foreach=True)),
    ],
    "sgd": [
        ("torch fused", lambda ps: torch.optim.SGD(ps, lr=1e-4, momentum=0.9, fused=True)),
        ("torch foreach", lambda ps: torch.optim.SGD(ps, lr=1e-4, momentum=0.9, foreach=True)),
    ],
    "nadam": [("torch foreach", lambda ps: torch.optim.NAdam(ps, lr=1e-4, foreach=True))],
    "muon": [("torch", lambda ps: torch.optim.Muon(ps, lr=1e-4))],
}
OTHERS = {
    "lion": "Lion",
    "adabelief": "AdaBelief",
    "exadam": "EXAdam",
    "adamp": "AdamP",
    "sgdp": "SGDP",
    "spam": "SPAM",
    "stable_spam": "StableSPAM",
    "sgd_sai": "SGDSaI",
    "adam_mini": "AdamMini",
    "adahessian": "AdaHessian",
    "sophia_h": "SophiaH",
}
HYPER = {"sgd": {"momentum": 0.9}, "sgdp": {"momentum": 0.9}}
ALIKE: dict[str, dict[str, Any]] = {
    "adabelief": {"rectify": False},
    "muon": CONVENTIONS["torch"] | {"ns_dtype": "bfloat16"},
}
"""Settings of ours that make the steps those of the peer's defaults."""

OTHERWISE = {
    "adahessian": "the peer's curvature is 1, ours has had no refresh; both read it",
    "sgd_sai": "the peer starts its buffer at zero and gives vectors the gain 1",
    "sophia_h": "the peer's curvature is 1, ours has had no refresh; both read it",
}
"""Peers whose steps are not ours, and why; of the others it is tested, with ours set as in `ALIKE`."""


def llama(small: bool) -> Shapes:
    """SmolLM2-135M: hidden 576, 9 heads and 3 key heads of 64, feed-forward 1536, 30 layers, tied embeddings."""
    hidden, keys, ffn, layers, vocabulary = (96, 32, 256, 2, 512) if small else (576, 192, 1536, 30, 49152)
    layer = [
        (hidden, hidden),
        (keys, hidden),
        (keys, hidden),
        (hidden, hidden),
        (ffn, hidden),
        (ffn, hidden),
        (hidden, ffn),
        (hidden,),
        (hidden,),
    ]
    return [(vocabulary, hidden), *(shape for _ in range(layers) for shape in layer), (hidden,)]


def tiny(small: bool) -> Shapes:
    return [(8, 8)] * (100 if small else 10_000)


def made(shapes: Shapes) -> list[Parameter]:
    generator = torch.Generator().manual_seed(0)
    params = [Parameter(0.02 * torch.randn(shape, generator=generator)) for shape in shapes]
    for p in params:
        p.grad = 0.01 * torch.randn(p.shape, generator=generator)
    return params


def peers(name: str, report: Report) -> list[tuple[str, Callable[[list[Parameter]], torch.optim.Optimizer]]]:
    """What to compare with: torch's own where it has the optimizer, else pytorch-optimizer's."""
    if name in PEERS:
        return PEERS[name]
    try:
        others = importlib.import_module("pytorch_optimizer")
    except ImportError:
        note = "pytorch-optimizer is not installed: rules that torch does not have stand alone."
        report.notes += [note] * (note not in report.notes)
        return []
    if name not in OTHERS:
        return []
    kind = getattr(others, OTHERS[name])
    return [("pytorch-optimizer", lambda ps: peer(name, kind, ps))]


def peer(name: str, kind: Callable[..., torch.optim.Optimizer], params: list[Parameter]) -> torch.optim.Optimizer:
    """pytorch-optimizer's, with 1e-4 and no decay; curvature, where it has any, is given once and read from then on."""
    if name == "adam_mini":  # by names, of which none is a transformer's here: one second moment a tensor
        model = torch.nn.Module()
        for i, p in enumerate(params):
            model.register_parameter(f"p{i}", p)
        return kind(model, lr=1e-4, weight_decay=0.0)
    if name in ("adahessian", "sophia_h"):
        made = kind(params, lr=1e-4, update_period=1 << 40)
        made.step = partial(made.step, hessian=[torch.ones_like(p) for p in params])  # type: ignore[method-assign]
        made.step()
        del made.step
        return made
    return kind(params, lr=1e-4, **HYPER.get(name, {}))


def agrees(name: str, make: Callable[[list[Parameter]], torch.optim.Optimizer]) -> bool:
    """Whether three steps of ours and of the peer, both without decay, end at the same parameters (1 % of the way)."""
    shapes: Shapes = [(24, 16), (16, 24), *([] if SPECS[name].min_ndim > 1 else [(16,)])]
    ours, theirs, start = made(shapes), made(shapes), made(shapes)
    optimizer = Optimizer(ours, RULES[name](**HYPER.get(name, {}) | ALIKE.get(name, {})), lr=1e-4)
    other = make(theirs)
    for group in other.param_groups:
        group["weight_decay"] = 0.0
    for _ in range(3):
        optimizer.step()
        other.step()
    ways = [(torch.cat([(p - s).flatten() for p, s in zip(ps, start, strict=True)])) for ps in (ours, theirs)]
    return bool((ways[0] - ways[1]).norm() <= 0.01 * ways[1].norm())


def moved_bytes(rule: UpdateRule, params: list[Parameter], state_bytes: int) -> int:
    """Bytes that a step must read and write: parameter, gradient, state; the state that it does not change, once."""
    probe = params[0].detach()[:4, :4].contiguous()
    state = rule.init(probe)
    _, new = rule.update(torch.ones_like(probe), state, probe)
    same = sum(4 for key, value in new.items() if value is state[key] and value.shape == probe.shape)
    elements = sum(p.numel() for p in params)
    return 12 * elements + 2 * state_bytes - same * elements


@pytest.mark.parametrize("which", [llama, tiny], ids=["llama", "tiny"])
def test_optimizers(which: Callable[[bool], Shapes], bench: Settings, tmp_path: Path) -> None:
    small = bench.model == "tiny"
    everything = made(which(small))
    elements = sum(p.numel() for p in everything)
    title = f"A step of {elements:,} parameters in {len(everything):,} tensors"
    report = Report(f"optimizers-{which.__name__}", title, bench)
    report.workload = {"tensors": len(everything), "parameters": elements}
    yardstick = torch.zeros(1 << (20 if small else 26))
    for name in (n for n in sorted(RULES) if not issubclass(RULES[n], Quantized | LowRank)):  # in test_compressed.py
        rule = RULES[name](**HYPER.get(name, {}))
        params = [p for p in everything if p.ndim >= SPECS[name].min_ndim]
        matrices = SPECS[name].min_ndim > 1
        if matrices:  # embeddings are none of theirs, and a tenth of the layers is enough to compare
            params = params[1:22] if which is llama else params[:200]
        ours = Optimizer(params, rule, lr=1e-4, weight_decay=0.01)
        arms: dict[str, Callable[[], Any]] = {name: ours.step}
        for label, make in peers(name, report):
            if name in OTHERWISE:
                note = f"{name} / {label}: another step ({OTHERWISE[name]})."
                report.notes += [note] * (note not in report.notes)
            else:
                assert agrees(name, make), f"{name}: its steps are not those of {label}"
            arms[label] = make(params).step
        for arm in arms.values():  # makes the state, compiles
            arm()
        held = [t for state in ours.state.values() for t in state.values() if t.ndim > 0]
        state_bytes = sum(t.numel() * t.element_size() for t in held)
        arms["add in place"] = lambda: yardstick.add_(1.0)  # a copy would also read what it overwrites
        grown = peak_bytes(ours.step)
        samples = interleaved(arms, bench.times(7), bench.seconds / len(RULES))
        bandwidth = 2 * yardstick.nbytes / median(samples["add in place"])
        bound = moved_bytes(rule, params, state_bytes) / bandwidth
        count = sum(p.numel() for p in params)
        seconds = median(samples[name])
        report.add(f"{name}: step", seconds * 1e3, "ms")
        for label in list(arms)[1:-1]:
            report.add(f"{name}: {label}", median(samples[label]) * 1e3, "ms")
            aim = {"torch fused": 1.1 if name == "adamw" else None, "pytorch-optimizer": 0.667}.get(label)
            report.add(f"{name} / {label}", ratio(samples[name], samples[label]), "x", at_most=aim)
        if which is llama:
            stated = SPECS[name].state_bytes
            report.add(f"{name} / bytes bound", seconds / bound, "x", at_most=None if matrices else 2)
            report.add(
                f"{name}: state",
                state_bytes / count,
                "bytes a parameter",
                aim=f"{stated}, as stated",
                met=round(state_bytes / count, 2) == stated,
            )
            if grown is not None:
                report.add(f"{name}: memory that a step adds", grown / 2**20, "MiB")
        report.keep({f"{name}: {label}": list_ for label, list_ in samples.items()})
        del ours, arms, samples, held
        gc.collect()
    report.notes += [
        "Bytes bound: parameter, gradient and state read, parameter and state written once, at the speed at which "
        f"{yardstick.nbytes / 2**20:.0f} MiB are read and written back (`add_` in place) in the same repetitions.",
        "Rules for matrices step those of three layers (llama) or 200 (tiny). Others step everything.",
    ]
    report.write(tmp_path)
