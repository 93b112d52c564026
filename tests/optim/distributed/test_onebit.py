"""1-bit Adam: the compressed mean, the published trajectories on two workers, and what it costs."""

import copy
import math
import pickle

import numpy as np
import pytest
import torch

from optim import OneBitAdam, OneBitAdamRule, Optimizer
from optim.distributed.onebit import _compress, _signs, padded
from tests.optim.distributed import jobs
from tests.optim.harness import assert_same, parameters, randn, set_grads, train
from tests.reference.onebit_adam import Workers


def test_padding_is_of_whole_bytes_for_every_worker():
    for workers in range(1, 20):
        for numel in (1, 7, 30, 1000):
            length = padded(numel, workers)
            assert length >= numel and length % workers == 0 and length // workers % 8 == 0
            assert length - numel < workers * math.lcm(workers, 8)
    assert [padded(30, 2), padded(16, 2), padded(5, 2)] == [32, 16, 16], "as the published code pads"


def test_signs_and_what_they_miss():
    x = randn((64,), 1)
    x[3] = 0.0
    before = x.clone()
    packed, scale = _compress(x)
    signs = _signs(packed, x.dtype)
    assert packed.numel() == 8 and signs[3] == 1, "zero is sent as plus"
    assert torch.equal(signs, torch.where(before >= 0, 1.0, -1.0).double())
    assert float(scale) == pytest.approx(float(before.norm()) / 8)
    torch.testing.assert_close(x + scale * signs, before)


@pytest.mark.golden
@pytest.mark.distributed
def test_published_trajectories(golden_dir, job_of, onebit_cases, record_property):
    """Two processes against DeepSpeed's classes: parameters, moments, and both errors after every step, in float32 and
    float64.
    """
    if not onebit_cases:
        pytest.skip(f"no case of 1-bit Adam in {golden_dir}")
    found = job_of(2)
    for j, (case, (inputs, names, steps, _, dtype)) in enumerate(onebit_cases):
        record_property("golden", case["id"])
        compressed = int(inputs["compressed"].sum())
        keys = [
            ("params", "params", len(steps)),
            ("exp_avg", "exp_avg", len(steps)),
            ("exp_avg_sq", "exp_avg_sq", len(steps)),
        ]
        for rank, result in enumerate(found):
            errors = [(key, f"rank{rank}/{key}", compressed) for key in ("worker_error", "server_error")]
            for n in names:
                for key, there, count in keys + errors:
                    torch.testing.assert_close(
                        result["onebit"][j][f"{key}/{n}"],
                        inputs[f"{there}/{n}"][-count:].double(),
                        **case["tolerance"],
                        msg=lambda m, at=(case["case"], key, n, dtype): f"{at}\n{m}",
                    )


@pytest.mark.distributed
@pytest.mark.parametrize("ranks", [2, 3])
def test_workers_agree_learn_and_send_a_bit_an_entry(ranks, job_of):
    found = [result["training"] for result in job_of(ranks)]
    for other in found[1:]:
        assert torch.equal(other["w"], found[0]["w"]), "the same bits on every worker"
    reference = Workers(np.zeros((40, 12)), ranks, jobs.LR, freeze_step=jobs.FREEZE_STEP)
    for t in range(jobs.STEPS):
        w = torch.tensor(reference.p)
        grads = [jobs.least_squares(w, rank, ranks).numpy() for rank in range(ranks)]
        reference.step(grads, jobs.LR * (1 - t / jobs.STEPS))
    np.testing.assert_allclose(found[0]["w"].numpy(), reference.p, rtol=1e-9, atol=1e-11)
    assert (found[0]["w"] - randn((40, 12), 1)).norm() < 0.2 * randn((40, 12), 1).norm()
    length = padded(480, ranks)
    one = (length // 8 // ranks + 8) * (ranks - 1)
    assert found[0]["sent"] == {"all_to_all": 2 * one, "all_gather": 0, "all_reduce": 1}, "1: whether all is finite"
    assert 2 * one < 8 * 480 / 16, "less than a sixteenth of a gradient in float64"


@pytest.mark.distributed
@pytest.mark.parametrize("ranks", [2, 3])
def test_a_gradient_that_is_not_finite_leaves_its_tensor_alone_on_every_worker(ranks, job_of):
    """Also on those whose own is fine, errors included; the other tensor steps. A loaded state has no errors."""
    for result in job_of(ranks):
        before, after = result["not_finite"]["seen"][1:]
        assert set(before) == set(after) and len(after) == 10
        for key in before:
            assert torch.equal(before[key], after[key]) == key.endswith("/a"), key
            assert after[key].isfinite().all()
        (said,) = result["not_finite"]["said"]
        assert "'a'" in said and "not finite; onebit_adam left it unchanged" in said
        assert result["not_finite"]["errors"] == 0


def test_one_process_compresses_nothing():
    """Then it is its rule: Adam without bias correction, whose second moment stands still after the warm-up."""
    ours, theirs = parameters([(4, 3)]), parameters([(4, 3)])
    onebit = OneBitAdam(ours, lr=0.05, freeze_step=2, weight_decay=0.1)
    train(onebit, ours, range(5))
    train(Optimizer(theirs, OneBitAdamRule(freeze_step=2), lr=0.05, weight_decay=0.1), theirs, range(5))
    assert_same(ours, theirs)
    p = parameters([(4, 3)])[0]
    m = v = torch.zeros_like(p)
    for t in range(5):
        set_grads([p], t + 1)
        m = 0.9 * m + 0.1 * p.grad
        v = 0.999 * v + 0.001 * p.grad**2 if t < 2 else v
        with torch.no_grad():
            p -= 0.05 * (m / (v.sqrt() + 1e-8) + 0.1 * p)
    torch.testing.assert_close(ours[0], p, rtol=1e-12, atol=1e-14)


def test_a_copy_steps_on_with_its_masks():
    (p,) = parameters([(4, 3)])
    mask = torch.eye(4, 3)
    optimizer = OneBitAdam([("w", p)], lr=0.05, masks={"w": mask}, mask_unseen=False)
    for q, other in (copy.deepcopy((p, optimizer)), pickle.loads(pickle.dumps((p, optimizer)))):
        assert torch.equal(other._masks[q], mask) and not other.mask_unseen
        train(other, [q], range(3))
    train(optimizer, [p], range(3))
    assert_same([p], [q])


@pytest.mark.parametrize(
    ("error", "part", "settings"),
    [
        (ValueError, "freeze_step", {"freeze_step": -1}),
        (ValueError, "betas", {"betas": (1.0, 0.9)}),
        (ValueError, "masks has 'v', which is not the name", {"masks": {"v": torch.ones(2, 2)}}),
        (ValueError, r"mask of 'w' has shape \(3,\), not \(2, 2\)", {"masks": {"w": torch.ones(3)}}),
    ],
)
def test_refusals(error, part, settings):
    with pytest.raises(error, match=part):
        OneBitAdam([("w", torch.nn.Parameter(torch.ones(2, 2)))], lr=0.1, **settings)
