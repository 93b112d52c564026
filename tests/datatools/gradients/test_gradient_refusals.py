"""Modules of every kind: `hooks` gives the gradient of each row alone in float64, or refuses by name what has none."""

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils import checkpoint

from datatools import per_sample_grads

D = 4


class Made(nn.Module):
    """A module whose forward is given; keywords are its children."""

    def __init__(self, run, **children):
        super().__init__()
        self.run = run
        for name, child in children.items():
            setattr(self, name, child)

    def forward(self, x):
        return self.run(self, x)


class Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return x @ weight.T

    @staticmethod
    def backward(ctx, g):
        x, weight = ctx.saved_tensors
        return g @ weight, g.flatten(0, -2).T @ x.flatten(0, -2)


class Average(nn.Module):
    """A running mean that the forward pass changes, also in eval mode."""

    def __init__(self):
        super().__init__()
        self.a = nn.Linear(D, D)
        self.register_buffer("mean", torch.zeros(D))

    def forward(self, x):
        y = self.a(x)
        with torch.no_grad():
            self.mean.mul_(0.9).add_(y.mean((0, 1)), alpha=0.1)
        return y - self.mean


def linear():
    return nn.Linear(D, D)


def squares(module, batch):
    return module(batch["x"]).square().flatten(1).mean(1)


def some_rows(multiply):
    """The operation sees only rows with a positive sum, as experts see only some rows; the last row is not one."""

    def run(self, x):
        y, chosen = self.b(x), x.sum((1, 2)) > 0
        return y.index_add(0, chosen.nonzero()[:, 0], multiply(self, x[chosen])) if chosen.any() else y

    return run


def penalty(module, batch):
    x = batch["x"].clone().requires_grad_()
    (g,) = torch.autograd.grad(module(x).sum(), x, create_graph=True)
    return g.square().flatten(1).mean(1)


def inner_gradient(module, batch):
    grad = torch.func.grad(lambda row: module(row).sum())
    return torch.func.vmap(grad)(batch["x"]).square().flatten(1).mean(1)


def two(self, x):
    return self.b(torch.tanh(self.a(x)))


def checkpointed(self, x):
    return self.b(checkpoint.checkpoint(lambda y: torch.tanh(self.a(y)), x, use_reentrant=False))


def watched(self, x):
    y = torch.tanh(self.a(x))
    y.register_hook(lambda g: 3 * g)
    return self.b(y)


def packed(self, x):
    rows = nn.utils.rnn.pack_padded_sequence(x, torch.full((len(x),), 4), batch_first=True)
    return nn.utils.rnn.pad_packed_sequence(self.a(rows)[0], batch_first=True)[0]


def many(self, x):
    return torch.vmap(lambda weight: torch.tanh(x @ weight.T))(torch.stack([self.a.weight, self.b.weight])).mean(0)


EQUAL = {
    "an own function that some rows reach": lambda: (
        Made(some_rows(lambda self, x: Product.apply(x, self.w)), b=linear(), w=nn.Parameter(torch.randn(D, D))),
        squares,
    ),
    "a script that some rows reach": lambda: (
        Made(some_rows(lambda self, x: self.a(x)), a=torch.jit.script(linear()), b=linear()),
        squares,
    ),
    "a compiled function that some rows reach": lambda: (
        Made(
            some_rows(lambda self, x: compiled(x, self.w)),
            b=linear(),
            w=nn.Parameter(torch.randn(D, D)),
        ),
        squares,
    ),
    "a compiled module": lambda: (torch.compile(Made(two, a=linear(), b=linear()), backend="eager"), squares),
    "a hook on a tensor": lambda: (Made(watched, a=linear(), b=linear()), squares),
    "checkpointing": lambda: (Made(checkpointed, a=linear(), b=linear()), squares),
    "the gradient of the input": lambda: (Made(two, a=linear(), b=linear()), penalty),
    "the gradient of the input by torch.func": lambda: (Made(two, a=linear(), b=linear()), inner_gradient),
    "vmap over weights": lambda: (Made(many, a=linear(), b=linear()), squares),
    "packed rows": lambda: (Made(packed, a=nn.LSTM(D, 3, batch_first=True, bidirectional=True)), squares),
    "attention": lambda: (
        Made(lambda self, x: self.a(x, x, x)[0], a=nn.MultiheadAttention(D, 2, batch_first=True)),
        squares,
    ),
    "weight norm": lambda: (Made(two, a=nn.utils.parametrizations.weight_norm(linear()), b=linear()), squares),
    "an encoder": lambda: (nn.TransformerEncoderLayer(D, 2, 8, batch_first=True), squares),
}


@torch.compile(backend="eager", dynamic=True)
def compiled(x, weight):
    return torch.tanh(x @ weight.T)


def inputs():
    x = torch.randn(3, 5, D, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    x[0], x[-1] = x[0].abs(), -x[-1].abs()
    return {"x": x}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=pytest.mark.slow) if "compiled" in kind else kind for kind in EQUAL]
)
def test_gradients_are_those_of_each_row_alone(kind):
    with torch.random.fork_rng():
        torch.manual_seed(3)
        module, loss = EQUAL[kind]()
    module, batch = module.double().eval(), inputs()
    names = [name for name, _ in module.named_parameters()]
    got = per_sample_grads(loss, module, batch, names)
    params = [p.requires_grad_() for p in module.parameters()]
    for i in range(3):
        value = loss(module, {"x": batch["x"][i : i + 1]}).sum()
        for name, want in zip(names, torch.autograd.grad(value, params, allow_unused=True), strict=True):
            torch.testing.assert_close(got[name][i], torch.zeros_like(got[name][i]) if want is None else want)


def of_all_tokens(module, batch):
    return module(batch["x"]).square().flatten(1).sum(1) / batch["x"].numel()


def contrastive(module, batch):
    z = module(batch["x"]).mean(1)
    return functional.cross_entropy(z @ z.T, torch.arange(len(z)), reduction="none")


def reentrant(self, x):
    return self.b(checkpoint.checkpoint(torch.tanh, self.a(x), use_reentrant=True))


def reentrant_input(self, x):
    y = x.detach().requires_grad_(True)  # as `enable_input_require_grads` does
    return self.b(checkpoint.checkpoint(lambda z: torch.tanh(self.a(z)), y, use_reentrant=True))


REFUSED = {
    "a mean over the batch": (lambda: Made(two, a=linear(), b=linear()), of_all_tokens, "alone and .* in a batch of 3"),
    "a contrastive loss": (lambda: Made(two, a=linear(), b=linear()), contrastive, "rows depend on each other"),
    "rows centred": (
        lambda: Made(lambda self, x: self.b(torch.tanh(self.a(x) - self.a(x).mean(0))), a=linear(), b=linear()),
        squares,
        "rows depend on each other",
    ),
    "attention along rows": (
        lambda: Made(lambda self, x: self.a(x, x, x)[0], a=nn.MultiheadAttention(D, 2)),
        squares,
        "attention along the dimension of rows",
    ),
    "dropout": (
        lambda: Made(lambda self, x: functional.dropout(self.a(x), training=True), a=linear()),
        squares,
        "random numbers in eval mode",
    ),
    "a changing buffer": (Average, squares, "changes the buffer 'mean'"),
    "reentrant checkpointing": (lambda: Made(reentrant, a=linear(), b=linear()), squares, "use_reentrant=False"),
    "reentrant checkpointing of an input": (
        lambda: Made(reentrant_input, a=linear(), b=linear()),
        squares,
        "use_reentrant=False",
    ),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", REFUSED)
def test_what_has_no_gradient_of_single_rows_is_refused_by_name(kind):
    make, loss, said = REFUSED[kind]
    with torch.random.fork_rng():
        torch.manual_seed(3)
        module = make().double().eval()
        names = [name for name, _ in module.named_parameters()]
        with pytest.raises(ValueError, match=said):
            per_sample_grads(loss, module, inputs(), names)


@pytest.mark.parametrize("kind", ["dropout", "reentrant checkpointing of an input"])
def test_the_loop_refuses_what_would_be_random_or_zero(kind):
    make, loss, said = REFUSED[kind]
    with torch.random.fork_rng():
        torch.manual_seed(3)
        module = make().double().eval()
        with pytest.raises(ValueError, match=said):
            per_sample_grads(loss, module, inputs(), [name for name, _ in module.named_parameters()], method="loop")


def test_what_torch_func_cannot_transform_is_refused_by_name():
    module = Made(lambda self, x: self.a(x)[0], a=nn.GRU(D, 3, batch_first=True)).eval()
    with pytest.raises(ValueError, match="torch.func cannot transform Made .*use method 'hooks' or 'loop'"):
        per_sample_grads(squares, module, {"x": torch.randn(3, 5, D)}, ["a.weight_hh_l0"], method="vmap")


def of_reference(module, batch):
    return (torch.log_softmax(module(batch["x"]), -1) - batch["reference"]).flatten(1).mean(1)


def test_a_loss_that_is_zero_up_to_rounding_is_not_refused():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module, x = nn.Sequential(nn.Linear(64, 256), nn.Tanh(), nn.Linear(256, 50)).eval(), torch.randn(9, 64)
    with torch.no_grad():
        reference = torch.log_softmax(module(x), -1)
        alone = torch.log_softmax(module(x[-1:]), -1)
    reference[-1] += (alone - reference[-1:])[0] + 1e-7  # rounding differs in the batch, whatever the kernels
    batch = {"x": x, "reference": reference}
    assert per_sample_grads(of_reference, module, batch, ["0.weight"])["0.weight"].shape == (9, 256, 64)


def test_a_row_whose_loss_is_zero_shows_nothing_and_the_next_batch_is_compared():
    def weighted(module, batch):
        return module(batch["x"]).square()[:, 0] * batch["w"] / batch["w"].sum()

    module, x = nn.Linear(D, D).eval(), torch.ones(3, D)
    per_sample_grads(weighted, module, {"x": x, "w": torch.tensor([1.0, 1.0, 0.0])}, ["weight"])
    with pytest.raises(ValueError, match="rows depend on each other"):
        per_sample_grads(weighted, module, {"x": x, "w": torch.ones(3)}, ["weight"])


def test_batches_are_compared_once_where_the_loss_shows_that_rows_are_independent():
    passes = []

    def counted(module, batch):
        passes.append(len(batch["x"]))
        return 4 + squares(module, batch)

    module, batch = nn.Linear(D, D).bfloat16().eval(), {"x": torch.ones(3, 5, D, dtype=torch.bfloat16)}
    for _ in range(3):
        per_sample_grads(counted, module, batch, ["weight"])
    assert passes.count(3) == 4  # one comparison, three computations


@pytest.mark.filterwarnings("error")  # a warning says that `loop` is used
def test_the_precision_of_autocast_is_that_of_its_operations():
    def loss(module, batch):
        with torch.autocast("cpu", torch.bfloat16):
            return module(batch["x"]).float().square().mean(1)

    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = nn.Sequential(nn.Linear(64, 256), nn.Tanh(), nn.Linear(256, 256), nn.Tanh(), nn.Linear(256, 50)).eval()
        batch = {"x": torch.randn(7, 64)}
    got = per_sample_grads(loss, module, batch, ["0.weight"])["0.weight"]
    want = per_sample_grads(loss, module, batch, ["0.weight"], method="loop")["0.weight"]
    assert (got - want).norm() < 0.05 * want.norm()
