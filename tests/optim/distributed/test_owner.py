"""Matrix owner computes: two and three ranks give what one gives, replicated and in rows."""

import copy

import pytest
import torch

from optim import Optimizer, SGDRule, create
from optim.distributed import OwnerComputes
from tests.optim.distributed import jobs
from tests.optim.harness import assert_close, assert_same, parameters, set_grads
from tests.optim.specs import SPECS


@pytest.mark.distributed
@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_are_one(ranks, job_of, monkeypatch):
    """Every rule that looks at whole tensors: uneven rows, ranks without rows, fewer tensors than ranks, a missing and
    a NaN gradient, a state dict that is loaded again. Parameters to rounding, and the same bits on all ranks.

    This also says that NorMuon's norm is the whole matrix's.
    """
    found = [result["owner"] for result in job_of(ranks)]
    monkeypatch.setenv("OPTIM_BACKEND", "torch")
    names = {name for name, _ in found[0]} - {"alone"}
    with pytest.warns(RuntimeWarning, match="'p1': its gradient is not finite"):
        alone = {name: jobs.train(name, "one") for name in names} | {"alone": jobs.train("muon", "one", ((5, 4),))}
    for (name, kind), mine in found[0].items():
        want = alone[name]
        assert_close(mine["params"], want["params"], torch.float64, f"{name} {kind}")
        for other in found[1:]:
            assert_same(other[name, kind]["params"], mine["params"], f"{name} {kind}")
            for i, state in want["state"].items():
                for key, value in state.items():
                    for rank in (mine, other[name, kind]):
                        assert_close([rank["state"][i][key]], [value], torch.float64, f"{name} {kind} {key}")
        held = [rank[name, kind]["held"] for rank in found]
        rule = SPECS["muon" if name == "alone" else name].rule()
        if not rule.coupled:
            assert sum(held) == len(want["state"]), f"{name} {kind}: every state is on one rank"
            assert max(held) - min(held) <= 1


@pytest.mark.distributed
def test_state_dicts_hold_whole_states_of_adamws_tensors_too(job_of, monkeypatch):
    """As FSDP2's parameters have them, AdamW's states are sharded; saved they are those of one process."""
    monkeypatch.setenv("OPTIM_BACKEND", "torch")
    want = jobs.with_adamw("one")
    for result in job_of(2):
        for kind, mine in result["with_adamw"].items():
            assert_close(mine["params"], want["params"], torch.float64, kind)
            assert mine["state"].keys() == want["state"].keys()
            for i, state in want["state"].items():
                assert {type(value) for value in mine["state"][i].values()} == {torch.Tensor}, f"{kind} {i}"
                assert_close(mine["state"][i].values(), state.values(), torch.float64, f"{kind} {i}")


@pytest.mark.distributed
@pytest.mark.parametrize("name", jobs.FEW_ROWS)
def test_a_rank_without_rows_takes_its_part(name, job_of, monkeypatch):
    """FSDP2 without an owner: a tensor of one row leaves the other ranks an empty shard."""
    monkeypatch.setenv("OPTIM_BACKEND", "torch")
    with pytest.warns(RuntimeWarning, match="'p1': its gradient is not finite"):
        want = jobs.train(name, "one")["params"]
    for result in job_of(2):
        assert_close(result["shards"][name], want, torch.float64)


@pytest.mark.distributed
def test_bytes_sent(job_of):
    """Replicated: each rank's largest share, to each other. Rows: gradient and parameter there, the parameter back."""
    found = job_of(2)
    for kind in jobs.KINDS:
        sent = [result["bytes"][kind] for result in found]
        if kind == "replicas":
            assert [s["all_gather"] for s in sent] == [4 * (48 + 20)] * 2, "rank 0 owns two of the three"
        else:  # half of what others own, twice; half of what it owns, once
            assert [s["all_to_all"] for s in sent] == [4 * (2 * 24 + 34), 4 * (2 * 34 + 24)]
        assert all(s["all_reduce"] == 0 for s in sent)


def test_one_process_is_the_plain_optimizer():
    params, twins = parameters([(4, 3), (3,)]), parameters([(4, 3), (3,)])
    ours = OwnerComputes(create("muon", [("w", params[0]), ("norm", params[1])], lr=0.02, ns_dtype="param"))
    theirs = create("muon", [("w", twins[0]), ("norm", twins[1])], lr=0.02, ns_dtype="param")
    for t in range(3):
        set_grads(params, t)
        set_grads(twins, t)
        ours.step()
        theirs.step()
    assert_same(params, twins)
    theirs.load_state_dict(ours.state_dict())
    torch.optim.lr_scheduler.LambdaLR(ours, lambda step: 0.5)
    assert ours.param_groups[0]["lr"] == 0.01


def test_an_optimizer_with_a_state_is_refused():
    (p,) = parameters([(3, 3)])
    optimizer = Optimizer([p], SGDRule(momentum=0.9), lr=0.1)
    set_grads([p], 1)
    optimizer.step()
    with pytest.raises(ValueError, match="before its first step"):
        OwnerComputes(optimizer)


def test_a_copy_steps_on():
    (p,) = parameters([(4, 3)])
    optimizer = OwnerComputes(create("muon", [("w", p)], lr=0.02, ns_dtype="param"))
    q, other = copy.deepcopy((p, optimizer))
    for params, one in (([p], optimizer), ([q], other)):
        set_grads(params, 1)
        one.step()
    assert_same([p], [q])
