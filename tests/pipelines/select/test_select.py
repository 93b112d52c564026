"""`datatools select` from end to end on a tiny model: what it writes, budgets, and pools of every kind."""

import json
import math
import shutil
import struct
from collections import Counter

import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from datatools import DataError, GradientFeatures, files
from pipelines.models import load as models
from pipelines.rows.prepare import prepare
from pipelines.select import run as select
from pipelines.select import write
from pipelines.select.columns import column
from pipelines.select.scorer import scorer
from pipelines.settings.load import load_config
from pipelines.settings.methods import SCORERS, known
from pipelines.settings.parts import DataConfig, LoraConfig, ModelConfig
from pipelines.settings.select import SelectConfig
from tests.pipelines.select.looking import hashes, ids, rows_in, scores
from tests.tiny import save_tiny_model

# ------------------------------------------------------------------------------------------------------ what it writes


def test_everything_that_is_promised_is_there(first):
    present = set(hashes(first))
    assert {
        "run.yaml",
        "provenance.json",
        "progress.json",
        "events.jsonl",
        "scores.parquet",
        "selected.jsonl",
        "selected.parquet",
        "summary.json",
        "report.html",
    } <= present
    for step in (4, 8):
        assert {
            f"features/train-{step}/plan.json",
            f"features/target-{step}/part-00000.json",
            f"warmup/checkpoint-{step}/complete.json",
            f"warmup/checkpoint-{step}/optimizer.pt",
            f"warmup/checkpoint-{step}/adapter_model.safetensors",
        } <= present
    assert not [name for name in present if ".tmp" in name or name.endswith(".lock")]


def test_columns_of_the_scores(first, world):
    schema = pq.read_schema(first / "scores.parquet")
    assert {f.name: str(f.type) for f in schema} == {
        "_id": "string",
        "_source": "string",
        "_file": "string",
        "_line": "int64",
        "_key": "string",
        "_tokens": "int32",
        "_supervised": "int32",
        "_status": "string",
        "_score": "float",
        "_rank": "int64",
        "_selected": "bool",
        "_nearest": "string",
        "_nearest_similarity": "float",
        "_norm": "float",
        "subtask:target": "float",
    }
    table = scores(first)
    assert table["_line"] == list(range(1, 61)) and set(table["_file"]) == {str(world.pool)}
    order = sorted(range(60), key=lambda i: table["_rank"][i])
    assert [table["_rank"][i] for i in order] == list(range(1, 61))
    assert [table["_score"][i] for i in order] == sorted(table["_score"], reverse=True)
    assert [table["_id"][i] for i in order[:6]] == ids(first)
    assert [i for i in range(60) if table["_selected"][i]] == sorted(order[:6])
    assert set(table["_nearest"]) <= {"t-500", "t-501", "t-502"}
    assert all(near >= score - 1e-6 for near, score in zip(table["_nearest_similarity"], table["_score"], strict=True))


def test_columns_of_the_selection(first):
    table = pq.read_table(first / "selected.parquet").to_pydict()
    assert list(table) == ["dataset", "id", "messages", "_id", "_source", "_score", "_rank", "_weight", "_why"]
    assert table["id"] == table["_id"] == ids(first) and table["_rank"] == [1, 2, 3, 4, 5, 6]
    assert all(why.startswith("most similar to target row t-50") for why in table["_why"])


def test_summary_and_provenance(first, world):
    summary = json.loads((first / "summary.json").read_text())
    assert summary["formula"]["name"] == "less-paper" and "adamw(betas=(0.9, 0.999)" in summary["formula"]["notes"][0]
    assert summary["pool"]["rows"] == 60 and summary["budget"] == {
        "asked": "10%",
        "rows": 6,
        "tokens": summary["budget"]["tokens"],
    }
    assert sum(c["weight"] for c in summary["checkpoints"]) == pytest.approx(1)
    assert [c["step"] for c in summary["checkpoints"]] == [4, 8]
    stored = sum(p.stat().st_size for p in (first / "features").rglob("*") if p.is_file())
    assert summary["cost"]["after"]["bytes"] == stored
    assert summary["model"]["seen_share"] == 1.0 and summary["model"]["unseen"] == []
    provenance = json.loads((first / "provenance.json").read_text())
    assert provenance["facts"]["data"] == {
        str(world.pool): f"{files.digest_file(world.pool)}, {world.pool.stat().st_size} bytes"
    }
    weights = world.model / "model.safetensors"
    assert provenance["facts"]["model"]["model.safetensors"] == files.digest_file(weights)
    chosen = [key for key, yes in sorted(zip(scores(first)["_key"], scores(first)["_selected"], strict=True)) if yes]
    assert provenance["selection"]["rows"] == 6 and len(chosen) == 6


ODD_LINES = [
    b'{"messages": [{"role": "user", "content": "a BOM before"}, {"role": "assistant", "content": "yes"}]}',
    b'{"id":"crlf","messages":[{"content":"order of keys","role":"user"},{"content":"odd","role":"assistant"}]}\r',
    '{"z": 1e2, "id": "ünï", "messages": [{"role": "user", "content": "Grüße, \u2028 and 🙂"},'
    ' {"role": "assistant", "content": "e\u0301 is not é, \u202e neither"}]}'.encode(),
    b'  {"id" : "spaces" ,"prompt":"p", "completion":"\\u00e9\\ud83d\\ude42 escaped", "meta":{}, "n": 10}\t ',
    b'{"id": "nested", "text": "plain text", "meta": {"a": [], "b": [{}], "c": null}, "n": "one", "_x": 3}',
    b'{"id": "pair", "prompt": "p ", "completion": "c", "meta": [1, "two"], "n": 1.5}',
    b'{"id": "pair2", "prompt": "p ", "completion": "d", "meta": {"a": 1}, "n": true}',
]


@pytest.mark.parametrize("method", ["random", "less"])
def test_selected_lines_are_the_pool_s_byte_for_byte(world, tmp_path, method):
    """No parsing and writing again: key order, escapes, spaces, CR and normal forms stay; so does reading them."""
    pool = tmp_path / "odd.jsonl"
    pool.write_bytes(b"\xef\xbb\xbf" + b"\n".join(ODD_LINES))  # the mark is the file's, not the row's; no last newline
    run = select.run(world.select(tmp_path / "run", train=DataConfig(paths=[str(pool)]), method=method, budget="100%"))
    written = (run / "selected.jsonl").read_bytes()
    assert written.endswith(b"\n")
    assert sorted(written.removesuffix(b"\n").split(b"\n")) == sorted(ODD_LINES)
    again = select.run(
        world.select(
            tmp_path / "again", train=DataConfig(paths=[str(run / "selected.jsonl")]), method=method, budget="100%"
        )
    )
    assert sorted((again / "selected.jsonl").read_bytes().split(b"\n")) == sorted(written.split(b"\n"))


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


@given(st.lists(JSON_VALUES, min_size=1, max_size=4))
def test_any_column_can_be_written(tmp_path_factory, values):
    """selected.parquet takes whatever JSON rows bring: empty objects, mixed types, whole numbers beyond 64 bits."""
    path = tmp_path_factory.mktemp("any") / "t.parquet"
    write._write_table(path, [{"x": column(values)}])
    assert pq.read_table(path).num_rows == len(values)


# ------------------------------------------------------------------------------------------------- budgets and methods


def test_budgets_in_rows_shares_and_tokens(world, tmp_path):
    for budget, rows in (("7", 7), ("25%", 15), ("5%", 3)):
        assert len(ids(select.run(world.select(tmp_path / budget, method="loss", budget=budget)))) == rows
    run = select.run(world.select(tmp_path / "tokens", method="loss", budget="700 tokens"))
    table = scores(run)
    used = sum(n for n, yes in zip(table["_tokens"], table["_selected"], strict=True) if yes)
    left = [n for n, yes in zip(table["_tokens"], table["_selected"], strict=True) if not yes]
    assert used <= 700 and used + min(left) > 700, "no further row fits"


def test_a_cap_on_sources(world, tmp_path):
    free = select.run(world.select(tmp_path / "free", method="tfidf", budget="12"))
    capped = select.run(world.select(tmp_path / "capped", method="tfidf", budget="12", max_per_source=4))
    assert Counter(row["dataset"] for row in rows_in(capped / "selected.jsonl")) == {"a0": 4, "a1": 4, "a2": 4}
    order = [i for i in ids(free) if i in ids(capped)]
    assert [i for i in ids(capped) if i in order] == order, "within a source the best come first, as without a cap"


@pytest.mark.parametrize("method", ["less", "random"])
def test_exact_duplicates_are_chosen_once(own_world, tmp_path, method):
    """Rows of equal text under other ids: one is kept, the others have the status `duplicate` and no score."""
    lines = [json.loads(line) for line in own_world.pool.read_text().splitlines()]
    copies = [{**row, "id": f"copy-{row['id']}"} for row in lines[:10]]
    own_world.pool.write_text("".join(json.dumps(row) + "\n" for row in [*copies, *lines]))
    pool = DataConfig(paths=[str(own_world.pool)], dedup="exact")
    run = select.run(own_world.select(tmp_path / "run", train=pool, method=method, budget="60"))
    table = scores(run)
    assert Counter(table["_status"]) == {"ok": 60, "duplicate": 10}
    dropped = [i for i, state in enumerate(table["_status"]) if state == "duplicate"]
    assert not any(table["_selected"][i] or table["_score"][i] is not None for i in dropped)
    contents = [row["messages"][0]["content"] for row in rows_in(run / "selected.jsonl")]
    assert len(contents) == len(set(contents)) == 60


def test_copies_that_are_kept_have_one_score(own_world, tmp_path, counted):
    """Without deduplication a copy is computed once, scored like its twin, and the report warns of it."""
    lines = [json.loads(line) for line in own_world.pool.read_text().splitlines()]
    copies = [{**row, "id": f"copy-{row['id']}"} for row in lines[:10]]
    own_world.pool.write_text("".join(json.dumps(row) + "\n" for row in [*lines, *copies]))
    run = select.run(own_world.select(tmp_path / "run", budget="100%"))
    table = scores(run)
    assert table["_score"][:10] == table["_score"][60:] and counted == [2 * 63]
    assert any("repeat the content" in text for text in json.loads((run / "summary.json").read_text())["warnings"])


@pytest.mark.parametrize("method", sorted(set(SCORERS) - {"less"}))
def test_every_method_writes_the_same_files(world, tmp_path, method):
    target = [] if method in ("random", "loss") else [str(world.target)]
    run = select.run(world.select(tmp_path / "run", method=method, target=target))
    assert len(ids(run)) == 6 and (run / "report.html").stat().st_size > 1000
    table, summary = scores(run), json.loads((run / "summary.json").read_text())
    assert summary["method"] == method and summary["audit"] is None
    scored = method not in ("random", "random-length")
    assert all((value is not None) == scored for value in table["_score"])
    assert all((value is not None) == (scorer(method).nearest is not None) for value in table["_nearest"])
    if scored and known(method).selector == "top_k":
        taken = [score for score, selected in zip(table["_score"], table["_selected"], strict=True) if selected]
        assert sorted(taken) == sorted(table["_score"])[-6:], "several rows can have the score of the last one"
    trained = "gradients" in known(method).needs
    assert (run / "warmup").exists() == trained and any(run.glob("features/*train-*")) == trained


# --------------------------------------------------------------------------------------------- checkpoints of the user


@pytest.mark.parametrize("pool", ["one row", "equal rows", "the target itself"])
def test_small_and_degenerate_pools(world, tmp_path, pool):
    """One row, rows of one content (ties go by id), and a pool that is the target: defined answers."""
    rows = rows_in(world.target)
    if pool == "one row":
        rows = rows[:1]
    elif pool == "equal rows":
        rows = [{**rows[0], "id": f"copy-{i}"} for i in (3, 1, 2, 5, 4)]
    path = tmp_path / "pool.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = select.run(world.select(tmp_path / "run", train=DataConfig(paths=[str(path)]), budget="1"))
    table = scores(run)
    assert len(ids(run)) == 1 and all(math.isfinite(value) for value in table["_score"])
    if pool == "equal rows":
        assert len(set(table["_score"])) == 1 and ids(run) == ["copy-1"]
        assert dict(zip(table["_id"], table["_rank"], strict=True)) == {f"copy-{i}": i for i in range(1, 6)}


def test_a_model_without_the_usual_layer_names(tmp_path, world):
    """GPT-2 has no q_proj: adapters go where its attention is; names that it does not have are refused with its own."""
    from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

    tokenizer = AutoTokenizer.from_pretrained(world.model)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        GPT2LMHeadModel(
            GPT2Config(vocab_size=len(tokenizer), n_embd=16, n_head=2, n_layer=1, bos_token_id=1, eos_token_id=1)
        ).save_pretrained(tmp_path / "gpt2")
    tokenizer.save_pretrained(tmp_path / "gpt2")
    model = ModelConfig(name=str(tmp_path / "gpt2"))
    for method in ("loss", "rds", "less"):
        assert len(ids(select.run(world.select(tmp_path / method, model=model, method=method)))) == 6
    with pytest.raises(DataError, match=r"lora.targets q_proj: no layer .*'c_attn', 'c_fc', 'c_proj'"):
        select.run(world.select(tmp_path / "named", model=model, lora=LoraConfig(targets=["q_proj"])))


# -------------------------------------------------------------------------------------------------- explain and dry run


def test_a_dry_run_leaves_nothing_behind(command, world, tmp_path):
    """It reads, encodes, loads the model, says the cost, and neither --out nor a temporary file remains."""
    (tmp_path / "tmp").mkdir()
    before = hashes(world.folder)
    for name in ("select", "train"):
        answer = command(*world.argv(name, "--dry-run", out=tmp_path / "run"), env={"TMPDIR": str(tmp_path / "tmp")})
        assert answer.code == 0 and answer.stdout == "" and "dry run" in answer.stderr, answer.stderr
        assert not (tmp_path / "run").exists() and not list((tmp_path / "tmp").iterdir())
    assert hashes(world.folder) == before


def test_a_dry_run_does_not_touch_the_run_that_is_there(first, world):
    before = hashes(first)
    select.run(world.select(first, seed=9, overwrite=True, dry_run=True))
    assert hashes(first) == before


def test_the_store_of_a_run_can_be_read_by_itself(first):
    """Features are for others too: plain safetensors, named by content, with what they were made of."""
    store = GradientFeatures.open(first / "features" / "train-8")
    assert store.verify() == [] and len(store) == 60 and store.dim == 256
    assert store.meta["gradient"] == [
        "adamw(betas=(0.9, 0.999), eps=1e-08, eps_root=0.0, bias_correction=True, amsgrad=False, "
        "eps_before_correction=False, stochastic_rounding=False)"
    ]
    data = (first / "features" / "train-8" / "part-00000.safetensors").read_bytes()
    header = json.loads(data[8 : 8 + struct.unpack("<Q", data[:8])[0]])
    assert header["features"]["shape"][1] == 256


def test_a_second_model_in_one_process_is_another_run(world, first, tmp_path):
    save_tiny_model(tmp_path / "other", seed=1)
    run = select.run(world.select(tmp_path / "run", model=ModelConfig(name=str(tmp_path / "other"))))
    assert scores(run)["_score"] != scores(first)["_score"]


def test_words_of_a_row_do_not_depend_on_its_format(world, tmp_path):
    """--method tfidf: pairs, conversations and texts of the same words have the scores that scikit-learn gives them."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    topics = ["lanterns glow", "ferries cross the bay", "clay dries slowly", "foxes dig dens", "frost covers roofs"]
    said = [(f"tell me: {t}", f"indeed {t}, item {k}") for k, t in enumerate(topics)]
    shapes = {
        "pair": lambda q, a: {"prompt": q, "completion": a},
        "chat": lambda q, a: {"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]},
        "alpaca": lambda q, a: {"instruction": q, "output": a},
        "text": lambda q, a: {"text": f"{q}\n{a}"},
    }
    vectorizer = TfidfVectorizer(sublinear_tf=True, ngram_range=(1, 2), token_pattern=r"(?u)\b\w+\b")
    wanted = ("what do ferries do?", "they cross the bay")
    matrix = vectorizer.fit_transform(["\n".join(pair) for pair in [*said, wanted]])
    right = (matrix[:-1] @ matrix[-1:].T).toarray()[:, 0]
    for pool, target in [(a, b) for a in shapes for b in shapes if "pair" in (a, b)]:
        for name, lines in (("pool", [shapes[pool](*pair) for pair in said]), ("dev", [shapes[target](*wanted)])):
            (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        config = world.select(
            tmp_path / f"{pool}-{target}", method="tfidf", target=[str(tmp_path / "dev.jsonl")], budget="1"
        )
        run = select.run(config.model_copy(update={"train": DataConfig(paths=[str(tmp_path / "pool.jsonl")])}))
        assert scores(run)["_score"] == pytest.approx(right.tolist(), abs=1e-5), (pool, target)


def test_pools_without_a_word_are_refused_by_tfidf(world, tmp_path):
    for name in ("pool", "dev"):
        (tmp_path / f"{name}.jsonl").write_text('{"prompt": "?!", "completion": "..."}\n')
    config = world.select(tmp_path / "run", method="tfidf", target=[str(tmp_path / "dev.jsonl")], budget="1")
    with pytest.raises(DataError, match="no row of the pool or the target holds a word"):
        select.run(config.model_copy(update={"train": DataConfig(paths=[str(tmp_path / "pool.jsonl")])}))


def test_hidden_states_may_be_narrower_than_the_configuration_says(tmp_path, own_world):
    """OPT-350m projects its states to another width than its hidden size; features and clusters take what comes."""
    from transformers import AutoTokenizer, OPTConfig, OPTForCausalLM

    from pipelines.colm.sources import clusters_of

    tokenizer = AutoTokenizer.from_pretrained(own_world.model)
    shutil.rmtree(own_world.model)
    torch.manual_seed(0)
    model = OPTForCausalLM(OPTConfig(
        vocab_size=len(tokenizer), hidden_size=32, ffn_dim=32, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=128, word_embed_proj_dim=12, do_layer_norm_before=False, pad_token_id=1,
    ))  # fmt: skip
    model.save_pretrained(own_world.model)
    tokenizer.save_pretrained(own_world.model)
    run = select.run(own_world.select(tmp_path / "run", method="rds"))
    model.eval()

    def vector(row):
        tokens = tokenizer(
            tokenizer.apply_chat_template(row["messages"], tokenize=False),
            return_tensors="pt",
            add_special_tokens=False,
        )["input_ids"]
        with torch.no_grad():
            states = model.model(input_ids=tokens).last_hidden_state[0]
        return torch.nn.functional.normalize((states * torch.arange(1.0, len(states) + 1)[:, None]).sum(0), dim=0)

    target = torch.stack([vector(row) for row in rows_in(own_world.target)])
    for row, score in list(zip(rows_in(own_world.pool), scores(run)["_score"], strict=True))[:5]:
        assert score == pytest.approx(float((target @ vector(row)).mean()), abs=1e-5)
    loaded = models.load(ModelConfig(name=str(own_world.model)))
    config = own_world.select(tmp_path / "unused")
    rows = prepare(config.train, config.model, loaded.tokenizer, cache=tmp_path, label="pool")
    assert len(set(clusters_of(loaded.model, rows, range(20), 3, seed=0)[:20])) == 3


def test_what_templates_leave_out_is_counted_in_the_report(own_world, tmp_path):
    rows = [json.loads(line) for line in own_world.pool.read_text().splitlines()]
    for row in rows[:7]:
        row["messages"][1]["reasoning_content"] = "because"
    own_world.pool.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = select.run(own_world.select(tmp_path / "run", method="tfidf"))
    summary = json.loads((run / "summary.json").read_text())
    assert summary["pool"]["flags"] == {"reasoning_dropped": 7}
    said = [text for text in summary["warnings"] if "reasoning" in text]
    assert len(said) == 1 and said[0].startswith("pool: in 7 of 60 rows, the chat template omits reasoning")


def pairs(path, ask, say, count, start=0):
    rows = [{ask: f"tell {k}", say: f"told {k * k}", "text": "not this"} for k in range(start, start + count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_pool_and_target_have_columns_of_their_own(world, tmp_path):
    """The pool's names, the target's, and, where the target has none, the pool's or those that are usual."""
    pool = DataConfig(paths=[pairs(tmp_path / "pool.jsonl", "q", "r", 6)], columns={"prompt": "q", "completion": "r"})
    mine = world.select(tmp_path / "run", method="tfidf", train=pool, budget="2", target=[str(tmp_path / "dev.jsonl")])
    runs = []
    for n, (ask, say, columns) in enumerate(
        [
            ("frage", "antwort", {"prompt": "frage", "completion": "antwort"}),
            ("q", "r", None),  # the pool's
            ("prompt", "completion", None),  # the usual ones
            ("frage", "antwort", {"dev.jsonl": {"prompt": "frage", "completion": "antwort"}}),
        ]
    ):
        pairs(tmp_path / "dev.jsonl", ask, say, 1, start=3)
        run = select.run(mine.model_copy(update={"out": tmp_path / f"run-{n}", "target_columns": columns}))
        runs.append(scores(run)["_score"])
    assert runs[0] == runs[1] == runs[2] == runs[3] and max(range(6), key=runs[0].__getitem__) == 3
    again = load_config(SelectConfig, tmp_path / "run-3" / "run.yaml")
    assert again.target_columns == {"dev.jsonl": {"prompt": "frage", "completion": "antwort"}}
    pairs(tmp_path / "dev.jsonl", "frage", "antwort", 1)
    (tmp_path / "dev.jsonl").write_text('{"frage": "q", "antwort": "a"}')
    with pytest.raises(DataError, match=r"dev.jsonl:1: .*--target-columns"):
        select.run(world.select(tmp_path / "none", method="tfidf", target=[str(tmp_path / "dev.jsonl")]))


def test_preferences_are_selected_with_the_flag(command, world, tmp_path):
    rows = [{"prompt": f"ask {k}", "chosen": f"good {k}", "rejected": "bad"} for k in range(4)]
    (tmp_path / "pool.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    argv = [
        "select",
        "--model",
        world.model,
        "--train",
        tmp_path / "pool.jsonl",
        "--method",
        "random",
        "--budget",
        "2",
        "--out",
        tmp_path / "run",
    ]
    answer = command(*map(str, argv))
    assert answer.code == 3 and "preference_row" in answer.stderr and "--preference chosen" in answer.stderr
    answer = command(*map(str, [*argv, "--preference", "chosen"]))
    assert answer.code == 0, answer.stderr
    examples = json.loads((tmp_path / "run" / "summary.json").read_text())["best"]
    assert all(e["answer"].startswith("good") for e in examples)
