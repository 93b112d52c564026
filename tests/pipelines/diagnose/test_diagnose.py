"""`datatools diagnose` on a tiny model: numbers that can be checked, resume check by check, a page, and refusals."""

import json
import math
import re

import pytest
import torch

from datatools import DataError, UsageError
from optim import diagnostics
from pipelines.diagnose import run as diagnose
from pipelines.diagnose.checks import CHECKS
from pipelines.diagnose.looks import Check
from pipelines.models import load as models
from pipelines.models.losses import token_losses
from pipelines.report import diagnose_page as diagnose_view
from pipelines.rows.prepare import prepare
from pipelines.settings.diagnose import DiagnoseConfig
from pipelines.settings.parts import DataConfig, ModelConfig
from tests.pipelines import damage

QUICK = {"rows": 4, "probes": 3, "lanczos_steps": 4, "coordinates": 64}


def settings(world, out, **changes):
    values = {"model": ModelConfig(name=str(world.model)), "data": DataConfig(paths=[str(world.pool)]), "out": out}
    return DiagnoseConfig(**values | QUICK | changes)


@pytest.fixture(scope="module")
def done(world, tmp_path_factory):
    return diagnose.run(settings(world, tmp_path_factory.mktemp("runs") / "first"))


def summary(folder):
    return json.loads((folder / "diagnose.json").read_text())


def texts(page):
    return re.sub(r"<[^>]*>", " ", page[page.index("<body>") :])


def test_values_of_another_type_are_told(done):
    assert damage.check(diagnose_view.render, done / "diagnose.json", 25)


def test_a_run_has_every_check_a_page_and_plain_numbers(done):
    found = summary(done)
    assert tuple(found["checks"]) == tuple(CHECKS) and found["data"]["rows"] == 4 and found["seed"] == 0
    page = (done / "report.html").read_text()
    for title in ("Sharpness of blocks", "Spectra of weights", "Smoothness", "Condition numbers", "Double descent"):
        assert title in page
    assert page.count("<svg") > 7 * 4 and "<script" not in page and "http://" not in page and "https://" not in page
    assert "nan" not in texts(page).lower().split()


def test_numbers_are_those_of_the_functions_behind_them(world, done):
    """Sharpness, spectra, condition numbers and the top eigenvalue, computed here from the model and the rows."""
    config, found = settings(world, done), summary(done)["checks"]
    loaded = models.load(config.model)
    rows = prepare(config.data, config.model, loaded.tokenizer, cache=world.folder, label="data")
    picked = diagnose.pick(rows, 4, seed=diagnose.derive_seed(0, "rows"))
    model = loaded.model.requires_grad_(True)
    params = dict(model.named_parameters())
    weight = params["model.layers.1.mlp.down_proj.weight"]
    (entry,) = [e for e in found["spectrum"]["matrices"]
                if e["name"].endswith("layers.1.mlp.down_proj.weight") and e["of"] == "weights"]  # fmt: skip
    want = diagnostics.spectrum(weight)
    assert {k: entry[k] for k in want} == pytest.approx(want) and entry["role"] == "ffn_out"
    (entry,) = [e for e in found["conditioning"]["matrices"] if e["name"].endswith("layers.1.mlp.down_proj.weight")]
    assert entry["cond2"] == pytest.approx(diagnostics.condition_numbers(weight)["cond2"])
    batch = rows.batch(picked)
    loss = token_losses(model, batch)[0].mean()
    grads = torch.autograd.grad(loss, [weight])
    (entry,) = [e for e in found["spectrum"]["matrices"]
                if e["name"].endswith("layers.1.mlp.down_proj.weight") and e["of"] == "sgd"]  # fmt: skip
    assert entry["effective_rank"] == pytest.approx(diagnostics.spectrum(grads[0])["effective_rank"], rel=1e-3)
    product = diagnostics.hessian(lambda: token_losses(model, batch)[0].mean(), list(params.values()))
    start = torch.autograd.grad(token_losses(model, batch)[0].mean(), list(params.values()))
    top = diagnostics.lanczos(product, start, steps=4)["largest"]
    assert found["smoothness"]["lanczos"]["largest"] == pytest.approx(top, rel=1e-2)
    assert found["smoothness"]["plain"]["dimension"] == sum(p.numel() for p in params.values())
    assert set(found["sharpness"]["blocks"]) == {"embedding", "qk", "vo", "ffn", "norm"}
    sizes = {n: p.numel() for n, p in params.items()}
    norms = [n for n in params if "norm" in n]
    mean = sum(found["sharpness"]["tensors"][n] * sizes[n] for n in norms) / sum(sizes[n] for n in norms)
    assert found["sharpness"]["blocks"]["norm"]["sharpness"] == pytest.approx(mean)


def test_the_polar_update_is_the_most_even(done):
    roles = summary(done)["checks"]["spectrum"]["roles"]
    for role in ("vo", "ffn"):
        entropy = {kind: roles[kind][role]["svd_entropy_normalized"]["mean"] for kind in ("sgd", "adamw", "muon")}
        assert entropy["muon"] > entropy["adamw"] > entropy["sgd"]


def test_equal_runs_are_equal_and_a_stopped_one_goes_on(world, done, tmp_path, monkeypatch):
    """Stopped in the third check: the first two are not measured again, and the results are those of the whole run."""
    measured = []
    real = diagnose.measure

    def stop(name, *more):
        measured.append(name)
        if len(measured) == 3:
            raise KeyboardInterrupt
        return real(name, *more)

    monkeypatch.setattr(diagnose, "measure", stop)
    with pytest.raises(KeyboardInterrupt):
        diagnose.run(settings(world, tmp_path / "run"))
    assert sorted(p.stem for p in (tmp_path / "run" / "checks").iterdir()) == ["sharpness", "spectrum"]
    diagnose.run(settings(world, tmp_path / "run"))
    assert measured == ["sharpness", "spectrum", "smoothness", "smoothness", "conditioning", "double-descent"]
    assert summary(tmp_path / "run")["checks"] == summary(done)["checks"]


def test_a_finished_run_is_asked_for_another_check(world, tmp_path, monkeypatch):
    diagnose.run(settings(world, tmp_path / "run", checks=["conditioning"]))
    assert tuple(summary(tmp_path / "run")["checks"]) == ("conditioning",)
    again = Check("", "", lambda look, seed: pytest.fail("measured again"))
    monkeypatch.setitem(CHECKS, "conditioning", again)
    diagnose.run(settings(world, tmp_path / "run", checks=["sharpness", "conditioning"]))
    assert tuple(summary(tmp_path / "run")["checks"]) == ("sharpness", "conditioning")
    other = diagnose.run(settings(world, tmp_path / "other", checks=["sharpness"], seed=1))
    assert summary(other)["checks"]["sharpness"] != summary(tmp_path / "run")["checks"]["sharpness"]


def test_what_is_not_finite_is_written_and_shown(world, tmp_path):
    """A model with a dead matrix: singular, without a spectrum, and the page is drawn."""
    broken = tmp_path / "model"
    loaded = models.load(ModelConfig(name=str(world.model)))
    with torch.no_grad():
        loaded.model.model.layers[0].mlp.up_proj.weight.zero_()
        loaded.model.model.layers[0].self_attn.k_proj.weight[1:] = 0
    loaded.model.save_pretrained(broken)
    loaded.tokenizer.save_pretrained(broken)
    config = settings(world, tmp_path / "run", model=ModelConfig(name=str(broken)),
                      checks=["spectrum", "conditioning", "sharpness"])  # fmt: skip
    diagnose.run(config)
    entries = summary(tmp_path / "run")["checks"]["conditioning"]["matrices"]
    singular = [e["name"] for e in entries if e["cond2"] == "inf"]
    assert [n.rpartition(".")[0].rpartition(".")[2] for n in singular] == ["k_proj", "up_proj"]
    page = texts((tmp_path / "run" / "report.html").read_text())
    assert "2 matrices are singular" in page and "nan" not in page.lower().split()


@pytest.mark.parametrize(
    ("changes", "error", "part"),
    [
        ({"updates": ["muno"]}, UsageError, "updates: no optimizer is called 'muno'"),
        ({"data": DataConfig(paths=["nothing.jsonl"])}, DataError, "nothing.jsonl"),
    ],
)
def test_refusals(world, tmp_path, changes, error, part):
    with pytest.raises(error, match=part):
        diagnose.run(settings(world, tmp_path / "run", **changes))


def test_weights_that_are_not_finite_are_named(world, tmp_path):
    loaded = models.load(ModelConfig(name=str(world.model)))
    with torch.no_grad():
        loaded.model.model.layers[0].mlp.up_proj.weight.fill_(math.inf)
    loaded.model.save_pretrained(tmp_path / "model")
    loaded.tokenizer.save_pretrained(tmp_path / "model")
    for check in ("spectrum", "sharpness", "smoothness"):
        config = settings(world, tmp_path / check, model=ModelConfig(name=str(tmp_path / "model")), checks=[check])
        with pytest.raises(DataError, match=f"diagnose {check}: .*(nan|not finite)"):
            diagnose.run(config)


def test_a_damaged_summary(done, tmp_path):
    (tmp_path / "diagnose.json").write_text('{"checks": {"sharpness": 3}}')
    with pytest.raises(DataError, match="damaged"):
        diagnose_view.render(tmp_path)


def test_command_line(world, command, tmp_path):
    base = ("diagnose", "--model", world.model, "--data", world.pool, "--rows", "2", "--out", tmp_path / "run")
    slip = command(*base, "--checks", "sharpness,spectra")
    assert slip.code == 2 and "did you mean 'spectrum'" in slip.stderr
    dry = command(*base, "--dry-run")
    assert dry.code == 0 and "passes over them" in dry.stderr and not (tmp_path / "run").exists()
    done = command(*base, "--checks", "conditioning, sharpness")
    assert done.code == 0, done.stderr
    assert done.stdout.strip() == str(tmp_path / "run") and (tmp_path / "run" / "report.html").is_file()
    page = tmp_path / "run" / "report.html"
    drawn = page.read_bytes()
    page.unlink()
    assert command("report", tmp_path / "run").stdout.strip() == str(page) and page.read_bytes() == drawn
