"""The ablation's arms, and what one step of each method learns of rare facts."""

import pytest
import torch

from optim import AdamWRule, MuonRule, Optimizer
from optim.diagnostics import ARMS, by_component, tail_learning

LAYER = "model.layers.0."
NAMES = {
    "self_attn.q_proj": "q", "self_attn.k_proj": "k", "self_attn.v_proj": "v", "self_attn.o_proj": "o",
    "mlp.up_proj": "ffn_in", "mlp.gate_proj": "ffn_gate", "mlp.down_proj": "ffn_out",
}  # fmt: skip


def llama():
    named = [("model.embed_tokens.weight", (8, 4)), *((f"{LAYER}{n}.weight", (4, 4)) for n in NAMES),
             (f"{LAYER}input_layernorm.weight", (4,))]  # fmt: skip
    return [(name, torch.nn.Parameter(torch.ones(shape))) for name, shape in named]


@pytest.mark.parametrize("arm", ARMS)
def test_an_arm_has_its_roles_and_adam_the_rest(arm):
    chosen, rest = by_component(llama(), arm)
    assert {NAMES[n.removeprefix(LAYER).removesuffix(".weight")] for n, _ in chosen} == set(ARMS[arm])
    assert len(chosen) + len(rest) == 9 and {n for n, _ in rest} >= {"model.embed_tokens.weight"}
    groups = [{"params": chosen, "rule": MuonRule()}, {"params": rest, "rule": AdamWRule()}]
    Optimizer([g for g in groups if g["params"]], AdamWRule(), lr=0.1)


def test_fused_matrices_belong_to_one_side():
    named = [("transformer.h.0.attn.c_attn.weight", torch.zeros(4, 12))]
    assert len(by_component(named, "all")[0]) == 1 and len(by_component(named, "ffn")[1]) == 1
    with pytest.raises(ValueError, match="c_attn.*k, q, v in one matrix.*'vo' only has v"):
        by_component(named, "vo")
    with pytest.raises(ValueError, match="arm = 'both'"):
        by_component(named, "both")


def bases(d, k, seed):
    made = torch.Generator().manual_seed(seed)
    return [torch.linalg.qr(torch.randn(d, d, generator=made, dtype=torch.float64))[0][:, :k] for _ in range(2)]


def power_law(k, exponent):
    p = torch.arange(1, k + 1, dtype=torch.float64) ** -exponent
    return p / p.sum()


@pytest.mark.parametrize("exponent", [0.5, 1.0, 2.0])
def test_polar_learns_rare_facts_whatever_the_bases(exponent):
    """Within about eps of the best; gradient descent leaves the rarest behind, signs do where bases are rotated."""
    k, p, eps = 64, power_law(64, exponent), 0.05
    for seed in range(2):
        found = tail_learning(p, *bases(k, k, seed), eps=eps)
        assert found["polar"] > 1 - 2 * eps and max(found["sign"], found["gd"]) < 0.1
    eye = torch.eye(k, dtype=torch.float64)
    aligned = tail_learning(p, eye, eye, eps=eps)
    assert aligned["sign"] == pytest.approx(1 - eps) and aligned["polar"] == pytest.approx(found["polar"])
    assert aligned["gd"] == pytest.approx(found["gd"])


def test_gradient_descent_falls_with_the_imbalance():
    e, f = bases(16, 12, 0)
    worst = [tail_learning(power_law(12, a), e, f)["gd"] for a in (0.0, 0.5, 1.0, 2.0)]
    assert worst == sorted(worst, reverse=True) and worst[0] == pytest.approx(0.95) and worst[-1] < 0.2


def test_refused_shapes():
    with pytest.raises(ValueError, match="the shapes"):
        tail_learning(torch.ones(3) / 3, torch.eye(4), torch.eye(3))
