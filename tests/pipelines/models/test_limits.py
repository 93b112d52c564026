"""Rows are compared with what the model takes while they are read: its positions, and the ids of its embedding."""

import json
import shutil

import pytest
import torch
from transformers import AutoTokenizer

from datatools import DataError
from pipelines.diagnose import run as diagnose
from pipelines.models import load as models
from pipelines.models.limits import LONGEST, ModelLimits, limits_of
from pipelines.order import run as order
from pipelines.select import audit
from pipelines.select import run as select
from pipelines.settings.audit import AuditConfig
from pipelines.settings.diagnose import DiagnoseConfig
from pipelines.settings.order import OrderConfig
from pipelines.settings.parts import DataConfig, ModelConfig
from pipelines.settings.train import EvaluateConfig, TrainConfig
from pipelines.training import evaluation, train
from tests.zoo import build


@pytest.mark.parametrize(
    ("name", "positions", "table"),
    [
        ("GPT2LMHeadModel", 64, True),
        ("OPTForCausalLM", 64, True),  # two entries of the table are for nothing
        ("BartForCausalLM", 64, True),
        ("RobertaForCausalLM", 63, True),  # positions begin behind that of the padding
        ("GPTJForCausalLM", 64, True),  # rotary, with its sines in a table
        ("CTRLLMHeadModel", 64, True),
        ("MptForCausalLM", 64, True),
        ("LlamaForCausalLM", 64, False),
        ("GPTNeoXForCausalLM", 64, False),
        ("Qwen3ForCausalLM", 64, False),
        ("BloomForCausalLM", None, False),
        ("MambaForCausalLM", None, False),
    ],
)
def test_limits_are_where_the_model_stops(name, positions, table):
    """By trial: the longest row that the model reads is the limit, without weights, too."""
    model = build.build(name)
    limits = limits_of(model)
    assert limits == ModelLimits(positions, table, build.VOCABULARY)
    with torch.device("meta"):
        assert limits_of(build.model_class(name)(build.config(name))) == limits

    def reads(length: int) -> bool:
        try:
            with torch.no_grad():
                model(input_ids=torch.full((1, length), 9), use_cache=False)
        except (IndexError, RuntimeError):
            return False
        return True

    assert reads(positions or 70)
    assert reads((positions or 70) + 1) is not table


def test_the_longest_row():
    table, rotary, none = ModelLimits(32, True), ModelLimits(32, False), ModelLimits()
    assert [limits.longest(None) for limits in (table, rotary, none)] == [32, 32, LONGEST]
    assert [limits.longest(16) for limits in (table, rotary, none)] == [16, 16, 16]
    assert [limits.longest(64) for limits in (table, rotary, none)] == [32, 64, 64]


def rows(path, count=6, words=40, start=0):
    lines = [
        {
            "id": f"r{k}",
            "messages": [
                {"role": "user", "content": f"q{k}"},
                {"role": "assistant", "content": f"a{k} " + "x" * words},
            ],
        }
        for k in range(start, start + count)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def with_model(world, model):
    tokenizer = AutoTokenizer.from_pretrained(world.model)
    shutil.rmtree(world.model)
    model.save_pretrained(world.model)
    tokenizer.save_pretrained(world.model)
    return world


def opt(world, positions=48, vocabulary=300):
    """A model with a table of positions, whose layers have the names that adapters are for by default."""
    from transformers import OPTConfig, OPTForCausalLM

    torch.manual_seed(0)
    return with_model(
        world,
        OPTForCausalLM(
            OPTConfig(
                vocab_size=vocabulary,
                hidden_size=32,
                ffn_dim=32,
                num_hidden_layers=1,
                num_attention_heads=2,
                dropout=0.0,
                max_position_embeddings=positions,
                word_embed_proj_dim=32,
                pad_token_id=1,
            )
        ),
    )


def commands(world, folder):
    """Every command that puts rows through a model, as a function to call."""
    model = ModelConfig(name=str(world.model))
    data = DataConfig(paths=[str(world.pool)])
    yield "evaluate", lambda: evaluation.evaluate(EvaluateConfig(model=model, data=data))
    yield "train", lambda: train.run(TrainConfig(model=model, data=data, out=folder / "train", training={"epochs": 1}))
    for method in ("rds", "loss", "tfidf", "random"):
        config = world.select(folder / method, method=method, budget="1")
        yield method, lambda config=config: select.run(config)
    yield (
        "order",
        lambda: order.run(
            OrderConfig(
                task="record",
                model=model,
                data={"paths": [str(world.pool)]},
                out=folder / "order",
                batches=2,
                held_out=1,
                training={"batch_size": 1},
                warmup_steps=0,
            )
        ),
    )
    yield (
        "diagnose",
        lambda: diagnose.run(
            DiagnoseConfig(model=model, data=data, out=folder / "diagnose", checks=["sharpness"], rows=2)
        ),
    )


def test_rows_are_cut_to_the_positions_of_the_model(own_world, tmp_path, capsys):
    """Whatever command reads them, and whatever method scores them; the default, and a length that asks for more."""
    world = opt(own_world)
    rows(world.pool), rows(world.target, 1)
    for name, run in commands(world, tmp_path):
        run()
        said = capsys.readouterr().err
        assert "6 of 6 rows were cut to 48 tokens, the number of positions of the model" in said, (name, said)
    data = DataConfig(paths=[str(world.pool)])
    assert (
        evaluation.evaluate(EvaluateConfig(model=ModelConfig(name=str(world.model), max_length=1000), data=data))[
            "rows"
        ]
        == 6
    )


def test_rows_beyond_the_positions_may_be_refused(own_world, tmp_path):
    world = opt(own_world)
    rows(world.pool)
    for how, match in (
        ("error", r"pool.jsonl:1: \d+ tokens; the limit is 48 \(the positions of the model\)"),
        ("skip", "no usable row"),
    ):
        config = EvaluateConfig(
            model=ModelConfig(name=str(world.model), max_length=1000, on_long=how),
            data=DataConfig(paths=[str(world.pool)]),
        )
        with pytest.raises(DataError, match=match):
            evaluation.evaluate(config)
    rows(world.pool, words=5000)
    world.pool.write_text(world.pool.read_text().replace("q0", "long " * 50))
    with pytest.raises(DataError, match=r"answer starts after the first 48 tokens \(the positions of the model\)"):
        evaluation.evaluate(
            EvaluateConfig(model=ModelConfig(name=str(world.model)), data=DataConfig(paths=[str(world.pool)]))
        )


def test_tokens_that_the_embedding_does_not_have_are_refused(own_world, tmp_path):
    """Before anything is computed, naming row, token and remedy; rows without such a token may be used."""
    world = opt(own_world, positions=200, vocabulary=257)  # the tokenizer's three control tokens are 256 to 258
    rows(world.pool), rows(world.target, 1)
    for name, run in commands(world, tmp_path):
        expected = (
            r"1: token_beyond_vocabulary \(token 257 \('<\|im_end\|>'\), but the model's embedding has 257 rows"
            if name != "order"
            else "no usable row"
        )
        with pytest.raises(DataError, match=expected):
            run()
        assert not list(tmp_path.rglob("checkpoint*"))
    mixed = [{"text": "plain text"}, {"text": "ends<|im_end|>"}]
    world.pool.write_text("".join(json.dumps(row) + "\n" for row in mixed))
    config = EvaluateConfig(
        model=ModelConfig(name=str(world.model)), data=DataConfig(paths=[str(world.pool)], on_bad_row="skip")
    )
    found = evaluation.evaluate(config)
    assert (found["rows"], found["bad_rows"]) == (1, 1)


def test_rows_longer_than_trained_for_are_said(own_world, capsys):
    """Rotary positions go on: the rows are read, with a warning; without a setting they are cut."""
    rows(own_world.pool, words=2100)  # the tiny Llama is made for 2,048 tokens
    data = DataConfig(paths=[str(own_world.pool)])
    for asked, text in (
        (3000, "6 of 6 rows are longer than the 2048 tokens that the model was trained for"),
        (None, "6 of 6 rows were cut to 2048 tokens, the number of positions of the model"),
        (300, ""),
    ):
        evaluation.evaluate(EvaluateConfig(model=ModelConfig(name=str(own_world.model), max_length=asked), data=data))
        said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning")]
        assert len(said) == bool(text) and all(text in line for line in said)


@pytest.mark.parametrize("table", [False, True])
def test_limits_do_not_need_the_weights(own_world, table):
    world, limits = own_world, ModelLimits(2048, False, 259)
    if table:
        world, limits = opt(own_world), ModelLimits(48, True, 300)
    config = ModelConfig(name=str(world.model))
    (world.model / "model.safetensors").rename(world.folder / "aside")
    assert models.load(config, tokenizer_only=True).limits == limits
    (world.folder / "aside").rename(world.model / "model.safetensors")
    assert models.load(config).limits == limits


def test_an_audit_compares_its_rows_too(own_world, tmp_path, capsys):
    world = opt(own_world)
    for start, (path, count) in enumerate(((world.pool, 6), (world.target, 1), (world.test, 2))):
        rows(path, count, start=10 * start)
    picked = select.run(world.select(tmp_path / "run", method="random", budget="2", target=[]))
    capsys.readouterr()
    audit.run(
        AuditConfig(
            selected=picked / "selected.jsonl",
            pool=DataConfig(paths=[str(world.pool)]),
            test=DataConfig(paths=[str(world.test)]),
            target=[str(world.target)],
            against=["tfidf", "rds"],
            seeds=1,
            model=ModelConfig(name=str(world.model)),
            out=tmp_path / "audit",
        )
    )
    said = capsys.readouterr().err
    for label, count in (("pool", "6 of 6"), ("test", "2 of 2"), ("target", "1 of 1")):
        assert f"{label}: {count} rows were cut to 48 tokens" in said
