"""`loop` is the definition; `hooks` and `vmap` must give its numbers, and `hooks` must say what it cannot see."""

from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

import datatools
from datatools import covered, micro_batches, per_sample_grads, token_batches, visit_per_sample_grads


class MLP(nn.Module):
    """Linear layers with and without bias, one used twice, over a sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(5, 7)
        self.twice = nn.Linear(7, 7, bias=False)
        self.norm = nn.LayerNorm(7)
        self.last = nn.Linear(7, 3)
        self.unused = nn.Linear(2, 2)

    def forward(self, x):
        h = torch.tanh(self.first(x))
        return self.last(self.norm(self.twice(torch.tanh(self.twice(h)))))


def mse(module, batch):
    return (module(batch["x"]) - batch["y"]).square().flatten(1).mean(1)


def make(dtype=torch.float64, size=4):
    generator = torch.Generator().manual_seed(0)
    module = MLP().to(dtype).eval()
    for p in module.parameters():
        p.data.copy_(torch.randn(p.shape, generator=generator, dtype=dtype) * 0.5)
    x = torch.randn(size, 6, 5, generator=generator, dtype=dtype)
    return module, {"x": x, "y": torch.randn(size, 6, 3, generator=generator, dtype=dtype)}


LINEAR = ["first.weight", "first.bias", "twice.weight", "last.weight", "last.bias", "unused.weight"]


@pytest.mark.parametrize("method", ["hooks", "vmap"])
def test_methods_give_the_numbers_of_the_loop(method):
    module, batch = make()
    names = [*LINEAR, "norm.weight", "norm.bias"]
    want = per_sample_grads(mse, module, batch, names, method="loop")
    got = per_sample_grads(mse, module, batch, names, method=method)
    assert list(got) == names
    for name in names:
        torch.testing.assert_close(got[name], want[name], rtol=1e-12, atol=1e-14)
    assert got["unused.weight"].abs().sum() == 0
    assert got["twice.weight"].abs().sum() > 0


def test_the_loop_is_the_gradient_of_each_row_alone():
    module, batch = make()
    grads = per_sample_grads(mse, module, batch, LINEAR[:1], method="loop")
    for i in range(4):
        module.zero_grad()
        mse(module, {k: v[i : i + 1] for k, v in batch.items()}).sum().backward()
        torch.testing.assert_close(grads["first.weight"][i], module.first.weight.grad, rtol=0, atol=0)


def test_nothing_of_the_module_changes():
    module, batch = make()
    module.norm.requires_grad_(False)
    before = {name: (p.clone(), p.requires_grad) for name, p in module.named_parameters()}
    for method in ("hooks", "loop", "vmap"):
        per_sample_grads(mse, module, batch, ["first.weight"], method=method)
    for name, p in module.named_parameters():
        assert torch.equal(p, before[name][0]) and p.requires_grad == before[name][1] and p.grad is None
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in module.modules())


def test_each_parameter_is_visited_once_last_layer_first():
    module, batch = make()
    seen = []
    losses = visit_per_sample_grads(
        mse, module, batch, LINEAR[:5], lambda name, grad: seen.append((name, tuple(grad.shape)))
    )
    assert sorted(name for name, _ in seen) == sorted(LINEAR[:5])
    assert seen[0][0].startswith("last") and seen[-1][0].startswith("first")
    torch.testing.assert_close(losses, mse(module, batch).detach())


def test_covered_lists_linear_layers_and_hooks_computes_norms_too():
    module, _ = make()
    everything = [n for n, _ in module.named_parameters()]
    assert covered(module, everything) == [n for n in everything if not n.startswith("norm")]


def test_training_mode_unknown_names_and_odd_losses_are_refused():
    module, batch = make()
    with pytest.raises(ValueError, match="no parameter 'missing'"):
        per_sample_grads(mse, module, batch, ["missing"])
    with pytest.raises(ValueError, match="one value per row"):
        per_sample_grads(lambda m, b: mse(m, b).sum(), module, batch, ["first.weight"])
    module.train()
    with pytest.raises(ValueError, match=r"module.eval\(\)"):
        per_sample_grads(mse, module, batch, ["first.weight"])


@pytest.fixture(scope="module")
def lora():
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        attention_bias=True,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = get_peft_model(
            LlamaForCausalLM(config), LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj", "v_proj", "down_proj"])
        )
        for name, p in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(p, std=0.1)
    return model.eval()


def lm_losses(model, batch):
    logits = model(input_ids=batch["input_ids"], use_cache=False).logits[:, :-1]
    labels = batch["labels"][:, 1:]
    losses = functional.cross_entropy(logits.mT, labels, reduction="none", ignore_index=-100)
    return losses.sum(1) / (labels != -100).sum(1)


@pytest.mark.parametrize("dtype, rtol", [(torch.float64, 1e-9), (torch.float32, 1e-3)])
def test_hooks_on_lora_are_exact_for_padded_batches(lora, dtype, rtol):
    """Padding stands on the right of a causal model, so a row's gradient must be that of the row without padding."""
    model = lora.to(dtype)
    generator = torch.Generator().manual_seed(1)
    names = [n for n, _ in model.named_parameters() if "lora_" in n]
    rows = [torch.randint(0, 50, (length,), generator=generator) for length in (9, 5, 12, 2)]
    padded = {"input_ids": torch.zeros(4, 12, dtype=torch.long), "labels": torch.full((4, 12), -100)}
    for i, row in enumerate(rows):
        padded["input_ids"][i, : len(row)] = row
        padded["labels"][i, 1 : len(row)] = row[1:]
    got = per_sample_grads(lm_losses, model, padded, names)
    scale = max(float(g.abs().max()) for g in got.values())
    for i, row in enumerate(rows):
        alone = {"input_ids": row[None], "labels": row[None]}
        want = per_sample_grads(lm_losses, model, alone, names, method="loop")
        for name in names:
            torch.testing.assert_close(got[name][i], want[name][0], rtol=rtol, atol=scale * rtol)
    model.to(torch.float32)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.proj = nn.Linear(4, 4)

    def forward(self, x):
        return self.proj(x)


@pytest.mark.parametrize(
    "kind", ["dora", "rslora", "adalora", "lora_bias", "ia3", "ia3_feedforward", "vera", "loha", "oft", "two_adapters"]
)
def test_adapters_other_than_plain_lora_are_not_taken_for_it(kind):
    import peft

    common = {"target_modules": ["proj"]}
    config = {
        "dora": lambda: peft.LoraConfig(r=2, use_dora=True, **common),
        "rslora": lambda: peft.LoraConfig(r=2, use_rslora=True, lora_bias=True, **common),
        "adalora": lambda: peft.AdaLoraConfig(init_r=2, target_r=1, total_step=10, **common),
        "lora_bias": lambda: peft.LoraConfig(r=2, lora_bias=True, **common),
        "ia3": lambda: peft.IA3Config(feedforward_modules=[], **common),
        "ia3_feedforward": lambda: peft.IA3Config(feedforward_modules=["proj"], **common),
        "vera": lambda: peft.VeraConfig(r=2, **common),
        "loha": lambda: peft.LoHaConfig(r=2, **common),
        "oft": lambda: peft.OFTConfig(oft_block_size=2, r=0, **common),
        "two_adapters": lambda: peft.LoraConfig(r=2, **common),
    }[kind]()
    model = peft.get_peft_model(Net(), config)
    if kind == "two_adapters":
        model.add_adapter("second", config)
        model.base_model.set_adapter(["default", "second"])
    model = model.double().eval()
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    for p in model.parameters():
        p.data.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0), dtype=p.dtype))
    assert covered(model, names) == [] or kind == "oft"
    batch = {"x": torch.randn(3, 5, 4, dtype=torch.float64)}
    want = per_sample_grads(lambda m, b: m(b["x"]).square().flatten(1).mean(1), model, batch, names, method="loop")
    unseen = {
        "loha": "whose backward pass is its own",
        "oft": "__setitem__",
    }  # an operation of its own; a write into a matrix
    with pytest.warns(UserWarning, match=unseen[kind]) if kind in unseen else nullcontext():
        got = per_sample_grads(lambda m, b: m(b["x"]).square().flatten(1).mean(1), model, batch, names)
    for name in names:
        torch.testing.assert_close(got[name], want[name], rtol=1e-9, atol=1e-12)


@given(st.lists(st.integers(1, 300), min_size=1, max_size=60), st.integers(1, 1000))
def test_token_batches_hold_every_row_once_within_the_budget(lengths, budget):
    batches = token_batches(lengths, budget)
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    for batch in batches:
        area = max(lengths[i] for i in batch) * len(batch)
        assert len(batch) == 1 or (area <= budget and area - sum(lengths[i] for i in batch) <= 0.125 * area)
    longest = [lengths[batch[0]] for batch in batches]
    assert longest == sorted(longest, reverse=True)


def test_batches_are_made_when_they_are_asked_for():
    made = []
    batches = micro_batches([2, 3, 1], 3, lambda group: made.append(group) or [i + 10 for i in group])
    assert len(batches) == 3 and not made
    assert batches[-1] == ([2], [12]) and made == [[2]]
    assert list(batches[1::2]) == [([0], [10])] and [group for group, _ in batches] == batches.groups
    with pytest.raises(IndexError):
        batches[3]


def test_rows_are_grouped_in_one_place_only():
    """Whoever needs padded batches of bounded size asks `micro_batches`; nobody else groups rows by length."""
    root = Path(datatools.__file__).parents[1]
    sources = [path for package in ("datatools", "pipelines") for path in (root / package).rglob("*.py")]
    callers = {path.name for path in sources if "token_batches(" in path.read_text().replace("def token_batches(", "")}
    assert callers == {"batching.py"}


class Twice(nn.Module):
    """Two calls of one layer, of which the loss uses one."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, x):
        used, _ = self.layer(x), self.layer(2 * x)
        return used


def test_a_call_that_the_loss_does_not_use_adds_nothing():
    module, x = Twice().double().eval(), torch.randn(2, 4, 3, dtype=torch.float64)

    def loss(m, batch):
        return m(batch["x"]).square().flatten(1).sum(1)

    want = per_sample_grads(loss, module, {"x": x}, ["layer.weight"], method="loop")["layer.weight"]
    assert want.abs().sum() > 0
    torch.testing.assert_close(per_sample_grads(loss, module, {"x": x}, ["layer.weight"])["layer.weight"], want)


def test_float32_adapters_over_a_bfloat16_model(lora):
    """What peft makes on a GPU: hooks must give the loop's gradient, to bfloat16's rounding."""
    model = lora.to(torch.bfloat16)
    names = [n for n, _ in model.named_parameters() if "lora_" in n]
    for name, p in model.named_parameters():
        if "lora_" in name:
            p.data = p.data.float()
    row = torch.arange(1, 11)[None]
    batch = {"input_ids": row, "labels": row}
    want = per_sample_grads(lm_losses, model, batch, names, method="loop")
    got = per_sample_grads(lm_losses, model, batch, names)
    for name in names:
        assert got[name].dtype == torch.float32
    flat = [torch.cat([g[name].flatten() for name in names]) for g in (got, want)]
    assert functional.cosine_similarity(flat[0], flat[1], dim=0) > 0.99
    model.to(torch.float32)
