"""Each row is rendered and tokenized once per run, in all stages of every command."""

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from pipelines.diagnose import run as diagnose
from pipelines.models import load as models
from pipelines.order.run import run as order
from pipelines.rows.chat import render
from pipelines.rows.chat.refusals import RowError
from pipelines.rows.encode import Encoder
from pipelines.rows.prepare import prepare
from pipelines.select import audit
from pipelines.select import run as select
from pipelines.settings.audit import AuditConfig
from pipelines.settings.diagnose import DiagnoseConfig
from pipelines.settings.order import OrderConfig, OrderData, OrderTraining
from pipelines.settings.parts import DataConfig, LoraConfig, ModelConfig, TrainingConfig
from pipelines.settings.train import TrainConfig
from pipelines.training import train


@dataclass
class Counts:
    """How often each row was encoded, by content, and what that took."""

    rows: Counter = field(default_factory=Counter)
    rendered: int = 0
    tokenized: int = 0

    def per_row(self) -> tuple[int, float, float, float]:
        """(most encodings of a row; on average: encodings, renderings, tokenizations)."""
        n = len(self.rows)
        return max(self.rows.values()), self.rows.total() / n, self.rendered / n, self.tokenized / n


@pytest.fixture
def counts(monkeypatch):
    found = Counts()
    encode, tokenize = Encoder.__call__, Encoder._whole
    draw, draw_all = render.worker.render, render.worker.render_all

    def encoded(self, row):
        found.rows[row.raw] += 1
        return encode(self, row)

    def tokenized(self, *args):
        found.tokenized += 1
        return tokenize(self, *args)

    def rendered(*args):
        found.rendered += 1
        return draw(*args)

    def rendered_together(wanted):
        found.rendered += len(wanted)
        return draw_all(wanted)

    monkeypatch.setattr(render.worker, "render_all", rendered_together)
    monkeypatch.setattr(Encoder, "__call__", encoded)
    monkeypatch.setattr(Encoder, "_whole", tokenized)
    monkeypatch.setattr(render.worker, "render", rendered)
    return found


def run_select(world, out: Path):
    select.run(world.select(out))


def run_train(world, out: Path):
    training = TrainingConfig(epochs=2, batch_size=4)
    config = TrainConfig(
        model=ModelConfig(name=str(world.model)), data=DataConfig(paths=[str(world.pool)]), out=out, training=training
    )
    train.run(config)


def run_audit(world, out: Path):
    config = AuditConfig(
        selected=out.with_name("selection") / "selected.jsonl",
        pool=DataConfig(paths=[str(world.pool)]),
        model=ModelConfig(name=str(world.model)),
        target=[str(world.target)],
        lora=LoraConfig(rank=4),
        test=DataConfig(paths=[str(world.test)]),
        out=out,
        against=["random", "tfidf", "full"],
        seeds=1,
        training=TrainingConfig(epochs=2, batch_size=4),
    )
    audit.run(config)


def run_order(world, out: Path):
    config = OrderConfig(model=ModelConfig(name=str(world.model)), data=OrderData(paths=[str(world.pool)]), out=out,
                         training=OrderTraining(batch_size=4, learning_rate=1e-3), batches=4, held_out=8, orders=5,
                         estimators=["pairwise", "reduced"], dimensions=6, warmup_steps=0)  # fmt: skip
    order(config)


def run_diagnose(world, out: Path):
    config = DiagnoseConfig(model=ModelConfig(name=str(world.model)), data=DataConfig(paths=[str(world.pool)]), out=out,
                            rows=4, probes=3, lanczos_steps=4, coordinates=64)  # fmt: skip
    diagnose.run(config)


BEFORE = {"select": 3.5, "train": 3.0, "audit": 2.7, "order": 2.9, "diagnose": 1.3}
"""Encodings per row on average when each stage encoded by itself; a single row was encoded up to 8 times (order)."""


def clear(counts):
    counts.rows.clear()
    counts.rendered = counts.tokenized = 0


@pytest.mark.parametrize("command", [run_select, run_train, run_audit, run_order, run_diagnose])
def test_a_row_is_encoded_once_per_run(world, tmp_path, counts, command):
    """One encoding is two renderings (as it is, and with marks) and one call of the tokenizer."""
    if command is run_audit:
        select.run(world.select(tmp_path / "selection"))
        clear(counts)
    command(world, tmp_path / "run")
    most, encodings, renderings, tokenizations = counts.per_row()
    assert len(counts.rows) >= 60
    assert most == encodings == tokenizations == 1 and 2 <= renderings < 2.2


def test_the_same_command_again_encodes_nothing(world, tmp_path, counts):
    run_diagnose(world, tmp_path / "run")
    clear(counts)
    run_diagnose(world, tmp_path / "run")
    assert not counts.rows and not counts.rendered


def prepared(world, cache, **model):
    config = ModelConfig(name=str(world.model), **model)
    tokenizer = models.load(config, tokenizer_only=True).tokenizer
    return prepare(DataConfig(paths=[str(world.pool)]), config, tokenizer, cache=cache, label="pool")


def told(rows):
    """All that encoding has shown, and all tokens."""
    scan = rows.scan
    arrays = [a.tolist() for a in (scan.ok, scan.tokens, scan.supervised, scan.cut)]
    return arrays, list(scan.keys), scan.bad, scan.flags, [rows.item(i) for i in range(len(rows))]


def test_kept_tokens_are_those_of_the_encoder(world, tmp_path, counts):
    short = int(prepared(world, tmp_path).scan.tokens.min()) - 2
    rows = prepared(world, tmp_path, max_length=short)
    want = told(rows)
    rows.kept = None
    assert told(rows) == want and want[0][3] != [0] * len(rows)
    clear(counts)
    assert told(prepared(world, tmp_path, max_length=short)) == want and not counts.rows
    assert told(prepared(world, tmp_path, max_length=short + 1)) != want and counts.rows.total() == 60
    assert len(list(tmp_path.rglob("tokens-*"))) == 1, "the file of another encoding goes"


@pytest.mark.parametrize("name", ["tokens", "rows"])
@pytest.mark.parametrize("damage", ["gone", "empty", "cut", "a byte", "the end"])
def test_damaged_parts_are_made_again(world, tmp_path, counts, name, damage):
    rows = prepared(world, tmp_path)
    want = told(rows)
    (path,) = tmp_path.rglob(f"{name}-*")
    data = bytearray(path.read_bytes())
    places = {"a byte": data.index(rows.pool.ids[3].encode()) if name == "rows" else len(data) // 2, "the end": -3}
    if damage == "gone":
        path.unlink()
    elif damage in places:
        data[places[damage]] ^= 1
        path.write_bytes(data)
    else:
        path.write_bytes(data[: len(data) // 2 if damage == "cut" else 0])
    assert told(rows) == want, "in the run whose file is damaged under it"
    clear(counts)
    assert told(prepared(world, tmp_path)) == want
    if name == "rows" or damage in ("gone", "empty", "cut"):
        assert counts.rows.total() == 60
    else:
        assert counts.rows.total() <= 1, "only the row that is damaged"


def test_an_interrupted_encoding_leaves_no_part(world, tmp_path, monkeypatch):
    encode, left = Encoder.__call__, iter(range(20))

    def stop(self, row):
        if next(left, None) is None:
            raise KeyboardInterrupt
        return encode(self, row)

    monkeypatch.setattr(Encoder, "__call__", stop)
    with pytest.raises(KeyboardInterrupt):
        prepared(world, tmp_path)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_rows_that_took_too_long_are_tried_again_by_the_next_command(world, tmp_path, counts, monkeypatch):
    encode = Encoder.__call__

    def slow(self, row):
        if row.id.endswith("-7"):
            raise RowError("template_too_slow", "")
        return encode(self, row)

    config = DataConfig(paths=[str(world.pool)], on_bad_row="skip")
    model = ModelConfig(name=str(world.model))
    tokenizer = models.load(model, tokenizer_only=True).tokenizer
    with monkeypatch.context() as patch:
        patch.setattr(Encoder, "__call__", slow)
        rows = prepare(config, model, tokenizer, cache=tmp_path, label="pool")
    assert not rows.usable.all() and rows.kept.row(0) is not None
    clear(counts)
    assert prepare(config, model, tokenizer, cache=tmp_path, label="pool").usable.all() and counts.rows.total() == 60
