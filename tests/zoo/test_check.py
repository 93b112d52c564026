"""The checks of the zoo see a fault that is put in."""

from dataclasses import replace

import pytest
import torch

import optim
from datatools import DataError
from tests.zoo import check


def outcome(key, name="LlamaForCausalLM"):
    return check.check(name, [key])[key]


@pytest.mark.parametrize("key", ["gradients", "values", "groups", "order"])
def test_a_sound_model_is_right(key):
    assert outcome(key).kind == "right"


def test_a_parameter_without_its_gradient_is_wrong(monkeypatch):
    real = check.per_sample_grads

    def without(losses, model, batch, names):
        found = real(losses, model, batch, names)
        found[names[0]] = torch.zeros_like(found[names[0]])
        return found

    monkeypatch.setattr(check, "per_sample_grads", without)
    found = outcome("gradients")
    assert found.kind == "wrong" and "relative error 1.0e+00" in found.note


def test_a_parameter_that_is_not_claimed_lowers_the_share(monkeypatch):
    real = check.covered
    monkeypatch.setattr(check, "covered", lambda model, names: [n for n in real(model, names) if "mlp" not in n])
    found = outcome("gradients")
    assert found.kind == "right" and 0.2 < found.share < 0.6


@pytest.mark.parametrize("instead", ["q_proj", "k_proj", "o_proj"])
def test_rows_that_are_not_values_are_wrong(monkeypatch, instead):
    real = check.LastLayer.of
    layer = "model.layers.1.self_attn"
    monkeypatch.setattr(check.LastLayer, "of", lambda model: replace(real(model, f"{layer}.{instead}"), kind="values"))
    assert outcome("values").kind == "wrong"


def test_half_of_the_value_rows_is_wrong(monkeypatch):
    real = check.LastLayer.of

    def half(model):
        target = real(model)
        return replace(target, outputs=slice(0, target.shape[0] // 2), shape=(target.shape[0] // 2, target.shape[1]))

    monkeypatch.setattr(check.LastLayer, "of", half)
    assert outcome("values").note == "moving the other rows changes values"


@pytest.mark.parametrize(
    "assign, what",
    [({"o_proj": "adamw"}, "2 matrices left out"), ({"embed_tokens": "matrix"}, "1 others")],
)
def test_a_matrix_left_out_and_an_embedding_taken_are_wrong(monkeypatch, assign, what):
    real = optim.create
    monkeypatch.setattr(
        optim,
        "create",
        lambda name, named, **k: real(name, named, **k, **({"assign": assign} if name == "muon" else {})),
    )
    found = outcome("groups")
    assert found.kind == "wrong" and what in found.note


def test_an_error_of_the_project_while_loading_is_a_refusal_and_any_other_a_crash(monkeypatch):
    def refuse(model, name):
        raise DataError("no: do that instead")

    monkeypatch.setattr(check.causal, "check", refuse)
    assert outcome("order") == check.Outcome("refused", "DataError: no: do that instead")
    monkeypatch.setattr(check.causal, "check", lambda model, name: 1 / 0)
    assert outcome("order").kind == "crash"
