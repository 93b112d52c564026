"""Per-row optimizer updates, from gradients to the store: the acceptance tests of LESS and the promises on numbers."""

import hashlib
import math
import os
import pickle
import re
import subprocess
import sys
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import optim
from datatools import (
    PROJECTORS,
    Candidates,
    DataError,
    GradientFeatures,
    aggregate,
    extract,
    files,
    influence,
    per_sample_grads,
    select,
)
from optim import SGDRule, UpdateMap
from pipelines.models import load as models
from pipelines.models.lora import add_lora, lora_parameters
from pipelines.models.losses import collate, row_losses
from pipelines.settings.parts import LoraConfig, ModelConfig
from pipelines.training import checkpoints
from tests.tiny import save_tiny_model

REPOSITORY = Path(__file__).resolve().parents[3]
VOCABULARY = 200


# ------------------------------------------------------------------------------------------------ a small job of rows


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def module(folder):
    """The tiny Llama with LoRA matrices that are not at their start (B = 0 would hide half of the formula)."""
    base = models.load(ModelConfig(name=str(folder))).model
    wrapped = add_lora(base, LoraConfig(rank=4), seed=1).eval()
    generator = torch.Generator().manual_seed(3)
    for name, p in lora_parameters(wrapped).items():
        if "lora_B" in name:
            p.data.copy_(torch.randn(p.shape, generator=generator) * 0.05)
    return wrapped


def random_rows(count, *, seed=0, shortest=5, longest=40):
    """(input_ids, labels): random tokens, the first third without loss; no two alike."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(count):
        n = int(torch.randint(shortest, longest + 1, (), generator=generator))
        ids = torch.randint(0, VOCABULARY, (n,), generator=generator).tolist()
        found.append((ids, [-100] * (n // 3) + ids[n // 3 :]))
    return found


def key_of(row):
    return hashlib.md5(repr(row).encode(), usedforsecurity=False).hexdigest()


@dataclass
class Job:
    """Rows and how their features are made; `fill` is the call of `extract` that a pipeline makes."""

    module: Any
    rows: list[tuple[list[int], list[int]]]
    updates: UpdateMap
    projector: Any
    loss: Any = row_losses
    token_budget: int = 256
    method: str = "hooks"
    meta: Mapping[str, Any] = field(default_factory=lambda: {"test": 1})

    def fill(self, folder, *, rows_per_unit=16, advance=None, rank=0, world=1, dtype="float32"):
        by_key = {key_of(row): row for row in self.rows}
        store = GradientFeatures.create_or_open(
            folder, meta=self.meta, dim=self.projector.dim, dtype=dtype, keys=list(by_key), rows_per_unit=rows_per_unit
        )
        extract(
            store,
            self.module,
            self.loss,
            lambda keys: collate([by_key[key] for key in keys]),
            {key: len(row[0]) for key, row in by_key.items()},
            self.updates,
            self.projector,
            method=self.method,
            token_budget=self.token_budget,
            advance=advance,
            rank=rank,
            world=world,
        )
        return store


def plain(module):
    """Gradients as they are."""
    params = {name: p.detach() for name, p in lora_parameters(module).items()}
    return UpdateMap(dict.fromkeys(params, SGDRule()), {name: SGDRule().init(p) for name, p in params.items()}, params)


def warmed(module, name="adamw", *, steps=2, seed=7, **options):
    """The optimizer `name` after a few steps on random rows; the parameters are put back to where they were."""
    params = lora_parameters(module)
    before = {key: p.detach().clone() for key, p in params.items()}
    optimizer = optim.create(name, params.items(), lr=1e-3, **options)
    for step in range(steps):
        for p in params.values():
            p.requires_grad_(True)
        loss = row_losses(module, collate(random_rows(4, seed=seed + step))).mean()
        for p, grad in zip(params.values(), torch.autograd.grad(loss, list(params.values())), strict=True):
            p.grad = grad
        optimizer.step()
    for key, p in params.items():
        p.data.copy_(before[key])
        p.grad = None
        p.requires_grad_(False)
    return UpdateMap.of(optimizer)


def identity(module):
    return PROJECTORS["identity"].of({name: p.shape for name, p in lora_parameters(module).items()}, 1, 0)


def hashes(folder):
    return {path.name: files.digest_file(path) for path in sorted(Path(folder).iterdir())}


def everything(store):
    """(features [n, d], norms [n], status) of a store, in the order of its plan."""
    blocks = list(store.iter_blocks())
    features, norms = torch.cat([b.features for b in blocks]), torch.cat([b.norms for b in blocks])
    return features, norms, [state for b in blocks for state in b.status]


# ------------------------------------------------------------------------- the same feature, whatever the circumstances


def test_a_stored_feature_is_the_definition(module, tmp_path):
    """The store holds unit vectors and norms of u(g_i), g_i by one backward pass a row, i in the order of the plan."""
    rows, updates = random_rows(12), warmed(module)
    features, norms, status = everything(Job(module, rows, updates, identity(module)).fill(tmp_path))
    assert status == ["ok"] * 12
    for i, row in enumerate(rows):
        grads = per_sample_grads(row_losses, module, collate([row]), list(updates.params), method="loop")
        wanted = torch.cat([u.flatten() for u in updates({name: g[0] for name, g in grads.items()}).values()])
        assert torch.cosine_similarity(features[i], wanted, dim=0) > 1 - 1e-6
        assert float(norms[i]) == pytest.approx(float(wanted.norm()), rel=1e-5)


@pytest.mark.parametrize("budget", [1, 64, 100_000])
def test_batch_grouping_does_not_change_a_feature(module, tmp_path, budget):
    """One row at a time, small batches or all at once: padding and company are rounding, cosine >= 0.99999."""
    rows, updates = random_rows(40), warmed(module)
    want, norms, _ = everything(Job(module, rows, updates, identity(module)).fill(tmp_path / "a"))
    job = Job(module, rows, updates, identity(module), token_budget=budget)
    got, other, _ = everything(job.fill(tmp_path / "b", rows_per_unit=7))
    assert float((want * got).sum(1).min()) >= 0.99999
    torch.testing.assert_close(other, norms, rtol=1e-4, atol=0)


@pytest.mark.parametrize("stop_after", [1, 9, 30])
def test_an_interrupted_extraction_ends_with_the_same_bytes(module, tmp_path, stop_after):
    rows, updates = random_rows(40), warmed(module)
    job = Job(module, rows, updates, PROJECTORS["sjlt"].of({}, 128, 0))
    job.fill(tmp_path / "whole", dtype="float16")

    class Stop(Exception):
        pass

    done = 0

    def advance(n, tokens):
        nonlocal done
        done += n
        if done >= stop_after:
            raise Stop

    with pytest.raises(Stop):
        job.fill(tmp_path / "parts", advance=advance, dtype="float16")
    again = []
    job.fill(tmp_path / "parts", advance=lambda n, tokens: again.append(n), dtype="float16")
    assert hashes(tmp_path / "parts") == hashes(tmp_path / "whole")
    assert 40 - 16 * (stop_after // 16) >= sum(again)  # finished units are not computed again


def test_the_bytes_do_not_depend_on_the_number_of_workers(module, tmp_path):
    job = Job(module, random_rows(40), warmed(module), PROJECTORS["sjlt"].of({}, 128, 0))
    job.fill(tmp_path / "one", rows_per_unit=8)
    for rank in (2, 0, 1):  # in any order
        job.fill(tmp_path / "three", rows_per_unit=8, rank=rank, world=3)
    assert hashes(tmp_path / "three") == hashes(tmp_path / "one")


@pytest.mark.parametrize("name", sorted(optim.RULES))
def test_every_rule_drives_extraction(module, tmp_path, name):
    """Whatever the optimizer, the feature is its update for one row: finite, and equal to the rule applied alone."""
    # bfloat16 products of Newton-Schulz round a batch and a single matrix differently; float32 shows that both are the
    # rule
    updates = warmed(module, name, **({"ns_dtype": "float32"} if name in ("muon", "muon_8bit", "normuon") else {}))
    assert {rule.name for rule in updates.rules.values()} == {name}
    rows = random_rows(6, seed=2)
    features, norms, status = everything(Job(module, rows, updates, identity(module)).fill(tmp_path))
    assert status == ["ok"] * 6 and features.isfinite().all() and norms.isfinite().all()
    # against the same gradients: Lion's signs would turn the rounding of another batch into whole coordinates
    grads = per_sample_grads(row_losses, module, collate(sorted_like_extract(rows)), list(updates.params))
    for place, row in enumerate(sorted_like_extract(rows)):
        wanted = torch.cat([u.flatten() for u in updates({n: g[place] for n, g in grads.items()}).values()])
        i = rows.index(row)
        assert torch.cosine_similarity(features[i], wanted, dim=0) > 1 - 1e-5
        assert float(norms[i]) == pytest.approx(float(wanted.norm()), rel=1e-4)


def sorted_like_extract(rows):
    """The one batch that `extract` makes of these rows: longest first, then by place."""
    return [rows[i] for i in sorted(range(len(rows)), key=lambda i: (-len(rows[i][0]), i))]


def test_losses_and_gradient_norms_are_kept_beside_the_features(module, tmp_path):
    """A unit's info has each row's loss and the norm of its plain gradient, whatever the optimizer made of it."""
    rows = random_rows(6)
    store = Job(module, rows, warmed(module), PROJECTORS["sjlt"].of({}, 32, 0)).fill(tmp_path)
    info = store.info(0)
    for i, row in enumerate(rows):
        batch = collate([row])
        grads = per_sample_grads(row_losses, module, batch, list(lora_parameters(module)), method="loop")
        norm = torch.cat([g.flatten() for g in grads.values()]).norm()
        assert info["gradient_norm"][i] == pytest.approx(float(norm), rel=1e-4)
        assert info["loss"][i] == pytest.approx(float(row_losses(module, batch).detach()), rel=1e-5)


# -------------------------------------------------------------------------------------------------- what features tell


def test_a_duplicate_of_a_target_row_comes_first(module, tmp_path):
    """With plain gradients on both sides a pool row equal to a target row has cosine 1: the top 1 % of the pool."""
    target, pool = random_rows(4, seed=50), random_rows(396)
    places = [17, 100, 255, 399]
    for place, row in zip(places, target, strict=True):
        pool.insert(place, row)
    projector = PROJECTORS["sjlt"].of({}, 512, 0)
    train = Job(module, pool, plain(module), projector).fill(tmp_path / "train", dtype="float16")
    val = Job(module, target, plain(module), projector).fill(tmp_path / "target", dtype="float16")
    similarity = influence([train], [val], [1.0], keys=[key_of(row) for row in pool])
    for j, place in enumerate(places):
        assert int(similarity[:, j].argmax()) == place and float(similarity[place, j]) > 0.999
    for how in ("less", "max"):
        best = aggregate(similarity, [0, 1, 2, 3], how).argsort(descending=True)[:4]
        assert sorted(best.tolist()) == places


@pytest.mark.parametrize("name", ["sjlt", "rademacher"])
def test_projected_cosines_are_near_the_exact_ones(module, tmp_path, name):
    """A cosine moves by 1 / sqrt(k) in the mean; none of 240 by more than four times that."""
    k = 1024
    pool, target, updates = random_rows(40), random_rows(6, seed=9), warmed(module)
    cosines = []
    for projector in (identity(module), PROJECTORS[name].of({}, k, 0)):
        train = Job(module, pool, updates, projector).fill(tmp_path / f"train-{projector.name}")
        val = Job(module, target, plain(module), projector).fill(tmp_path / f"target-{projector.name}")
        cosines.append(influence([train], [val], [1.0]))
    assert float((cosines[0] - cosines[1]).abs().max()) < 4 / math.sqrt(k)


@pytest.mark.slow
def test_first_order_fidelity(folder, record_property):
    """<mean target gradient, mean Adam feature of the batch> foretells each step's fall of the target loss: r > 0.5.

    LESS's own check of a gradient store (r = 0.74, 0.57, 0.46 on three tasks of the paper), here over 60 steps whose
    batches are sometimes like the target and mostly not.
    """
    loaded = models.load(ModelConfig(name=str(folder)))
    model = add_lora(loaded.model, LoraConfig(rank=8), seed=0).eval()
    params = lora_parameters(model)
    optimizer = optim.create("adamw", params.items(), lr=3e-3)
    projector = PROJECTORS["sjlt"].of({}, 8192, 0)
    counting, words = patterned_rows(loaded.tokenizer)
    target, counting = collate(counting[:8]), counting[8:]
    generator = torch.Generator().manual_seed(0)
    expected, seen = [], []
    loss = float(row_losses(model, target).detach().mean())
    for _ in range(60):
        share = float(torch.rand((), generator=generator))
        batch = [
            (counting if float(torch.rand((), generator=generator)) < share else words)[
                int(torch.randint(0, 60, (), generator=generator))
            ]
            for _ in range(8)
        ]
        adam = UpdateMap.of(optimizer)
        features = projector.project(adam.per_sample(per_sample_grads(row_losses, model, collate(batch), list(params))))
        wanted = projector.project(per_sample_grads(row_losses, model, target, list(params)))
        expected.append(float(features.mean(0) @ wanted.mean(0)))
        for p in params.values():
            p.requires_grad_(True)
        optimizer.zero_grad()
        row_losses(model, collate(batch)).mean().backward()
        optimizer.step()
        before, loss = loss, float(row_losses(model, target).detach().mean())
        seen.append(before - loss)
    r = float(torch.corrcoef(torch.tensor([expected, seen]))[0, 1])
    record_property("fidelity", r)
    print(f"fidelity over 60 steps: r = {r:.3f}")
    assert r > 0.5


def patterned_rows(tokenizer):
    """Two kinds of text with a structure to learn: (counting, words), each (input_ids, labels)."""
    counting = [f"{i}, {i + 1}, {i + 2}, {i + 3}, {i + 4}" for i in range(68)]
    names = ["anna", "bela", "cleo", "dora", "emma", "fay", "gina", "hope"]
    words = [f"{names[i % 8]} likes {names[i * 3 % 7]} and {names[i // 8 % 8]}" for i in range(68)]
    return [[(ids, ids) for ids in (tokenizer(text)["input_ids"] for text in kind)] for kind in (counting, words)]


# -------------------------------------------------------------------------------------------- rows without a number


def poisoned(kind, first_tokens):
    """`row_losses`, with a loss or only a gradient that is not finite for rows that begin with one of these tokens."""

    def loss(module, batch):
        values = row_losses(module, batch).clone()
        for i in range(len(values)):
            if int(batch["input_ids"][i, 0]) in first_tokens:
                if kind == "gradient":  # the loss stays what it was, the derivative of sqrt at 0 is infinite
                    values[i] = values[i] + torch.sqrt(values[i] * 0)
                else:
                    values[i] = values[i] * float(kind)
        return values

    return loss


@pytest.mark.parametrize("kind", ["nan", "inf", "gradient"])
@pytest.mark.parametrize("rule", ["adamw", "muon"])
def test_a_non_finite_row_is_marked_and_harms_no_other(module, tmp_path, kind, rule):
    """It is `nonfinite`, has no score and is never chosen; every other row has the bits that it has without it."""
    rows = random_rows(40)
    bad = [3, 11, 30]
    for n, i in enumerate(bad):
        rows[i] = ([199 - n, *rows[i][0]], [-100, *rows[i][1]])
    tokens = {199 - n for n in range(3)}
    rows = [r if i in bad else ([r[0][0] % 190, *r[0][1:]], r[1]) for i, r in enumerate(rows)]
    updates, projector = warmed(module, rule), PROJECTORS["sjlt"].of({}, 64, 0)
    clean = everything(Job(module, rows, updates, projector).fill(tmp_path / "clean"))
    loss = poisoned(kind, tokens)
    Job(module, rows[4:8], updates, projector, loss=loss).fill(tmp_path / "sound")  # learns where rows are
    store = Job(module, rows, updates, projector, loss=loss).fill(tmp_path / "poisoned")
    features, norms, status = everything(store)
    assert [i for i, state in enumerate(status) if state == "nonfinite"] == bad
    assert set(status) == {"ok", "nonfinite"}
    others = [i for i in range(40) if i not in bad]
    assert torch.equal(features[others], clean[0][others]) and torch.equal(norms[others], clean[1][others])
    assert not features[bad].any()

    target = Job(module, random_rows(2, seed=8), plain(module), projector).fill(tmp_path / "target")
    similarity = influence([store], [target], [1.0])
    eligible = torch.tensor([state == "ok" for state in status])
    scores = aggregate(similarity, [0, 0], eligible=eligible)
    assert scores[bad].isnan().all() and scores[others].isfinite().all()
    keys = [key_of(row) for row in rows]
    candidates = Candidates(keys=keys, scores=torch.where(eligible, scores, 0.0), eligible=eligible)
    assert not set(select("top_k", candidates, len(others)).indices.tolist()) & set(bad)


@pytest.mark.parametrize("rule", ["sgd", "adamw"])
def test_a_row_without_a_trained_token_is_empty(module, tmp_path, rule):
    """Its gradient is zero: a status, not a cosine of 0/0, nor the momentum that AdamW would make its update of."""
    rows = random_rows(5)
    rows[2] = (rows[2][0], [-100] * len(rows[2][0]))
    updates = warmed(module) if rule == "adamw" else plain(module)
    features, norms, status = everything(Job(module, rows, updates, identity(module)).fill(tmp_path))
    assert status == ["ok", "ok", "empty", "ok", "ok"]
    assert features.isfinite().all() and not features[2].any() and float(norms[2]) == 0


# ----------------------------------------------------------------------------------------------- saved optimizer states


def as_checkpoint(folder, state):
    folder.mkdir(parents=True)
    torch.save(state, folder / "optimizer.pt")
    return checkpoints.Checkpoint(folder, 3, 1e-3, 1.0)


def states_equal(found, wanted):
    assert set(found.params) == set(wanted)
    for name, state in wanted.items():
        for part in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(found.states[name][part], state[part]), (name, part)


def torch_adamw(params, *, steps=2, named=False, **options):
    """`torch.optim.AdamW` after some steps with random gradients, and its state by name."""
    generator = torch.Generator().manual_seed(5)
    own = {name: nn.Parameter(p.detach().clone()) for name, p in params.items()}
    optimizer = torch.optim.AdamW(list(own.items()) if named else list(own.values()), lr=1e-3, **options)
    for _ in range(steps):
        for p in own.values():
            p.grad = torch.randn(p.shape, generator=generator) * 1e-3
        optimizer.step()
    return optimizer, {name: optimizer.state[p] for name, p in own.items()}


@pytest.mark.parametrize("layout", ["integers", "two groups", "param_names", "names as keys", "wrapped names"])
def test_integers_and_names_give_identical_features(module, tmp_path, layout):
    """Spec 4.2: the feature must not depend on how the optimizer's state was keyed when it was saved."""
    params = dict(lora_parameters(module))
    optimizer, wanted = torch_adamw(params, named=layout == "param_names")
    saved = optimizer.state_dict()
    names = list(params)
    if layout == "two groups":  # as Trainer builds them: the no-decay group is empty for LoRA
        saved["param_groups"].append({**saved["param_groups"][0], "params": [], "weight_decay": 0.0})
    if layout in ("names as keys", "wrapped names"):  # FSDP's full state dict; DDP and compile add prefixes
        prefix = "module._orig_mod." if layout == "wrapped names" else ""
        saved["state"] = {prefix + names[i]: state for i, state in saved["state"].items()}
        shuffled = [prefix + name for name in sorted(names, reverse=True)]  # order must not matter where names tell
        saved["param_groups"][0] |= {"params": shuffled}
    found = checkpoints.updates(as_checkpoint(tmp_path / "checkpoint-3", saved), params)
    states_equal(found, wanted)
    plain_map = UpdateMap.from_state_dict(torch_adamw(params, named=True)[0].state_dict(), params)
    rows = random_rows(6)
    got = Job(module, rows, found, identity(module)).fill(tmp_path / "a")
    want = Job(module, rows, plain_map, identity(module)).fill(tmp_path / "b")
    assert torch.equal(everything(got)[0], everything(want)[0])


@pytest.mark.parametrize("how", ["shape", "count", "name", "nothing", "list"])
def test_a_state_that_does_not_fit_is_refused(module, tmp_path, how):
    params = dict(lora_parameters(module))
    saved = torch_adamw(params, named=how == "name")[0].state_dict()
    if how == "shape":
        saved["state"][0]["exp_avg"] = torch.zeros(7, 5)
    elif how == "count":
        saved["param_groups"][0]["params"].pop()
    elif how == "name":
        saved["param_groups"][0]["param_names"][0] = "another.weight"
    checkpoint = as_checkpoint(tmp_path / "c", {"nothing": {}, "list": [1, 2]}.get(how, saved))
    with pytest.raises(DataError, match="optimizer.pt") as refused:
        checkpoints.updates(checkpoint, params)
    wanted = {"shape": r"\(7, 5\)", "count": "15|16", "name": "another.weight"}.get(how, "state_dict")
    assert re.search(wanted, str(refused.value))


def trained_by_trainer(model, folder, *, steps=3):
    """A real run of transformers' Trainer with torch's AdamW: its optimizer.pt has integers and two groups."""
    from transformers import Trainer, TrainingArguments

    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=2,
        weight_decay=0.1,
        learning_rate=1e-3,
        logging_steps=1,
        save_steps=steps,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    rows = [{"input_ids": torch.tensor(ids), "labels": torch.tensor(ids)} for ids, _ in random_rows(8, longest=5)]
    trainer = Trainer(model=model, args=arguments, train_dataset=rows)
    with torch.random.fork_rng():
        trainer.train()
    return trainer


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_the_states_of_a_trainer_run_find_their_parameters(tmp_path, kind, capsys):
    """All weights trained: the saved order is decayed first, then norms and biases, and only the model can tell it.

    GPT-2's layer norms are called ln_1: Trainer leaves them out of decay by their type.
    """
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    small = {"vocab_size": VOCABULARY, "hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 2}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if kind == "llama":
            model = LlamaForCausalLM(
                LlamaConfig(**small, intermediate_size=32, num_key_value_heads=1, attention_bias=True)
            )
        else:
            model = GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, n_embd=16, n_head=2, n_layer=2, n_positions=64))
    trainer = trained_by_trainer(model, tmp_path)
    folder = tmp_path / "checkpoint-3"
    saved = torch.load(folder / "optimizer.pt", weights_only=True)
    assert len(saved["param_groups"]) == 2 and "param_names" not in saved["param_groups"][0]
    module = trainer.model
    params = checkpoints.trainable(module)
    # inside the process the optimizer holds the parameters themselves, so their states are known beyond doubt
    inner = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
    wanted = {name: inner.state[p] for name, p in module.named_parameters()}
    stop = checkpoints.find([tmp_path])[0]
    assert stop.step == 3
    states_equal(checkpoints.updates(stop, params, module=module), wanted)

    by_model_order = [params[n] for n in params]
    saved["param_groups"] = [{**saved["param_groups"][0], "params": list(range(len(by_model_order)))}]
    wrong = as_checkpoint(tmp_path / "wrong", saved)
    with pytest.raises(DataError, match=r"state \d+ \(exp_avg.*should be"):
        checkpoints.updates(wrong, params, module=module)


def test_an_evil_optimizer_file_is_refused_and_runs_nothing(module, tmp_path):
    """Checkpoints come from strangers: nothing in them is ever unpickled."""
    canary = tmp_path / "canary"

    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {canary}",)

    params = dict(lora_parameters(module))
    for number, write in enumerate(
        (
            lambda path: path.write_bytes(pickle.dumps(Evil())),
            lambda path: path.write_bytes(pickle.dumps({"state": Evil(), "param_groups": []})),
            lambda path: torch.save({"state": {}, "param_groups": [Evil()]}, path),
            lambda path: torch.save([Evil()], path, _use_new_zipfile_serialization=False),
            lambda path: path.write_bytes(b""),
            lambda path: path.write_bytes(b"PK\x03\x04" + b"\0" * 64),
        )
    ):
        folder = tmp_path / str(number)
        folder.mkdir()
        write(folder / "optimizer.pt")
        with pytest.raises(DataError, match="optimizer.pt"):
            checkpoints.updates(checkpoints.Checkpoint(folder, 1, 1e-3, 1.0), params)
    assert not canary.exists()


# --------------------------------------------------------------------------------------------------------------- memory


MEASURE = """
import sys, tempfile
from pathlib import Path
import torch
from tests.datatools.features.test_features import Job, plain, random_rows
from tests.tiny import save_tiny_model
from datatools import PROJECTORS
from pipelines.models import load as models
from pipelines.models.lora import add_lora
from pipelines.settings.parts import LoraConfig, ModelConfig

with tempfile.TemporaryDirectory() as scratch:
    base = models.load(ModelConfig(name=str(save_tiny_model(Path(scratch) / "model")))).model
    module = add_lora(base, LoraConfig(rank=4), seed=1).eval()
    rows, projector = random_rows(int(sys.argv[1])), PROJECTORS["sjlt"].of({}, 8192, 0)
    job = Job(module, rows, plain(module), projector, token_budget=512)
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak of the imports, which would hide ours
    job.fill(Path(scratch) / "store", rows_per_unit=32, dtype="float16")
    print(next(line.split()[1] for line in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in line))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from Linux's /proc")
def test_memory_does_not_grow_with_the_number_of_rows(record_property):
    """Ten times the rows, 59 MB of float32 features more, may cost 12 MiB: keys, lengths, and the allocator's moods."""
    peaks = []
    for rows in (200, 2000):
        done = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(MEASURE), str(rows)],
            capture_output=True,
            text=True,
            check=True,
            cwd=REPOSITORY,
            env={**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"},
        )
        peaks.append(int(done.stdout.split()[-1]) / 1024)
    record_property("rss_growth_mib", peaks[1] - peaks[0])
    print(f"peak RSS: {peaks[0]:.1f} MiB for 200 rows, {peaks[1]:.1f} MiB for 2000")
    assert peaks[1] - peaks[0] < 12
