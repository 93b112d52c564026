"""Every kind of layer, in one pass: the gradients of each row equal one-row autograd in float64, without a warning."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from datatools import per_sample_grads


def squares(module, batch):
    return module(batch["x"]).square().flatten(1).mean(1)


def made(module, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    for p in module.parameters():
        p.data = torch.randn(p.shape, generator=generator).to(dtype) * 0.7
    for buffer in module.buffers():
        if buffer.is_floating_point():
            buffer.data = torch.rand(buffer.shape, generator=generator).to(dtype) + 0.5
    return module.eval()


def agree(module, x, loss=squares, rtol=1e-9):
    """All parameters against autograd of one row at a time, written here; each must have a gradient."""
    names = [name for name, _ in module.named_parameters()]
    got = per_sample_grads(loss, module, {"x": x}, names)
    for i in range(len(x)):
        params = dict(module.named_parameters())
        value = loss(module, {"x": x[i : i + 1]}).sum()
        want = torch.autograd.grad(value, list(params.values()), allow_unused=True)
        want = [torch.zeros_like(params[n]) if g is None else g.to_dense() for n, g in zip(params, want, strict=True)]
        scale = max(float(grad.abs().max()) for grad in want)
        for name, grad in zip(params, want, strict=True):
            torch.testing.assert_close(
                got[name][i], grad, rtol=rtol, atol=rtol * scale, msg=lambda m, n=name, i=i: f"{n}, row {i}: {m}"
            )
    return got


@st.composite
def convolutions(draw):
    dims, transposed = draw(st.integers(1, 3)), draw(st.booleans())
    groups = draw(st.integers(1, 3))
    inner, outer = groups * draw(st.integers(1, 2)), groups * draw(st.integers(1, 2))

    def each(low, high):
        return tuple(draw(st.integers(low, high)) for _ in range(dims))

    kernel, stride, dilation = each(1, 3), each(1, 3), each(1, 2)
    more = {"stride": stride, "dilation": dilation, "groups": groups, "bias": draw(st.booleans())}
    if transposed:
        more["padding"] = tuple(draw(st.integers(0, d * (k - 1))) for d, k in zip(dilation, kernel, strict=True))
        more["output_padding"] = tuple(
            draw(st.integers(0, max(s, d) - 1)) for s, d in zip(stride, dilation, strict=True)
        )
    else:
        more["padding_mode"] = draw(st.sampled_from(["zeros", "circular", "reflect", "replicate"]))
        more["padding"] = draw(st.sampled_from(["same", "valid", None]))
        if more["padding"] == "same":
            more["stride"] = 1
        elif more["padding"] is None:
            more["padding"] = each(0, 2)
    kind = getattr(nn, f"Conv{'Transpose' if transposed else ''}{dims}d")
    places = tuple(draw(st.integers(5, 7)) for _ in range(dims))
    rows = draw(st.integers(1, 4))
    return made(kind(inner, outer, kernel, **more)), torch.randn(rows, inner, *places, dtype=torch.float64)


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@settings(max_examples=60)
@given(convolutions())
def test_convolutions_of_every_shape(case):
    agree(*case)


class Frames(nn.Module):
    """Rows hold several frames, which a convolution sees one by one."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 3, 3, padding=1)

    def forward(self, x):
        return torch.tanh(self.conv(x.flatten(0, 1))).unflatten(0, x.shape[:2])


NORMS = {
    "layer": lambda: nn.LayerNorm((4, 5)),
    "rms": lambda: nn.RMSNorm(5),
    "group": lambda: nn.GroupNorm(2, 6),
    "instance": lambda: nn.InstanceNorm2d(6, affine=True),
    "tracked": lambda: nn.InstanceNorm2d(6, affine=True, track_running_stats=True),
    "batch": lambda: nn.BatchNorm2d(6),
    "prelu": lambda: nn.PReLU(6),
    "bilinear": lambda: Pairs(),
    "frames": lambda: nn.Sequential(nn.Unflatten(1, (3, 2)), Frames()),
    "linear after": lambda: nn.Sequential(nn.Conv2d(6, 3, 1), nn.GroupNorm(3, 3), nn.Flatten(), nn.Linear(60, 2)),
    "weight norm": lambda: nn.utils.parametrizations.weight_norm(nn.Conv2d(6, 2, 3)),
    "spectral norm": lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(5, 3)),
    "attention": lambda: nn.Sequential(nn.Flatten(2), nn.TransformerEncoderLayer(20, 2, 8, batch_first=True)),
    "time first": lambda: TimeFirst(),
    "lstm": lambda: Recurrent(nn.LSTM),
    "gru": lambda: Recurrent(nn.GRU),
    "functional": lambda: Functional(),
}


class Pairs(nn.Bilinear):
    def __init__(self):
        super().__init__(5, 5, 3)

    def forward(self, x):
        return super().forward(x, x.flip(-1))


class TimeFirst(nn.Module):
    def __init__(self):
        super().__init__()
        self.mixes = nn.MultiheadAttention(20, 2, add_bias_kv=True)

    def forward(self, x):
        h = x.flatten(2).transpose(0, 1)
        y, weights = self.mixes(h, h, h)
        return torch.cat([y.transpose(0, 1), weights], -1)


class Recurrent(nn.Module):
    """A recurrent layer, of which the outputs and the last state are used."""

    def __init__(self, kind):
        super().__init__()
        self.inner = kind(20, 3, num_layers=2, batch_first=True)

    def forward(self, x):
        y, last = self.inner(x.flatten(2))
        last = last[0] if isinstance(last, tuple) else last
        return torch.cat([y.flatten(1), last.transpose(0, 1).flatten(1)], 1)


class Functional(nn.Module):
    """Leaves in functional calls: a position, a class token, a temperature, a bias of attention, factors of a gate."""

    def __init__(self):
        super().__init__()
        shapes = {"place": (1, 7, 20), "token": (1, 1, 20), "heat": (), "bias": (1, 7, 7), "log": (20,), "shift": (20,),
                  "gate": (20,), "mix": (20, 20), "power": (1,)}  # fmt: skip
        for name, shape in shapes.items():
            setattr(self, name, nn.Parameter(torch.zeros(shape)))

    def forward(self, x):
        h = torch.cat([self.token.expand(len(x), -1, -1), x.flatten(2)], 1) + self.place
        h = functional.scaled_dot_product_attention(h, h, h, attn_mask=self.bias)
        h = torch.einsum("bsi,io->bso", h, self.mix) * (1 + self.log.exp()) - self.shift
        h = torch.where(h > 0, h, self.gate * h) / functional.softplus(self.heat)
        return h.abs().add(1).pow(self.power)


@pytest.mark.parametrize("kind", NORMS)
def test_layers_that_are_no_products(kind):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        got = agree(made(NORMS[kind]().double()), torch.randn(3, 6, 4, 5, dtype=torch.float64), rtol=1e-8)
    assert all(float(grad.abs().sum()) > 0 for grad in got.values())


@settings(max_examples=20)
@given(st.integers(1, 4), st.integers(1, 6), st.none() | st.integers(-9, 8), st.booleans(), st.booleans())
def test_embeddings_also_tied_with_the_head(size, width, padding, tied, sparse):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(9, 4, padding_idx=padding, sparse=sparse)
            self.place = nn.Embedding(8, 4)
            self.head = nn.Linear(4, 9, bias=False)
            if tied:
                self.head.weight = self.embed.weight

        def forward(self, ids):
            h = self.embed(ids) + self.place(torch.arange(ids.shape[1])) + self.place.weight[ids % 8]
            return self.head(torch.tanh(h))

    module = made(Model())
    ids = torch.randint(9, (size, width), generator=torch.Generator().manual_seed(size))
    agree(module, ids)


@pytest.mark.parametrize("dtype, rtol", [(torch.float32, 1e-4), (torch.bfloat16, 0.1)])
def test_lower_precision(dtype, rtol):
    module = made(
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 2)), dtype
    )
    agree(module, torch.randn(3, 3, 4, 4, generator=torch.Generator().manual_seed(0)).to(dtype), rtol=rtol)


@pytest.mark.parametrize("method", ["hooks", "loop", "vmap"])
def test_layers_whose_rows_interact_are_refused_by_name(method):
    batch = {"x": torch.randn(3, 2, 4)}
    for layer, say in (
        (nn.BatchNorm1d(2).train(), r"BatchNorm1d '0' is in training mode.*module.eval\(\)"),
        (nn.BatchNorm1d(2, track_running_stats=False).eval(), "BatchNorm1d '0' has no running statistics.*GroupNorm"),
    ):
        with pytest.raises(ValueError, match=say):
            per_sample_grads(squares, nn.Sequential(layer), batch, ["0.weight"], method=method)


def test_a_function_that_normalizes_by_the_batch_is_refused():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(2))

        def forward(self, x):
            return functional.batch_norm(x, None, None, self.scale, training=True)

    with pytest.raises(ValueError, match="`batch_norm` normalizes by the statistics of its batch"):
        per_sample_grads(squares, Model().eval(), {"x": torch.randn(3, 2, 4)}, ["scale"])
