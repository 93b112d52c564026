"""Trajectories and schedules against reference numbers.

Two sets: the small copy in tests/golden, and ../shared/golden or `--golden-dir DIR`, of which every case is compared,
is held by another test, or is reported as not supported, with the reason.
"""

import json
from pathlib import Path

import pytest
import torch

from optim import SPAMRule, StableSPAMRule, schedule
from optim.curves import one_cycle_momentum
from tests.conftest import REPOSITORY, golden_folder
from tests.optim import golden, golden_builders, golden_runs

pytestmark = pytest.mark.golden

BUNDLED = REPOSITORY / "tests" / "golden"


def roots(config: pytest.Config) -> list[Path]:
    return [BUNDLED, golden_folder(config)]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    for argument, found in (("case", golden.every_case), ("curve", curves)):
        if argument in metafunc.fixturenames:
            bundled, given = ([*found(root)] for root in roots(metafunc.config))
            ids = [f"bundled:{c.id}" for c in bundled] + [c.id for c in given]
            metafunc.parametrize(argument, bundled + given, ids=ids)


class Curve:
    """One schedule of a schedules.json."""

    def __init__(self, folder: Path, entry: dict) -> None:
        self.entry, self.id = entry, f"{folder.name}:{entry['name']}"


def curves(root: Path) -> list[Curve]:
    return [
        Curve(path.parent, entry)
        for path in sorted([*root.glob("schedules.json"), *root.glob("*/schedules.json")])
        for entry in json.loads(path.read_text(encoding="utf-8"))["schedules"]
    ]


def test_golden_folder(golden_dir):
    """Says so where the folder is missing; and that what is there has cases."""
    assert [*golden.every_case(golden_dir)], f"no manifest.json with cases below {golden_dir}"


def test_trajectory(case, record_property):
    record_property("golden", case.id)
    name = case.entry["optimizer"]
    if name in golden.HELD_ELSEWHERE:
        record_property("elsewhere", golden.HELD_ELSEWHERE[name])
        pytest.skip(f"held by {golden.HELD_ELSEWHERE[name]}")
    try:
        if golden.for_information(case):
            raise golden.NotBuilt(f"{name}, {case.entry.get('variant', 'a variant')}: for information only")
        if name not in golden_builders.BUILDERS:
            raise golden.NotBuilt(f"optimizer {name}")
        got, losses = golden_runs.run(case, golden_builders.BUILDERS[name])
    except golden.NotBuilt as missing:
        record_property("not_built", str(missing))
        pytest.skip(f"not supported: {missing}")
    golden_runs.compare(case, got, losses)


def ours(entry: dict):
    """The schedule of a golden curve, or None if the suite does not have it."""
    p, name = entry["params"], entry["name"]
    warm = {"total_steps": p.get("total_steps"), "warmup_steps": p.get("warmup", 0)}
    ratio = p.get("min_lr", 0.0) / p.get("max_lr", 1.0)
    if name.startswith("linear_warmup"):
        return schedule("linear", **warm)
    if name.startswith("cosine_warmup"):
        return schedule("cosine", **warm, min_ratio=ratio)
    if name.startswith("cosine_annealing"):
        return schedule("cosine", total_steps=p["T_max"], min_ratio=p["eta_min"] / p["max_lr"])
    if name.startswith("wsd_"):
        total = p["warmup"] + p["stable"] + p["decay"]
        return schedule(
            "wsd",
            total_steps=total,
            warmup_steps=p["warmup"],
            decay_steps=p["decay"],
            decay=name.removeprefix("wsd_"),
            min_ratio=p["min_lr_ratio"],
        )
    if name.startswith(("rex_", "uba_", "poly")):
        kind = "polynomial" if name.startswith("poly") else name[:3]
        return schedule(kind, **warm, min_ratio=ratio, **{k: p[k] for k in ("d", "phi", "power") if k in p})
    if name.startswith("onecycle_"):
        length = p["total_steps"] - 1  # torch counts the values, not the steps between the first and the last
        if name.endswith("momentum"):
            options = {k: p[k] for k in ("base_momentum", "max_momentum")}
            return lambda step: one_cycle_momentum(step, total_steps=length, **options)
        options = {k: p[k] for k in ("pct_start", "div_factor", "final_div_factor", "three_phase")}
        anneal = {"cos": "cosine", "linear": "linear"}[p["anneal"]]
        return schedule("one_cycle", total_steps=length, anneal=anneal, **options)
    if name == "spam_warmup_scale":
        spam = SPAMRule(warmup_steps=p["warmup_steps"], DeltaT=1000)
        return lambda since: float(spam.warmup(torch.tensor(1000.0 + since), torch.tensor(since, dtype=torch.float64)))
    if name == "stablespam_beta_scale":
        stable = StableSPAMRule(total_T=p["total_T"], eta_min=p["eta_min"])
        return lambda call: float(stable.beta_scale(torch.tensor(float(call))))
    if name.startswith("blockwise_"):
        block = p.get("ratio", 1)  # of the peak over the base rate, of which the floor is a share
        base = p.get("base_lr", p.get("max_lr"))
        factor = schedule(
            name.split("_ratio")[0],
            total_steps=p["max_iters"],
            warmup_steps=p["warmup"],
            ratio=block,
            min_ratio=p["min_lr"] / base,
            **({"gamma": p["gamma"]} if "gamma" in p else {}),
        )
        return lambda step: block * base / p.get("max_lr", 1.0) * factor(step)
    return None


def test_schedule(curve, record_property):
    record_property("golden", curve.id)
    factor = ours(curve.entry)
    if factor is None:
        record_property("not_built", f"schedule {curve.entry['name']}")
        pytest.skip(f"not supported: schedule {curve.entry['name']}")
    peak = curve.entry["params"].get("max_lr", 1.0)  # 1 for momenta, and for block rates, which have a base rate
    for step, want in zip(curve.entry["steps"], curve.entry["values"], strict=True):
        got = peak * factor(step)
        assert got == pytest.approx(want, rel=1e-12, abs=1e-18), f"{curve.id}, step {step}: {curve.entry['reference']}"
