"""A verdict belongs to the selection that was judged, and no selection is replaced without a word."""

import json
import re
import shlex

import pytest

import pipelines.select.gradients
from datatools import DataError, UsageError, files
from datatools.files import seals
from pipelines.report import select_page, terminal
from pipelines.runs import verdicts
from pipelines.select import audit, verdict
from pipelines.select import run as select
from pipelines.settings.audit import AuditConfig
from pipelines.settings.parts import DataConfig, LoraConfig, TrainingConfig
from pipelines.settings.select import WarmupConfig
from tests.tiny import write_rows

VERDICT = "The selection is a made-up one."


def judged(world, run, out, **changes):
    """Settings of the smallest audit there is: one seed, one baseline."""
    settings = {
        "selected": run / "selected.jsonl",
        "pool": DataConfig(paths=[str(world.pool)]),
        "test": DataConfig(paths=[str(world.test)]),
        "against": ["random"],
        "seeds": 1,
        "model": world.select(out).model,
        "lora": LoraConfig(rank=4),
        "training": TrainingConfig(epochs=1, batch_size=8),
        "out": out,
    }
    return AuditConfig(**settings | changes)


def summary(run):
    return json.loads((run / "summary.json").read_text())


def sign(run, digest=None):
    """Put an audit that judged the selection with this digest (the one that is there) into the run's summary."""
    found = {"verdict": VERDICT, "selection": digest or verdicts.digest_of(run), "rows": [], "table": []}
    found["table"] = [{"arm": arm, "mean": mean, "n": 3} for arm, mean in (("selected", 1.0), ("random", 2.0))]
    files.write_json(run / "summary.json", {**summary(run), "audit": found})
    return found


def page(run):
    return select_page.render(run).read_text()


@pytest.fixture
def run(world, tmp_path):
    return select.run(world.select(tmp_path / "run", method="tfidf"))


def test_the_same_selection_again_keeps_its_audit(world, run):
    found = sign(run)
    before = (run / "selected.jsonl").read_bytes()
    select.run(world.select(run, method="tfidf"))
    assert (run / "selected.jsonl").read_bytes() == before
    assert summary(run)["audit"] == found and VERDICT in page(run)
    assert not list(run.glob("selected.old-*"))


def test_the_same_selection_again_leaves_its_audit_whole(world, run):
    """Also where an earlier version recorded the audit's own list of seals among the files of the selection."""
    nested = run / "audit" / "seals.jsonl"
    audit.run(judged(world, run, run / "audit"))
    sealed = (run / "seals.jsonl").read_text()
    assert "audit/seals.jsonl" not in sealed
    before = {path: path.read_bytes() for path in (nested, run / "audit" / "audit.json")}
    (run / "seals.jsonl").write_bytes(
        sealed.encode() + seals._line({"name": "audit/seals.jsonl", "bytes": 41, "xxh3": "9" * 32})
    )
    for _ in range(2):
        select.run(world.select(run, method="tfidf"))
        assert {path: path.read_bytes() for path in before} == before
        audit.run(judged(world, run, run / "audit"))
        before[nested] = nested.read_bytes()
    assert not list(run.rglob("*.damaged"))


def test_a_lost_summary_is_made_anew_with_the_audit_that_lies_in_the_folder(world, run):
    found = sign(run)
    files.make_folder(run / "audit")
    files.write_json(run / "audit" / "audit.json", found)
    (run / "summary.json").write_text("{")
    select.run(world.select(run, method="tfidf"))
    assert summary(run)["audit"] == found


@pytest.mark.parametrize("changes", [{"budget": "20%"}, {"max_per_source": 2}, {"aggregate": "max"}])
def test_settings_that_make_another_selection_are_refused(world, run, changes):
    before = {path.name: path.read_bytes() for path in run.iterdir() if path.is_file()}
    name, value = next(iter(changes.items()))
    for dry_run in (False, True):
        with pytest.raises(UsageError, match=rf"{name} was .*, is {value}.*not replaced.*--out.*--overwrite"):
            select.run(world.select(run, method="tfidf", dry_run=dry_run, **changes))
    assert {path.name: path.read_bytes() for path in run.iterdir() if path.is_file()} == before
    select.run(world.select(run, method="tfidf", overwrite=True, **changes))
    assert (run.with_name("run.old-1") / "selected.jsonl").read_bytes() == before["selected.jsonl"]


@pytest.mark.parametrize("kept", [None, 1])
def test_the_refusal_names_what_computes_no_gradient_again(world, tmp_path, monkeypatch, kept):
    """`--checkpoints` and `features.folder` of the first run make the second, other budget, out of its features."""
    shape = WarmupConfig(minimum_rows=16, epochs=2, batch_size=4, checkpoints=kept)
    first = select.run(world.select(tmp_path / "run", warmup=shape))
    with pytest.raises(UsageError) as refused:
        select.run(world.select(first, warmup=shape, budget="20%"))
    words = shlex.split(re.search(r"\(with (.*?) it computes", str(refused.value))[1])
    named = [words[i + 1] for i, word in enumerate(words) if word == "--checkpoints"]
    features = next(word.removeprefix("features.folder=") for word in words if word.startswith("features.folder="))
    assert len(named) == (kept or 2)

    def nothing(*_, **__):
        raise AssertionError("a gradient was computed again")

    monkeypatch.setattr(pipelines.select.gradients, "extract", nothing)
    again = world.select(tmp_path / "other", warmup=shape, budget="20%", checkpoints=named)
    again = again.model_copy(update={"features": again.features.model_copy(update={"folder": tmp_path / features})})
    other = select.run(again)
    ids = [
        [json.loads(line)["id"] for line in (one / "selected.jsonl").read_text().splitlines()] for one in (first, other)
    ]
    assert len(ids[1]) == 12 and ids[1][:6] == ids[0]


def test_a_grown_pool_moves_the_earlier_selection_aside(own_world, tmp_path):
    run = select.run(own_world.select(tmp_path / "run", method="tfidf"))
    found = sign(run)
    before = (run / "selected.jsonl").read_bytes()
    write_rows(tmp_path / "more.jsonl", 30, start=500)  # where the target's rows begin: the best rows are new
    own_world.pool.write_bytes(own_world.pool.read_bytes() + (tmp_path / "more.jsonl").read_bytes())
    select.run(own_world.select(run, method="tfidf"))
    assert (run / "selected.jsonl").read_bytes() != before
    aside = run / "selected.old-1"
    assert (aside / "selected.jsonl").read_bytes() == before and summary(aside)["audit"] == found
    assert summary(run)["audit"] is None and VERDICT not in page(run) and "Not audited" in page(run)
    assert any("selected.old-1" in text for text in summary(run)["warnings"])


def test_a_kill_while_moving_aside_goes_on(run):
    (run / "selected.old-1").mkdir()
    (run / "selected.parquet").rename(run / "selected.old-1" / "selected.parquet")
    assert verdicts.set_aside(run, "another") == run / "selected.old-1"
    assert {p.name for p in (run / "selected.old-1").iterdir()} == set(verdicts._ASIDE)
    assert verdicts.set_aside(run, "another") is None


def test_a_report_shows_no_verdict_on_other_rows(run, capsys):
    sign(run, "of another selection")
    assert VERDICT not in page(run) and "Not audited" in page(run) and "audit belongs to another selection" in page(run)
    sign(run)
    assert VERDICT in page(run)
    lines = (run / "selected.jsonl").read_bytes().splitlines(keepends=True)
    (run / "selected.jsonl").write_bytes(b"".join(lines[1:]))  # by hand
    capsys.readouterr()
    assert VERDICT not in page(run) and "has changed since the selection" in page(run)
    assert "warning: selected.jsonl has changed since the selection" in capsys.readouterr().err, "not on the page alone"


def test_an_audit_is_delivered_to_the_selection_that_it_judged(world, run, monkeypatch, capsys):
    """Not to one that was made while it ran, nor for another file of the run's folder."""
    inner = verdict.summarise

    def slow(*arguments):
        lines = (run / "selected.jsonl").read_bytes().splitlines(keepends=True)
        files.write_bytes(run / "selected.jsonl", b"".join(lines[1:]))
        return inner(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(verdict, "summarise", slow)
        out = audit.run(judged(world, run, run / "audit"))
    assert summary(run)["audit"] is None and "has changed since the audit read it" in capsys.readouterr().err
    assert json.loads((out / "audit.json").read_text())["selection"] != verdicts.digest_of(run)
    with pytest.raises(DataError, match=r"selection was .*, is .*--accept-change selection"):
        audit.run(judged(world, run, run / "audit"))
    part = run / "part.jsonl"
    part.write_bytes((run / "selected.jsonl").read_bytes().splitlines(keepends=True)[0])
    audit.run(judged(world, run, run / "second", selected=part))
    assert summary(run)["audit"] is None
    with files.lock_folder(run):
        audit.run(judged(world, run, run / "audit", accept_change=["selection"]))
    assert summary(run)["audit"] is None and "is not in the report" in capsys.readouterr().err
    audit.run(judged(world, run, run / "audit", accept_change=["selection"]))
    assert summary(run)["audit"]["selection"] == verdicts.digest_of(run)


def test_an_unaudited_selection_says_so(run, capsys):
    from rich.console import Console

    terminal.show(summary(run), Console(width=80))
    assert "not audited" in capsys.readouterr().out and "Not audited" in page(run)
