"""Adam-mini's blocks by name, and blockwise Adam over several tensors."""

import pytest
import torch

from optim import AdamMini, AdamMiniRule, BlockwiseAdam, Optimizer, UpdateMap, create
from tests.optim.golden import arrays, cases, golden, kind_of
from tests.optim.harness import randn, set_grads
from tests.reference.adam_mini import PublishedAdamMini
from tests.reference.blockwise_adam import PublishedAdaSGD

LAYER = "model.layers.0."
SHAPES = {
    "model.embed_tokens.weight": (10, 8),
    LAYER + "self_attn.q_proj.weight": (8, 8),
    LAYER + "self_attn.q_proj.bias": (8,),
    LAYER + "self_attn.k_proj.weight": (4, 8),
    LAYER + "self_attn.v_proj.weight": (4, 8),
    LAYER + "self_attn.o_proj.weight": (8, 8),
    LAYER + "self_attn.q_proj.lora_A.default.weight": (3, 8),
    LAYER + "self_attn.q_proj.lora_B.default.weight": (8, 3),
    LAYER + "mlp.up_proj.weight": (6, 8),
    LAYER + "mlp.norm.weight": (6,),
    LAYER + "input_layernorm.weight": (8,),
    "model.norm.bias": (8,),
    "lm_head.weight": (10, 8),
}
WANTED = {
    "model.embed_tokens.weight": (10,),
    LAYER + "self_attn.q_proj.weight": (4,),
    LAYER + "self_attn.q_proj.bias": (8,),
    LAYER + "self_attn.k_proj.weight": (2,),
    LAYER + "self_attn.v_proj.weight": (4,),
    LAYER + "self_attn.o_proj.weight": (8,),
    LAYER + "self_attn.q_proj.lora_A.default.weight": (3,),
    LAYER + "self_attn.q_proj.lora_B.default.weight": (8,),
    LAYER + "mlp.up_proj.weight": (6,),
    LAYER + "mlp.norm.weight": (),
    LAYER + "input_layernorm.weight": (),
    "model.norm.bias": (8,),
    "lm_head.weight": (10,),
}
NO_DECAY = {n for n in SHAPES if "norm" in n or n.endswith("bias")}


def pairs(names=SHAPES):
    return [(n, torch.nn.Parameter(randn(SHAPES[n], i, torch.float32))) for i, n in enumerate(names)]


def stepped(optimizer):
    """name -> shape of its second moment, after a step."""
    found = {}
    for group in optimizer.param_groups:
        set_grads(group["params"], 1)
    optimizer.step()
    for group in optimizer.param_groups:
        for name, p in zip(group["param_names"], group["params"], strict=True):
            found[name] = tuple(optimizer.state[p]["exp_avg_sq"].shape)
    return found


def test_blocks_by_name():
    optimizer = create("adam_mini", pairs(), lr=0.01, weight_decay=0.3, dim=8, n_heads=4)
    assert stepped(optimizer) == WANTED
    for group in optimizer.param_groups:
        for name in group["param_names"]:
            assert group["weight_decay"] == (0.0 if name in NO_DECAY else 0.3), name


def test_wrapped_names_give_the_same_blocks():
    wrapped = [("module._orig_mod." + n, p) for n, p in pairs()]
    got = stepped(AdamMini(wrapped, dim=8, n_heads=4))
    assert {n.removeprefix("module._orig_mod."): shape for n, shape in got.items()} == WANTED


def test_without_heads_query_and_key_have_rows_and_values_may_be_whole():
    got = stepped(AdamMini(pairs(), whole_value=True))
    assert got[LAYER + "self_attn.q_proj.weight"] == (8,) and got[LAYER + "self_attn.k_proj.weight"] == (4,)
    assert got[LAYER + "self_attn.v_proj.weight"] == () and got[LAYER + "self_attn.o_proj.weight"] == (8,)


def test_lora_has_one_second_moment_a_row_whatever_its_rank():
    """Also where the rank is a head's size (A would be one block), and where the value matrix is whole."""
    shapes = {
        f"self_attn.{m}_proj.lora_{ab}.default.weight": shape
        for m in "qkv"
        for ab, shape in (("A", (4, 8)), ("B", (8, 4)))
    }
    got = stepped(
        AdamMini(
            [(LAYER + n, torch.nn.Parameter(torch.ones(s))) for n, s in shapes.items()], head_dim=4, whole_value=True
        )
    )
    assert got == {LAYER + n: s[:1] for n, s in shapes.items()}


def test_head_dim_may_differ_from_dim_over_heads():
    """Qwen3: 2 heads of 8 rows and one key head in a model of dimension 8."""
    q, k = LAYER + "self_attn.q_proj.weight", LAYER + "self_attn.k_proj.weight"
    for given in ({"head_dim": 8}, {"head_dim": 8, "dim": 8, "n_heads": 2}):
        named = [(q, torch.nn.Parameter(torch.ones(16, 8))), (k, torch.nn.Parameter(torch.ones(8, 8)))]
        assert stepped(create("adam_mini", named, lr=0.1, **given)) == {q: (2,), k: ()}


@pytest.mark.parametrize("name", ["attn.c_attn", "attention.query_key_value", "self_attn.qkv_proj", "attn.Wqkv"])
def test_query_key_and_value_in_one_have_rows(name):
    fused = [(LAYER + name + ".weight", torch.nn.Parameter(torch.ones(24, 8)))]
    assert stepped(AdamMini(fused, dim=8, n_heads=2, whole_value=True)) == {LAYER + name + ".weight": (24,)}


def test_groups_keep_their_settings():
    named = pairs()
    given = [{"params": named[:3], "lr": 0.5, "tag": "a"}, {"params": named[3:]}]
    optimizer = AdamMini(given, lr=0.1, betas=(0.8, 0.9))
    rates = {n: (g["lr"], g.get("tag")) for g in optimizer.param_groups for n in g["param_names"]}
    assert all(rates[n] == ((0.5, "a") if i < 3 else (0.1, None)) for i, n in enumerate(SHAPES))
    assert all(g["rule"].betas == (0.8, 0.9) for g in optimizer.param_groups)
    (one,) = AdamMini(iter(named), blocks="row").param_groups
    assert one["rule"] == AdamMiniRule(blocks="row") and one["param_names"] == list(SHAPES)


def test_refusals():
    for blocks in ({"q_proj": "rows"}, {"q_proj": 0}, {"q_proj": True}):
        with pytest.raises(ValueError, match=r"blocks\['q_proj'\] = .*'tensor', 'row'"):
            AdamMini(pairs(), blocks=blocks)
    with pytest.raises(ValueError, match="blocks names 'qproj', which does not occur in the name of any parameter"):
        AdamMini(pairs(), blocks={"qproj": "row"})
    with pytest.raises(TypeError, match="expected blocks"):
        AdamMini(pairs(), blocks=["row"])
    with pytest.raises(TypeError, match="by name"):
        AdamMini([torch.nn.Parameter(torch.ones(2, 2))])
    with pytest.raises(ValueError, match="empty"):
        AdamMini([])
    for settings in ({"dim": 8}, {"n_heads": 4}, {"dim": 8, "n_heads": 3}, {"dim": 8, "n_heads": 0}):
        with pytest.raises(ValueError, match="n_heads"):
            AdamMini(pairs(), **settings)
    for head_dim in (0, -8, 8.0, True):
        with pytest.raises(ValueError, match="head_dim"):
            AdamMini(pairs(), head_dim=head_dim)
    with pytest.raises(ValueError, match=r"'p'.*blocks of 5 entries"):
        Optimizer([("p", torch.nn.Parameter(torch.ones(3, 2)))], AdamMiniRule(blocks=5), lr=0.1)


def test_saves_half_of_adams_memory():
    named = [
        (n, torch.nn.Parameter(torch.ones(s)))
        for n, s in (("model.embed_tokens.weight", (500, 64)), (LAYER + "self_attn.q_proj.weight", (64, 64)))
    ]
    optimizer = AdamMini(named, dim=64, n_heads=4)
    stepped(optimizer)
    held = sum(v.numel() * v.element_size() for s in optimizer.state.values() for v in s.values())
    assert held < 4.1 * sum(p.numel() for _, p in named)


def parameters_and_grads(case):
    inputs = arrays(case.folder / case.problem["file"])
    named = {n: torch.nn.Parameter(torch.tensor(inputs[f"init/{n}"])) for n in case.entry["params"]}
    for t in range(case.entry["steps"]):
        for n, p in named.items():
            present = f"has_grad/{n}" not in inputs or inputs[f"has_grad/{n}"][t]
            p.grad = torch.tensor(inputs[f"grad/{n}"][t]) if present else None
        yield named


@pytest.mark.golden
def test_the_transcribed_codes_are_the_published_ones(golden_dir):
    """The judges of property 26 reproduce the trajectories that the published codes made."""
    held = []
    for case in cases(golden_dir):
        entry = case.entry
        if entry.get("dtype") != "float64" or kind_of(case) != "recorded_grads":
            continue
        optimizer = None
        if entry["optimizer"] == "BlockwiseAdam":
            checked = entry["params"]
            for named in parameters_and_grads(case):
                if optimizer is None:
                    groups = [{"params": [named[n] for n in names]} for names in entry["blocks"]]
                    optimizer = PublishedAdaSGD(groups, **entry["hyper"])
                optimizer.step()
        elif entry["optimizer"] == "AdamMini" and not entry["hyper"].get("whole_v"):
            # unknown names have one v a tensor; of a transformer's, these have one a row
            rows = "n_heads" in case.problem
            checked = [n for n in entry["params"] if "mlp" in n and "weight" in n] if rows else entry["params"]
            for named in parameters_and_grads(case):
                if optimizer is None:
                    chosen = [named[n] for n in checked]
                    optimizer = PublishedAdamMini(chosen, **entry["hyper"], by_row=rows)
                optimizer.step()
        else:
            continue
        for n in checked:
            want = golden(case)[n][-1]
            torch.testing.assert_close(named[n].detach(), want, rtol=1e-10, atol=1e-12, msg=f"{case.id} {n}")
        held.append(entry["optimizer"])
    if not held:
        pytest.skip(f"no case of these on recorded gradients in {golden_dir}")


def test_a_group_is_one_block():
    """One second moment for several tensors: they move alike wherever the gradients are; others are left out."""
    a, b, idle = (torch.nn.Parameter(torch.zeros(n, dtype=torch.float64)) for n in (2, 6, 3))
    optimizer = BlockwiseAdam([("a", a), ("b", b), ("idle", idle)], lr=1.0, weight_decay=0.0, eps=0.0, block="group")
    a.grad, b.grad = torch.full_like(a, 4.0), torch.zeros_like(b)
    optimizer.step()
    torch.testing.assert_close(a.detach(), torch.full_like(a, -4 / (2 * 16 / 8) ** 0.5))
    assert torch.equal(optimizer.state[a]["exp_avg_sq"], optimizer.state[b]["exp_avg_sq"])
    assert idle not in optimizer.state
    single = BlockwiseAdam([("a", torch.nn.Parameter(torch.zeros(2)))], lr=1.0, weight_decay=0.0, eps=0.0)
    (c,) = single.param_groups[0]["params"]
    c.grad = torch.full_like(c, 4.0)
    single.step()
    torch.testing.assert_close(c.detach(), torch.full_like(c, -1.0))


def test_a_group_block_is_of_those_that_have_a_finite_gradient_now():
    """A tensor without one, or with a NaN, is no part of the block in this step, whatever it was before."""

    def built(*names):
        params = {n: torch.nn.Parameter(torch.zeros(2 + i, dtype=torch.float64)) for i, n in enumerate(names)}
        return params, BlockwiseAdam(params.items(), lr=1.0, weight_decay=0.0, block="group")

    both, optimizer = built("a", "b")
    one, alone = built("a")
    for t in range(3):
        both["a"].grad, one["a"].grad = (randn((2,), t) for _ in range(2))
        both["b"].grad = [None, torch.full((3,), torch.nan, dtype=torch.float64), None][t]
        if t == 1:
            with pytest.warns(RuntimeWarning, match="parameter 'b': its gradient is not finite"):
                optimizer.step()
        else:
            optimizer.step()
        alone.step()
    torch.testing.assert_close(both["a"], one["a"])
    both["b"].grad = randn((3,), 9)
    optimizer.step()
    assert float(optimizer.state[both["b"]]["rest_numel"]) == 2
    both["a"].grad, before = None, both["a"].detach().clone()
    optimizer.step()
    assert float(optimizer.state[both["b"]]["rest_numel"]) == 0 == float(optimizer.state[both["b"]]["rest_sq"])
    assert torch.equal(both["a"].detach(), before)


def test_a_map_of_a_group_block_keeps_the_rest_of_the_block():
    """Exact if the other tensors' gradients stay; near otherwise."""

    def built():
        params = [(n, torch.nn.Parameter(randn((5, 4), i))) for i, n in enumerate("ab")]
        return params, BlockwiseAdam(params, lr=1.0, weight_decay=0.0, block="group")

    params, optimizer = built()
    for t in range(5):
        for i, (_, p) in enumerate(params):
            p.grad = randn((5, 4), 10 * i + t * (i == 0))
        optimizer.step()
    (_, a), (_, _b) = params
    update_map, before = UpdateMap.of(optimizer), a.detach().clone()
    a.grad = randn((5, 4), 99)
    direction = update_map({"a": a.grad})["a"]
    batch = update_map.per_sample({"a": a.grad.expand(3, 5, 4)})["a"]
    optimizer.step()
    torch.testing.assert_close(before - a.detach(), direction)
    torch.testing.assert_close(batch, direction.expand(3, 5, 4))
