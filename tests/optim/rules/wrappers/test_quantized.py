"""8-bit states: code books and codes against recorded ones, bounds of the rounding, bytes, pieces, embeddings."""

import copy
import io

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import Parameter

from optim import (
    RULES,
    AdaBeliefRule,
    AdafactorRule,
    AdamW8bit,
    AdamW8bitRule,
    AdamWRule,
    ApolloRule,
    CondaRule,
    GaLoreRule,
    Lion8bitRule,
    Muon8bitRule,
    MuonRule,
    Optimizer,
    Quantized,
    StableEmbedding,
    UpdateMap,
    create,
    rule_from,
    stable_embedding_groups,
)
from optim.rules.wrappers import codebooks, quantized
from optim.rules.wrappers.coding import Coding
from tests.benchmarks.test_optimizers import llama
from tests.optim import golden, golden_builders
from tests.optim.harness import assert_close, assert_same, randn, states
from tests.optim.properties import Memory

STEP = torch.ones(())


def encoded(rule, x, *, signed=True, step=1.0):
    return rule._coding.encode("exp_avg" if signed else "exp_avg_sq", x, torch.tensor(step))


def round_trip(rule, x, *, signed=True, step=1.0):
    key = "exp_avg" if signed else "exp_avg_sq"
    return rule._coding.decode(key, *rule._coding.encode(key, x, torch.tensor(step)), x.dtype, x.numel()).view(x.shape)


# --------------------------------------------------------------------------------------------------- recorded numbers


@pytest.mark.golden
@pytest.mark.parametrize("signed", [True, False], ids=["signed", "unsigned"])
def test_code_books_and_codes_are_the_recorded_ones(golden_dir, signed):
    path = golden.stored_file(golden_dir, "quant_maps.npz")
    if path is None:
        pytest.skip(f"no quant_maps.npz in {golden_dir}")
    stored = golden.arrays(path)
    kind = "signed" if signed else "unsigned"
    assert np.array_equal(codebooks.BOOKS["dynamic", signed].values.double().numpy(), stored[f"map_{kind}"])
    x = torch.tensor(stored[f"x_{kind}"], dtype=torch.float32)
    sizes = sorted({int(k.split("/")[0].removeprefix(f"{kind}_bs")) for k in stored if k.startswith(f"{kind}_bs")})
    assert sizes, f"no codes in {path}"
    for block_size in sizes:
        rule = AdamW8bitRule(block_size=block_size, floor=False)
        codes, scales = encoded(rule, x, signed=signed)
        assert np.array_equal(codes.numpy(), stored[f"{kind}_bs{block_size}/q"]), block_size
        assert np.array_equal(scales.double().numpy(), stored[f"{kind}_bs{block_size}/absmax"])
        back = round_trip(rule, x, signed=signed)
        assert np.array_equal(back.double().numpy(), stored[f"{kind}_bs{block_size}/dequant"])


def codes_of(case, build):
    """(name, step, codes and scales by entry) after every step of a golden case on recorded gradients."""
    entry, inputs = case.entry, golden.arrays(golden.input_file(case))
    dtype = golden.DTYPES[entry.get("param_dtype", entry.get("dtype")).split()[0]]
    names = list(entry.get("parameters") or entry["params"])
    named = [(n, Parameter(torch.tensor(inputs[f"init/{n}"], dtype=dtype))) for n in names]
    optimizer = build(entry | {"at": case.folder, "problem_settings": case.problem}, named)
    for t in range(len(inputs[f"grad/{names[0]}"])):
        golden.set_recorded(inputs, t, named)
        optimizer.step()
        for name, p in named:
            yield name, t, optimizer.state[p]


@pytest.mark.golden
def test_the_codes_of_golden_runs(golden_dir):
    """At most 0.2 % of codes differ, each by one; scales to float32's rounding."""
    seen = 0
    for case in golden.cases(golden_dir):
        kind = case.entry["optimizer"]
        if kind not in ("Adam8bit", "muon_8bit") or golden.kind_of(case) != "recorded_grads":
            continue
        stored, at = golden.arrays(case.folder / case.entry["file"]), case.entry["case"] + "/"
        keys = {"exp_avg": (at + "state1/", at + "absmax1/"), "exp_avg_sq": (at + "state2/", at + "absmax2/")}
        if kind == "muon_8bit":
            keys = {"momentum_buffer": ("codes/", "absmax/")}
        for name, t, state in codes_of(case, golden_builders.BUILDERS[kind]):
            for entry, (codes, scales) in keys.items():
                if codes + name not in stored or entry + "_absmax" not in state:
                    continue
                seen += 1
                apart = np.abs(state[entry].numpy().astype(int) - stored[codes + name][t].astype(int))
                assert apart.max() <= 1 and (apart > 0).mean() <= 0.002, f"{case.id} {name} {entry}, step {t}"
                got = state[entry + "_absmax"].double().numpy()
                np.testing.assert_allclose(got, stored[scales + name][t], rtol=1e-5, atol=1e-12)
    if not seen:
        pytest.skip(f"no codes of cases on recorded gradients in {golden_dir}")


# ------------------------------------------------------------------------------------------------------------ rounding


@pytest.mark.parametrize("signed", [True, False], ids=["signed", "unsigned"])
def test_the_nearest_entry_wins(signed):
    """To float32's rounding of what is halfway; magnitudes from 1e-9 to 1, and every limit between two entries."""
    book = codebooks.BOOKS["dynamic", signed]
    values, generator = book.values, torch.Generator().manual_seed(0)
    y = torch.rand(100_000, generator=generator) ** (1 + 20 * torch.rand(100_000, generator=generator))
    if signed:
        y[::2].neg_()
    y = torch.cat([y, values, book.limits[:-1], book.limits[:-1].nextafter(torch.tensor(torch.inf))])
    codes = book.encode(y).long()
    distance = (y.double() - values[codes].double()).abs()
    for neighbour in ((codes - 1).clamp(min=0), (codes + 1).clamp(max=255)):
        assert (distance <= (y.double() - values[neighbour].double()).abs() + 1.2e-7 * y.abs()).all()
    on_limits = book.encode(book.limits[:-1])
    assert torch.equal(on_limits, torch.arange(255, dtype=torch.uint8)), "halfway goes to the lower entry"


@pytest.mark.parametrize("code, bound", [("linear", 1 / 254), ("dynamic", 0.5 * 0.9 / 64 + 1e-7)])
def test_no_entry_moves_by_more_than_half_a_gap(code, bound):
    """Of its block's largest magnitude; and the other blocks do not see a spike."""
    rule = Quantized(inner=MuonRule(), code=code, block_size=100)
    x = randn((37, 31), 1, torch.float32)
    x[3, 7] *= 1000
    moved = (round_trip(rule, x) - x).abs().view(-1)
    largest = torch.cat([part.abs().amax().expand(len(part)) for part in x.view(-1).split(100)])
    assert (moved <= bound * largest * (1 + 1e-5)).all()
    calm = largest < 10
    assert moved[calm].max() < 0.05 and moved[~calm].max() > 0.3


def test_zeros_stay_zeros_and_need_no_scale():
    for code in ("linear", "dynamic"):
        for signed in (True, False):
            x = torch.zeros(300)
            assert not round_trip(AdamW8bitRule(code=code), x, signed=signed).any()


def test_a_positive_second_moment_never_becomes_zero():
    """Without the floor, as published, a zero gradient after a spike elsewhere in the block steps by m / eps."""
    for floor, least, most in ((True, 0.0, 10.0), (False, 1e3, torch.inf)):
        p = Parameter(torch.zeros(256))
        optimizer = Optimizer([p], AdamW8bitRule(min_size=0, floor=floor), lr=1.0)
        for t in range(3):
            p.grad = torch.full((256,), 1e-2)
            p.grad[0] = 1e3 if t == 1 else 1e-2  # v of the others is 1e-10 of the spike's, m is 1e-5
            if t == 2:
                p.grad[1:] = 0
            before = p.detach().clone()
            optimizer.step()
        step = float((p.detach() - before)[1:].abs().max())
        assert least <= step <= most, f"floor={floor}: {step}"


def test_momentum_recovers_after_a_spike():
    """The entries beside it lose precision while it lasts, and have it again when it has decayed by mu^k."""
    rule, p = Muon8bitRule(min_size=0).with_settings(momentum=0.5), torch.zeros(8, 8)
    state, exact = rule.init(p), rule.inner.init(p)
    errors = []
    for t in range(20):
        g = randn((8, 8), t, torch.float32)
        if t == 2:
            g[0, 0] = 1000
        state, exact = rule.update(g, state, p)[1], rule.inner.update(g, exact, p)[1]
        moved = rule.inside(state, p)["momentum_buffer"] - exact["momentum_buffer"]
        errors.append(float(moved[1:].abs().max()))
    assert errors[2] > 20 * errors[1] and errors[-1] < 2 * max(errors[:2])


@pytest.mark.parametrize("code", ["linear", "dynamic"])
@pytest.mark.parametrize("signed", [True, False], ids=["signed", "unsigned"])
def test_stochastic_rounding_is_right_on_average(code, signed):
    """Over 400 draws the mean is the number, to five standard errors; nearest rounding is not that near."""
    x = randn((1, 64), 3, torch.float32)
    x = (x if signed else x * x).clamp(-2, 4)
    x[:, 0] = 4.0
    rule = AdamW8bitRule(code=code, block_size=64, stochastic=True, floor=False)
    draws = torch.stack([round_trip(rule, x, signed=signed, step=float(t)) for t in range(400)])
    gap = (draws.amax(0) - draws.amin(0)).clamp(min=1e-7)
    assert ((draws.mean(0) - x).abs() <= 5 * 0.5 * gap / 400**0.5 + 1e-5).all()
    nearest = round_trip(AdamW8bitRule(code=code, block_size=64, floor=False), x, signed=signed)
    assert ((nearest - x).abs() > 5 * 0.5 * gap / 400**0.5 + 1e-5).any()
    assert len({tuple(d.flatten().tolist()) for d in draws[:5]}) == 5, "each step draws anew"


def test_stochastic_rounding_has_its_own_draws_and_repeats_them():
    rule = Lion8bitRule(min_size=0, stochastic=True)
    before = torch.get_rng_state()
    x = randn((1000,), 1, torch.float32)
    once, again = (encoded(rule, x, step=7.0)[0] for _ in range(2))
    assert torch.equal(once, again) and torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(once, encoded(rule.with_settings(seed=1), x, step=7.0)[0])
    tail, _ = rule._coding.encode("exp_avg", x[512:], torch.tensor(7.0), start=512)
    same = encoded(rule.with_settings(block_size=1000), x, step=7.0)[0]
    assert torch.equal(tail, once[512:]) and not torch.equal(same, once)


# ------------------------------------------------------------------------------------------------------ memory, pieces


def bytes_of(optimizer):
    return sum(t.numel() * t.element_size() for state in optimizer.state.values() for t in state.values())


def test_bytes_of_a_135_million_model():
    """SmolLM2-135M's shapes: 2.1 bytes a parameter for AdamW, 1.1 for Muon's matrices, everything counted.

    By `init` on the meta device: what `test_battery` 31 holds is that a step keeps those shapes and dtypes.
    """
    shapes = llama(small=False)
    for rule, most in ((AdamW8bitRule(), 2.1), (Lion8bitRule(), 1.1), (Muon8bitRule(), 1.1)):
        mine = shapes if rule.name != "muon_8bit" else [s for s in shapes if len(s) == 2][1:]
        made = [rule.init(torch.empty(shape, device="meta")).values() for shape in mine]
        held = sum(t.numel() * t.element_size() for entries in made for t in entries)
        share = held / sum(torch.Size(shape).numel() for shape in mine)
        assert share <= most, f"{rule.name}: {share:.4f}"
    named = [("model.embed_tokens.weight", (49152, 576)), ("model.layers.0.mlp.up_proj.weight", (1536, 576))]
    params = [(name, Parameter(torch.empty(shape, device="meta"))) for name, shape in named]
    assert [g["rule"].name for g in create("muon_8bit", params, lr=0.1).param_groups] == ["muon_8bit", "adamw"]
    both = create("muon_8bit", params, lr=0.1, adamw_8bit=True)
    assert [g["rule"].name for g in both.param_groups] == ["muon_8bit", "adamw_8bit"]


def test_bytes_after_a_step():
    p = Parameter(torch.zeros(576, 1536))
    p.grad = torch.ones_like(p)
    for rule, most in ((AdamW8bitRule(), 2.04), (Muon8bitRule(), 1.003)):
        optimizer = Optimizer([p], rule, lr=0.1)
        optimizer.step()
        assert bytes_of(optimizer) / p.numel() <= most


@pytest.mark.parametrize("rule", [
    AdamW8bitRule(), AdamW8bitRule(code="linear", block_size=100), AdamW8bitRule(stochastic=True), Lion8bitRule(),
    Quantized(inner=AdaBeliefRule(), block_size=64), AdamW8bitRule(code="4bit", block_size=128),
    AdamW8bitRule(code="fp8_e4m3"), Quantized(inner=AdafactorRule(), code="4bit", stochastic=True),
], ids=lambda rule: f"{rule.name}-{rule.code}-{rule.block_size}")  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_pieces_threads_and_backends_make_no_difference(monkeypatch, rule, dtype):
    """In one piece or many, on one thread or three, compiled or not: the same codes, but where a sum rounds apart."""
    outcomes = {}
    threads = torch.get_num_threads()
    for chunk, count, backend in ((1 << 30, 1, "auto"), (600, 1, "auto"), (600, 3, "auto"), (600, 1, "torch")):
        monkeypatch.setattr(quantized, "CHUNK", chunk)
        monkeypatch.setenv("OPTIM_BACKEND", backend)
        torch.set_num_threads(count)
        try:
            p = Parameter(randn((97, 53), 1, dtype))
            optimizer = Optimizer([p], rule, lr=0.01, weight_decay=0.1)
            for t in range(3):
                p.grad = randn((97, 53), t, dtype) ** 5
                optimizer.step()
        finally:
            torch.set_num_threads(threads)
        outcomes[chunk, count, backend] = [p.detach(), *states(optimizer)]
    whole, *others, plain = outcomes.values()
    for other in others:
        assert_same(whole, other)
    for a, b in zip(whole, plain, strict=True):
        if a.is_floating_point():
            assert_close([a], [b], dtype)
        else:
            apart = (a.int() - b.int()).abs()
            assert (apart.max() <= 1 or rule.code == "4bit") and (apart > 0).float().mean() < 1e-2
    if rule.name == "adamw_8bit":
        assert {t.dtype for t in whole[1:]} == {torch.float32, *map(rule._coding.dtype, ("exp_avg", "exp_avg_sq"))}


@pytest.mark.parametrize(("code", "dtype"), [("fp8_e4m3", torch.float8_e4m3fn), ("fp8_e5m2", torch.float8_e5m2)])
def test_float8_codes_are_those_of_torch(code, dtype):
    """Rounded to the nearest number of the format; only ties, which a random number is not, may differ."""
    x = randn((4096,), 3, torch.float32) ** 3
    largest = float(x.abs().max())
    most = torch.finfo(dtype).max
    want = (x / largest * most).to(dtype).float() / most * largest
    rule = AdamW8bitRule(code=code, block_size=4096, floor=False)
    for key, y, wanted in (("exp_avg", x, want), ("exp_avg_sq", x.abs(), want.abs())):
        codes, scales = rule._coding.encode(key, y, torch.tensor(1.0))
        torch.testing.assert_close(rule._coding.decode(key, codes, scales, torch.float32, 4096), wanted)


def test_four_bits_take_half_a_byte():
    p = Parameter(torch.zeros(97, 53))
    p.grad = randn((97, 53), 1, torch.float32)
    optimizer = Optimizer([p], AdamW8bitRule(code="4bit", block_size=128), lr=0.1)
    optimizer.step()
    assert bytes_of(optimizer) / p.numel() <= 1.07
    with pytest.raises(ValueError, match="block_size = 127; it must be even"):
        AdamW8bitRule(code="4bit", block_size=127)
    codes = torch.arange(15, dtype=torch.uint8)
    assert torch.equal(codebooks.unpacked(codebooks.packed(codes), 15), codes)
    assert float(codebooks.VALUES["4bit", False].min()) == 1 / 16 and 0.0 in codebooks.VALUES["4bit", True]


def test_a_failing_piece_fails_the_step(monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("no memory")

    monkeypatch.setattr(Coding, "encode_to", fail)
    p = Parameter(torch.zeros(5000))
    p.grad = torch.ones(5000)
    with pytest.raises(RuntimeError, match="no memory"):
        Optimizer([p], AdamW8bitRule(), lr=0.1).step()


# ----------------------------------------------------------------------------------------------------------------- use


def test_small_tensors_step_as_ever():
    """Below 4096 entries nothing is encoded: bit for bit the inner rule."""
    outcomes = []
    for rule in (AdamWRule(), AdamW8bitRule()):
        small, large = Parameter(randn((64, 63), 1, torch.float32)), Parameter(randn((64, 64), 2, torch.float32))
        optimizer = Optimizer([small, large], rule, lr=0.1)
        for t in range(3):
            small.grad, large.grad = randn((64, 63), t, torch.float32), randn((64, 64), t, torch.float32)
            optimizer.step()
        outcomes.append((small.detach(), large.detach()))
    assert torch.equal(outcomes[0][0], outcomes[1][0]) and not torch.equal(outcomes[0][1], outcomes[1][1])


def test_settings_reach_the_rule_inside():
    p, q = (Parameter(torch.zeros(8, 8)) for _ in range(2))
    own = {"params": [p], "betas": (0.5, 0.6), "block_size": 32, "note": 1}
    optimizer = AdamW8bit([own, {"params": [q]}], eps=1e-6)
    first, second = (group["rule"] for group in optimizer.param_groups)
    assert (first.inner.betas, first.block_size, first.inner.eps) == ((0.5, 0.6), 32, 1e-6)
    assert second.inner.betas == (0.9, 0.999) and second.block_size == 256
    assert optimizer.param_groups[0]["note"] == 1 and "betas" not in dict(optimizer.param_groups[0])
    with pytest.raises(TypeError, match="no setting 'beta'"):
        AdamW8bit([p], beta=0.9)
    with pytest.raises(TypeError, match="no setting 'block'; did you mean 'block_size'"):
        create("adamw_8bit", [("p", p)], lr=0.1, block=3)


@pytest.mark.parametrize("inner", [CondaRule(), GaLoreRule()], ids=lambda rule: rule.name)
def test_bases_are_no_averages(inner):
    """A random basis is not kept, and so APOLLO's state can be coded."""
    with pytest.raises(ValueError, match="basis of singular vectors"):
        Quantized(inner=inner)
    assert Quantized(inner=ApolloRule()).inner == ApolloRule()


def test_any_rule_can_be_quantised_and_is_found_again():
    rule = Quantized(inner=AdaBeliefRule(eps=1e-12), block_size=16, min_size=0)
    assert rule_from(rule.describe()) == rule
    p = Parameter(randn((5, 5), 1))
    optimizer = Optimizer([("p", p)], rule, lr=0.1)
    p.grad = randn((5, 5), 2)
    optimizer.step()
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    update_map = UpdateMap.from_state_dict(torch.load(file, weights_only=True), {"p": p})
    g = randn((3, 5, 5), 3)
    assert_same(update_map.per_sample({"p": g}).values(), UpdateMap.of(optimizer).per_sample({"p": g}).values())
    other = Optimizer([("p", p)], rule.with_settings(eps=1e-8), lr=0.1)
    with pytest.raises(ValueError, match=r"in inner, eps is 1e-08 here and 1e-12 there"):
        other.load_state_dict(optimizer.state_dict())
    changed = copy.deepcopy(optimizer.state_dict())
    changed["state"][0].pop("exp_avg_absmax")
    with pytest.raises(ValueError, match="entries"):
        optimizer.load_state_dict(changed)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = StableEmbedding(300, 32, padding_idx=0, seed=3)
        self.other = nn.Embedding(300, 32)
        self.out = nn.Linear(32, 200)


def test_stable_embeddings_keep_full_precision():
    before = torch.get_rng_state()
    embedding = StableEmbedding(300, 32, padding_idx=0)
    assert torch.equal(torch.get_rng_state(), before), "weights are drawn from a generator of their own"
    bound = (6 / 332) ** 0.5
    w = embedding.weight.detach()
    assert w.abs().max() <= bound and w[1:].std() == pytest.approx(bound / 3**0.5, rel=0.05) and not w[0].any()
    assert not torch.equal(StableEmbedding(300, 32, seed=1).weight, StableEmbedding(300, 32, seed=2).weight)
    vectors = embedding(torch.tensor([[1, 2], [3, 299]]))
    assert vectors.shape == (2, 2, 32) and vectors.mean(-1).abs().max() < 1e-6
    ids = torch.tensor([5, 7, 299])
    low = copy.deepcopy(embedding).to(torch.bfloat16)
    want = torch.nn.functional.layer_norm(low.weight.detach()[ids].float(), (32,), eps=low.norm.eps)
    assert torch.equal(low(ids), want.to(torch.bfloat16)), "the norm is computed in float32"
    embedding(ids).sum().backward()
    assert embedding.weight.grad is not None and embedding.norm.bias.grad.tolist() == [3.0] * 32

    model = Model()
    optimizer = AdamW8bit(stable_embedding_groups(model), lr=0.1)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    dtypes = {name: optimizer.state[p]["exp_avg"].dtype for name, p in model.named_parameters()}
    assert dtypes["embed.weight"] == torch.float32 and dtypes["other.weight"] == torch.uint8
    assert dtypes["out.weight"] == torch.uint8 and dtypes["out.bias"] == torch.float32
    every = AdamW8bit(stable_embedding_groups(model, nn.Embedding), lr=0.1)
    assert every.param_groups[1]["param_names"] == ["embed.weight", "other.weight"]
    assert every.param_groups[1]["rule"].min_size == 2**62


# ------------------------------------------------------------------------------------------------------------- memory

LAYOUTS = {
    "contiguous": lambda x: x,
    "transposed": lambda x: x.T.contiguous().T,
    "sliced": lambda x: torch.stack([x, x], -1)[..., 0],
}


def state_bytes(state):
    return sum(t.numel() * t.element_size() for t in state.values())


@pytest.mark.parametrize("backend", ["auto", "torch"])
@pytest.mark.parametrize(("rule", "dtype", "layout"), [
    (AdamW8bitRule(), torch.float32, "contiguous"),
    (AdamW8bitRule(), torch.float32, "transposed"),
    (AdamW8bitRule(), torch.bfloat16, "sliced"),
    (AdamW8bitRule().with_settings(stochastic_rounding=True), torch.bfloat16, "contiguous"),
    (AdamW8bitRule(stochastic=True, code="linear"), torch.float32, "contiguous"),
    (Lion8bitRule(), torch.float32, "transposed"),
    (Quantized(inner=AdaBeliefRule()), torch.bfloat16, "contiguous"),
    (AdamW8bitRule().with_settings(amsgrad=True), torch.float32, "sliced"),
], ids=str)  # fmt: skip
def test_no_more_is_held_than_the_state_and_a_piece(monkeypatch, backend, rule, dtype, layout):
    """The first step with its initialisation, and a later one, of one tensor of many pieces; decoded it would be 4 to
    12 bytes a parameter.
    """
    monkeypatch.setenv("OPTIM_BACKEND", backend)
    monkeypatch.setattr(quantized, "CHUNK", 1 << 12)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # pieces of other threads are not counted
    try:
        p = Parameter(LAYOUTS[layout](randn((400, 500), 1, dtype)))
        optimizer = Optimizer([p], rule, lr=0.01, weight_decay=0.1)
        peaks = []
        for t in range(2):
            p.grad = LAYOUTS[layout](randn((400, 500), 2 + t, dtype))
            with Memory() as memory:
                optimizer.step()
            peaks.append(memory.peak)
    finally:
        torch.set_num_threads(threads)
    piece = 4 * (1 << 12)
    held = state_bytes(optimizer.state[p])
    assert held < 4 * p.numel(), "8 bits"
    assert peaks[0] - held < 20 * piece and peaks[1] < 20 * piece, (peaks[0] - held, peaks[1], piece)


@pytest.mark.parametrize("name", ["adamw_8bit", "lion_8bit", "muon_8bit"])
def test_a_new_state_is_made_without_the_numbers_that_it_stands_for(name):
    p = Parameter(randn((400, 500), 1, torch.float32))
    rule = RULES[name]()
    with Memory() as memory:
        state = rule.init(p)
    assert memory.peak == state_bytes(state)
    assert {t.device.type for t in state.values()} == {"cpu"} and not any(t.any() for t in state.values())


def test_matrices_are_decoded_one_at_a_time(monkeypatch):
    """8-bit Muon holds what Muon holds, its momentum included, of one matrix: the other states stay codes."""
    monkeypatch.setenv("OPTIM_BACKEND", "torch")
    peaks = {}
    for name, rule in (
        ("8 bits", Muon8bitRule().with_settings(ns_dtype="float32")),
        ("32 bits", MuonRule(nesterov=False, ns_dtype="float32")),
    ):
        params = [Parameter(randn((300, 400 + i), i, torch.float32)) for i in range(3)]
        optimizer = Optimizer(params, rule, lr=0.01)
        for i, p in enumerate(params):
            p.grad = randn(tuple(p.shape), 7 + i, torch.float32)
        with Memory() as memory:
            optimizer.step()
        peaks[name] = memory.peak - sum(state_bytes(optimizer.state[p]) for p in params)
    assert peaks["8 bits"] < peaks["32 bits"] + 4 * 300 * 402 + 20 * 4 * quantized.CHUNK, peaks


@pytest.mark.parametrize("backend", ["auto", "torch"])
@pytest.mark.parametrize("layout", sorted(LAYOUTS))
@pytest.mark.parametrize(
    "rule",
    [
        AdamW8bitRule(),
        AdamW8bitRule().with_settings(stochastic_rounding=True),
        AdamW8bitRule(stochastic=True),
        Muon8bitRule(),
    ],
    ids=str,
)
def test_layouts_and_pieces_change_nothing(monkeypatch, backend, layout, rule):
    """A tensor in another order of memory, in pieces that cut its rows, steps as the contiguous one in one piece."""
    monkeypatch.setenv("OPTIM_BACKEND", backend)
    outcomes = []
    for chunk, how in ((1 << 20, "contiguous"), (1 << 11, layout)):
        monkeypatch.setattr(quantized, "CHUNK", chunk)
        p = Parameter(LAYOUTS[how](randn((96, 130), 1, torch.bfloat16)))
        optimizer = Optimizer([p], rule, lr=0.01, weight_decay=0.1)
        for t in range(3):
            p.grad = LAYOUTS[how](randn((96, 130), 2 + t, torch.bfloat16))
            optimizer.step()
        outcomes.append([p.detach().contiguous(), *states(optimizer)])
    assert_same(*outcomes)
