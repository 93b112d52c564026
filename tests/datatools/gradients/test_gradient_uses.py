"""Weights used in every way that decoders use them: `hooks` gives the numbers of one pass per row, or says who does."""

import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional

from datatools import covered, per_sample_grads
from datatools.gradients import rows

D, H, E = 4, 6, 3


def squares(module, batch):
    return module(batch["x"]).square().flatten(1).mean(1)


class Base(nn.Module):
    """`first` and `last` are ordinary; what is between is the case."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(D, D), nn.Linear(D, D)

    def forward(self, x):
        return self.last(torch.tanh(self.between(torch.tanh(self.first(x)))))


class Flattened(Base):
    """OPT: rows and tokens in one dimension."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(D, D)

    def between(self, h):
        return self.inner(h.reshape(-1, D)).view(h.shape)


class TimeFirst(Flattened):
    def between(self, h):
        return self.inner(h.transpose(0, 1)).transpose(0, 1)


class HeadsInBatch(Flattened):
    def between(self, h):
        b, s, _ = h.shape
        heads = h.view(b, s, 2, D // 2).transpose(1, 2).reshape(b * 2, s, D // 2)
        return (
            self.inner(torch.cat([heads, heads], -1))[..., : D // 2]
            .view(b, 2, s, D // 2)
            .transpose(1, 2)
            .reshape(b, s, D)
        )


class Shuffled(Flattened):
    """Tokens in an order that follows from their values, as a router's do."""

    def between(self, h):
        flat = h.reshape(-1, D)
        order = flat[:, 0].argsort()
        return torch.empty_like(flat).index_copy(0, order, self.inner(flat[order])).view(h.shape)


class InPlace(Flattened):
    """Gemma 3n: the output of a layer is changed in place, here also under a view."""

    def between(self, h):
        y = self.inner(h)
        y *= 0.5
        y[..., 0] += 1
        return y


class WeightAlone(Flattened):
    """Mamba: the weight is used, the layer is never called."""

    def between(self, h):
        return (self.inner.weight @ h.transpose(1, 2)).transpose(1, 2) + self.inner.bias


class OwnLinear(nn.Linear):
    """Falcon: a subclass that multiplies by itself."""

    def forward(self, x):
        y = x @ self.weight.T
        return y if self.bias is None else y + self.bias


class Subclass(Base):
    def __init__(self):
        super().__init__()
        self.inner = OwnLinear(D, D)

    def between(self, h):
        return self.inner(h)


class Conv1D(nn.Module):
    """As transformers has it: [in, out]."""

    def __init__(self, nf, nx):
        super().__init__()
        self.nf, self.nx = nf, nx
        self.weight, self.bias = nn.Parameter(torch.randn(nx, nf)), nn.Parameter(torch.zeros(nf))

    def forward(self, x):
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(*x.shape[:-1], self.nf)


class GPT2(Base):
    def __init__(self):
        super().__init__()
        self.up, self.down = Conv1D(H, D), Conv1D(D, H)

    def between(self, h):
        return self.down(torch.relu(self.up(h)))


class Experts(Base):
    """Stacked experts, one picked per token, each in a loop."""

    transposed = False

    def __init__(self):
        super().__init__()
        self.router = nn.Linear(D, E, bias=False)
        shape = (E, D, D + 1)[:1] + ((D, H) if self.transposed else (H, D))
        self.up = nn.Parameter(torch.randn(shape))
        self.down = nn.Parameter(torch.randn(E, *((H, D) if self.transposed else (D, H))))
        self.up_bias = nn.Parameter(torch.randn(E, H))

    def route(self, h):
        flat = h.reshape(-1, D)
        weights = self.router(flat).softmax(-1)
        return flat, *weights.max(-1)

    def between(self, h):
        flat, weight, chosen = self.route(h)
        out = torch.zeros_like(flat)
        for e in chosen.unique():
            (at,) = torch.where(chosen == e)
            x = functional.linear(flat[at], self.up[e]) + self.up_bias[e]
            out.index_add_(0, at, functional.linear(torch.tanh(x), self.down[e]) * weight[at, None])
        return out.view(h.shape)


class ExpertsInOut(Experts):
    transposed = True

    def between(self, h):
        flat, weight, chosen = self.route(h)
        out = torch.zeros_like(flat)
        for e in range(E):
            at = (chosen == e).nonzero()[:, 0]
            x = flat[at] @ self.up[e] + self.up_bias[e]
            out[at] = (torch.tanh(x) @ self.down[e]) * weight[at, None]
        return out.view(h.shape)


class ExpertsBatched(Experts):
    """Every token with its own copy of a matrix (`batched_mm` of transformers)."""

    def between(self, h):
        flat, weight, chosen = self.route(h)
        x = torch.bmm(self.up[chosen], flat.unsqueeze(-1)).squeeze(-1)
        x.add_(self.up_bias[chosen])
        return (torch.bmm(self.down[chosen], torch.tanh(x).unsqueeze(-1)).squeeze(-1) * weight[:, None]).view(h.shape)


class ExpertsDense(ExpertsInOut):
    """Llama 4: every expert sees every token."""

    def between(self, h):
        flat, weight, chosen = self.route(h)
        every = flat.repeat(E, 1).view(E, -1, D)
        every = every * (functional.one_hot(chosen, E) * weight[:, None]).T[:, :, None]
        return torch.bmm(torch.tanh(torch.bmm(every, self.up)), self.down).sum(0).view(h.shape)


class ExpertsGrouped(Experts):
    """Sorted by expert, one grouped product (what transformers takes on a GPU); sizes are multiples of 16 bytes."""

    transposed = False

    def between(self, h):
        flat, weight, chosen = self.route(h)
        order = chosen.argsort(stable=True)
        ends = torch.bincount(chosen, minlength=E).cumsum(0).to(torch.int32)
        x = functional.grouped_mm(flat[order], self.up.transpose(-2, -1), offs=ends)
        x.add_(self.up_bias[chosen[order]])
        y = functional.grouped_mm(torch.tanh(x), self.down.transpose(-2, -1), offs=ends)
        return (torch.empty_like(flat).index_copy(0, order, y) * weight[:, None]).view(h.shape)


class Heads(Base):
    """Zamba: one small matrix per head, stretched over the batch; DeepSeek-V4: groups of one matrix."""

    def __init__(self):
        super().__init__()
        self.inner, self.split = nn.Parameter(torch.randn(2, D // 2, D // 2)), nn.Linear(D // 2, D)

    def between(self, h):
        heads = h.view(*h.shape[:2], 2, D // 2).permute(2, 0, 3, 1)  # [heads, rows, features, tokens]
        mixed = (self.inner[:, None] @ heads).permute(1, 3, 0, 2)  # [rows, tokens, heads, features]
        grouped = self.split.weight.view(2, D // 2, D // 2).transpose(1, 2)
        y = torch.bmm(mixed.reshape(-1, 2, D // 2).transpose(0, 1), grouped).transpose(0, 1).reshape(h.shape)
        return y + self.split.bias


class ChannelBias(Flattened):
    """A bias along another dimension than the last, and one for each position."""

    def __init__(self):
        super().__init__()
        self.places = nn.Parameter(torch.randn(7, D))

    def between(self, h):
        y = (self.inner(h).transpose(1, 2) + self.inner.bias[:, None]).transpose(1, 2)
        return y + self.places[: h.shape[1]]


class Sliced(Flattened):
    """Parts of one matrix, used one by one."""

    def between(self, h):
        upper, lower = self.inner.weight.chunk(2)
        return torch.cat([functional.linear(h, lower), h @ upper.T], -1)


class Tied(Base):
    """One matrix in two layers."""

    def __init__(self):
        super().__init__()
        self.inner, self.again = nn.Linear(D, D), nn.Linear(D, D)
        self.again.weight = self.inner.weight

    def between(self, h):
        return self.again(torch.tanh(self.inner(h)))


class Hidden(torch.autograd.Function):
    """An operation of its own, which no mode of torch sees."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return x @ weight.T

    @staticmethod
    def backward(ctx, g):
        x, weight = ctx.saved_tensors
        return g @ weight, (g.flatten(0, -2).T @ x.flatten(0, -2)) if ctx.needs_input_grad[1] else None


class Unseen(Flattened):
    def between(self, h):
        return Hidden.apply(h, self.inner.weight)


class Squared(Flattened):
    def between(self, h):
        return functional.linear(h, self.inner.weight**2)


class RowFree(Flattened):
    """A table that all rows share: its tokens belong to no row."""

    def between(self, h):
        table = torch.linspace(-1, 1, h.shape[1] * D, dtype=h.dtype).view(-1, D)
        return h + torch.tanh(self.inner(table))


class Ordered(Flattened):
    """A sum that runs over the rows: no part of the batch gives a part of the result."""

    def between(self, h):
        return torch.einsum("bsi,oi->sbo", h, self.inner.weight).transpose(0, 1).cumsum(1)


class AcrossRows(Flattened):
    """An operation that sees rows only in pairs, although the loss of a row depends on that row alone."""

    def between(self, h):
        pairs = torch.einsum("bsi,csi,oi->bcso", h, h, self.inner.weight)
        return pairs.diagonal(dim1=0, dim2=1).movedim(-1, 0)


FAST = [Flattened, TimeFirst, HeadsInBatch, Shuffled, InPlace, WeightAlone, Subclass, GPT2, Experts, ExpertsInOut,
        ExpertsBatched, ExpertsDense, Heads, ChannelBias, Sliced, Tied, Squared, RowFree, Ordered]  # fmt: skip
SLOW = [Unseen, AcrossRows]


def made(kind, seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        module = kind().double().eval()
        for p in module.parameters():
            torch.nn.init.normal_(p, std=0.7)
    return module


def inputs(size, width, seed=0):
    return {"x": torch.randn(size, width, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)}


def agree(module, batch, names, **more):
    want = per_sample_grads(squares, module, batch, names, method="loop")
    got = per_sample_grads(squares, module, batch, names, **more)
    for name in names:
        torch.testing.assert_close(got[name], want[name], rtol=1e-9, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")
    return want


@pytest.mark.parametrize("kind", FAST)
def test_one_pass_gives_every_way_of_using_a_weight(kind):
    """Nothing may be left to `loop` (a warning is an error here); batches of every shape, one after the other."""
    module = made(kind)
    names = covered(module, [n for n, _ in module.named_parameters()])
    matrices = {n for n, p in module.named_parameters() if p.ndim > 1 and "bias" not in n and n != "places"}
    assert matrices - {"up", "down"} <= set(names)
    names += [n for n, _ in module.named_parameters() if n not in names]
    for seed, (size, width) in enumerate([(3, 5), (4, 4), (2, 1), (1, 6), (5, 2), (3, 3), (40, 2)]):
        want = agree(module, inputs(size, width, seed), names)
    assert all(float(grad.abs().sum()) > 0 for name, grad in want.items() if name in matrices)


@pytest.mark.parametrize("kind", SLOW)
def test_what_one_pass_cannot_see_is_left_to_the_loop_and_said(kind):
    module = made(kind)
    names = ["inner.weight", "first.weight", "last.bias"]
    with pytest.warns(UserWarning, match=r"inner.weight.*method 'loop'"):
        want = agree(module, inputs(3, 5), names)
    assert float(want["inner.weight"].abs().sum()) > 0
    agree(module, inputs(4, 4, 1), names)  # not said again


def test_grouped_products_in_float32():
    """torch's grouped product has no float64."""

    class Wide(ExpertsGrouped):
        def __init__(self):
            super().__init__()
            self.up = nn.Parameter(torch.randn(E, 8, D))
            self.down = nn.Parameter(torch.randn(E, D, 8))
            self.up_bias = nn.Parameter(torch.randn(E, 8))

    module = made(Wide).float()
    names = [n for n, _ in module.named_parameters()]
    for seed, (size, width) in enumerate([(3, 5), (4, 4), (1, 6)]):
        batch = {"x": inputs(size, width, seed)["x"].float()}
        want = per_sample_grads(squares, module, batch, names, method="loop")
        got = per_sample_grads(squares, module, batch, names)
        for name in names:
            torch.testing.assert_close(got[name], want[name], rtol=1e-4, atol=1e-5)


def test_experts_without_a_token_have_gradient_zero():
    module = made(Experts)
    got = per_sample_grads(squares, module, inputs(2, 1), ["up"])["up"]
    want = per_sample_grads(squares, module, inputs(2, 1), ["up"], method="loop")["up"]
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)
    assert (got.flatten(2).abs().sum(2) == 0).any()


def test_a_router_that_once_kept_the_order_is_not_trusted_to_keep_it():
    """Among token ids, as many vectors as rows may be one a row or what a router picked: measured each time."""

    class Picked(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.inner = nn.Embedding(10, D), nn.Linear(D, D)

        def forward(self, ids):
            flat = self.embed(ids).reshape(-1, D)
            at = (ids.reshape(-1) >= 5).nonzero()[:, 0]
            return flat.index_add(0, at, self.inner(flat[at])).view(*ids.shape, D)

    module = made(Picked)

    def loss(m, batch):
        return m(batch["ids"]).square().flatten(1).sum(1)

    for ids in ([[7, 1], [2, 8]], [[6, 9], [1, 2]], [[1, 0], [5, 9]]):
        batch = {"ids": torch.tensor(ids)}
        want = per_sample_grads(loss, module, batch, ["inner.weight"], method="loop")
        got = per_sample_grads(loss, module, batch, ["inner.weight"])
        torch.testing.assert_close(got["inner.weight"], want["inner.weight"], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("size", [1, 2, 8, 9, 33, 70])
def test_powers_of_two_name_every_row(dtype, size):
    """Gradients may have any magnitude: the weights are exact in binary."""
    owner = torch.randint(0, size, (200,), generator=torch.Generator().manual_seed(size))
    plain = 10.0 ** torch.linspace(-3, 2, 200).to(dtype)
    plain[7] = 0
    weighted = [plain * w[owner].to(dtype) for w in rows.weightings(size, dtype)]
    found = rows.identify(weighted, plain, size, dtype)
    owner[7] = -1
    assert torch.equal(found, owner if size > 1 else owner.clamp_max(0))


def test_a_token_of_two_rows_belongs_to_none():
    plain = torch.ones(4)
    weights = next(rows.weightings(4, torch.float32)).float()
    mixed = weights.clone()
    mixed[2] = weights[2] + weights[0]
    assert rows.identify([weights], plain, 4, torch.float32) is not None
    assert rows.identify([mixed], plain, 4, torch.float32) is None


def test_rows_without_a_finite_gradient_do_not_spoil_the_others():
    module, batch = made(Shuffled), inputs(3, 5)
    batch["x"][1, 2] = torch.nan
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        got = per_sample_grads(squares, module, batch, ["inner.weight"])["inner.weight"]
    want = per_sample_grads(squares, module, {"x": batch["x"][[0, 2]]}, ["inner.weight"], method="loop")["inner.weight"]
    torch.testing.assert_close(got[[0, 2]], want, rtol=1e-9, atol=1e-12)
    assert got[1].isnan().any()
