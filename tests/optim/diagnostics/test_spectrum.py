"""Spectra of matrices and the roles of a transformer's parameters."""

import math

import pytest
import torch

from optim.diagnostics import ROLE_GROUPS, by_role, roles, spectrum
from optim.linalg import newton_schulz


@pytest.mark.golden
def test_against_golden(reference):
    stored = reference("spectrum")
    grad = torch.tensor(stored["in/grad"])
    u, _, vh = torch.linalg.svd(grad, full_matrices=False)
    inputs = {k.removeprefix("in/"): torch.tensor(v) for k, v in stored.items() if k.startswith("in/")}
    inputs |= {"polar": u @ vh, "sign": grad.sign()}
    for name, matrix in inputs.items():
        found = spectrum(matrix)
        assert found == pytest.approx({k: float(stored[f"{k}/{name}"]) for k in found}, rel=1e-8, abs=1e-10), name
        assert spectrum(matrix.T) == pytest.approx(found, rel=1e-8)
        narrow = spectrum(matrix.float())
        assert narrow["effective_rank"] == pytest.approx(found["effective_rank"], rel=1e-4)
    checked = {k.partition("/")[0] for k in stored} - {"in"}
    assert checked == set(found)


def test_the_polar_factor_is_the_most_isotropic_update():
    """Entropy of polar = 1 >= sign and gradient, for gradients of falling spectrum; Newton-Schulz is near it."""
    made = torch.Generator().manual_seed(0)
    for _ in range(5):
        grad = torch.randn(12, 4, generator=made) @ torch.randn(4, 9, generator=made)
        grad += 0.05 * torch.randn(12, 9, generator=made)
        u, _, vh = torch.linalg.svd(grad, full_matrices=False)
        polar, sign, plain, muon = (
            spectrum(m)["svd_entropy_normalized"] for m in (u @ vh, grad.sign(), grad, newton_schulz(grad))
        )
        assert polar == pytest.approx(1, abs=1e-6) and polar > sign > plain and muon > sign


def test_edges():
    assert all(math.isnan(v) for v in spectrum(torch.zeros(3, 4)).values())
    assert all(math.isnan(v) for v in spectrum(torch.tensor([[1.0, math.inf], [0, 1]])).values())
    row = spectrum(torch.ones(1, 5))
    assert row["svd_entropy_normalized"] == 1 and row["effective_rank"] == 1 and row["cond"] == 1
    low = spectrum(torch.diag(torch.tensor([1.0, 0.0, 0.0])))
    assert low["cond"] == math.inf and low["q75_q25"] == math.inf and low["svd_entropy_normalized"] == 0
    tiny, one = spectrum(1e-30 * torch.eye(3, dtype=torch.float64)), spectrum(torch.eye(3))
    assert tiny == pytest.approx(one), "scale does not matter, nor do squares below the range"
    assert spectrum(torch.ones(2, 3, 4)) == spectrum(torch.ones(2, 12)), "convolutions are flattened"
    with pytest.raises(ValueError, match=r"shape \(5,\)"):
        spectrum(torch.ones(5))
    with pytest.raises(ValueError, match=r"shape \(0, 3\)"):
        spectrum(torch.ones(0, 3))


@pytest.mark.parametrize(
    ("name", "shape", "want"),
    [
        ("model.layers.0.self_attn.q_proj.weight", (8, 8), ["q"]),
        ("model.layers.0.self_attn.k_proj.weight", (4, 8), ["k"]),
        ("model.layers.0.self_attn.v_proj.weight", (4, 8), ["v"]),
        ("model.layers.0.self_attn.o_proj.weight", (8, 8), ["o"]),
        ("model.layers.0.mlp.gate_proj.weight", (16, 8), ["ffn_gate"]),
        ("model.layers.0.mlp.up_proj.weight", (16, 8), ["ffn_in"]),
        ("model.layers.0.mlp.down_proj.weight", (8, 16), ["ffn_out"]),
        ("model.layers.0.mlp.gate_up_proj.weight", (32, 8), ["ffn_gate", "ffn_in"]),
        ("transformer.h.0.attn.c_attn.weight", (8, 24), ["q", "k", "v"]),
        ("transformer.h.0.attn.c_proj.weight", (8, 8), ["o"]),
        ("transformer.h.0.mlp.c_fc.weight", (8, 32), ["ffn_in"]),
        ("transformer.h.0.mlp.c_proj.weight", (32, 8), ["ffn_out"]),
        ("gpt_neox.layers.0.attention.query_key_value.weight", (24, 8), ["q", "k", "v"]),
        ("gpt_neox.layers.0.mlp.dense_h_to_4h.weight", (32, 8), ["ffn_in"]),
        ("gpt_neox.layers.0.mlp.dense_4h_to_h.weight", (8, 32), ["ffn_out"]),
        ("model.embed_tokens.weight", (32, 8), []),
        ("model.norm.weight", (8, 8), []),
        ("model.layers.0.self_attn.q_proj.bias", (8,), []),
        ("lm_head.weight", (32, 8), []),
    ],
)
def test_roles(name, shape, want):
    assert [role for role, _ in roles(name, torch.zeros(shape), heads=4)] == want


def test_fused_matrices_are_split_as_they_were_made():
    q, k, v = (torch.full((size, 6), float(i)) for i, size in ((1, 8), (2, 4), (3, 4)))
    found = dict(roles("a.self_attn.qkv_proj.weight", torch.cat([q, k, v]), heads=4, kv_heads=2))
    assert {r: (m.shape, float(m[0, 0])) for r, m in found.items()} == {
        "q": ((8, 6), 1), "k": ((4, 6), 2), "v": ((4, 6), 3)}  # fmt: skip
    columns = dict(roles("h.0.attn.c_attn.weight", torch.cat([torch.full((5, 3), float(i)) for i in range(3)], 1)))
    assert {r: (m.shape, float(m.mean())) for r, m in columns.items()} == {r: ((5, 3), i) for i, r in enumerate("qkv")}
    by_head = torch.arange(12.0)[:, None].expand(12, 2)  # 2 heads of (q, k, v) x 2 rows
    neox = dict(roles("h.attention.query_key_value.weight", by_head, heads=2))
    assert neox["k"][:, 0].tolist() == [2, 3, 8, 9]
    for settings, part in (({}, "head by head"), ({"heads": 5}, "cannot be divided into 3 x 5 heads")):
        with pytest.raises(ValueError, match=part):
            roles("h.attention.query_key_value.weight", by_head, **settings)
    with pytest.raises(ValueError, match="cannot be divided"):
        roles("a.attn.qkv_proj.weight", torch.zeros(13, 2), heads=4, kv_heads=2)


def test_means_by_role_leave_out_what_is_not_finite():
    rows = [("q", {"m": 1.0}), ("q", {"m": 3.0}), ("k", {"m": math.inf}), ("ffn_in", {"m": 5.0})]
    found = by_role(rows)
    assert found["q"]["m"] == {"mean": 2, "spread": 1, "count": 2} and found["qk"]["m"]["mean"] == 2
    assert math.isnan(found["k"]["m"]["mean"]) and found["k"]["m"]["count"] == 0
    assert set(found) == {"q", "k", "ffn_in", "qk", "ffn"} and set(ROLE_GROUPS) == {"qk", "vo", "ffn"}
