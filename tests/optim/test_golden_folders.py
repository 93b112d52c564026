"""The golden harness on a folder of other names, shapes and settings, made here from the independent transcriptions."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

from tests.conftest import REPOSITORY
from tests.reference import adabelief, adam_mini, adamw, lion, muon, spam

STEPS = 7
TIGHT = {"rtol": 1e-9, "atol": 1e-11}


def recorded(shapes, seed, *, missing=True):
    """A problem on recorded gradients: a zero step, one with larger entries, one that the second tensor misses."""
    draw = np.random.default_rng(seed)
    arrays = {f"init/{n}": draw.standard_normal(shape) for n, shape in shapes.items()}
    for k, (n, shape) in enumerate(shapes.items()):
        grads = draw.standard_normal((STEPS, *shape))
        grads[2], grads[4] = 0, 1000 * grads[4]
        arrays[f"grad/{n}"] = grads
        arrays[f"has_grad/{n}"] = np.array([not (missing and k == 1 and t == 3) for t in range(STEPS)])
    return arrays


def grads_of(arrays, name):
    return [g if there else None for g, there in zip(arrays[f"grad/{name}"], arrays[f"has_grad/{name}"], strict=True)]


def trajectory(reference, arrays, name, **settings):
    start = arrays[f"init/{name}"]
    return np.stack([start, *reference.run(start, grads_of(arrays, name), **settings)])


def adam_case(name, optimizer, problem, hyper, paths, **more):
    return {"case": name, "file": f"{name}.npz", "optimizer": optimizer, "problem": problem, "params": list(paths),
            "steps": STEPS, "dtype": "float64", "hyper": hyper, "param_groups": None, "lr_mult": None,
            "reference": "a transcription", "tolerance": TIGHT, "notes": "", **more}  # fmt: skip


def adam_set(folder):
    """A set in the schema of the Adam family, with problems called otherwise."""
    folder.mkdir()
    shapes = {"kernel": (5, 9), "offset": (4,), "tensor": (2, 3, 2)}
    named = {
        "model.layers.0.self_attn.q_proj.weight": (12, 12),
        "model.layers.0.self_attn.k_proj.weight": (8, 12),
        "model.layers.0.mlp.up_proj.weight": (7, 12),
        "lm_head.weight": (11, 12),
    }
    problems, inputs = {}, {}
    for key, some in (("alpha", shapes), ("omega", named), ("whole", shapes)):
        inputs[key] = recorded(some, len(inputs) + 3, missing=key != "whole")
        np.savez(folder / f"data_{key}.npz", **inputs[key])
        problems[key] = {"kind": "recorded_grads", "file": f"data_{key}.npz", "steps": STEPS, "shapes": some}
    problems["omega"] |= {"dim": 12, "n_heads": 3, "n_kv_heads": 2}
    problems["strange"] = {"kind": "of a kind that nobody knows", "file": "data_alpha.npz", "steps": STEPS}
    cases = []

    def add(name, optimizer, problem, reference, hyper, told=None, each=lambda n: {}):
        rest = {k: v for k, v in hyper.items() if told is None or k in ("lr", "weight_decay")} | (told or {})
        paths = {n: trajectory(reference, inputs[problem], n, **rest | each(n)) for n in problems[problem]["shapes"]}
        np.savez(folder / f"{name}.npz", **{f"{name}/params/{n}": path for n, path in paths.items()})
        cases.append(adam_case(name, optimizer, problem, hyper, paths))

    betas = {"lr": 3e-3, "weight_decay": 0.07, "betas": [0.7, 0.93]}
    add("w1", "AdamW", "alpha", adamw, betas | {"eps": 1e-5, "amsgrad": True})
    add("l1", "Lion", "omega", lion, {"lr": 2e-3, "weight_decay": 0.3, "betas": [0.8, 0.95]})
    add(
        "mini",
        "AdamMini",
        "omega",
        adam_mini,
        betas | {"eps": 1e-7},
        each=lambda n: {"blocks": {"q_proj": 4 * 12, "k_proj": 4 * 12}.get(n.split(".")[-2], "row")},
    )
    belief = betas | {"eps": 1e-8}
    add(
        "b1",
        "AdaBelief",
        "alpha",
        adabelief,
        belief
        | {
            "amsgrad": False,
            "degenerated_to_sgd": True,
            "weight_decouple": True,
            "fixed_decay": True,
            "rectify": False,
        },
        told={k: belief[k] for k in ("betas", "eps")} | {"rectify": False, "fixed_decay": True},
    )
    add(
        "s1",
        "SPAM",
        "whole",
        spam,
        {
            "lr": 3e-3,
            "weight_decay": 0.0,
            "betas": [0.7, 0.93],
            "eps": 1e-6,
            "correct_bias": True,
            "warmup_steps": 2,
            "threshold": 10,
            "DeltaT": 3,
            "grad_accu_steps": 1,
        },
    )
    none = {"kernel": np.zeros((STEPS + 1, 5, 9))}
    cases += [
        adam_case("x1", "Unheard", "alpha", {"lr": 1.0}, none),
        adam_case("x2", "AdamW", "strange", betas | {"eps": 1e-8}, none),
        adam_case("x3", "AdamW", "alpha", betas | {"eps": 1e-8, "lookahead": 5}, none),
        adam_case("x4", "AdamW", "alpha", betas | {"eps": 1e-8}, none, notes="informative: not to be held"),
    ]
    (folder / "manifest.json").write_text(json.dumps({"format": 1, "problems": problems, "cases": cases}))


def matrix_set(folder, *, spoil=False):
    """A set in the schema of the matrix family, whose manifest names problems and no kinds."""
    folder.mkdir()
    tensors = {"thin": (9, 4), "broad": (3, 10), "line": (6,)}
    inputs = recorded(tensors, 8)
    np.savez(folder / "problem_Q9.npz", **inputs)
    draw = np.random.default_rng(5)
    regression = {
        "X": draw.standard_normal((15, 5)),
        "Y": draw.standard_normal((15, 4)),
        "init/matrix": draw.standard_normal((4, 5)),
    }
    np.savez(folder / "problem_R7.npz", **regression)
    shared = {"nesterov": True, "ns_steps": 4, "ns_coefficients": [3.4445, -4.775, 2.0315], "eps": 1e-7}
    hyper = shared | {
        "muon": {"lr": 0.03, "momentum": 0.8, "weight_decay": 0.2},
        "adam": {"lr": 0.004, "betas": [0.6, 0.9], "eps": 1e-9, "weight_decay": 0.0},
    }
    told = {"momentum_form": "ema", "scale": "original", "ns_steps": 4}
    paths = {
        n: trajectory(muon, inputs, n, **hyper["muon"], **told)
        if len(shape) > 1
        else trajectory(adamw, inputs, n, lr=0.004, weight_decay=0.0, betas=(0.6, 0.9), eps=1e-9)
        for n, shape in tensors.items()
    }
    if spoil:
        paths["thin"][3:] += 0.01
    np.savez(folder / "m.npz", **{f"param/{n}": path for n, path in paths.items()})
    w, losses, path, buffer = regression["init/matrix"], [], [], 0.0
    for _ in range(STEPS):
        path.append(w)
        apart = regression["X"] @ w.T - regression["Y"]
        losses.append(0.5 / 15 * (apart**2).sum())
        g = apart.T @ regression["X"] / 15
        buffer = 0.8 * buffer + 0.2 * g
        step = muon.orthogonalised(0.8 * buffer + 0.2 * g, steps=4) * max(1.0, 4 / 5) ** 0.5
        w = w - 0.03 * (step + 0.2 * w)
    np.savez(folder / "r.npz", **{"param/matrix": np.stack([*path, w]), "loss": np.array(losses)})
    common = {
        "optimizer": "muon",
        "hyper_parameters": hyper,
        "source": "derived",
        "reference": "a transcription",
        "param_dtype": "float64",
        "newton_schulz_dtype": "float64",
        "agreement": "",
        "notes": "",
        "tolerance": {"rtol": 1e-7, "atol": 1e-9},
    }
    rules = {n: "muon" if len(shape) > 1 else "adam" for n, shape in tensors.items()}
    cases = [
        common | {"case": "m", "file": "m.npz", "problem": "Q9", "parameters": rules},
        common | {"case": "r", "file": "r.npz", "problem": "R7", "parameters": {"matrix": "muon"}},
    ]
    (folder / "manifest.json").write_text(json.dumps({"format_version": 1, "cases": cases}))


def run(folder):
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "tests/optim/test_golden.py",
        "-k",
        "not bundled",
        "--golden-dir",
        str(folder),
    ]
    done = subprocess.run(
        command,
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OPTIM_BACKEND": "torch"},
    )
    return done.returncode, done.stdout


@pytest.mark.slow
def test_every_case_of_another_folder_is_held_or_reported(tmp_path):
    adam_set(tmp_path / "family_of_mine")
    matrix_set(tmp_path / "others")
    code, out = run(tmp_path)
    assert code == 0, out[-3000:]
    assert "7 held, 0 failed, 4 not supported" in out, out[-3000:]
    for reason in (
        "optimizer Unheard (1)",
        "problem of kind 'of a kind that nobody knows' (1)",
        "setting lookahead (1)",
        "for information only (1)",
    ):
        assert reason in out, out[-3000:]


@pytest.mark.slow
def test_a_wrong_number_in_another_folder_fails(tmp_path):
    """The folder itself may be one set."""
    matrix_set(tmp_path / "set", spoil=True)
    code, out = run(tmp_path / "set")
    assert code == 1 and "1 held, 1 failed, 0 not supported" in out, out[-3000:]
