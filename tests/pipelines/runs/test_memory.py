"""Passes that run out of memory go on with smaller batches and the same results; what cannot says what to set."""

import json
import sys
from contextlib import contextmanager

import pytest
import torch
from transformers import LlamaForCausalLM

from datatools import EnvironmentProblem, GradientFeatures, TokenBudget, is_out_of_memory, micro_batches
from pipelines.cli import app
from pipelines.select import run as select
from pipelines.settings.select import FeaturesConfig
from pipelines.settings.train import EvaluateConfig, TrainConfig
from pipelines.training import evaluation, train
from tests.pipelines.conftest import make_world

ERRORS = {
    "gpu": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    "cpu": RuntimeError("[enforce fail at alloc_cpu.cpp:124] . DefaultCPUAllocator: can't allocate memory: you tried"),
}
LARGE = 512


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


@contextmanager
def room_for(tokens, error=ERRORS["gpu"]):
    """A machine in whose memory a batch of this many padded tokens fits, and no larger one; yields the sizes tried."""
    tried, forward = [], LlamaForCausalLM.forward

    def limited(self, input_ids=None, **more):
        tried.append(input_ids.numel())
        if input_ids.numel() > tokens:
            raise error
        return forward(self, input_ids=input_ids, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LlamaForCausalLM, "forward", limited)
        yield tried


def features(tokens):
    return FeaturesConfig(token_budget=tokens, rows_per_unit=20)


@pytest.mark.parametrize("error", ERRORS.values(), ids=ERRORS)
@pytest.mark.parametrize("method", ["less", "rds", "loss"])
def test_results_are_those_of_a_run_with_the_smaller_batches(world, tmp_path, method, error):
    def run(name, tokens):
        return select.run(world.select(tmp_path / name, method=method, features=features(tokens)))

    want = run("small", LARGE // 2)
    with room_for(LARGE // 2, error) as tried:
        found = run("halved", LARGE)
    assert max(tried) > LARGE // 2  # it was tried
    stores = sorted(path.name for path in (want / "features").iterdir() if (path / "plan.json").is_file())
    assert stores
    for name in stores:
        a, b = (GradientFeatures.open(one / "features" / name) for one in (want, found))
        keys = list(a.rows().keys)
        assert torch.equal(a.take(keys), b.take(keys))  # to the bit, although a unit had failed half-way
    assert (want / "selected.jsonl").read_bytes() == (found / "selected.jsonl").read_bytes()
    events = map(json.loads, (found / "events.jsonl").read_text().splitlines())
    said = [event["text"] for event in events if event["event"] == "warning" and "fit into memory" in event["text"]]
    assert said and all("batches now have at most 256" in text for text in said)
    assert len({text.partition(": a batch of")[0] for text in said}) == len(said)  # each pass says it once


def test_a_row_that_does_not_fit_alone_is_named(world, tmp_path):
    messages = [{"role": "user", "content": "x" * 600}, {"role": "assistant", "content": "y"}]
    pool = tmp_path / "pool.jsonl"
    pool.write_bytes(world.pool.read_bytes() + json.dumps({"id": "long", "messages": messages}).encode() + b"\n")
    for method in ("loss", "rds", "gist"):
        with room_for(512), pytest.raises(EnvironmentProblem, match=r"does not fit into memory, even alone") as caught:
            select.run(world.select(tmp_path / method, method=method, train={"paths": [str(pool)]}))
        assert f"{pool}:61" in str(caught.value) and "--max-length" in str(caught.value)


def test_losses_are_evaluated_in_smaller_batches(world, capsys):
    def loss():
        return evaluation.evaluate(EvaluateConfig(model=str(world.model), data=str(world.pool)))["loss"]

    want = loss()
    with room_for(300) as tried:
        assert loss() == pytest.approx(want, rel=1e-6)
    assert max(tried) > 300 and "losses: a batch of" in capsys.readouterr().err


def test_training_does_not_change_its_batches_by_itself(world, tmp_path):
    config = TrainConfig(model=str(world.model), data=str(world.pool), out=tmp_path / "run")
    with (
        room_for(100),
        pytest.raises(EnvironmentProblem, match=r"parts of at most 2,048 .*--set training.micro_tokens"),
    ):
        train.run(config)


def test_other_errors_pass_through():
    def work(rows, batch):
        raise RuntimeError("the shapes do not match")

    budget = TokenBudget(8)
    with pytest.raises(RuntimeError, match="shapes"):
        micro_batches([4, 4], 8, len).each(work, budget)
    assert budget.tokens == 8


@pytest.mark.parametrize("room, tokens", [(7, 1000), (3, 16), (4, 4), (1, 64)])
def test_every_row_is_worked_on_once_whatever_fits(room, tokens):
    lengths, seen, told = [1, 2, 3, 2, 1, 1, 3], [], []

    def work(rows, batch):
        if max(lengths[i] for i in rows) * len(rows) > room and len(rows) > 1:
            raise MemoryError
        seen.extend(rows)

    budget = TokenBudget(tokens, shrunk=lambda before, now: told.append((before, now)))
    micro_batches(lengths, budget.tokens, len).each(work, budget)
    assert sorted(seen) == list(range(7))
    assert all(now <= before // 2 for before, now in told) and [b for b, _ in told[1:]] == [n for _, n in told[:-1]]


def test_a_slice_of_batches_keeps_its_rows():
    """As each of several ranks takes some of the batches."""
    batches, seen, once = micro_batches([4, 4, 3, 3], 8, len), [], []

    def work(rows, batch):
        if not once and len(rows) > 1:
            once.append(rows)
            raise MemoryError
        seen.append(rows)

    batches[1::2].each(work, TokenBudget(8))
    assert once == [[2, 3]] and sorted(seen) == [[2], [3]]


@pytest.mark.parametrize(
    "text, memory",
    [
        ("DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes.", True),
        ("MPS backend out of memory (MPS allocated: 1 GB)", True),
        ("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`", True),
        ("mat1 and mat2 shapes cannot be multiplied", False),
    ],
)
def test_the_errors_of_torch_are_told_apart(text, memory):
    assert is_out_of_memory(RuntimeError(text)) is memory
    assert not is_out_of_memory(ValueError(text))


def test_the_command_line_knows_the_error_of_the_cpu(capsys):
    assert app._report(ERRORS["cpu"], ["diagnose"]) == EnvironmentProblem.exit_code
    assert "error: out of memory: " in capsys.readouterr().err


def test_the_command_line_knows_the_error_of_python_before_torch_is_there(capsys, monkeypatch):
    monkeypatch.delitem(sys.modules, "torch")
    assert app._report(MemoryError(), ["ls"]) == EnvironmentProblem.exit_code
    assert "error: out of memory: " in capsys.readouterr().err
