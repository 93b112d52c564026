"""Base models and a world for adapters."""

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.pipelines.conftest import make_world
from tests.tiny import save_tiny_model


@pytest.fixture(scope="session")
def bases(tmp_path_factory):
    """Two folders: `tied`, with one weight for embedding and head, and `untied`; both with biases in attention."""
    home = tmp_path_factory.mktemp("bases")
    save_tiny_model(home / "plain")
    model = AutoModelForCausalLM.from_pretrained(home / "plain")
    config = copy.deepcopy(model.config)
    config.attention_bias = True
    for name, tied in (("tied", True), ("untied", False)):
        config.tie_word_embeddings = tied
        with torch.random.fork_rng():
            torch.manual_seed(0)
            type(model)(config).save_pretrained(home / name)
        AutoTokenizer.from_pretrained(home / "plain").save_pretrained(home / name)
    return home


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """A world of the tests of models, which also keep files there."""
    return make_world(tmp_path_factory.mktemp("world"))
