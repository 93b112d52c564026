"""Settings: what is read, what is refused and in which words, and that a dump reads back to an equal configuration."""

import math
import time
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from datatools import UsageError
from pipelines.cli import commands
from pipelines.cli.commands import COMMANDS
from pipelines.settings.audit import AuditConfig
from pipelines.settings.dump import config_digest, dump, fingerprint
from pipelines.settings.flags import submodel
from pipelines.settings.load import audit_base, load_config
from pipelines.settings.parts import DataConfig, ModelConfig
from pipelines.settings.select import SelectConfig
from pipelines.settings.train import EvaluateConfig, TrainConfig
from pipelines.settings.yaml import parse_yaml

MINIMAL = "model: m\ntrain: a.jsonl\ntarget: d.jsonl\n"
FLAGS = {"model.name": "m", "train.paths": ["a.jsonl"], "target": ["d.jsonl"]}


@pytest.fixture
def write(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def _write(text, name="select.yaml"):
        Path(name).write_bytes(text if isinstance(text, bytes) else text.encode())
        return Path(name)

    return _write


def models():
    """The settings of all commands and their sections."""
    found = [command.settings for command in COMMANDS.values()]
    for model in found:
        sections = (submodel(field.annotation) for field in model.model_fields.values())
        found += [section for section in sections if section is not None and section not in found]
    return found


def refused(*arguments, **more):
    with pytest.raises(UsageError) as caught:
        load_config(*arguments, **more)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ------------------------------------------------------------------------------------------------------- models


@pytest.mark.parametrize("model", models(), ids=lambda m: m.__name__)
def test_every_setting_is_described(model):
    assert model.__doc__
    for name, field in model.model_fields.items():
        assert field.description, f"{model.__name__}.{name}"


def test_shorthands_and_defaults(write):
    config = load_config(SelectConfig, write(MINIMAL))
    assert config.model.name == "m" and config.train.paths == ["a.jsonl"] and config.target == ["d.jsonl"]
    assert (config.budget, config.method, config.seed, config.warmup.epochs, config.projector.dim) == (
        "5%",
        "auto",
        0,
        4,
        8192,
    )
    assert DataConfig(paths=["x"]).on_bad_row == "error"
    assert SelectConfig(model="m", train=["a", "b"], target="t").train.paths == ["a", "b"]


def test_order_of_precedence(write):
    path = write(MINIMAL + "seed: 1\nwarmup: {epochs: 2, batch_size: 16}\n")
    config = load_config(SelectConfig, path, {"warmup.epochs": 3, "seed": None}, ["warmup.batch_size=32"])
    assert (config.seed, config.warmup.epochs, config.warmup.batch_size) == (1, 3, 32)


def test_lists_are_replaced_and_empty_flags_are_not_given(write):
    path = write("model: m\ntrain: [a, b]\ntarget: [d, e]\n")
    config = load_config(SelectConfig, path, {"train.paths": ["c"], "target": []})
    assert config.train.paths == ["c"] and config.target == ["d", "e"]


def test_an_adapter_over_a_short_model_keeps_its_name(write):
    config = load_config(EvaluateConfig, write("model: m\ndata: x\n"), {"model.adapter": Path("dir")})
    assert config.model.name == "m" and config.model.adapter == Path("dir")


def test_immutable():
    with pytest.raises(ValidationError):
        load_config(SelectConfig, None, FLAGS).seed = 3


@pytest.mark.parametrize(
    "value, want", [("0.3", 0.3), ("30%", 0.3), ("500", 500), (500.0, 500), ("100%", None), (1, 1)]
)
def test_max_per_source(value, want):
    got = load_config(SelectConfig, None, FLAGS | {"max_per_source": value}).max_per_source
    assert got == want and type(got) is type(want)


# -------------------------------------------------------------------------------------------------------- errors


def test_the_error_of_the_style_guide(write):
    assert refused(DataConfig, write("paths: x\nsource_kye: y\n", "data.yaml")) == (
        "data.yaml: DataConfig has no setting 'source_kye'; did you mean 'source_key'?"
    )


@pytest.mark.parametrize(
    "line, want",
    [
        ("fracton: 1", "SelectConfig has no setting 'fracton'; did you mean 'warmup.fraction'?"),
        ("warmup: {fracton: 1}", "warmup: WarmupConfig has no setting 'fracton'; did you mean 'fraction'?"),
        ("epochs: 4", "did you mean 'warmup.epochs' or 'training.epochs'?"),
        ("dedup: exact", "did you mean 'train.dedup'?"),
        ("zzzzzz: 4", "it has out, seed,"),
        ("seed: yes", "select.yaml: setting 'seed' is yes/true/on, a truth value"),
        ("seed: 1e-5", "setting 'seed' is 1e-05; should be a valid integer"),
        ("seed: -1", "greater than or equal to 0"),
        ("warmup: {epochs: yes}", "a truth value"),
        ("warmup: {learning_rate: abc}", "setting 'warmup.learning_rate' is 'abc'; should be a valid number"),
        ("lora: {alpha: .inf}", "finite"),
        (
            "lora: {targets: [q, no]}",
            "setting 'lora.targets[1]' is False; should be a valid string; put text in quotes",
        ),
        ("features: {adam_mode: papr}", "did you mean 'paper'?"),
        ("method: lss", "did you mean 'l"),
        ("projector: {dim: 100000000}", "less than or equal to"),
        ("warmup: {optimizer_options: {x: [[1]]}}", "setting 'warmup.optimizer_options"),
        ('out: "a\\0b"', "no file name can have"),
        ("checkpoints: 3", "valid list"),
    ],
)
def test_refused_settings(write, line, want):
    message = refused(SelectConfig, write(MINIMAL + line))
    assert want in message and message.startswith("select.yaml: "), message


def test_no_for_a_text_is_refused_with_advice(write):
    message = refused(SelectConfig, write("model: m\ntarget: d\ntrain: {paths: a, dedup: no}\n"))
    assert "'train.dedup' is no/false/off, a truth value" in message and "quotes" in message
    config = load_config(SelectConfig, write('model: "no"\ntarget: d\ntrain: a\n'))
    assert config.model.name == "no"


def test_missing_settings_name_their_flag():
    message = refused(SelectConfig)
    assert message.startswith("SelectConfig needs 'model'") and "--model" in message and "'train'" in message
    assert "--target" in refused(SelectConfig, None, {"model.name": "m", "train.paths": ["a"]})
    load_config(SelectConfig, None, {"model.name": "m", "train.paths": ["a"], "method": "random"})


def test_errors_name_the_flag_or_set_they_came_from():
    assert refused(SelectConfig, None, FLAGS | {"seed": -3}).startswith("command line: setting 'seed' is -3")
    assert refused(SelectConfig, None, FLAGS, ["seed=abc"]).startswith("--set seed: setting 'seed' is 'abc'")
    assert "did you mean 'seed'?" in refused(SelectConfig, None, FLAGS, ["sed=3"])
    assert "expected NAME=VALUE" in refused(SelectConfig, None, FLAGS, ["seed"])
    assert "has no settings inside" in refused(SelectConfig, None, FLAGS, ["warmup.optimizer.x=3"])


# ---------------------------------------------------------------------------------------------------------- YAML


@pytest.mark.parametrize(
    "text, want",
    [
        ("seed: 1\nseed: 2", "line 2: 'seed' is set twice, first on line 1"),
        ("a: {b: 1, b: 2}", "'b' is set twice"),
        ("a: &x 1\nb: *x", "anchors and aliases"),
        ("a: &x {c: 1}", "anchors and aliases"),
        ("<<: {a: 1}", "must be text, not '<<'"),
        ("a: !!python/object/apply:os.system ['true']", "the tag tag:yaml.org,2002:python/object/apply:os.system"),
        ("a: !!str 1", "the tag"),
        ("a: !own 1", "the tag"),
        ("1: 2", "must be text"),
        ("no: 2", "must be text"),
        ("~: 2", "must be text"),
        ("? [a]\n: 1", "must be text"),
        ("a: 010", "010 is read as different numbers"),
        ("a: 0x1F", "different numbers"),
        ("a: 1_000", "different numbers"),
        ("a: " + "9" * 41, "40 digits"),
        ("a: " + "[" * 40 + "]" * 40, "nested more than 32 deep"),
        ("a: [", "line"),
        ("a: 1\n--- \nb: 2", "second document"),
        ("a: \x01", "not readable as YAML"),
    ],
)
def test_yaml_that_is_refused(text, want):
    with pytest.raises(UsageError) as caught:
        parse_yaml(text, "x.yaml")
    assert want in str(caught.value) and str(caught.value).startswith("x.yaml"), str(caught.value)


@pytest.mark.parametrize(
    "text, want",
    [
        ("1e-5", 1e-5),
        ("1.5e3", 1500.0),
        ("-.5", -0.5),
        ("7", 7),
        ("0", 0),
        ("1:30", "1:30"),
        ("2026-01-02", "2026-01-02"),
        ("yes", True),
        ("off", False),
        ("~", None),
        ("5%", "5%"),
        ("'010'", "010"),
        ("=", "="),
        ("y", "y"),
        ("[1, 1e-8]", [1, 1e-8]),
        ("{a: {}}", {"a": {}}),
        ("", None),
    ],
)
def test_plain_scalars(text, want):
    assert parse_yaml(text) == want and type(parse_yaml(text)) is type(want)


def test_yaml_size_and_bombs_are_refused_quickly(write):
    bomb = "a0: &a0 [x,x,x,x,x,x,x,x,x]\n" + "".join(
        f"a{i}: &a{i} [{','.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12)
    )
    start = time.process_time()
    assert "anchors" in refused(SelectConfig, write(bomb))
    assert "1000001 bytes" in refused(SelectConfig, write(b"a" * 1_000_001))
    assert "nested" in refused(SelectConfig, write("[" * 900_000))
    assert "SelectConfig" in refused(SelectConfig, write("".join(f"key{i}: {i}\n" for i in range(60_000))))
    assert time.process_time() - start < 10  # each well below a second on an idle machine


def test_files_that_cannot_be_read(tmp_path):
    for name, content, want in [
        ("f", b"\xff\xfe", "not UTF-8"),
        ("g", b"- a", "contains a list"),
        ("h", b"text", "contains a str"),
    ]:
        (tmp_path / name).write_bytes(content)
        assert want in refused(SelectConfig, tmp_path / name)
    assert "cannot be read (No such file" in refused(SelectConfig, tmp_path / "missing.yaml")
    assert "is a folder" in refused(SelectConfig, tmp_path)


@given(st.text(max_size=200))
def test_any_text_is_read_or_refused(text):
    try:
        parse_yaml(text, "x")
    except UsageError as error:
        assert str(error).startswith("x")


# -------------------------------------------------------------------------------------------------------- --set


def test_set_reads_values_by_the_type_of_the_setting():
    sets = [
        "budget=500",
        "model.revision=1234567",
        "warmup.optimizer_options.eps=1e-8",
        "warmup.optimizer_options.betas=[0.9, 0.95]",
        "target=[a, b]",
        "lora.targets=auto",
        "warmup.max_steps=10",
        "features.rows_per_unit=null",
        "train.columns.prompt=q",
        "model.chat=no",
        "projector=rademacher",
        "warmup.gradient_clip=null",
    ]
    config = load_config(SelectConfig, None, FLAGS, sets)
    assert config.budget == "500" and config.model.revision == "1234567"
    assert config.warmup.optimizer_options == {"eps": 1e-8, "betas": [0.9, 0.95]}
    assert config.target == ["a", "b"] and config.lora.targets == "auto" and config.warmup.max_steps == 10
    assert config.train.columns == {"prompt": "q"} and config.model.chat == "no"
    assert config.projector.name == "rademacher" and config.warmup.gradient_clip is None


def test_a_whole_section_may_be_null():
    config = load_config(TrainConfig, None, {"model.name": "m", "data.paths": ["a"]}, ["lora=null"])
    assert config.lora is None
    config = load_config(TrainConfig, None, {"model.name": "m", "data.paths": ["a"]}, ["lora=null", "lora.rank=4"])
    assert config.lora is not None and config.lora.rank == 4


# ------------------------------------------------------------------------------------------------ dump and print


@pytest.mark.parametrize("comments", [False, True])
def test_dump_reads_back(write, comments):
    sets = [
        "budget=500",
        "warmup.optimizer_options={eps: 1e-8, betas: [0.9, 0.95], flag: yes, word: 'no'}",
        "train.columns={prompt: 'a: b # c'}",
        "lora.targets=auto",
        "warmup.learning_rate=1e-5",
    ]
    config = load_config(SelectConfig, None, FLAGS, sets)
    text = dump(config, comments=comments)
    assert load_config(SelectConfig, write(text)) == config
    assert yaml.safe_load(text)["budget"] == "500"  # other readers agree
    assert ("# how much to select" in text) == comments


@given(st.text(min_size=1, max_size=40).filter(lambda s: not s.startswith("~")))
def test_any_name_survives_a_dump(tmp_path_factory, name):
    try:
        config = load_config(SelectConfig, None, FLAGS | {"model.name": name, "target": [name]})
    except UsageError:
        return  # characters that no file name can have
    path = tmp_path_factory.mktemp("dump") / "settings.yaml"
    path.write_text(dump(config), encoding="utf-8", newline="")
    assert load_config(SelectConfig, path) == config


@given(st.floats(min_value=0, max_value=100))
def test_any_number_survives_a_dump(value):
    text = dump(load_config(SelectConfig, None, FLAGS | {"warmup.learning_rate": value}))
    assert parse_yaml(text)["warmup"]["learning_rate"] == value
    assert not math.isnan(value)


def test_home_is_a_tilde_in_files_and_a_folder_in_memory(monkeypatch, tmp_path, write):
    monkeypatch.setenv("HOME", str(tmp_path))
    config = load_config(SelectConfig, None, FLAGS | {"model.name": "~/m", "out": Path("~/runs"), "target": ["~/d"]})
    assert (
        config.model.name == f"{tmp_path}/m" and config.out == tmp_path / "runs" and config.target == [f"{tmp_path}/d"]
    )
    assert str(tmp_path) not in dump(config)
    assert load_config(SelectConfig, write(dump(config))) == config


def test_volatile_settings_are_neither_written_nor_compared():
    config = load_config(SelectConfig, None, FLAGS | {"overwrite": True, "dry_run": True, "accept_change": ["code"]})
    other = load_config(SelectConfig, None, FLAGS | {"out": Path("elsewhere")})
    assert "overwrite" not in dump(config) and "accept_change" not in dump(config)
    assert fingerprint(config) == fingerprint(other) and config_digest(config) == config_digest(other)
    assert config_digest(config) != config_digest(load_config(SelectConfig, None, FLAGS | {"seed": 1}))


# --------------------------------------------------------------------------------------------------------- audit


def test_an_audit_takes_over_the_run_that_it_judges(tmp_path):
    run = load_config(
        SelectConfig, None, FLAGS | {"train.source_key": "s", "warmup.learning_rate": 0.01, "lora.rank": 4}
    )
    (tmp_path / "run.yaml").write_text(dump(run))
    base, name = audit_base(tmp_path / "selected.jsonl")
    flags = {"selected": tmp_path / "selected.jsonl", "test.paths": ["t"], "pool.paths": ["p"]}
    config = load_config(AuditConfig, None, flags, base=base, base_name=name)
    assert config.model == run.model and config.target == run.target and config.lora == run.lora
    assert config.pool.paths == ["p"] and config.pool.source_key == "s"
    assert config.training.learning_rate == 0.01 and config.training.epochs == run.warmup.epochs
    assert config.out == tmp_path / "audit"
    raced = load_config(SelectConfig, None, FLAGS | {"verify": True, "warmup.epochs": 7, "training.epochs": 3})
    (tmp_path / "run.yaml").write_text(dump(raced))
    base, name = audit_base(tmp_path / "selected.jsonl")
    assert load_config(AuditConfig, None, flags, base=base, base_name=name).training == raced.training


@pytest.mark.parametrize("how", ["flag", "set", "yaml"])
def test_an_audit_of_another_model_takes_nothing_of_the_runs_model(tmp_path, how):
    """Neither its template nor its features, but its rows, adapters and recipe."""
    changes = {"model.chat": "tulu", "model.max_length": 99, "lora.rank": 4, "warmup.learning_rate": 0.01}
    run = load_config(SelectConfig, None, FLAGS | changes)
    (tmp_path / "run.yaml").write_text(dump(run))
    selected, yaml = tmp_path / "selected.jsonl", tmp_path / "audit.yaml"
    yaml.write_text("model: other\n")
    named = {"yaml": None, "config": yaml if how == "yaml" else None, "model": "other" if how == "flag" else None}
    sets = ["seed=3", "model.name = other"] if how == "set" else []
    start = commands._audit({**named, "selected": selected, "set": sets})
    flags = {"selected": selected, "test.paths": ["t"], "model.name": named["model"]}
    config = load_config(AuditConfig, start.yaml, flags, sets, base=start.base, base_name=start.base_name)
    assert config.model == ModelConfig(name="other") and config.features is None
    assert config.lora.rank == 4 and config.training.learning_rate == 0.01 and config.pool == run.train
    same = commands._audit({**named, "selected": selected, "set": [], "config": None, "model": run.model.name})
    again = load_config(AuditConfig, None, flags | {"model.name": run.model.name}, base=same.base)
    assert again.model == run.model and again.features == tmp_path / "features"


def test_an_audit_without_a_run_needs_a_model(tmp_path):
    assert audit_base(tmp_path / "selected.jsonl") == ({}, "") and audit_base(None) == ({}, "")
    assert "--model" in refused(AuditConfig, None, {"selected": "x", "test.paths": ["t"], "pool.paths": ["p"]})


def test_columns_are_read_from_texts_and_files_have_their_own(tmp_path):
    def columns(*sets, **flags):
        given = {"model.name": "m", "train.paths": "a", "target": "t", "train.columns": ["prompt=q,completion=a"]}
        return load_config(SelectConfig, None, given | flags, list(sets))

    both = columns(target_columns=["prompt=x", "completion=y"])
    assert both.train.columns == {"prompt": "q", "completion": "a"}
    assert both.target_columns == {"prompt": "x", "completion": "y"}
    assert columns("train.columns={prompt: p, b.jsonl: {text: body}}").train.columns == {
        "prompt": "p",
        "b.jsonl": {"text": "body"},
    }
    path = tmp_path / "settings.yaml"
    path.write_text(dump(both))
    assert load_config(SelectConfig, path) == both
    for wrong in ("prompt", "prompt=", "=q"):
        with pytest.raises(UsageError, match="expected OURS=YOURS, such as prompt=question"):
            columns(**{"train.columns": [wrong]})
