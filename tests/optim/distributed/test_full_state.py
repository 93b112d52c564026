"""State dicts under FSDP2, full and sharded, through torch's own functions: a run goes on to the bit."""

import pytest
import torch

from optim import OPTIMIZERS
from tests.optim.distributed import full_state, processes

pytestmark = pytest.mark.distributed

UNLIKE = ("adam_mini", "normuon", "stable_spam")
"""Rules whose states have entries of other shapes than the parameter's, which torch hands over whole."""


def compare(found, names):
    for mine in found:
        assert {name for name, _ in mine} == set(names)
        for (name, how), outcome in mine.items():
            if isinstance(outcome, str):
                assert "shard" in outcome, (name, outcome)
                continue
            went_on, loaded = outcome
            for n in went_on:
                assert torch.equal(went_on[n], loaded[n]), (name, how, n)


def test_rules_with_entries_of_other_shapes(tmp_path):
    found = processes.run(full_state.resumed, 2, tmp_path, list(UNLIKE), list(full_state.HOW))
    compare(found, UNLIKE)
    assert not any(isinstance(outcome, str) for outcome in found[0].values())


@pytest.mark.slow
def test_every_rule_goes_on_from_a_full_state_dict(tmp_path):
    """Or refuses shards by name when it is built or stepped."""
    names = sorted(set(OPTIMIZERS) - set(UNLIKE))
    compare(processes.run(full_state.resumed, 2, tmp_path, names, ["full"]), names)
