"""`create`, the split of Muon's parameters, and the README's table."""

import re

import pytest
import pytorch_optimizer
import torch
from transformers.training_args import OptimizerNames

from optim import (
    OPTIMIZERS,
    RULES,
    AdamW,
    AdamWRule,
    Muon,
    MuonRule,
    Optimizer,
    create,
    is_matrix,
    split_matrices,
    unknown,
)
from optim.rules.muon import CONVENTIONS
from tests.conftest import REPOSITORY

LORA = "base_model.model.model.layers.0."
SHAPES = {
    "model.embed_tokens.weight": (10, 4),
    "transformer.wte.weight": (10, 4),
    "model.layers.0.self_attn.q_proj.weight": (4, 4),
    "model.layers.0.mlp.down_proj.weight": (4, 8),
    "model.layers.0.mlp.down_proj.bias": (4,),
    "model.layers.0.input_layernorm.weight": (4,),
    "model.layers.0.q_norm.weight": (2, 4),
    "bert.encoder.layer.0.output.dense.weight": (4, 8),
    "lm_head.weight": (10, 4),
    "output.weight": (10, 4),
    "score.weight": (2, 4),
    "conv.weight": (4, 3, 2, 2),
    LORA + "self_attn.q_proj.lora_A.default.weight": (2, 4),
    LORA + "self_attn.q_proj.lora_B.default.weight": (4, 2),
    LORA + "embed_tokens.lora_embedding_A.default": (2, 10),
    LORA + "self_attn.q_proj.lora_magnitude_vector.default.weight": (4,),
    "base_model.model.lm_head.lora_A.default.weight": (2, 4),
    "logit_scale": (),
}
MATRICES = {
    "model.layers.0.self_attn.q_proj.weight",
    "model.layers.0.mlp.down_proj.weight",
    "bert.encoder.layer.0.output.dense.weight",
    "conv.weight",
    LORA + "self_attn.q_proj.lora_A.default.weight",
    LORA + "self_attn.q_proj.lora_B.default.weight",
    "base_model.model.lm_head.lora_A.default.weight",
}


def named(names=SHAPES):
    return [(n, torch.nn.Parameter(torch.ones(SHAPES[n]))) for n in names]


@pytest.mark.parametrize("name", SHAPES)
def test_is_matrix(name):
    assert is_matrix(name, torch.empty(SHAPES[name])) == (name in MATRICES)


def test_split_keeps_all_in_order():
    matrices, rest = split_matrices(named())
    assert [n for n, _ in matrices] == [n for n in SHAPES if n in MATRICES]
    assert [n for n, _ in rest] == [n for n in SHAPES if n not in MATRICES]
    with pytest.raises(TypeError, match="names"):
        split_matrices([torch.ones(2, 2)])


def test_muon_is_two_groups():
    optimizer = create("muon", named(), lr=1e-3, weight_decay=0.1, momentum=0.9, adamw_betas=(0.8, 0.9))
    matrices, rest = optimizer.param_groups
    assert set(matrices["param_names"]) == MATRICES and len(rest["param_names"]) == len(SHAPES) - len(MATRICES)
    assert matrices["rule"] == MuonRule(momentum=0.9)
    assert rest["rule"] == AdamWRule(betas=(0.8, 0.9), eps_before_correction=True), "Moonlight's"
    assert matrices["lr"] == rest["lr"] == 1e-3 and matrices["weight_decay"] == rest["weight_decay"] == 0.1
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = torch.ones_like(p)
    optimizer.step()
    moved = [float((p.detach() - 1).square().mean().sqrt()) for g in optimizer.param_groups for p in g["params"]]
    assert all(1e-4 < step < 3e-3 for step in moved), "one learning rate moves both kinds alike"


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_muon_conventions(convention):
    settings = {} if convention == "moonlight" else {"adamw_lr": 3e-4, "adamw_weight_decay": 0.0}
    optimizer = create("muon", named(), lr=0.02, convention=convention, **settings)
    assert optimizer.param_groups[0]["rule"] == MuonRule(**CONVENTIONS[convention])
    assert optimizer.param_groups[1]["lr"] == settings.get("adamw_lr", 0.02)
    if settings:
        with pytest.raises(ValueError, match="adamw_lr"):
            create("muon", named(), lr=0.02, convention=convention)
    assert len(create("muon", named(sorted(MATRICES)), lr=0.02, convention=convention).param_groups) == 1


def test_muon_refusals():
    with pytest.raises(ValueError, match="hidden matrix"):
        create("muon", named(["lm_head.weight"]), lr=0.1)
    with pytest.raises(ValueError, match="convention"):
        Muon(named(), convention="kj")
    with pytest.raises(ValueError, match=r"'logit_scale'.*not a matrix"):
        Optimizer(named(["logit_scale"]), MuonRule(), lr=0.1)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_create_makes_the_class(name):
    pairs = named(sorted(MATRICES))
    settings = {"blocks": "tensor"} if name == "adam_mini" else {}  # which has groups of its own: test_blocks.py
    optimizer = create(name, iter(pairs), lr=0.01, weight_decay=0.3, **settings)
    assert type(optimizer) is OPTIMIZERS[name]
    (group,) = optimizer.param_groups
    assert group["rule"] == RULES[name]() and group["lr"] == 0.01 and group["weight_decay"] == 0.3
    assert group["param_names"] == sorted(MATRICES)


def test_create_refusals():
    with pytest.raises(TypeError, match="no setting 'deltat'; did you mean 'DeltaT'"):
        create("spam", named(), lr=0.1, deltat=3)
    with pytest.raises(TypeError, match="no setting 'beta'; did you mean 'betas'"):
        create("adamw", named(), lr=0.1, beta=(0.9, 0.9))
    with pytest.raises(TypeError, match="foreach"):
        create("sgd", named(), lr=0.1, foreach=True)
    with pytest.raises(ValueError, match="betas"):
        create("lion", named(), lr=0.1, betas=(1.0, 0.0))


@pytest.mark.parametrize(
    ("word", "offered"),
    [
        ("AdamW", "'adamw'"), ("SGD", "'sgd'"), ("StableSPAM", "'stable_spam'"), ("muon8bit", "'muon_8bit'"),
        ("adam-mini", "'adam_mini'"), ("adamv", "'adam' or 'adamw' or 'adamp'"), ("moun", "'muon'"), ("lio", "'lion'"),
        ("sgdpp", "'sgdp'"), ("conad", "'conda'"), ("normuons", "'normuon'"), ("ssgd", "'sgd'"),
    ],
)  # fmt: skip
def test_a_slip_of_the_pen_is_corrected(word, offered):
    """Case, underscores, one letter; where two are as near, both are named."""
    with pytest.raises(ValueError, match=f"no optimizer is called '{word}'; did you mean {offered}\\?$"):
        create(word, named(), lr=0.1)


@pytest.mark.parametrize(
    ("word", "nearest"),
    [
        ("radam", "adamw"), ("adan", "adamw"), ("adamax", "adamw"), ("Adam-S", "adamw"), ("scion", "muon"),
        ("Gluon", "muon"), ("tiger", "lion"), ("lomo", "adafactor"), ("swats", "adamw"), ("DAdaptAdam", "prodigy"),
        ("schedule_free", "schedule_free_adamw"), ("rprop", "rmsprop"), ("signum", "signsgd"), ("madgrad", "adagrad"),
    ],
)  # fmt: skip
def test_another_algorithm_is_not_offered_for_the_one_that_was_asked_for(word, nearest):
    with pytest.raises(ValueError, match=f"'{word}'; it is not in the suite; nearest in kind: '{nearest}'. Known: ada"):
        create(word, named(), lr=0.1)


def test_what_resembles_another_algorithm_is_here():
    assert set(unknown._NEAREST) <= set(OPTIMIZERS)
    assert not {unknown._letters(name) for name in OPTIMIZERS} & (set(unknown._OTHERS) | set(unknown._SAME))


@pytest.mark.parametrize("word", ["muons_of_x", "x", ""])
def test_a_word_that_is_no_algorithm_shows_the_list(word):
    with pytest.raises(ValueError, match=f"no optimizer is called '{word}'; known: adabelief, .*, swan$"):
        create(word, named(), lr=0.1)


@pytest.mark.parametrize(
    ("word", "says"),
    [
        ("adam8bit", "'adamw_8bit' without"),
        ("paged_adamw_32bit", "use 'adamw', which has no paging"),
        ("sgdw", "decoupled"),
        ("SGDM", "momentum=0.9"),
        ("adamw_torch_fused", "use 'adamw'"),
        ("sophia", "'sophia_h'"),
    ],
)
def test_what_another_name_means_here_is_said_as_such(word, says):
    with pytest.raises(ValueError, match=f"{says}.* Known: adabelief") as error:
        create(word, named(), lr=0.1)
    assert "did you mean" not in str(error.value)


def test_adamw_without_decay_is_adam():
    ours, theirs = (torch.nn.Parameter(torch.linspace(-1, 1, 6)) for _ in range(2))
    optimizer, adam = create("adamw", [("p", ours)], lr=0.1), torch.optim.Adam([theirs], lr=0.1)
    for t in range(3):
        for p in (ours, theirs):
            p.grad = torch.linspace(0.1, 2, 6) * (t + 1)
        optimizer.step()
        adam.step()
    torch.testing.assert_close(ours, theirs)


def test_defaults_are_torchs():
    ours, theirs = AdamW(named()).param_groups[0], torch.optim.AdamW(named()).param_groups[0]
    assert (ours["lr"], ours["weight_decay"]) == (theirs["lr"], theirs["weight_decay"])
    assert (ours["rule"].betas, ours["rule"].eps) == (theirs["betas"], theirs["eps"])


def test_readme_lists_exactly_the_rules():
    text = (REPOSITORY / "optim" / "README.md").read_text(encoding="utf-8")
    table = text.split("## Optimizers")[1].split("##")[0]
    rows = {m[1]: m[0] for m in re.finditer(r"^\| `(\w+)` \|.*$", table, re.MULTILINE)}
    assert set(rows) == set(RULES)
    for name, row in rows.items():
        cells = [cell.strip() for cell in row.strip("|").split("|")]
        assert cells[3] == ("yes" if RULES[name].elementwise else "no"), name


def test_the_whole_field_is_answered():
    """Every name of pytorch-optimizer, torch and transformers: one of ours, what it means here, or the nearest."""
    field = {name.lower() for name in pytorch_optimizer.get_supported_optimizers()}
    field |= {name.lower() for name, kind in vars(torch.optim).items() if isinstance(kind, type)} - {"optimizer"}
    field |= {name.value for name in OptimizerNames}
    for name in sorted(field - set(OPTIMIZERS)):
        told = unknown.instead_of(name, OPTIMIZERS)
        assert not told.startswith("; known"), name


def test_settings_of_a_group_are_live_and_shown():
    optimizer = create("adamw", named(sorted(MATRICES)), lr=0.1)
    optimizer.param_groups[0]["betas"] = (0.5, 0.75)
    assert "betas=(0.5, 0.75)" in repr(optimizer)
    assert optimizer.param_groups[0]["rule"].betas == optimizer.param_groups[0]["betas"] == (0.5, 0.75)


@pytest.mark.parametrize(
    "name", ["muon", "soap", "shampoo", "kron", "dion", "rmnp", "conda", "swan", "sinkgd", "scale"]
)
def test_one_size_of_updates_serves_every_rule_for_matrices(name):
    pairs = [("model.layers.0.mlp.up_proj.weight", torch.nn.Parameter(torch.zeros(6, 9)))]
    optimizer = create(name, pairs, lr=0.5, match_rms=0.2)
    for t in range(2):  # the first step of SOAP only measures
        before = pairs[0][1].detach().clone()
        pairs[0][1].grad = torch.randn(6, 9, generator=torch.Generator().manual_seed(t))
        optimizer.step()
    assert float((pairs[0][1].detach() - before).square().mean().sqrt()) == pytest.approx(0.1, rel=1e-4)
    with pytest.raises(ValueError, match="match_rms = 0"):
        create(name, pairs, lr=0.5, match_rms=0)
