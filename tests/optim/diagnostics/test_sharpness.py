"""Block sharpness: reference numbers, the theory behind the estimator, and what it must leave alone."""

import json

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from optim import PAPER_RATIOS, blockwise
from optim.diagnostics import block_sharpness, propose_ratios
from tests.optim import golden


def identity(name):
    return name


@pytest.mark.golden
def test_softmax_regression_against_golden(golden_dir, record_property):
    """Problem p2 of the Adam family at its start, with recorded labels."""
    path = golden.stored_file(golden_dir, "estimators.npz")
    if path is None:
        pytest.skip(f"no estimators.npz in {golden_dir}")
    record_property("golden", f"{path.parent.name}:sharp")
    problems = json.loads((path.parent / "manifest.json").read_text(encoding="utf-8"))["problems"].values()
    file = next(problem["file"] for problem in problems if problem["kind"] == "softmax_rosen")
    inputs, stored = np.load(path.parent / file), np.load(path)
    x, labels = torch.tensor(inputs["X"]), torch.tensor(stored["sharp/labels"])
    params = {n: torch.tensor(inputs[f"init/{n}"], requires_grad=True) for n in "Wb"}
    found = block_sharpness(
        [lambda: cross_entropy(x @ params["W"].T + params["b"], labels)], params.items(), labels="data", block=identity
    )
    assert found == pytest.approx({n: float(stored[f"sharp/{n}"]) for n in "Wb"}, rel=1e-10)


def tiny_model(stored):
    """The model of the case's notes: embedding, scaled norm, feed-forward with a residual, head."""
    params = {k.removeprefix("param/"): torch.tensor(v, requires_grad=True)
              for k, v in stored.items() if k.startswith("param/")}  # fmt: skip

    def loss(y, batch=slice(None)):
        p = params
        h = p["emb"][torch.tensor(stored["x"])[batch]]
        u = h * (h.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * p["norm.gamma"]
        h = h + torch.tanh(u @ p["ffn.w1"].T) @ p["ffn.w2"].T
        return cross_entropy(h @ p["head"].T, torch.tensor(y)[batch])

    return params, loss


@pytest.fixture(scope="module")
def shared_case(golden_dir):
    found = golden.of_kind(golden_dir, "diagnostic: blockwise sharpness")
    if not found:
        pytest.skip(f"no case of blockwise sharpness in {golden_dir}")
    return dict(np.load(found[0].folder / found[0].entry["file"])) | {"case": found[0].id}


@pytest.mark.golden
def test_tiny_model_against_golden(shared_case, record_property):
    """Every tensor by itself, with the recorded sampled labels and with the data's; per example: batches of one."""
    record_property("golden", shared_case["case"])
    params, loss = tiny_model(shared_case)
    rows = range(len(shared_case["x"]))
    for key, losses in (
        ("gnb", [lambda: loss(shared_case["y_sampled"])]),
        ("empirical_minibatch", [lambda: loss(shared_case["y"])]),
        ("empirical_persample", [lambda i=i: loss(shared_case["y"], slice(i, i + 1)) for i in rows]),
    ):
        found = block_sharpness(losses, params.items(), labels="data", block=identity)
        assert found == pytest.approx({n: float(shared_case[f"{key}/{n}"]) for n in params}, rel=1e-8), key


def test_sampled_labels_give_the_gauss_newton_trace(shared_case):
    """In expectation: the mean of 1000 draws lies within a tenth of the exact trace; the data's labels are far off."""
    params, loss = tiny_model(shared_case)
    exact = {n: float(shared_case[f"gauss_newton_trace_avg/{n}"]) for n in params}
    found = block_sharpness([lambda: loss(shared_case["y"])] * 1000, params.items(), block=identity)
    assert found == pytest.approx(exact, rel=0.1)
    data = block_sharpness([lambda: loss(shared_case["y"])], params.items(), labels="data", block=identity)
    assert any(abs(data[n] - exact[n]) > exact[n] for n in params)


def plain():
    """Softmax regression of 2 layers' worth of named tensors."""
    made = torch.Generator().manual_seed(0)
    x = torch.randn(12, 5, generator=made)
    names = ("model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.up_proj.weight", "lm_head.weight", "score.weight")
    params = {n: torch.nn.Parameter(torch.randn(5, 5, generator=made)) for n in names}
    y = torch.arange(12) % 5

    def loss(labels=y):
        a, b, head, _ = params.values()
        return cross_entropy(torch.tanh(torch.tanh(x @ a.T) @ b.T) @ head.T, labels)

    return params, loss


def test_blocks_pool_their_tensors_and_nothing_is_touched():
    params, loss = plain()
    params["lm_head.weight"].grad = torch.ones(5, 5)
    before = torch.get_rng_state()
    tensors = block_sharpness([loss, loss], params.items(), block=identity, seed=3)
    blocks = block_sharpness([loss, loss], params.items(), seed=3)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(params["lm_head.weight"].grad, torch.ones(5, 5))
    layers = [value for name, value in tensors.items() if ".mlp." in name]
    assert set(tensors) == set(params) - {"score.weight"}, "no loss depends on it"
    assert blocks == pytest.approx({"ffn": sum(layers) / 2, "head": tensors["lm_head.weight"]})
    assert block_sharpness([loss], params.items(), seed=3) != block_sharpness([loss], params.items(), seed=4)
    params["lm_head.weight"].requires_grad_(False)
    assert set(block_sharpness([loss], params.items())) == {"ffn"}


@pytest.mark.parametrize("labels", ["sampled", "data"])
def test_dropout_leaves_the_global_generator(labels):
    w, x = torch.nn.Parameter(torch.ones(3, 5)), torch.ones(12, 5)
    before = torch.get_rng_state()
    block_sharpness(
        [lambda: cross_entropy(torch.nn.functional.dropout(x, 0.5) @ w.T, torch.zeros(12).long())],
        [("lm_head.weight", w)],
        labels=labels,
    )
    assert torch.equal(torch.get_rng_state(), before)


def test_ignored_labels_are_no_predictions():
    """B counts the labels that are not ignored: rows that are masked out change nothing but which rows there are."""
    params, loss = plain()
    y = torch.arange(12) % 5
    y[6:] = -100
    masked = block_sharpness([lambda: loss(y)], params.items(), labels="data")
    grads = torch.autograd.grad(loss(y), list(params.values())[:3])
    head = 6 * float(grads[2].square().sum()) / 25
    assert masked["head"] == pytest.approx(head, rel=1e-5)


def test_proposals():
    """1 for the sharpest, `largest` for the flattest, logarithmic between, and groups can be made of them."""
    found = {"embedding": 1e-6, "qk": 1e-4, "ffn": 1e-3, "norm": 1e-2}
    ratios = propose_ratios(found)
    assert ratios == pytest.approx({"embedding": 10, "qk": 10**0.5, "ffn": 10**0.25, "norm": 1})
    assert propose_ratios({"a": 2.0, "b": 2.0}) == {"a": 1.0, "b": 1.0} and propose_ratios({}) == {}
    order = sorted(found, key=found.__getitem__)
    assert (
        order
        == sorted(found, key=PAPER_RATIOS.__getitem__, reverse=True)
        == sorted(found, key=ratios.__getitem__, reverse=True)
    )
    params, loss = plain()
    measured = block_sharpness([loss], params.items())
    named = [(n, p) for n, p in params.items() if n != "score.weight"]
    assert [g["lr_ratio"] for g in blockwise(named, lr=1.0, ratios=propose_ratios(measured))] in ([1, 10], [10, 1])


@pytest.mark.parametrize(
    ("part", "call"),
    [
        ("empty", lambda p, f: block_sharpness([], p.items())),
        ("labels = 'own'", lambda p, f: block_sharpness([f], p.items(), labels="own")),
        ("cross_entropy", lambda p, f: block_sharpness([lambda: p["score.weight"].sum()], p.items())),
        ("cross_entropy", lambda p, f: block_sharpness([lambda: p["score.weight"].sum()], p.items(), labels="data")),
        ("'qk' is 0.0", lambda p, f: propose_ratios({"qk": 0.0})),
        ("largest = 0.5", lambda p, f: propose_ratios({"qk": 1.0}, largest=0.5)),
    ],
)
def test_refusals(part, call):
    with pytest.raises(ValueError, match=part):
        call(*plain())
