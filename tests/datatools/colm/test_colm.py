"""CoLM as a whole: its Adam history, its features, its randomness, and what it refuses."""

from collections import Counter
from time import perf_counter

import pytest
import torch

from datatools import DataError, UsageError
from datatools.colm import CORESET_METHODS, CoLM, History, matching_error
from datatools.colm.exact import exact_gradients
from datatools.colm.last_layer import LastLayer
from datatools.subsets.facility_location import distances
from optim import AdamWRule, LionRule, MuonRule
from pipelines.models import load as models
from pipelines.models.losses import row_losses
from pipelines.rows.prepare import prepare
from pipelines.settings.parts import DataConfig, ModelConfig
from tests.datatools.colm.test_last_layer import adapted, brute, build, some_batch

SOURCES = ["big"] * 9 + ["rare"] * 2 + ["large"] * 5


@pytest.fixture(scope="module")
def model():
    return adapted("llama")


@pytest.fixture(scope="module")
def batch():
    return some_batch(16, 24)[0]


def colm(model, **changes):
    return CoLM(model, row_losses, **{"keep": 8, "small": {"rare"}, "seed": 3} | changes)


def measured(chooser, batch, rows, *, step=0, project=False):
    return chooser._measure(chooser.kind, batch, rows, None, step, 0, project=project)


# ------------------------------------------------------------------------------------------------------- Adam's history


def test_adam_at_the_first_step_is_the_sign():
    """spec/colm.md section 4, continuing 3.4."""
    grads = torch.tensor([[1.68, -0.56, 1.12], [1.08, -0.36, 0.72], [-3.6, 1.2, -2.4], [2.4, -0.8, 1.6]])
    history = History(AdamWRule(), (3,))
    torch.testing.assert_close(history.directions(grads), grads.sign(), atol=1e-6, rtol=0)
    history.advance(grads[[0, 2]])
    torch.testing.assert_close(history.state["exp_avg"], torch.tensor([-0.096, 0.032, -0.064]))
    torch.testing.assert_close(history.state["exp_avg_sq"], torch.tensor([0.0078912, 0.0008768, 0.0035072]))
    after = history.directions(grads)
    want = torch.tensor([0.18558174, 0.05343050, -0.72760161, 0.30944549])[:, None] * torch.tensor([1.0, -1.0, 1.0])
    torch.testing.assert_close(after, want, atol=1e-6, rtol=1e-5)
    found = distances(after)
    assert [float(found[i, j]) for i, j in ((0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3))] == pytest.approx(
        [0.39645371, 2.73955003, 0.37159125, 2.34309631, 0.76804496, 3.11114128], rel=1e-5
    )


def test_adam_of_the_general_example():
    grads = torch.tensor([[0.3, -0.1, 0.02, 0.4], [0.1, 0.2, -0.05, 0.3], [-0.2, 0.1, 0.04, 0.5]])
    history = History(AdamWRule(), (4,))
    history.state = {
        "step": torch.tensor(10.0),
        "exp_avg": torch.tensor([0.05, 0, 0.01, 0.1]),
        "exp_avg_sq": torch.tensor([0.01, 0.04, 0.0004, 0.09]),
    }
    want = torch.tensor([
        [0.11389329, -0.00762606, 0.08385516, 0.06604203],
        [0.08385517, 0.01524639, 0.03041306, 0.06098558],
        [0.03805894, 0.00762606, 0.09895324, 0.07108668],
    ])  # fmt: skip
    torch.testing.assert_close(history.directions(grads), want, rtol=1e-5, atol=1e-7)
    history.advance(grads[1:2])
    torch.testing.assert_close(history.state["exp_avg"], torch.tensor([0.055, 0.02, 0.004, 0.12]))
    torch.testing.assert_close(history.state["exp_avg_sq"], torch.tensor([0.01, 0.04, 0.0004021, 0.09]))
    assert float(history.state["step"]) == 11


def test_any_elementwise_rule_has_a_history_and_others_are_refused(model, batch):
    chooser = colm(model, rule=LionRule())
    for step in range(3):
        assert len(chooser(batch, SOURCES, step=step)) == 8
    assert chooser.state_dict()["exp_avg"].abs().sum() > 0
    with pytest.raises(UsageError, match="not an elementwise rule"):
        colm(model, rule=MuonRule())


# ------------------------------------------------------------------------------------------------------------- features


def test_picks_of_exact_are_those_of_brute_force_gradients(model, batch):
    grads = brute(model, batch, LastLayer.of(model)).flatten(1)
    for method in sorted(name for name, one in CORESET_METHODS.items() if not one.target and not one.reads):
        ours = colm(model, method=method, rule="none", token_budget=60)(batch, SOURCES, step=5)
        named = colm(model, method=method, rule="none", token_budget=60)
        made = named._generator("plan", 5, 0)
        from datatools.colm import choose_rows, plan

        theirs = choose_rows(
            grads,
            plan(SOURCES, 8, {"rare"}, generator=made),
            method=method,
            generator=named._generator("choice", 5, 0),
        )
        assert ours.indices.tolist() == theirs.indices.tolist(), method


def spearman(x, y):
    ranks = [v.argsort().argsort().double() for v in (x, y)]
    return float(torch.corrcoef(torch.stack(ranks))[0, 1])


def check_probes(model, batch):
    n, target = len(batch["input_ids"]), LastLayer.of(model)
    apart = torch.triu_indices(n, n, 1).unbind()
    truth = exact_gradients(model, row_losses, batch, target).flatten(1)
    chooser = colm(model, features="probes", probes=64)
    found = measured(chooser, batch, torch.arange(n), step=0)
    assert spearman(distances(found, "l2")[apart], distances(truth, "l2")[apart]) >= 0.9
    # scaled so that inner products are unbiased: squared norms agree on average
    assert 0.7 < float((found.square().sum(1) / truth.square().sum(1)).mean()) < 1.3


def test_distances_by_64_probes_are_ordered_as_the_true_ones():
    """Answers of 2 to 24 tokens: norms differ, as in real batches; distances of like rows would be all the same."""
    batch = some_batch(24, 40)[0]
    for i in range(24):
        batch["labels"][i, : 30 - i] = -100
    check_probes(build("llama"), batch)


@pytest.mark.real
def test_distances_by_64_probes_on_real_rows_of_a_trained_model(shared, tmp_path):
    if not (shared / "data/models/stories260k").is_dir():
        pytest.skip("no data/models/stories260k in the shared folder")
    settings = ModelConfig(name=str(shared / "data/models/stories260k"), chat="tulu", max_length=160)
    loaded = models.load(settings)
    rows = prepare(
        DataConfig(paths=[str(shared / "data/train/mix-64.jsonl")], on_bad_row="skip"),
        settings,
        loaded.tokenizer,
        cache=tmp_path,
        label="rows",
    )
    check_probes(loaded.model, rows.batch(rows.usable.nonzero()[0][:16].tolist()))


def test_the_published_features_are_collinear(model, batch):
    """spec/colm.md section 8: one direction for all rows leaves nothing but one number a row."""
    chooser = colm(model, features="paper_code", method="facility_location")
    for step in range(4):
        chooser(batch, SOURCES, step=step)
    raw = measured(chooser, batch, torch.arange(16), step=9)
    u = chooser.history.directions(raw).flatten(1).double()
    values = torch.linalg.svdvals(u - u.mean(0))
    assert float(values[0] ** 2 / values.square().sum()) > 0.9999
    fresh = measured(chooser, batch, torch.arange(16), step=1)
    torch.testing.assert_close(raw, fresh), "the direction stays for the whole run"


def test_probes_are_fresh_each_step_unless_a_history_reads_them(model, batch):
    rows = torch.arange(16)
    free = colm(model, features="probes", probes=4)
    kept = colm(model, features="probes", probes=4, rule="adam")
    assert not torch.equal(measured(free, batch, rows, step=0), measured(free, batch, rows, step=1))
    assert torch.equal(measured(kept, batch, rows, step=0), measured(kept, batch, rows, step=1))


def test_large_gradients_are_projected_for_herding_and_sparsified_for_medoids(model, batch):
    grads = brute(model, batch, LastLayer.of(model)).flatten(1)
    rows = torch.arange(16)
    whole, sketched = (measured(colm(model, dim=dim), batch, rows, project=True) for dim in (None, 40))
    torch.testing.assert_close(whole, grads, rtol=1e-4, atol=1e-6)
    assert sketched.shape == (16, 40) and grads.shape == (16, 48)
    assert 0.5 < float((sketched.square().sum(1) / grads.square().sum(1)).mean()) < 1.5
    assert len(colm(model, dim=40)(batch, SOURCES, step=0)) == 8
    assert len(colm(model, dim=8, method="facility_location")(batch, SOURCES, step=0)) == 8


# ------------------------------------------------------------------------------------------------------------- a choice


@pytest.mark.parametrize("features", ["exact", "probes", "paper_code"])
@pytest.mark.parametrize("method", ["herding", "facility_location"])
def test_a_choice_touches_nothing_and_depends_on_step_and_seed_alone(model, batch, features, method):
    model.train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    state = torch.get_rng_state()
    settings = {"features": features, "method": method, "probes": 4}
    first = colm(model, **settings)
    picks = [first(batch, SOURCES, step=t).indices.tolist() for t in range(3)]
    assert torch.equal(torch.get_rng_state(), state) and model.training
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    torch.rand(7)
    again = colm(model, **settings)
    assert [again(batch, SOURCES, step=t).indices.tolist() for t in range(3)] == picks
    for chosen in picks:
        counts = Counter(SOURCES[i] for i in chosen)
        assert len(chosen) == 8 and counts["rare"] == 2 and counts["big"] in (3, 4), counts  # its share is 3.9


def test_micro_batches_do_not_change_the_picks(model, batch):
    picks = {
        tuple(colm(model, token_budget=budget)(batch, SOURCES, step=0).indices.tolist()) for budget in (24, 70, 10_000)
    }
    assert len(picks) == 1


def test_a_saved_history_goes_on_where_it_was(model, batch):
    settings = {"method": "facility_location", "features": "exact"}
    whole = colm(model, **settings)
    want = [whole(batch, SOURCES, step=t).indices.tolist() for t in range(4)]
    first = colm(model, **settings)
    for t in range(2):
        first(batch, SOURCES, step=t)
    second = colm(model, **settings)
    second.load_state_dict(first.state_dict())
    assert [second(batch, SOURCES, step=t).indices.tolist() for t in (2, 3)] == want[2:]
    assert torch.equal(second.state_dict()["exp_avg"], whole.state_dict()["exp_avg"])
    with pytest.raises(DataError, match="the saved history does not match"):
        colm(model).load_state_dict(first.state_dict())


def test_history_of_all_rows_differs_from_that_of_chosen_rows(model, batch):
    states = []
    for history in ("selected", "all"):
        chooser = colm(model, rule="adam", history=history)
        chooser(batch, SOURCES, step=0)
        states.append(chooser.state_dict()["exp_avg"])
    assert not torch.equal(*states)


@pytest.mark.parametrize("features", ["exact", "probes"])
def test_watching_measures_the_choice_and_does_not_change_it(model, batch, features):
    grads = brute(model, batch, LastLayer.of(model)).flatten(1)
    plain = colm(model, features=features, probes=8)
    watched = colm(model, features=features, probes=8)
    for step in range(2):
        want = plain(batch, SOURCES, step=step)
        got = watched(batch, SOURCES, step=step, watch=True)
        assert got.indices.tolist() == want.indices.tolist()
        assert watched.last.match_error == pytest.approx(matching_error(grads, got), rel=1e-3)
        assert watched.last.match_error_random > 0 and plain.last.match_error is None
        assert watched.last.watch_seconds > 0 and plain.last.watch_seconds == 0


def test_measuring_is_no_part_of_a_choice_that_reads_nothing(model, batch):
    """The control takes no pass over the batch; the one that measures it is timed apart."""
    passes = []

    def counted(module, part):
        passes.append(len(part["input_ids"]))
        return row_losses(module, part)

    chooser = CoLM(model, counted, keep=8, small={"rare"}, method="random_in_source")
    picks = chooser(batch, SOURCES, step=3).indices.tolist()
    assert passes == []
    began = perf_counter()
    assert chooser(batch, SOURCES, step=3, watch=True).indices.tolist() == picks
    took = perf_counter() - began
    assert sum(passes) == len(SOURCES) and 0 < chooser.last.watch_seconds < took
    assert chooser.last.match_error > 0


def test_sources_may_be_numbers_or_absent_and_overflow_is_counted(model, batch):
    chooser = colm(model, small={1})
    chosen = chooser(batch, torch.tensor([0] * 6 + [1] * 10), step=0)
    assert chooser.overflows == 1 and all(i >= 6 for i in chosen.indices.tolist())
    assert len(colm(model)(batch, step=0)) == 8


def test_what_is_refused_and_leaves_the_model_alone(model, batch):
    before = {k: v.clone() for k, v in model.state_dict().items()}
    asked = {k: p.requires_grad for k, p in model.named_parameters()}
    model.train()
    with pytest.raises(UsageError, match="cannot keep 17 rows of a batch of 16"):
        colm(model)(batch, SOURCES, step=0, keep=17)
    with pytest.raises(UsageError, match="3 sources for a batch of 16 rows"):
        colm(model)(batch, SOURCES[:3], step=0)
    with pytest.raises(UsageError, match="2 names for a batch of 16 rows"):
        colm(model)(batch, SOURCES, step=0, names=["a", "b"])
    with pytest.raises(UsageError, match=r"the batch has no 'labels', it has \['input_ids'\]"):
        colm(model)({"input_ids": batch["input_ids"]}, SOURCES, step=0)
    silent = {k: v.clone() for k, v in batch.items()}
    silent["labels"][4] = -100
    with pytest.raises(DataError, match=r"rows \[4\] of the batch have no supervised token"):
        colm(model)(silent, SOURCES, step=0)
    names = [f"a.jsonl:{i + 1}" for i in range(16)]
    with pytest.raises(DataError, match=r"coreset: rows a\.jsonl:5 have no supervised token \(1 rows\)"):
        colm(model)(silent, SOURCES, step=0, names=names)

    def broken(module, part):
        return row_losses(module, part) * torch.nan

    for features in ("exact", "probes", "paper_code"):
        with pytest.raises(DataError, match="features of rows .* are not finite"):
            CoLM(model, broken, keep=8, features=features, probes=2)(batch, SOURCES, step=0)
    with pytest.raises(DataError, match=r"features of rows a\.jsonl:1, a\.jsonl:2, .* are not finite \(16 rows\)"):
        CoLM(model, broken, keep=8)(batch, SOURCES, step=0, names=names)
    for change, text in (
        ({"method": "herdin"}, "did you mean 'herding'"),
        ({"features": "exakt"}, "did you mean 'exact'"),
        ({"metric": "l3"}, "metric='l3'"),
        ({"rule": "adan"}, "did you mean 'adam'"),
        ({"keep": 0}, "each must be above 0"),
    ):
        with pytest.raises(UsageError, match=text):
            colm(model, **change)
    assert model.training and all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert {k: p.requires_grad for k, p in model.named_parameters()} == asked


@pytest.mark.parametrize("features", ["exact", "probes"])
def test_a_row_of_a_small_source_without_a_loss_is_named_by_herding_alone(model, batch, features):
    """Rows 9 and 10 are the small source's; medoids do not read them, and keep them whatever their loss is."""
    marked = batch["input_ids"][10, :6]

    def broken(module, part):
        here = (part["input_ids"][:, :6] == marked).all(1)
        return row_losses(module, part) * torch.where(here, torch.nan, 1.0)

    settings = {"keep": 8, "small": {"rare"}, "features": features, "probes": 2}
    names = [f"a.jsonl:{i + 1}" for i in range(16)]
    with pytest.raises(DataError, match=r"features of rows a\.jsonl:11 are not finite \(1 rows\)"):
        CoLM(model, broken, **settings)(batch, SOURCES, step=0, names=names)
    chosen = CoLM(model, broken, method="facility_location", **settings)(batch, SOURCES, step=0)
    assert {9, 10} < set(chosen.indices.tolist()) and len(chosen) == 8
