"""SPAM and Stable-SPAM beyond the battery: spikes, resets that come to all parameters at once, sparse momentum."""

import pytest
import torch

from optim import Optimizer, SPAMRule, StableSPAMRule, UpdateMap, create
from tests.optim.golden import arrays, cases, golden, input_file, kind_of
from tests.optim.harness import randn
from tests.reference.spam import PublishedSPAM
from tests.reference.stable_spam import PublishedStableSPAM

PUBLISHED = {"SPAM": PublishedSPAM, "StableSPAM": PublishedStableSPAM}


@pytest.mark.golden
def test_the_transcribed_codes_are_the_published_ones(golden_dir):
    """The judges of property 26 reproduce the trajectories that the published codes made."""
    held = 0
    for case in cases(golden_dir):
        entry = case.entry
        if entry["optimizer"] not in PUBLISHED or entry["dtype"] != "float64" or kind_of(case) != "recorded_grads":
            continue
        if "density_params" in entry:
            continue  # sparse momentum is not transcribed
        inputs, want = arrays(input_file(case)), golden(case)
        named = {n: torch.nn.Parameter(torch.tensor(inputs[f"init/{n}"])) for n in entry["params"]}
        settings = {k: v for k, v in entry["hyper"].items() if k != "amsgrad"}
        optimizer = PUBLISHED[entry["optimizer"]](list(named.values()), **settings)
        for t in range(entry["steps"]):
            for n, p in named.items():
                present = f"has_grad/{n}" not in inputs or inputs[f"has_grad/{n}"][t]
                p.grad = torch.tensor(inputs[f"grad/{n}"][t]) if present else None
            optimizer.step()
        for n, p in named.items():
            torch.testing.assert_close(p.detach(), want[n][-1], rtol=1e-10, atol=1e-12, msg=f"{case.id} {n}")
        held += 1
    if not held:
        pytest.skip(f"no case of these on recorded gradients in {golden_dir}")


@pytest.mark.parametrize(
    "rule",
    [
        SPAMRule(DeltaT=4, warmup_steps=2, threshold=0),
        StableSPAMRule(update_proj_gap=4, separate_counters=True),
    ],
)
def test_resets_count_calls_and_steps_count_gradients(rule):
    """A parameter that misses gradients is reset together with the others, and counts its own steps."""
    p, q = (torch.nn.Parameter(randn((3, 2), i)) for i in range(2))
    optimizer = Optimizer([("p", p), ("q", q)], rule, lr=0.01)
    for t in range(1, 4):
        p.grad, q.grad = randn((3, 2), t), randn((3, 2), 10 + t) if t == 1 else None
        optimizer.step()
    p.grad, q.grad = randn((3, 2), 4), randn((3, 2), 14)
    optimizer.step()
    for x in (p, q):
        m = optimizer.state[x]["exp_avg"]
        assert float(optimizer.state[x]["calls"]) == 4
        cosine = (m * x.grad).sum() / (m.norm() * x.grad.norm())
        assert cosine > 0.95, "one gradient since the reset (clipped by Stable-SPAM)"
    assert float(optimizer.state[p]["step"]) == 4 and float(optimizer.state[q]["step"]) == 2
    late = torch.nn.Parameter(torch.ones(2))
    optimizer.add_param_group({"params": [("late", late)]})
    late.grad = torch.ones(2)
    optimizer.step()
    assert float(optimizer.state[late]["calls"]) == 1, "a group counts its own calls"


def test_a_parameter_that_starts_late_joins_the_count_of_its_group():
    p, q = (torch.nn.Parameter(torch.ones(2)) for _ in range(2))
    optimizer = Optimizer([p, q], SPAMRule(), lr=0.01)
    for t in range(3):
        p.grad, q.grad = torch.ones(2), torch.ones(2) if t == 2 else None
        optimizer.step()
    assert float(optimizer.state[q]["calls"]) == 3 and float(optimizer.state[q]["step"]) == 1


@pytest.mark.parametrize("rule", [SPAMRule(), StableSPAMRule()], ids=lambda r: r.name)
def test_a_parameter_catches_up_with_one_that_has_no_gradient_now(rule):
    """The count is of the group: it goes on from those that are not stepped this time, too."""
    p, q = (torch.nn.Parameter(torch.ones(2)) for _ in range(2))
    optimizer = Optimizer([p, q], rule, lr=0.01)
    for present in ((p,), (p,), (p,), (q,)):
        p.grad = q.grad = None
        for x in present:
            x.grad = torch.ones(2)
        optimizer.step()
    assert float(optimizer.state[q]["calls"]) == 4 and float(optimizer.state[q]["step"]) == 1
    assert float(optimizer.state[p]["calls"]) == 3, "it catches up when it steps again"


@pytest.mark.parametrize("grad_accu_steps", [0, 1, 2])
def test_clipping_from_the_first_call_on_is_as_published(grad_accu_steps):
    """With 1 nothing moves before the first reset, with 0 never; the published code accepts both."""
    settings = {"threshold": 20, "DeltaT": 6, "warmup_steps": 2, "grad_accu_steps": grad_accu_steps}
    ours, theirs = (torch.nn.Parameter(randn((3, 2), 1)) for _ in range(2))
    start = ours.detach().clone()
    if grad_accu_steps < 2:
        with pytest.warns(UserWarning, match="all gradients are clipped to 0"):
            optimizer = create("spam", [("p", ours)], lr=0.01, **settings)
    else:
        optimizer = create("spam", [("p", ours)], lr=0.01, **settings)
    published = PublishedSPAM([theirs], lr=0.01, **settings)
    for t in range(1, 15):
        ours.grad, theirs.grad = randn((3, 2), t), randn((3, 2), t)
        optimizer.step()
        published.step()
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)
        assert torch.equal(ours, start) == (grad_accu_steps == 0 or (grad_accu_steps == 1 and t < 6))


def test_a_spike_is_clipped():
    """A gradient a million times larger moves momentum by no more than sqrt(threshold v)."""
    rule = SPAMRule(grad_accu_steps=2, threshold=100.0, DeltaT=0)
    p = torch.nn.Parameter(torch.zeros(5, dtype=torch.float64))
    optimizer = Optimizer([("p", p)], rule, lr=0.1)
    for t in range(10):
        p.grad = randn((5,), t)
        optimizer.step()
    state = optimizer.state[p]
    m, v = state["exp_avg"].clone(), state["exp_avg_sq"].clone()
    spiked = 1e6 * randn((5,), 20)
    p.grad = spiked
    optimizer.step()
    torch.testing.assert_close(state["exp_avg"], 0.9 * m + 0.1 * spiked.sign() * (100 * v).sqrt())


def test_stable_spam_recovers_the_clip_threshold_only_with_its_own_counters():
    """After a reset the published threshold jumps by about 1 / (1 - gamma3) and lets a spike of 100 through."""

    def height_after_a_reset(separate):
        rule = StableSPAMRule(update_proj_gap=20, separate_counters=separate)
        state, param = rule.init(torch.zeros(50)), torch.zeros(50)
        for t in range(21):
            _, state = rule.update(randn((50,), t, torch.float32), state, param)
        count = state["step" if separate else "moment_step"]
        return float(state["m_max_t"] / (1 - rule.gamma3 ** float(count)))

    assert 1 < height_after_a_reset(True) < 4
    assert height_after_a_reset(False) > 5 * height_after_a_reset(True)


def test_stable_spam_normalises_gradients():
    """Gradients of any size make the same updates."""
    rule, param = StableSPAMRule(eps=0.0), torch.zeros(4, 3, dtype=torch.float64)
    paths = []
    for size in (1.0, 1e6):
        state, path = rule.init(param), []
        for t in range(5):
            d, state = rule.update(size * randn((4, 3), t), state, param)
            path.append(d)
        paths.append(torch.stack(path))
    torch.testing.assert_close(*paths)


def test_sparse_momentum():
    """Only entries of the mask move; each reset draws another one, of about the given density, the same every run."""
    rule = SPAMRule(density=0.25, DeltaT=3, warmup_steps=1, threshold=0)
    moved = []
    for _ in range(2):
        p = torch.nn.Parameter(torch.zeros(100, 40))
        optimizer = Optimizer([("p", p)], rule, lr=0.01)
        for t in range(6):
            before = p.detach().clone()
            p.grad = randn((100, 40), t, torch.float32)
            optimizer.step()
            moved.append(p.detach() != before)
    first, second, third = moved[0], moved[2], moved[5]
    assert torch.equal(moved[0], moved[1]) and torch.equal(moved[2], moved[4])
    for mask in (first, second, third):
        assert abs(float(mask.float().mean()) - 0.25) < 0.03
    for a, b in ((first, second), (second, third)):
        assert abs(float((a & b).float().mean()) - 0.0625) < 0.02, "independent draws"
    assert all(torch.equal(a, b) for a, b in zip(moved[:6], moved[6:], strict=True))
    other = rule.update(torch.ones(100, 40), rule.init(torch.zeros(100, 40)), torch.zeros(100, 40))[0] != 0
    assert torch.equal(other, first)
    seeded = SPAMRule(density=0.25, seed=1)
    assert not torch.equal(seeded.update(torch.ones(100, 40), seeded.init(p.data), p.data)[0] != 0, first)


def test_sparse_momentum_of_a_batch():
    p = torch.nn.Parameter(randn((6, 5), 1))
    update_map = UpdateMap.of(create("spam", [("p", p)], lr=0.1, density=0.5))
    grads = randn((3, 6, 5), 2)
    got = update_map.per_sample({"p": grads})["p"]
    for i in range(3):
        torch.testing.assert_close(got[i], update_map({"p": grads[i]})["p"])
    assert 0 < int((got[0] == 0).sum()) < 30
